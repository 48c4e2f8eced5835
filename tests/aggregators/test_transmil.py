"""TransMIL against the paper's algorithms in NumPy, and torchmil's with the same weights."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import (
    Array,
    Weights,
    attention,
    heads_of,
    instances_of,
    linear,
    norm,
    random_bags,
    shaken,
    softmax,
    weights_of,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dragn_cache.aggregators import Aggregator, create_aggregator
from dragn_cache.aggregators.transmil import squared
from dragn_cache.errors import InputError
from dragn_cache.ragged.bags import offsets_of
from dragn_cache.ragged.nystroem import nystroem, pseudo_inverse
from dragn_cache.ragged.padded import Padding

WIDTH, EMBED, HEADS = 19, 12, 3
SIZES = [5, 1, 23, 2, 17, 37, 3]


def make(**options: Any) -> Aggregator:
    torch.manual_seed(2)
    options = {"embed": EMBED, "heads": HEADS} | options
    return shaken(create_aggregator("transmil", in_shape=(WIDTH,), **options))


def landmarks_of(x: Array, count: int) -> Array:
    edges = [i * len(x) // count for i in range(count + 1)]
    return np.stack([x[a:b].mean(0) for a, b in itertools.pairwise(edges)])


def inverse(a: Array) -> Array:
    """Six steps of the paper's iteration."""
    z = a.T / (np.abs(a).sum(0).max() * np.abs(a).sum(1).max())
    one = np.eye(len(a))
    for _ in range(6):
        z = z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z))) / 4
    return z


def approximate(q: Array, k: Array, v: Array, heads: int, landmarks: int) -> Array:
    parts = []
    for a, b, c in zip(heads_of(q, heads), heads_of(k, heads), heads_of(v, heads), strict=True):
        a = a / np.sqrt(a.shape[1])
        qm, km = landmarks_of(a, landmarks), landmarks_of(b, landmarks)
        parts.append(softmax(a @ km.T) @ inverse(softmax(qm @ km.T)) @ softmax(qm @ b.T) @ c)
    return np.concatenate(parts, 1)


def layer(w: Weights, name: str, x: Array, landmarks: int) -> Array:
    q, k, v = np.split(linear(w, f"{name}.qkv", norm(w, f"{name}.norm", x)), 3, 1)
    if len(x) <= landmarks:
        mixed = attention(q, k, v, HEADS, (EMBED / HEADS) ** -0.5)
    else:
        mixed = approximate(q, k, v, HEADS, landmarks)
    local = []
    for head, values in enumerate(heads_of(v, HEADS)):
        kernel = w[f"{name}.local.weight"][head, 0, :, 0]
        around = np.pad(values, ((16, 16), (0, 0)))
        local.append(np.stack([kernel @ around[i : i + 33] for i in range(len(x))]))
    return x + linear(w, f"{name}.o", mixed + np.concatenate(local, 1))


