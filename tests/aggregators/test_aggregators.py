"""The contract that every registered aggregator keeps; a new one is tested by being registered."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from own_aggregators import Demanding, Wider
from small_aggregators import LABELS, MAP, REQUIRED, SIZES, VECTOR, draw, make, relative, supervise

from dragn_cache.aggregators import (
    AGGREGATORS,
    Aggregated,
    aggregator_class,
    create_aggregator,
    options_of,
)
from dragn_cache.aggregators.mean import Mean
from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.ragged import RaggedBags

# Single precision through some layers, as far as the instructions of one processor or another
# order their sums: 1.4e-6 was seen (transmil, MKL's AVX2 kernels), and 2.5e-5 with rrt.
ROUNDING = 5e-6
ROUNDING_OF_RRT = 1e-4

every_aggregator = pytest.mark.parametrize("name", sorted(AGGREGATORS))
every_shape = pytest.mark.parametrize("in_shape", [MAP, VECTOR], ids=["map", "vector"])


@every_shape
@every_aggregator
def test_shapes_and_finite_values(name: str, in_shape: tuple[int, ...]) -> None:
    aggregator, bags = make(name, in_shape), draw(in_shape)
    result = aggregator(bags)
    assert isinstance(result, Aggregated)
    assert result.embedding.shape == (len(SIZES), aggregator.out_dim)
    assert result.embedding.isfinite().all()
    assert (result.attention is not None) == AGGREGATORS[name].has_attention
    if result.attention is not None:
        assert result.attention.shape in ((sum(SIZES),), (sum(SIZES), LABELS))
        assert result.attention.isfinite().all()
    assert aggregator.head(LABELS)(result.embedding).shape == (len(SIZES), LABELS)
    learning = aggregator(bags, supervise(len(SIZES)))
    assert torch.equal(learning.embedding, result.embedding)
    if learning.loss is not None:
        assert learning.loss.shape == ()
        assert learning.loss.isfinite()


@every_shape
@pytest.mark.parametrize(
    "name", [name for name, cls in AGGREGATORS.items() if cls.embedding_among_features]
)
def test_an_embedding_among_the_features_is_that_of_a_lone_instance(
    name: str, in_shape: tuple[int, ...]
) -> None:
    aggregator, bags = make(name, in_shape), draw(in_shape, [1, 1, 1])
    assert aggregator.out_dim == in_shape[0]
    assert relative(aggregator(bags).embedding, aggregator.vectors(bags)) < 1e-6


@every_shape
@every_aggregator
def test_a_bag_does_not_depend_on_its_batch_mates(name: str, in_shape: tuple[int, ...]) -> None:
    aggregator, bags = make(name, in_shape), draw(in_shape)
    most = ROUNDING_OF_RRT if name == "rrt" else ROUNDING
    together = aggregator(bags)
    for i, size in enumerate(SIZES):
        alone = aggregator(bags.select([i]))
        among_others = aggregator(bags.select([13, i, 4]))
        for embedding in (alone.embedding[0], among_others.embedding[1]):
            # Bit for bit, except that a convolution or matrix product may choose another
            # order of summation for another number of rows: hence rounding for those.
            if name in ("mean", "max") or (name == "dragn" and size <= 2):
                assert torch.equal(embedding, together.embedding[i])
            else:
                assert relative(embedding, together.embedding[i]) < most
        if alone.attention is not None:
            rows = slice(*bags.offsets[i : i + 2].tolist())
            assert relative(alone.attention, together.attention[rows]) < most


@every_shape
@every_aggregator
def test_in_double_precision_mates_change_a_bag_by_less_than_1e_11(
    name: str, in_shape: tuple[int, ...]
) -> None:
    """So what they change in single precision is rounding."""
    aggregator, bags = make(name, in_shape).double(), draw(in_shape).to(dtype=torch.float64)
    together = aggregator(bags).embedding
    for i in range(len(bags)):
        assert relative(aggregator(bags.select([i])).embedding[0], together[i]) < 1e-11
        assert relative(aggregator(bags.select([13, i, 4])).embedding[1], together[i]) < 1e-11


@every_shape
@every_aggregator
def test_order_matters_as_declared(name: str, in_shape: tuple[int, ...]) -> None:
    aggregator, bags = make(name, in_shape), draw(in_shape, [7, 13, 5])
    shuffled = bags.permuted(torch.Generator().manual_seed(3))
    difference = relative(aggregator(shuffled).embedding, aggregator(bags).embedding)
    if AGGREGATORS[name].order_sensitive:
        assert difference > 1e-3
    else:
        assert difference < ROUNDING


@every_shape
@every_aggregator
def test_gradients_reach_every_parameter_and_every_instance(
    name: str, in_shape: tuple[int, ...]
) -> None:
    aggregator, bags = make(name, in_shape), draw(in_shape, [3, 7, 4, 11])
    bags.values.requires_grad_()
    result = aggregator(bags, supervise(len(bags)))
    weight = torch.randn(result.embedding.shape, generator=torch.Generator().manual_seed(2))
    ((result.embedding * weight).sum() + (0 if result.loss is None else result.loss)).backward()
    for parameter_name, parameter in aggregator.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name
    assert bags.values.grad is not None
    assert bags.values.grad.isfinite().all()
    # A maximum passes nothing to some instances, but something to each bag.
    for i in range(len(bags)):
        assert RaggedBags(bags.values.grad, bags.offsets).bag(i).any()


@every_shape
@every_aggregator
def test_half_precision_features_are_computed_in_the_parameters_dtype(
    name: str, in_shape: tuple[int, ...]
) -> None:
    aggregator = make(name, in_shape)
    stored = draw(in_shape).to(dtype=torch.float16)
    from_half = aggregator(stored).embedding
    assert from_half.dtype == torch.float32
    assert relative(from_half, aggregator(stored.to(dtype=torch.float32)).embedding) < 1e-6
    assert aggregator.double()(stored).embedding.dtype == torch.float64


@every_shape
@every_aggregator
def test_evaluation_is_deterministic_and_changes_nothing(
    name: str, in_shape: tuple[int, ...]
) -> None:
    aggregator, bags = make(name, in_shape), draw(in_shape)
    state = {key: value.clone() for key, value in aggregator.state_dict().items()}
    first, second = aggregator(bags), aggregator(bags)
    assert torch.equal(first.embedding, second.embedding)
    for key, value in aggregator.state_dict().items():
        assert torch.equal(value, state[key])


@every_shape
@every_aggregator
def test_state_can_be_saved_and_loaded(name: str, in_shape: tuple[int, ...]) -> None:
    bags, saved, other = draw(in_shape), make(name, in_shape), make(name, in_shape, seed=9)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(bags).embedding, saved(bags).embedding)


@every_aggregator
def test_other_widths_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"shape \(17, 2, 3\), got \(17, 3, 2\); use the tap"):
        make(name, MAP)(draw((17, 3, 2)))
    with pytest.raises(InputError, match=r"shape \(19,\), got \(17, 2, 3\); use the tap"):
        make(name, VECTOR)(draw(MAP))


@every_aggregator
def test_empty_bags_are_refused_by_number(name: str) -> None:
    with pytest.raises(InputError, match="bag 2 of the batch: expected at least one instance"):
        make(name, VECTOR)(draw(VECTOR, [3, 1, 0, 2, 0]))
    with pytest.raises(InputError, match="expected at least one bag"):
        make(name, VECTOR)(draw(VECTOR).select([]))


@every_aggregator
@pytest.mark.parametrize("in_shape", [(), (4, 4), (0,), (4, 2, -1), (4.0,)])
def test_shapes_that_are_neither_map_nor_vector_are_refused(
    name: str, in_shape: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match="in_shape: expected"):
        create_aggregator(name, in_shape=in_shape, **REQUIRED.get(name, {}))


@every_aggregator
def test_unknown_options_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(
        InputError, match=rf"aggregator {name}: expected a known option, got 'colour'"
    ):
        create_aggregator(name, in_shape=MAP, **REQUIRED.get(name, {}), colour="green")


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="got 'dragon'; did you mean dragn"):
        create_aggregator("dragon", in_shape=MAP)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:Class", "No module named 'nowhere'"),
        ("dragn_cache.aggregators.mean:Means", "has no attribute 'Means'"),
        ("dragn_cache.aggregators.mean:", "expected package.module:Class"),
        (":Mean", "expected package.module:Class"),
        ("collections:Counter", "expected a subclass of dragn_cache.aggregators.Aggregator"),
    ],
)
def test_classes_that_cannot_be_used_are_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        aggregator_class(name)


def test_a_class_of_ones_own_on_pythons_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_pooling.py").write_text(
        "from dragn_cache.aggregators import Aggregated, Aggregator\n"
        "from dragn_cache.ragged.segments import segment_sum\n"
        "class Sum(Aggregator):\n"
        "    needs, order_sensitive = 'vector', False\n"
        "    def __init__(self, in_shape, *, factor=1.0):\n"
        "        super().__init__(in_shape)\n"
        "        self.factor = factor\n"
        "    def aggregate(self, bags):\n"
        "        summed = segment_sum(self.vectors(bags), bags.offsets)\n"
        "        return Aggregated(self.factor * summed, None)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    with pytest.raises(InputError, match="No module named 'my_pooling'; correct it, or run where"):
        create_aggregator("my_pooling:Sum", in_shape=VECTOR)
    assert sys.path == before
    monkeypatch.syspath_prepend(tmp_path)
    made = create_aggregator("my_pooling:Sum", in_shape=VECTOR, factor=2.0)
    bags = draw(VECTOR, [3, 5])
    expected = 2 * torch.stack([bags.bag(0).sum(0), bags.bag(1).sum(0)])
    torch.testing.assert_close(made(bags).embedding, expected)
    with pytest.raises(InputError, match=r"a known option, got 'scale'; .*one of: factor"):
        create_aggregator("my_pooling:Sum", in_shape=VECTOR, scale=2.0)


def test_the_documents_class_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(# (\w+)\.py\n.*?)```", text, re.DOTALL)
    ((source, module),) = code
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    made = create_aggregator(f"{module}:Mean2", in_shape=MAP, width=5)
    assert made(draw(MAP, [3, 1, 7])).embedding.shape == (3, 5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("order_sensitive = False\n def aggregate(self, bags): ...", "a class without needs;"),
        ("needs = 'any'", "a class without order_sensitive, aggregate;"),
    ],
)
def test_classes_that_leave_something_out_are_told(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"from dragn_cache.aggregators import Aggregator\nclass A(Aggregator):\n {body}\n"
    name = f"half_{len(body)}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=message):
        aggregator_class(f"{name}:A")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda rows: Aggregated(rows, None), r"shape \(2, 19\), bags × out_dim, got .* \(8, 19\)"),
        (lambda rows: rows[:2], "expected Aggregated .* got a Tensor"),
    ],
)
def test_results_that_are_not_one_embedding_per_bag_are_refused(
    given: Callable[[torch.Tensor], Aggregated], message: str
) -> None:
    class Wrong(Mean):
        def aggregate(self, bags: RaggedBags) -> Aggregated:
            return given(self.vectors(bags))

    with pytest.raises(InputError, match=message):
        Wrong(VECTOR)(draw(VECTOR, [3, 5]))


def test_options_of_classes_of_ones_own_are_checked_as_their_signature_says() -> None:
    name = "own_aggregators:Demanding"
    assert list(options_of(name)) == ["labels", "factor"]
    with pytest.raises(InputError, match=r"option labels: .* got none; give labels=…"):
        create_aggregator(name, in_shape=MAP)
    with pytest.raises(InputError, match="option factor: expected a number, got 'x'"):
        create_aggregator(name, in_shape=MAP, labels=3, factor="x")
    made = create_aggregator(name, in_shape=MAP, labels=3)
    assert isinstance(made, Demanding)
    assert (made.labels, made.factor) == (3, 1.0)


def test_options_that_a_class_of_ones_own_passes_on_are_those_of_its_base() -> None:
    name = "own_aggregators:Wider"
    assert set(options_of(name)) == {"factor", "attn_dim", "embed"}
    made = create_aggregator(name, in_shape=VECTOR, factor=5, attn_dim=7)
    assert isinstance(made, Wider)
    assert (made.factor, made.V.out_features) == (5, 7)
    with pytest.raises(InputError, match=r"got 'width'; .*attn_dim, embed, factor"):
        create_aggregator(name, in_shape=VECTOR, width=3)
    with pytest.raises(InputError, match=r"option attn_dim: .* got 0"):
        create_aggregator(name, in_shape=VECTOR, attn_dim=0)


@every_shape
def test_mean_is_the_mean_of_pooled_instances(in_shape: tuple[int, ...]) -> None:
    bags = draw(in_shape)
    bags.values.requires_grad_()
    embedding = create_aggregator("mean", in_shape=in_shape)(bags).embedding
    flat = (
        bags.values.detach().flatten(2) if len(in_shape) == 3 else bags.values.detach()[..., None]
    )
    for i, (start, end) in enumerate(zip(bags.offsets[:-1], bags.offsets[1:], strict=True)):
        assert torch.allclose(embedding[i], flat[start:end].mean((0, 2)))
    weight = torch.arange(1.0, len(SIZES) + 1)
    (embedding.sum(1) * weight).sum().backward()
    pixels = flat.shape[2]
    share = (weight / bags.sizes / pixels)[bags.segment_ids]
    assert bags.values.grad is not None
    assert torch.allclose(bags.values.grad.flatten(1), share[:, None].expand(-1, flat[0].numel()))


def test_max_by_hand_with_ties_sharing_the_gradient() -> None:
    values = torch.tensor([[0.0, -3.0], [0.0, -1.0], [0.0, -1.0], [5.0, 2.0]], requires_grad=True)
    bags = RaggedBags(values, torch.tensor([0, 3, 4]))
    embedding = create_aggregator("max", in_shape=(2,))(bags).embedding
    assert embedding.tolist() == [[0, -1], [5, 2]]
    (embedding * torch.tensor([[-6.0, -2.0], [7.0, 3.0]])).sum().backward()
    assert values.grad is not None
    expected = torch.tensor([[-2.0, 0.0], [-2.0, -1.0], [-2.0, -1.0], [7.0, 3.0]])
    assert torch.allclose(values.grad, expected)


def test_max_pools_maps_before_it_compares() -> None:
    # The single largest pixel is in the first instance, the largest average in the second.
    bags = RaggedBags.from_list([torch.tensor([[[[9.0, 0.0, 0.0]]], [[[4.0, 4.0, 4.0]]]])])
    assert create_aggregator("max", in_shape=(1, 1, 3))(bags).embedding.tolist() == [[4]]
