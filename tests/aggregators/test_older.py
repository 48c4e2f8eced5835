"""The older aggregators against their papers' formulas in NumPy, and what each adds to training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dragn_cache.aggregators import Aggregated, Aggregator, create_aggregator
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags
from dragn_cache.training.losses import create_loss

WIDTH, LABELS = 19, 3
SIZES = [5, 1, 13, 2, 3]
Weights = dict[str, NDArray[Any]]


def make(name: str, in_shape: tuple[int, ...] = (WIDTH,), **options: Any) -> Aggregator:
    """In evaluation mode and double precision, parameters off their start."""
    torch.manual_seed(3)
    made = create_aggregator(name, in_shape=in_shape, **options).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def draw(*shape: int, sizes: list[int] = SIZES, seed: int = 1) -> RaggedBags:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, *shape, generator=generator, dtype=torch.float64) for n in sizes]
    return RaggedBags.from_list(rows)


def weights_of(aggregator: Aggregator) -> Weights:
    return {name: value.detach().numpy() for name, value in aggregator.state_dict().items()}


def rows_of(bags: RaggedBags) -> list[NDArray[Any]]:
    return [bags.bag(k).numpy() for k in range(len(bags))]


def attention_of(result: Aggregated, bags: RaggedBags) -> list[NDArray[Any]]:
    assert result.attention is not None
    return [part.detach().numpy() for part in result.attention.split(bags.sizes.tolist())]


def softmax(x: NDArray[Any]) -> NDArray[Any]:
    powers = np.exp(x)
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def unit(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(x / np.sqrt((x**2).sum(-1, keepdims=True)))


def sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(1 / (1 + np.exp(-x)))


def close(found: Tensor, expected: Any) -> None:
    np.testing.assert_allclose(found.detach().numpy(), np.asarray(expected), rtol=1e-6, atol=1e-8)


def supervise(bags: int, task: Any = "multilabel") -> Supervision:
    targets = torch.eye(LABELS)[torch.arange(bags) % LABELS]
    return Supervision(targets, create_loss("auto", task).at(1))


# SPoC


def test_spoc_weighs_pixels_by_their_distance_from_the_centre() -> None:
    height, width = 4, 7
    bags = draw(WIDTH, height, width)
    y, x = np.mgrid[:height, :width]
    prior = np.exp(-((y - 1.5) ** 2 + (x - 3) ** 2) / (2 * (4 / 6) ** 2))
    for spatial_prior, weight in ((True, prior), (False, np.ones_like(prior))):
        spoc = make("spoc", (WIDTH, height, width), spatial_prior=spatial_prior)
        expected = [unit((maps * weight).sum((0, 2, 3))) for maps in rows_of(bags)]
        close(spoc(bags).embedding, expected)


def test_spoc_of_vectors_and_of_nothing() -> None:
    bags = RaggedBags.from_list([torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.zeros(3, 2)])
    for options in ({}, {"whiten": 2}):
        embedding = create_aggregator("spoc", in_shape=(2,), **options)(bags).embedding
        close(embedding.double(), [[0.6, 0.8], [0, 0]])


def test_spoc_whitens_by_the_training_bags() -> None:
    training, bags = draw(WIDTH, sizes=[2, 3, 1] * 11), draw(WIDTH, seed=5)
    spoc = make("spoc", whiten=7)
    spoc.fit(training.between(k, k + 3) for k in range(0, 33, 3))
    known = np.stack([unit(rows.sum(0)) for rows in rows_of(training)])
    variance, axes = np.linalg.eigh(np.cov(known.T))
    axes, variance = axes[:, ::-1][:, :7], variance[::-1][:7]
    expected = unit(
        (np.stack([unit(rows.sum(0)) for rows in rows_of(bags)]) - known.mean(0))
        @ axes
        / np.sqrt(variance)
    )
    found = spoc(bags).embedding
    assert spoc.out_dim == 7
    close(found.abs(), np.abs(expected))  # an axis may point either way
    again = make("spoc", whiten=7)
    again.load_state_dict(spoc.state_dict())
    assert torch.equal(again(bags).embedding, found)


def test_spoc_leaves_out_directions_without_variance() -> None:
    training = draw(WIDTH, sizes=[2] * 11)
    training.values[:, 5:] = 0
    spoc = make("spoc", whiten=7)
    spoc.fit([training])
    embedding = spoc(training).embedding
    assert embedding.isfinite().all()
    assert not embedding[:, 5:].any()
    assert embedding[:, :5].all()


@pytest.mark.parametrize("bags", [3, 7])
def test_spoc_needs_more_bags_than_components(bags: int) -> None:
    with pytest.raises(InputError, match=f"at most {bags - 1} components, .* training bags.*got 7"):
        make("spoc", whiten=7).fit([draw(WIDTH, sizes=[2] * bags)])


# NAN


@pytest.mark.parametrize("unit_length", [False, True])
@pytest.mark.parametrize("blocks", [1, 2])
def test_nan_attends_and_attends_again(blocks: int, unit_length: bool) -> None:
    nan, bags = make("nan", blocks=blocks, unit_length=unit_length), draw(WIDTH)
    w, result = weights_of(nan), nan(bags)
    attention = attention_of(result, bags)
    for k, rows in enumerate(rows_of(bags)):
        f = unit(rows) if unit_length else rows
        a = softmax(f @ w["q0"])
        if blocks == 2:
            a = softmax(f @ np.tanh(w["W.weight"] @ (a @ f) + w["W.bias"]))
        np.testing.assert_allclose(attention[k], a)
        close(result.embedding[k], a @ f)


def test_nan_starts_as_the_mean_and_unsaturated() -> None:
    bags = draw(512)
    nan = create_aggregator("nan", in_shape=(512,), blocks=1).double()
    close(nan(bags).embedding, [rows.mean(0) for rows in rows_of(bags)])
    weight = create_aggregator("nan", in_shape=(512,)).get_parameter("W.weight")
    assert 0.95 < float(weight.detach().std()) * 512**0.5 < 1.05


# DeepMIML


def test_deepmiml_takes_maxima_over_subconcepts_and_instances() -> None:
    miml, bags = make("deepmiml", labels=LABELS, subconcepts=5), draw(WIDTH)
    w, embedding = weights_of(miml), miml(bags).embedding
    assert miml.out_dim == 15
    expected = []
    for rows in rows_of(bags):
        scores = (rows @ w["scores.weight"].T + w["scores.bias"]).reshape(-1, LABELS, 5)
        expected.append(sigmoid(scores).max(2).max(0))
    close(miml.head(LABELS)(embedding).sigmoid(), expected)
    assert not list(miml.head(LABELS).parameters())


def test_deepmimls_loss_is_that_of_its_undropped_logits() -> None:
    miml, bags = make("deepmiml", labels=LABELS), draw(WIDTH)
    wanted = supervise(len(bags))
    result = miml.train()(bags, wanted)
    assert miml.bag_weight == 0
    assert result.loss is not None
    assert torch.equal(result.loss, wanted.loss(miml.head(LABELS)(result.embedding)))


# NetVLAD


def vlad(x: NDArray[Any], w: Weights) -> NDArray[Any]:
    x = unit(x)
    a = softmax(x @ w["assign.weight"].T + w["assign.bias"])
    residuals = (a[:, :, None] * (x[:, None] - w["centres"])).sum(0)
    return unit(unit(residuals).ravel())


def test_netvlad_sums_residuals_by_cluster() -> None:
    netvlad, bags = make("netvlad", clusters=7), draw(WIDTH)
    w = weights_of(netvlad)
    assert netvlad.out_dim == 7 * WIDTH
    close(netvlad(bags).embedding, [vlad(rows, w) for rows in rows_of(bags)])


def test_netvlad_of_maps_takes_averages_or_pixels_and_can_be_reduced() -> None:
    bags = draw(WIDTH, 2, 3)
    by_average, by_pixel = (
        make("netvlad", (WIDTH, 2, 3), clusters=7, reduce=11, pixels=p) for p in (False, True)
    )
    w = weights_of(by_pixel)
    for k, maps in enumerate(rows_of(bags)):
        pixels = maps.transpose(0, 2, 3, 1).reshape(-1, WIDTH)
        close(by_pixel(bags).embedding[k], unit(w["reduce.weight"] @ vlad(pixels, w)))
        averages = maps.mean((2, 3))
        close(by_average(bags).embedding[k], unit(w["reduce.weight"] @ vlad(averages, w)))


def clustered(bags: int) -> tuple[RaggedBags, NDArray[Any]]:
    """Instances around three directions at right angles, and those."""
    around = np.eye(3, WIDTH)
    noise = 0.05 * draw(WIDTH, sizes=[7] * bags).values
    rows = torch.from_numpy(around)[torch.arange(7 * bags) % 3] + noise
    return RaggedBags(5 * rows, 7 * torch.arange(bags + 1)), around


def test_netvlad_starts_from_kmeans() -> None:
    training, around = clustered(11)
    netvlad = make("netvlad", clusters=3)
    state = torch.get_rng_state()
    netvlad.fit(training.between(k, k + 1) for k in range(11))
    assert torch.equal(torch.get_rng_state(), state)
    w = weights_of(netvlad)
    c = w["centres"]
    x = unit(training.values.numpy())
    nearest = (x @ around[:, :WIDTH].T).argmax(1)
    means = np.stack([x[nearest == k].mean(0) for k in range(3)])
    np.testing.assert_allclose(c[(means @ c.T).argmax(1)], means, atol=1e-6)
    # w and b are 2 alpha c and -alpha |c|², for one alpha.
    alpha = w["assign.weight"][0, 0] / c[0, 0] / 2
    np.testing.assert_allclose(w["assign.weight"], 2 * alpha * c, rtol=1e-5)
    np.testing.assert_allclose(w["assign.bias"], -alpha * (c**2).sum(1), rtol=1e-5)
    # The two largest assignments are a hundredfold apart, on geometric average.
    a = np.sort(softmax(x @ w["assign.weight"].T + w["assign.bias"]), 1)
    assert np.exp(np.log(a[:, -1] / a[:, -2]).mean()) == pytest.approx(100, rel=1e-4)
    other = make("netvlad", clusters=3)
    other.fit([training])
    assert torch.equal(other(training).embedding, netvlad(training).embedding)


def test_netvlad_samples_when_there_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dragn_cache.aggregators.netvlad.SAMPLE", 31)
    training, around = clustered(11)
    netvlad, other = make("netvlad", clusters=3), make("netvlad", clusters=3)
    netvlad.fit([training])
    other.fit(training.between(k, k + 1) for k in range(11))
    assert torch.equal(other(training).embedding, netvlad(training).embedding)
    found = weights_of(netvlad)["centres"] @ around.T
    np.testing.assert_allclose(np.sort(found.max(1)), 1, atol=0.1)
    assert sorted(found.argmax(1)) == [0, 1, 2]


def test_netvlad_needs_as_many_different_instances_as_clusters() -> None:
    few = draw(WIDTH, sizes=[2, 3])
    with pytest.raises(InputError, match=r"netvlad, option clusters: .* got 7 for 5 features"):
        make("netvlad", clusters=7).fit([few])
    with pytest.raises(InputError, match=r"netvlad, option clusters: .* got 7 for 10 features"):
        make("netvlad", clusters=7).fit([few, few])


def test_netvlad_does_not_stretch_the_rounding_of_instances_on_their_centre() -> None:
    netvlad = create_aggregator("netvlad", in_shape=(WIDTH,), clusters=7)
    on_centres = torch.nn.functional.normalize(draw(WIDTH, sizes=[7]).values.float())
    with torch.no_grad():
        netvlad.get_parameter("centres").copy_(on_centres)
        netvlad.get_parameter("assign.weight").copy_(1e4 * on_centres)
        netvlad.get_parameter("assign.bias").zero_()
    for k, row in enumerate(on_centres):
        on_it, beside = row.expand(11, -1), row + 0.01 * on_centres[k - 1]
        embedding = netvlad(RaggedBags.from_list([on_it, beside[None]])).embedding
        lengths = embedding.detach().norm(dim=1)
        assert lengths[0] < 0.5
        assert lengths[1] == pytest.approx(1, abs=1e-6)


# Bag of words


def test_bow_counts_words_in_all_pixels() -> None:
    bow, bags = make("bow", (WIDTH, 2, 3), clusters=7), draw(WIDTH, 2, 3)
    w = weights_of(bow)
    assert bow.out_dim == 7
    expected = []
    for maps in rows_of(bags):
        words = maps.transpose(0, 2, 3, 1).reshape(-1, WIDTH)
        counts = softmax(words @ w["assign.weight"].T + w["assign.bias"]).sum(0)
        expected.append(unit(counts))
    close(bow(bags).embedding, expected)


# Recurrent ones


def lstm(x: NDArray[Any], w: Weights, end: str) -> NDArray[Any]:
    """One direction of one layer, written out; PyTorch's order of the gates: i, f, g, o."""
    hidden = w[f"weight_hh_{end}"].shape[1]
    h, c, states = np.zeros(hidden), np.zeros(hidden), []
    for step in x[::-1] if end.endswith("reverse") else x:
        gates = w[f"weight_ih_{end}"] @ step + w[f"bias_ih_{end}"]
        gates = gates + w[f"weight_hh_{end}"] @ h + w[f"bias_hh_{end}"]
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        states.append(h)
    return np.stack(states[::-1] if end.endswith("reverse") else states)


