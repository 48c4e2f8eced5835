"""CLAM, one branch or one per label, against its formulas in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import (
    Array,
    assert_close,
    check_gradients,
    gated,
    instances_of,
    linear,
    random_bags,
    relu_network,
    rows_of,
    softmax,
    weights_of,
)

from dragn_cache.aggregators import Aggregator, create_aggregator
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags

WIDTH, EMBED, ATTENTION, LABELS, ENDS = 19, 11, 7, 3, 4
SIZES = [5, 1, 13, 2, 23]
TARGETS = torch.tensor([[1.0, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 1]])
FORMS = ["clam_sb", "clam_mb"]
every_form = pytest.mark.parametrize("name", FORMS)
subtyping_or_not = pytest.mark.parametrize("subtyping", [False, True])


def make(name: str, **options: Any) -> Aggregator:
    torch.manual_seed(3)
    defaults = {"labels": LABELS, "embed": EMBED, "attn_dim": ATTENTION, "instances": ENDS}
    return create_aggregator(name, in_shape=(WIDTH,), **defaults | options).eval()


def supervise(targets: torch.Tensor = TARGETS) -> Supervision:
    return Supervision(targets, torch.nn.functional.binary_cross_entropy_with_logits)


def published_loss(logits: Array, a: Array, targets: Array, *, ends: int, subtyping: bool) -> float:
    """Of one bag: logits (n, L, 2), attention (n, L)."""
    b = min(ends, len(a) // 2)
    losses = []
    for label, target in enumerate(targets):
        order = np.argsort(-a[:, label], kind="stable")
        likelihood = np.log(softmax(logits[:, label], 1))
        if target:
            good, bad = likelihood[order[:b], 1], likelihood[order[len(a) - b :], 0]
            losses.append(-np.mean([*good, *bad]) if b else 0.0)
        elif subtyping:
            losses.append(-np.mean(likelihood[order[:b], 0]) if b else 0.0)
    return float(np.mean(losses)) if losses else 0.0


@every_form
@subtyping_or_not
@pytest.mark.parametrize("embed", [(), EMBED, (17, EMBED)])
def test_it_is_what_the_paper_says(name: str, subtyping: bool, embed: Any) -> None:
    clam, bags = make(name, subtyping=subtyping, embed=embed), random_bags(SIZES, WIDTH)
    w = weights_of(clam)
    result = clam(bags, supervise())
    losses = []
    for k, x in enumerate(instances_of(bags)):
        h = relu_network(w, "embed", x)
        a = softmax(gated(w, "scores", h), 0)
        assert a.shape == (len(h), 1 if name == "clam_sb" else LABELS)
        expected = a[:, 0] if name == "clam_sb" else a
        assert_close(result.attention[rows_of(bags, k)], expected)
        assert_close(result.embedding[k], (a.T @ h).ravel())
        logits = linear(w, "instance_classifiers", h).reshape(len(h), LABELS, 2)
        a = np.broadcast_to(a, (len(h), LABELS))
        losses.append(published_loss(logits, a, TARGETS[k].numpy(), ends=ENDS, subtyping=subtyping))
    assert losses[1] == 0  # one instance
    assert (losses[3] > 0) == subtyping  # no label
    assert result.loss.item() == pytest.approx(0.3 * np.mean(losses), rel=1e-5)
    assert clam.bag_weight == 0.7


def test_each_label_has_its_own_classifier() -> None:
    clam, bags = make("clam_mb"), random_bags(SIZES, WIDTH)
    head = clam.head(LABELS)
    embedding = clam(bags).embedding
    assert sum(p.numel() for p in head.parameters()) == LABELS * (EMBED + 1)
    w, parts = weights_of(head), embedding.detach().double().numpy().reshape(-1, LABELS, EMBED)
    expected = [[p @ row for p, row in zip(bag, w["weight"], strict=True)] for bag in parts]
    assert_close(head(embedding), np.array(expected) + w["bias"])
    assert isinstance(make("clam_sb").head(LABELS), torch.nn.Linear)
    with pytest.raises(InputError, match="expected the 3 labels that it has branches for, got 2"):
        clam.head(2)


@every_form
def test_of_attentions_that_tie_the_first_are_on_top(name: str) -> None:
    clam, bags = make(name, instances=2, embed=()), random_bags([7], WIDTH)
    with torch.no_grad():
        clam.scores.w.weight.zero_()  # type: ignore[union-attr, operator]
    targets = torch.tensor([[0.0, 1, 0]])
    bags.values.requires_grad_()
    clam(bags, supervise(targets)).loss.backward()
    w = weights_of(clam)
    logits = linear(w, "instance_classifiers", bags.values.detach().double().numpy())
    likelihood = np.log(softmax(logits.reshape(7, LABELS, 2)[:, 1], 1))
    expected = -np.mean([likelihood[0, 1], likelihood[1, 1], likelihood[5, 0], likelihood[6, 0]])
    assert clam(bags, supervise(targets)).loss.item() == pytest.approx(0.3 * expected, rel=1e-5)
    assert bags.values.grad is not None
    assert bags.values.grad.any(1).tolist() == [True, True, False, False, False, True, True]


@every_form
def test_a_bags_instance_loss_does_not_depend_on_its_mates(name: str) -> None:
    clam, bags = make(name), random_bags(SIZES, WIDTH)
    alone = [clam(bags.select([k]), supervise(TARGETS[[k]])).loss for k in range(len(SIZES))]
    together = clam(bags, supervise()).loss
    torch.testing.assert_close(torch.stack(alone).mean(), together, rtol=1e-5, atol=1e-7)


@every_form
@subtyping_or_not
def test_every_parameter_learns(name: str, subtyping: bool) -> None:
    clam, bags = make(name, subtyping=subtyping), random_bags(SIZES, WIDTH)
    result = clam(bags, supervise())
    check_gradients(clam, result.embedding.square().sum() + result.loss)


@every_form
def test_a_label_that_counts_nothing_has_no_instance_loss(name: str) -> None:
    """Whatever its target is; the weight of the others stays."""
    clam, bags = make(name, subtyping=True), random_bags(SIZES, WIDTH)
    weights = torch.ones_like(TARGETS)
    weights[0, 1] = weights[2, 0] = weights[4, 2] = 0
    others = torch.where(weights == 0, 1 - TARGETS, TARGETS)
    losses = [
        clam(bags, Supervision(targets, supervise().criterion, weights)).loss.item()
        for targets in (TARGETS, others)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert 0 < losses[0] < clam(bags, supervise()).loss.item()
    ones = Supervision(TARGETS, supervise().criterion, torch.ones_like(TARGETS))
    assert torch.equal(clam(bags, ones).loss, clam(bags, supervise()).loss)


@every_form
def test_a_batch_of_bags_of_one_has_no_instance_loss(name: str) -> None:
    clam, bags = make(name), random_bags([1, 1], WIDTH)
    result = clam(bags, supervise(TARGETS[:2]))
    assert result.loss.item() == 0
    check_gradients(clam.embed, result.embedding.sum() + result.loss)  # type: ignore[arg-type]


@every_form
def test_dropout_and_weights_are_as_asked_for(name: str) -> None:
    bags = random_bags(SIZES, WIDTH)
    clam = make(name, dropout=0.5, instance_weight=0.25)
    assert clam.bag_weight == 0.75
    other = make(name, instance_weight=0.5)
    ratio = other(bags, supervise()).loss / clam(bags, supervise()).loss
    assert ratio.item() == pytest.approx(2)
    clean = clam(bags).embedding
    torch.manual_seed(5)
    first = clam.train()(bags).embedding
    assert not torch.allclose(first, clean)
    torch.manual_seed(5)
    assert torch.equal(clam(bags).embedding, first)
    # Zero at p = 0.5 and all weight on one instance: the embedding itself is what was dropped.
    alone = RaggedBags.from_list([bags.bag(1)])
    dropped, whole = clam(alone).embedding, clam.eval()(alone).embedding
    assert ((dropped == 0) | torch.isclose(dropped, 2 * whole)).all()


@every_form
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 0}, "option labels: expected a whole number of at least 1, got 0"),
        ({"embed": (5, 0)}, r"option embed: expected one width or several, .*, got \(5, 0\)"),
        ({"attn_dim": 2.0}, r"option attn_dim: expected a whole number of at least 1, got 2\.0"),
        ({"instances": 0}, "option instances: expected a whole number of at least 1, got 0"),
        ({"instance_weight": 1}, "option instance_weight: expected a number from 0 to below 1"),
        ({"dropout": -0.1}, r"option dropout: expected a number from 0 to below 1, got -0\.1"),
        ({"dropout": True}, "option dropout: expected a number from 0 to below 1, got True"),
        ({"subtyping": 1}, "option subtyping: expected true or false, got 1"),
    ],
)
def test_other_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"aggregator {name}, {message}"):
        make(name, **options)
