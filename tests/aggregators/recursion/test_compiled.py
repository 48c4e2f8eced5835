"""The recursion in C++ against the plain loop of Algorithm 1, and against PyTorch without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_recursion import assert_like_the_loop, close, draw, needs_compiler, random_dragn

from dragn_cache.aggregators.dragn import Dragn
from dragn_cache.aggregators.recursion import compiled, kernels, library, rounds
from dragn_cache.ragged import RaggedBags

SHAPES = [(c, *size) for c in (1, 3, 17) for size in ((1, 1), (2, 3), (4, 10), (7, 7))]
EVERY_SIZE = [*range(33, 0, -2), *range(2, 33, 2)]  # 1..33
SOME_SIZES = [4, 33, 1, 9, 2, 3, 16]  # 68


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which of the two ways every call took."""
    ways: list[str] = []
    for owner, name in ((compiled, "fold"), (Dragn, "_fold_by_library")):
        original = getattr(owner, name)

        def noting(
            *args: object, name: str = name, original: object = original, **options: object
        ) -> object:
            ways.append(name)
            return original(*args, **options)  # type: ignore[operator]

        monkeypatch.setattr(owner, name, noting)
    return ways


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("bn", "training"), [(False, True), (True, True), (True, False)], ids=["no BN", "train", "eval"]
)
def test_every_size_of_bag_equals_the_loop_in_double(
    shape: tuple[int, ...], bn: bool, training: bool, ways: list[str]
) -> None:
    bn = bn and shape != (1, 1, 1)  # refused, see test_dragn
    dragn = random_dragn(shape, unit="L3Agg", bn=bn, bn_scope="window").double().train(training)
    bags = draw(shape, EVERY_SIZE, torch.float64)
    # Where BN sees three values, a change in the last bit of the features moves the loop's own
    # gradients by 3e-10 in sixteen rounds.
    three = bn and training and shape == (3, 1, 1)
    assert_like_the_loop(dragn, bags, values=1e-10, gradients=2e-9 if three else 1e-10)
    assert ways == ["fold"]


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"bn": False}, {"bn_scope": "window"}], ids=str)
def test_rounds_that_are_computed_again_give_the_same_bytes(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 37 instances 19 rounds: the maps of rounds 0, 4, 8, 12 and 16 are kept, or all."""
    bags = draw((5, 2, 3), [37, 1, 12, 2])
    results = []
    for limit in (compiled.MAPS_BYTES, 0):
        monkeypatch.setattr(compiled, "MAPS_BYTES", limit)
        monkeypatch.setattr(rounds, "KEPT_WINDOWS", limit)
        dragn = random_dragn((5, 2, 3), unit="L3Agg", **options).train()
        values = bags.values.clone().requires_grad_()
        embedding = dragn(RaggedBags(values, bags.offsets)).embedding
        saved = sum(t.dim() == 4 for t in embedding.grad_fn.saved_tensors)
        assert saved == (19 if limit else 5)
        embedding.square().sum().backward()
        results.append([values.grad, *(p.grad for p in dragn.parameters()), *dragn.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("unit", ["L2Agg", "L3Agg"])
def test_single_precision_is_close_to_the_loop(shape: tuple[int, ...], unit: str) -> None:
    bags = draw(shape, SOME_SIZES)
    assert_like_the_loop(
        random_dragn(shape, unit=unit, bn=False), bags, values=1e-5, gradients=1e-4
    )
    if unit == "L3Agg":
        dragn = random_dragn(shape, unit=unit).eval()
        assert_like_the_loop(dragn, bags, values=1e-5, gradients=1e-4)


@needs_compiler
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("mixing", ["shared", "per_channel"])
@pytest.mark.parametrize(
    ("unit", "bn"), [("L1Agg", False), ("L2Agg", False), ("L2Agg", True), ("L3Agg", True)]
)
def test_mixings_and_kernels_equal_the_loop(unit: str, bn: bool, mixing: str, kernel: int) -> None:
    shape = (17, 5, 3)
    dragn = random_dragn(
        shape, unit=unit, bn=bn, bn_scope="window", mixing=mixing, kernel=kernel
    ).double()
    bags = draw(shape, [4, 9, 1, 2, 3, 6], torch.float64)
    assert_like_the_loop(dragn, bags, mixing=mixing, values=1e-10, gradients=1e-10)


@needs_compiler
@pytest.mark.parametrize("unit", ["L1Agg", "L3Agg"])
def test_a_unit_for_each_round_equals_the_loop(unit: str) -> None:
    dragn = random_dragn(
        (5, 2, 7), unit=unit, bn="auto", bn_scope="window", share_rounds=False, rounds=3
    )
    bags = draw((5, 2, 7), [4, 11, 1, 2, 3, 6], torch.float64)
    assert_like_the_loop(dragn.double(), bags, values=1e-10, gradients=1e-10)


@needs_compiler
@pytest.mark.parametrize("scope", ["round", "window"])
@pytest.mark.parametrize("mixing", ["shared", "per_channel"])
def test_without_a_compiler_the_results_are_the_same(
    scope: str, mixing: str, monkeypatch: pytest.MonkeyPatch, ways: list[str]
) -> None:
    dragn = random_dragn((19, 3, 4), mixing=mixing, bn="on", bn_scope=scope).double()
    state = {name: value.clone() for name, value in dragn.state_dict().items()}
    bags = draw((19, 3, 4), [5, 1, 8, 2, 3], torch.float64)
    seen = []
    for compiler in (True, False):
        if not compiler:
            monkeypatch.setattr(kernels, "kernels", lambda *size: None)
        dragn.load_state_dict(state)
        dragn.zero_grad()
        features = bags.values.clone().requires_grad_()
        embedding = dragn(RaggedBags(features, bags.offsets)).embedding
        embedding.square().sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in dragn.parameters() if p.grad is not None])
        buffers = torch.cat([b.double().flatten() for b in dragn.buffers()])
        assert features.grad is not None
        seen.append((embedding, gradients, features.grad, buffers))
    for ours, other in zip(*seen, strict=True):
        assert close(ours, other, 1e-10)
    assert ways == ["fold", "_fold_by_library"]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_features_are_read_in_their_own_dtype(dtype: torch.dtype) -> None:
    bags = draw((13, 4, 3), SOME_SIZES, dtype)
    for training in (True, False):
        dragn = random_dragn((13, 4, 3), unit="L2Agg").train(training)
        exact = random_dragn((13, 4, 3), unit="L2Agg").train(training)
        ours = dragn(bags).embedding
        assert torch.equal(ours, exact(bags.to(dtype=torch.float32)).embedding)
        assert ours.dtype == torch.float32


@needs_compiler
@pytest.mark.parametrize("bn", [False, True])
def test_a_bag_is_the_same_bits_alone_and_on_any_number_of_threads(bn: bool) -> None:
    dragn = random_dragn((21, 3, 5), bn=bn).eval()
    bags = draw((21, 3, 5), SOME_SIZES)
    threads = torch.get_num_threads()
    together = dragn(bags).embedding
    alone = torch.cat([dragn(bags.select([k])).embedding for k in range(len(bags))])
    assert torch.equal(together, alone)
    try:
        torch.set_num_threads(1)
        one = gradients_of(dragn, bags)
        torch.set_num_threads(3)
        assert torch.equal(one, gradients_of(dragn, bags))
    finally:
        torch.set_num_threads(threads)


def gradients_of(dragn: Dragn, bags: RaggedBags) -> torch.Tensor:
    dragn.zero_grad()
    dragn(bags).embedding.sum().backward()
    return torch.cat([p.grad.flatten() for p in dragn.parameters() if p.grad is not None])


@needs_compiler
def test_hidden_maps_kept_or_computed_again_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bags = draw((11, 2, 5), SOME_SIZES)
    kept = gradients_of(random_dragn((11, 2, 5)), bags)
    monkeypatch.setattr(compiled, "HIDDEN_BYTES", 0)
    assert torch.equal(kept, gradients_of(random_dragn((11, 2, 5)), bags))


@needs_compiler
def test_gradients_can_be_taken_twice() -> None:
    dragn, bags = random_dragn((3, 2, 2)), draw((3, 2, 2), [5, 4])
    total = dragn(bags).embedding.sum()
    first = torch.autograd.grad(total, list(dragn.parameters()), retain_graph=True)
    again = torch.autograd.grad(total, list(dragn.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_compiler
def test_memory_let_go_is_used_again_and_what_is_kept_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_SPARE", {})
    monkeypatch.setattr(kernels, "SPARE_BYTES", 1000)
    first = kernels.empty(101, torch.float32)
    address = first.data_ptr()
    assert address % kernels.ALIGNMENT == 0
    other = kernels.empty(100, torch.float32)
    assert other.data_ptr() != address
    del first
    assert kernels.empty(97, torch.float32).data_ptr() == address
    large = [kernels.empty(n, torch.float64) for n in (59, 61, 67)]
    del large, other
    assert sum(spare.nbytes for spare in kernels._SPARE.values()) <= 1000


def test_without_a_compiler_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_compiler", lambda: None)
    assert library.load_library.__wrapped__(kernels.SOURCE, "REAL=float", "KERNEL=3") is None


@needs_compiler
def test_a_compiler_that_fails_is_said_once_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int main( {\n")
    with pytest.warns(RuntimeWarning, match=r"cannot compile broken.cpp, PyTorch computes instead"):
        assert library.load_library(source) is None
    assert not list(tmp_path.rglob("*.so*"))


@needs_compiler
def test_a_library_is_compiled_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return ANSWER; }\n')
    load = library.load_library.__wrapped__
    assert load(source, "ANSWER=41").answer() == 41
    (kept,) = tmp_path.rglob("*.so")
    written = kept.stat().st_mtime_ns
    assert load(source, "ANSWER=41").answer() == 41
    assert kept.stat().st_mtime_ns == written
    assert load(source, "ANSWER=43").answer() == 43  # another name: both are kept
    assert len(list(tmp_path.rglob("*.so"))) == 2
    kept.unlink()  # it is in use
    kept.write_bytes(b"cut")  # as by a full disk: compiled again
    assert load(source, "ANSWER=41").answer() == 41


@needs_compiler
@pytest.mark.parametrize("why", ["others may write", "no home"])
def test_code_is_not_kept_where_others_could_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    folder = tmp_path / "dragn-cache" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if why == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 47; }\n')
    assert library.load_library.__wrapped__(source).answer() == 47
    assert not list(folder.iterdir())
    assert not (tmp_path / "~").exists()
    assert len(list((tmp_path / "temporary").rglob("*.so"))) == 1