def gru(x: NDArray[Any], w: Weights, end: str) -> NDArray[Any]:
    """The same for a GRU; gates r, z, n."""
    h, states = np.zeros(w[f"weight_hh_{end}"].shape[1]), []
    for step in x[::-1] if end.endswith("reverse") else x:
        of_x = np.split(w[f"weight_ih_{end}"] @ step + w[f"bias_ih_{end}"], 3)
        of_h = np.split(w[f"weight_hh_{end}"] @ h + w[f"bias_hh_{end}"], 3)
        r, z = sigmoid(of_x[0] + of_h[0]), sigmoid(of_x[1] + of_h[1])
        h = (1 - z) * np.tanh(of_x[2] + r * of_h[2]) + z * h
        states.append(h)
    return np.stack(states[::-1] if end.endswith("reverse") else states)


def part(w: Weights, prefix: str) -> Weights:
    return {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}


@pytest.mark.parametrize("readout", ["mean", "ends"])
def test_bilstm_reads_a_bag_both_ways(readout: str) -> None:
    bilstm, bags = make("bilstm", hidden=11, readout=readout), draw(WIDTH)
    w, embedding = weights_of(bilstm), bilstm(bags).embedding
    own = part(w, "lstm.")
    for k, x in enumerate(rows_of(bags)):
        for layer in ("l0", "l1"):
            x = np.hstack([lstm(x, own, layer), lstm(x, own, f"{layer}_reverse")])
        if readout == "ends":
            x = np.hstack([x[-1, :11], x[0, 11:]])[None]
        steps = np.maximum(x @ w["project.1.weight"].T + w["project.1.bias"], 0)
        close(embedding[k], steps.mean(0))