def positioned(w: Weights, x: Array) -> Array:
    side = math.isqrt(len(x) - 1)
    square = x[1:].reshape(side, side, EMBED)
    result = square.copy()
    for size in (7, 5, 3):
        kernel, bias = (w[f"positions.conv{size}.{part}"] for part in ("weight", "bias"))
        around = np.pad(square, ((size // 2, size // 2), (size // 2, size // 2), (0, 0)))
        for i, j in np.ndindex(side, side):
            window = around[i : i + size, j : j + size]
            result[i, j] += np.einsum("ijc,cij->c", window, kernel[:, 0]) + bias
    return np.concatenate((x[:1], result.reshape(-1, EMBED)))


@pytest.mark.parametrize("landmarks", [256, 11, 5])
def test_it_is_what_the_paper_says(landmarks: int) -> None:
    model, bags = make(landmarks=landmarks), random_bags(SIZES, WIDTH)
    w, result = weights_of(model), model(bags)
    assert (result.attention, model.out_dim) == (None, EMBED)
    for bag, x in enumerate(instances_of(bags)):
        x = np.maximum(linear(w, "embed", x), 0)
        missing = math.ceil(len(x) ** 0.5) ** 2 - len(x)
        x = np.concatenate((w["cls"][None], x, x[:missing]))
        x = positioned(w, layer(w, "before", x, landmarks))
        expected = norm(w, "norm", layer(w, "after", x, landmarks)[0])
        np.testing.assert_allclose(result.embedding[bag].detach(), expected, rtol=1e-3, atol=1e-4)


def test_the_square_is_filled_up_with_the_first_instances() -> None:
    rows, offsets = squared(offsets_of(torch.tensor([1, 2, 5, 4])))
    assert offsets.tolist() == [0, 1, 5, 14, 18]
    assert rows.tolist() == [0, *[1, 2, 1, 2], *[3, 4, 5, 6, 7, 3, 4, 5, 6], *[8, 9, 10, 11]]


def test_with_landmarks_no_bag_depends_on_its_batch_mates_and_all_parameters_learn() -> None:
    model, bags = make(landmarks=7), random_bags(SIZES, WIDTH)
    together = model(bags).embedding
    for bag in range(len(SIZES)):
        alone = model(bags.select([bag])).embedding[0]
        torch.testing.assert_close(alone, together[bag], rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(together.square().sum(), list(model.parameters()))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_the_inverse_is_one_where_six_steps_suffice() -> None:
    generator = torch.Generator().manual_seed(0)
    a = (4 * torch.eye(5) + torch.randn(2, 3, 5, 5, generator=generator)).softmax(3).double()
    unit = torch.eye(5, dtype=torch.float64).expand(2, 3, 5, 5)
    torch.testing.assert_close(pseudo_inverse(a) @ a, unit, rtol=0, atol=1e-5)
    torch.testing.assert_close(pseudo_inverse(a)[1, 2], pseudo_inverse(a[1, 2]))


def test_a_landmark_for_each_row_is_exact_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    # Rows that attend to themselves above all: six steps suffice for the inverse.
    q = k = torch.linalg.qr(torch.randn(11, 11, generator=generator, dtype=torch.float64))[0] * 3
    v = torch.randn(11, 13, generator=generator, dtype=torch.float64)
    offsets = offsets_of(torch.tensor([11]))
    result = nystroem(q, k, v, offsets, Padding(offsets), heads=1, landmarks=11)
    expected = attention(q.numpy(), k.numpy(), v.numpy(), 1, 11**-0.5)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor of all operations held."""

    numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.numbers = max(self.numbers, item.numel())
        return result


def test_a_long_bag_needs_no_matrix_of_its_square() -> None:
    model = make(embed=8, heads=2, landmarks=16)
    bags = random_bags([2_500, 3, 2], WIDTH)
    with torch.no_grad(), Largest() as largest:
        embedding = model(bags).embedding
    assert embedding.isfinite().all()
    assert largest.numbers < 33 * 2_560


def theirs_with_our_weights(ours: Aggregator, **options: Any) -> nn.Module:
    """torchmil's model; its attention has no convolution over V and no linear layer after."""
    models = pytest.importorskip("torchmil.models", reason="torchmil is not installed")
    with torch.no_grad():
        for layer in (ours.before, ours.after):
            layer.local.weight.zero_()
            layer.o.weight.copy_(torch.eye(EMBED))
            layer.o.bias.zero_()
    state = ours.state_dict()
    theirs = models.TransMIL(
        in_shape=(WIDTH,),
        att_dim=EMBED,
        feat_ext=nn.Sequential(nn.Linear(WIDTH, EMBED), nn.ReLU()),
        **options,
    )
    renamed = {"feat_ext.0": "embed", "norm": "norm"}
    for number, name in enumerate(("before", "after")):
        renamed[f"layers.{number}.norm1"] = f"{name}.norm"
    renamed |= {"pos_layer.proj": "positions.conv7", "pos_layer.proj1": "positions.conv5"}
    renamed |= {"pos_layer.proj2": "positions.conv3"}
    copied = {f"{a}.{p}": state[f"{b}.{p}"] for a, b in renamed.items() for p in ("weight", "bias")}
    copied["cls_token"] = state["cls"].view(1, 1, -1)
    for number, name in enumerate(("before", "after")):
        copied[f"layers.{number}.att_module.qkv_nn.weight"] = state[f"{name}.qkv.weight"]
    missing, unexpected = theirs.load_state_dict(copied, strict=False)
    unused = {f"layers.{n}.norm2.{p}" for n in (0, 1) for p in ("weight", "bias")}
    assert set(missing) == unused | {"classifier.weight", "classifier.bias"}
    assert not unexpected
    theirs.classifier = nn.Identity()
    return theirs.double().eval()


def difference(ours: Aggregator, theirs: nn.Module, size: int) -> float:
    bags = random_bags([size], WIDTH).to(dtype=torch.float64)
    with torch.no_grad():
        gap = ours.double()(bags).embedding - theirs(bags.values[None])
    return float(gap.abs().max())


@pytest.mark.parametrize("size", [1, 4, 9, 7, 14])
def test_exact_attention_equals_torchmils_with_a_landmark_for_each_token(size: int) -> None:
    ours = make()
    tokens = math.ceil(size**0.5) ** 2 + 1
    # A landmark for each token leaves only the pseudo-inverse between the two, here run to its end.
    # Sizes 7 and 14 repeat instances: their matrix is singular, and rounding errors, others on each
    # processor, grow again after 40 steps (at 60 up to 2e-3, at 80 no finite number is left).
    theirs = theirs_with_our_weights(ours, n_heads=HEADS, n_landmarks=tokens, pinv_iterations=40)
    assert difference(ours, theirs, size) < 1e-9
    # With six steps it has not arrived, and with more landmarks than tokens their zeros count.
    if size > 1:
        for landmarks, steps in ((tokens, 6), (tokens + 3, 40)):
            theirs = theirs_with_our_weights(
                ours, n_heads=HEADS, n_landmarks=landmarks, pinv_iterations=steps
            )
            assert difference(ours, theirs, size) > 1e-5


def test_nystroems_equals_torchmils_where_landmarks_divide_the_tokens() -> None:
    # 9 and 49 instances: 10 and 50 tokens in 5 stretches.
    ours = make(heads=1, landmarks=5)
    theirs = theirs_with_our_weights(ours, n_heads=1, n_landmarks=5)
    assert difference(ours, theirs, 9) < 1e-9
    assert difference(ours, theirs, 49) < 1e-9
    # 17 tokens: theirs begin with three zeros, which are attended to.
    assert difference(ours, theirs, 16) > 1e-3
    # With several heads theirs starts the inverse of each from the largest sums of all.
    several = make(landmarks=5)
    theirs = theirs_with_our_weights(several, n_heads=HEADS, n_landmarks=5)
    assert difference(several, theirs, 9) > 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed": 0}, "option embed: expected a whole number of at least 1, got 0"),
        ({"heads": 2.0}, r"option heads: expected a whole number of at least 1, got 2\.0"),
        ({"landmarks": None}, "option landmarks: expected a whole number of at least 1, got None"),
        (
            {"embed": 13, "heads": 3},
            "option embed: expected a multiple of heads, 3, got 13; give embed=12",
        ),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_aggregator("transmil", in_shape=(WIDTH,), **options)
