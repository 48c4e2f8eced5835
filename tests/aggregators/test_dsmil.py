"""DSMIL against its formulas in NumPy, and against torchmil's with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import (
    assert_close,
    binary_loss,
    check_gradients,
    instances_of,
    linear,
    random_bags,
    rows_of,
    softmax,
    weights_of,
)

from dragn_cache.aggregators import Aggregator, create_aggregator
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags

WIDTH, ATTENTION, LABELS = 19, 7, 3
SIZES = [5, 1, 13, 2, 11]
TARGETS = torch.tensor([[1.0, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 1]])


def make(**options: Any) -> Aggregator:
    torch.manual_seed(3)
    options = {"labels": LABELS, "attn_dim": ATTENTION} | options
    return create_aggregator("dsmil", in_shape=(WIDTH,), **options).eval()


def supervise(targets: torch.Tensor = TARGETS) -> Supervision:
    return Supervision(targets, torch.nn.functional.binary_cross_entropy_with_logits)


@pytest.mark.parametrize("query", ["linear", "mlp"])
@pytest.mark.parametrize("value", ["identity", "linear", "relu"])
def test_it_is_what_the_paper_says(query: str, value: str) -> None:
    dsmil, bags = make(query=query, value=value), random_bags(SIZES, WIDTH)
    w = weights_of(dsmil)
    result = dsmil(bags, supervise())
    assert dsmil.out_dim == LABELS * WIDTH
    largest = []
    for k, h in enumerate(instances_of(bags)):
        c, q, v = linear(w, "instances", h), linear(w, "query.0", h), h
        if query == "mlp":
            q = np.tanh(linear(w, "query.2", np.maximum(q, 0)))
        if value != "identity":
            v = linear(w, "value.0", h)
        if value == "relu":
            v = np.maximum(v, 0)
        critical = q[c.argmax(0)]  # (L, attn_dim)
        u = softmax(q @ critical.T / np.sqrt(ATTENTION), 0)
        assert_close(result.attention[rows_of(bags, k)], u)
        assert_close(result.embedding[k], (u.T @ v).ravel())
        largest.append(c.max(0))
    expected = 0.5 * binary_loss(np.array(largest), TARGETS.numpy())
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    assert dsmil.bag_weight == 0.5


def test_its_head_is_the_published_convolution() -> None:
    dsmil, bags = make(), random_bags(SIZES, WIDTH)
    head = dsmil.head(LABELS)
    assert isinstance(head, torch.nn.Linear)
    published = torch.nn.Conv1d(LABELS, LABELS, kernel_size=WIDTH)
    with torch.no_grad():
        published.weight.copy_(head.weight.view(LABELS, LABELS, WIDTH))
        published.bias.copy_(head.bias)  # type: ignore[union-attr]
    embedding = dsmil(bags).embedding
    expected = published(embedding.view(-1, LABELS, WIDTH)).squeeze(2)
    torch.testing.assert_close(head(embedding), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("query", "value"), [("linear", "identity"), ("mlp", "relu")])
def test_with_one_label_it_equals_torchmils(query: str, value: str) -> None:
    # Theirs has no other number of labels, no linear value without a ReLU, and adds its two losses
    # without the halves; the streams themselves are the same.
    models = pytest.importorskip("torchmil.models", reason="torchmil is not installed")
    ours, bags = make(labels=1, query=query, value=value), random_bags(SIZES, WIDTH)
    head = ours.head(1)
    theirs = models.DSMIL(
        in_shape=(WIDTH,),
        att_dim=ATTENTION,
        nonlinear_q=query == "mlp",
        nonlinear_v=value == "relu",
    )
    copied = {}
    for key, tensor in ours.state_dict().items():
        layer, _, rest = key.partition(".")
        name = {"instances": "inst_classifier", "query": "q_nn", "value": "v_nn"}[layer]
        if layer == "value":
            rest = rest.replace("0.", "1.")  # a dropout comes first
        if layer == "query" and query == "linear":
            rest = rest.replace("0.", "")
        copied[f"{name}.{rest}"] = tensor
    copied |= {f"bag_classifier.{key}": tensor for key, tensor in head.state_dict().items()}
    theirs.load_state_dict(copied)
    targets = TARGETS[:, :1]
    result = ours(bags, supervise(targets))
    for k, rows in enumerate(map(bags.bag, range(len(bags)))):
        logit, u = theirs(rows[None], return_att=True)
        torch.testing.assert_close(head(result.embedding[k]), logit, rtol=1e-5, atol=1e-6)
        attention = result.attention[rows_of(bags, k)]
        torch.testing.assert_close(attention, u[0], rtol=1e-5, atol=1e-7)
        alone = ours(bags.select([k]), supervise(targets[[k]]))
        _, losses = theirs.compute_loss(targets[k], rows[None])
        torch.testing.assert_close(2 * alone.loss, losses["BCEWithLogitsLoss_max"])


def test_of_instances_that_tie_the_first_is_critical() -> None:
    dsmil = make()
    bags = random_bags([7], WIDTH)
    with torch.no_grad():
        dsmil.instances.weight.zero_()  # type: ignore[union-attr, operator]
    q = dsmil.query(bags.values)  # type: ignore[operator]
    u = (q @ q[0] / ATTENTION**0.5).softmax(0)
    attention = dsmil(bags).attention
    torch.testing.assert_close(attention, u[:, None].expand(-1, LABELS), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("query", ["linear", "mlp"])
@pytest.mark.parametrize("value", ["identity", "linear", "relu"])
def test_every_parameter_learns(query: str, value: str) -> None:
    dsmil, bags = make(query=query, value=value), random_bags(SIZES, WIDTH)
    result = dsmil(bags, supervise())
    check_gradients(dsmil, result.embedding.square().sum() + result.loss)


def test_features_that_are_not_numbers_do_not_stop_it() -> None:
    values = torch.full((4, WIDTH), float("nan"))
    assert make()(RaggedBags.from_list([values])).embedding.isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 0}, "option labels: expected a whole number of at least 1, got 0"),
        ({"attn_dim": -2}, "option attn_dim: expected a whole number of at least 1, got -2"),
        ({"query": "deep"}, "option query: expected linear or mlp, got 'deep'"),
        ({"value": None}, "option value: expected identity, linear or relu, got None"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**options)