def test_bilstm_drops_in_training_only() -> None:
    bilstm, bags = make("bilstm", hidden=11), draw(WIDTH)
    evaluated = bilstm(bags).embedding
    torch.manual_seed(7)
    first, second = bilstm.train()(bags).embedding, bilstm(bags).embedding
    assert not torch.equal(first, second)
    assert not torch.equal(first, evaluated)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_annofly_attends_to_states(cell: str, bidirectional: bool) -> None:
    options = {"cell": cell, "bidirectional": bidirectional, "hidden": 11, "attn_dim": 7}
    annofly, bags = make("annofly", **options), draw(WIDTH)
    w, result = weights_of(annofly), annofly(bags)
    own, run = part(w, "rnn."), {"gru": gru, "lstm": lstm}[cell]
    attention = attention_of(result, bags)
    for k, x in enumerate(rows_of(bags)):
        ends = ["l0", "l0_reverse"] if bidirectional else ["l0"]
        h = np.hstack([run(x, own, end) for end in ends])
        a = softmax(np.tanh(h @ w["W.weight"].T + w["W.bias"]) @ w["v.weight"][0])
        np.testing.assert_allclose(attention[k], a, rtol=1e-9)
        close(result.embedding[k], a @ h)


# Single instances


@pytest.mark.parametrize("test", ["max", "mean"])
def test_si_gives_the_maximum_or_mean_of_probabilities(test: str) -> None:
    bags = draw(WIDTH)
    for task in ("multilabel", "multiclass"):
        si = make("si", labels=LABELS, test=test, task=task)
        w, embedding = weights_of(si), si.head(LABELS)(si(bags).embedding)
        for k, rows in enumerate(rows_of(bags)):
            logits = rows @ w["classify.weight"].T + w["classify.bias"]
            p = sigmoid(logits) if task == "multilabel" else softmax(logits)
            p = p.max(0) if test == "max" else p.mean(0)
            if task == "multilabel":
                close(embedding[k].sigmoid(), p)
            else:
                close(embedding[k].softmax(0), p / p.sum())


def test_si_has_finite_logits_where_probabilities_round_to_0_and_1() -> None:
    si = create_aggregator("si", in_shape=(1,), labels=1, test="mean")
    with torch.no_grad():
        si.get_parameter("classify.weight").fill_(1)
        si.get_parameter("classify.bias").fill_(0)
    bags = RaggedBags.from_list([torch.full((3, 1), 400.0), torch.full((2, 1), -300.0)])
    assert si(bags).embedding.flatten().tolist() == pytest.approx([400, -300])


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_si_trains_on_instances_with_their_bags_labels(task: str) -> None:
    si, bags = make("si", labels=LABELS, task=task), draw(WIDTH)
    wanted = supervise(len(bags), task)
    result = si.train()(bags, wanted)
    w = weights_of(si)
    logits = bags.values.numpy() @ w["classify.weight"].T + w["classify.bias"]
    y = np.repeat(wanted.targets.numpy(), SIZES, 0)
    if task == "multilabel":
        p = sigmoid(logits)
        expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    else:
        expected = -(y * np.log(softmax(logits))).sum(1).mean()
    assert si.bag_weight == 0
    assert result.loss is not None
    assert result.loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("spoc", {"whiten": 0}, "option whiten: expected a whole number above 0, got 0"),
        ("spoc", {"whiten": 20}, "at most 19 components, the number of channels, got 20"),
        ("spoc", {"spatial_prior": 1}, "option spatial_prior: expected one of True, False, got 1"),
        ("nan", {"blocks": 3}, "option blocks: expected one of 1, 2, got 3"),
        ("nan", {"unit_length": None}, "option unit_length: .* got None"),
        ("deepmiml", {"labels": 3, "subconcepts": 0}, "option subconcepts: .* above 0, got 0"),
        ("deepmiml", {"labels": 0}, "option labels: .* above 0, got 0"),
        ("netvlad", {"clusters": 1}, "option clusters: expected a whole number above 1, got 1"),
        ("netvlad", {"pixels": "yes"}, "option pixels: .* got 'yes'"),
        ("netvlad", {"reduce": 2.0}, r"option reduce: .* got 2\.0"),
        ("bow", {"clusters": 1}, "option clusters: expected a whole number above 1, got 1"),
        ("bilstm", {"hidden": 0}, "option hidden: .* got 0"),
        ("bilstm", {"readout": "last"}, "option readout: .* 'mean', 'ends', got 'last'"),
        ("annofly", {"cell": "rnn"}, "option cell: .* 'gru', 'lstm', got 'rnn'"),
        ("annofly", {"hidden": 0}, "option hidden: .* got 0"),
        ("annofly", {"bidirectional": 0}, "option bidirectional: .* got 0"),
        ("annofly", {"attn_dim": 0}, "option attn_dim: .* got 0"),
        ("si", {"labels": 3, "test": "min"}, "option test: .* 'max', 'mean', got 'min'"),
        ("si", {"labels": 3, "task": "both"}, "option task: .* got 'both'"),
        ("si", {"labels": True}, "option labels: .* got True"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_aggregator(name, in_shape=(WIDTH,), **options)
