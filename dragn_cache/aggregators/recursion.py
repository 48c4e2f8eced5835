"""DRAGN's recursion on the CPU at the speed of its arithmetic: rounds of windows in C++.

The C++ (``recursion.cpp``) knows one round: a unit on windows of three maps, with channels side by
side in a vector, and its gradients. This module arranges maps and weights for it, goes through the
rounds of a batch forward and backward, and takes the statistics of batch normalisation.

- What is stored for the backward pass are the maps between the rounds; hidden maps inside a unit
  are computed again, three convolutions being cheaper than six maps there and back.
- Without batch statistics to wait for (no BN, or BN in evaluation mode, which is folded into the
  convolution) a window passes through the whole unit at once. With them every convolution meets all
  windows of the round before the next begins.
- Sums over windows are taken block by block of channels, so results do not depend on the number of
  threads, and in evaluation mode a bag's not on its batch mates. Gradients of weights go into
  doubles every few windows; BN's sums keep the maps' precision in a lane and are joined in double.

Where this does not apply (a GPU, no compiler, ``full`` mixing) `Dragn` uses PyTorch.
"""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import wait as wait_for
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dragn_cache import native

SOURCE = Path(__file__).with_suffix(".cpp")
REALS = {torch.float32: "float", torch.float64: "double"}
READABLE = {
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
}
ALIGNMENT = 64  # bytes
SPARE_BYTES = 2**30  # kept from one step to the next
HIDDEN_BYTES = 2**29  # up to so much, hidden maps between BN layers are kept for the backward pass
INPUTS = 3  # maps of a window, and hidden maps of a unit


class Step(NamedTuple):
    """One round: what leaves, and what is folded by which unit (int64, on the host)."""

    done: Tensor  # (b,) bags that leave
    ends: Tensor  # (b, 2) their first and last row
    starts: Tensor  # (W,) first row of each window
    unit: int


class Moments(NamedTuple):
    """What one BN layer saw in one round, over G groups (1, or the windows), K channels of BN."""

    unit: int
    layer: int
    step: int
    values: int  # how many a group and channel had
    mean: Tensor  # (G, K)
    variance: Tensor  # (G, K), unbiased


@dataclass
class Plan:
    """What a pass does, apart from its numbers."""

    steps: Sequence[Step]
    dtype: torch.dtype
    channels: int
    layers: int
    kernel: int
    shared: bool  # one kernel for all channels
    batch_norm: bool  # with statistics of this batch
    by_window: bool
    eps: float
    moments: list[Moments] = field(default_factory=list)


class _Layer(ctypes.Structure):
    _fields_ = (
        ("weights", c_void_p),
        ("transposed", c_void_p),
        ("gradients", c_void_p),
        ("stride", c_int64),
        ("outputs", c_int64),
    )


class _Job(ctypes.Structure):
    _fields_ = (
        ("next", c_int64),
        ("blocks", c_int64),
        ("rows", c_int64),
        ("windows", c_int64),
        ("h", c_int64),
        ("w", c_int64),
        ("layers", c_int64),
        ("layer", c_int64),
        ("grouped", c_int64),
        ("starts", c_void_p),
        ("maps", c_void_p),
        ("out", c_void_p),
        ("hidden", c_void_p * 2),
        ("affine", c_void_p * 2),
        ("moments", c_void_p),
        ("grad_out", c_void_p),
        ("grad_maps", c_void_p),
        ("grad_hidden", c_void_p * 2),
        ("backward", c_void_p * 2),
        ("sums", c_void_p),
        ("layer_of", _Layer * 3),
    )


class Kernels:
    """The compiled library for one dtype and kernel size."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.lanes.restype = c_int64
        self.lanes: int = library.lanes()

    def blocks(self, channels: int) -> int:
        return -(-channels // self.lanes)

    def reads(self, dtype: torch.dtype) -> bool:
        """Whether features of a dtype need no conversion first (float16 needs its compiler)."""
        return dtype in READABLE and hasattr(self._library, f"arrange_{READABLE[dtype]}")

    def run(self, name: str, job: _Job, *more: Any) -> None:
        """Run a function of the library on all threads that PyTorch would use."""
        function = getattr(self._library, name)
        job.next = 0
        count = min(torch.get_num_threads(), job.blocks)
        arguments = (ctypes.byref(job), *more)
        pool = native.threads(max(1, torch.get_num_threads() - 1), os.getpid())
        others = [pool.submit(function, *arguments) for _ in range(count - 1)]
        try:
            function(*arguments)
        finally:  # even after Ctrl-C: what they write to must not be let go before
            wait_for(others)


@cache
def kernels(dtype: torch.dtype, kernel: int) -> Kernels | None:
    """The library for a dtype and kernel size, or None where it cannot be compiled."""
    library = native.load_library(SOURCE, f"REAL={REALS[dtype]}", f"KERNEL={kernel}")
    return None if library is None else Kernels(library)


def empty(count: int, dtype: torch.dtype) -> Tensor:
    """(count,) aligned for the widest vectors, not initialised.

    Memory that was let go is used again, up to `SPARE_BYTES`: every step of training needs about
    the same, and taking hold of new pages would cost as much as the arithmetic.
    """
    size = torch.empty((), dtype=dtype).element_size() * count
    raw = _take_spare(size + ALIGNMENT)
    start = -raw.ctypes.data % ALIGNMENT
    piece = raw[start : start + size]
    weakref.finalize(piece, _let_go, raw)
    return torch.from_numpy(piece).view(dtype)


_SPARE: dict[int, NDArray[np.uint8]] = {}
"""By address. Memory is let go at any moment, in any thread; taking or giving is one step."""


def _take_spare(size: int) -> NDArray[np.uint8]:
    for address, spare in list(_SPARE.items()):
        if size <= spare.nbytes <= 2 * size and _SPARE.pop(address, None) is not None:
            return spare
    return np.empty(size, np.uint8)


def _let_go(raw: NDArray[np.uint8]) -> None:
    _SPARE[raw.ctypes.data] = raw
    spares = list(_SPARE.items())
    kept = sum(spare.nbytes for _, spare in spares)
    for address, spare in spares:  # the oldest first
        if kept > SPARE_BYTES and _SPARE.pop(address, None) is not None:
            kept -= spare.nbytes


# --- parameters in lanes -------------------------------------------------------------------------


def pack_unit(unit: Any, plan: Plan) -> list[Tensor]:
    """A `DragnUnit`'s parameters as `_Run` takes them, gradients reaching the unit's own."""
    found = kernels(plan.dtype, plan.kernel)
    assert found is not None
    packed, norms = [], unit.norms
    for layer, conv in enumerate(unit.convolutions):
        weight, bias = conv.weight, conv.bias
        if plan.kernel == 1:
            centre = weight.shape[-1] // 2
            weight = weight[:, :, centre : centre + 1, centre : centre + 1]
        if layer < len(norms) and not plan.batch_norm:  # by fixed statistics: a scale and a shift
            norm = norms[layer]
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            weight = weight * scale[:, None, None, None]
            bias = (bias - norm.running_mean) * scale + norm.bias
        packed.append(pack_conv(weight, bias, plan, found.lanes))
    if plan.batch_norm:
        for norm in norms:
            packed += [pack_norm(p, plan, found.lanes) for p in (norm.weight, norm.bias)]
    return packed


def pack_conv(weight: Tensor, bias: Tensor, plan: Plan, lanes: int) -> Tensor:
    """A convolution's (K, 3, k, k) weights and (K,) biases as (1 or blocks, values, lanes)."""
    if plan.shared:
        flat = torch.cat((weight.permute(1, 2, 3, 0).flatten(), bias))
        return flat[None, :, None].expand(1, -1, lanes).contiguous()
    own = weight.reshape(plan.channels, -1, *weight.shape[1:]).permute(0, 2, 3, 4, 1).flatten(1)
    return _in_lanes(torch.cat((own, bias.view(plan.channels, -1)), 1), lanes)


def pack_norm(values: Tensor, plan: Plan, lanes: int) -> Tensor:
    """BN's (K,) weights or biases as (1 or blocks, 3, 1 or lanes)."""
    if plan.shared:
        return values[None, :, None]
    return _in_lanes(values.view(plan.channels, INPUTS), lanes)


def _in_lanes(values: Tensor, lanes: int) -> Tensor:
    """(C, P) -> (blocks, P, lanes); what is missing in the last block is 0."""
    missing = -len(values) % lanes
    padded = nn.functional.pad(values, (0, 0, 0, missing))
    return padded.view(-1, lanes, values.shape[1]).transpose(1, 2).contiguous()


def _transposed(packed: Tensor, kernel: int, outputs: int) -> Tensor:
    """The weights by which gradients go back, in as many values as ``packed``."""
    count = INPUTS * kernel * kernel * outputs
    shape = (len(packed), INPUTS, kernel, kernel, outputs, packed.shape[2])
    weights = packed[:, :count].reshape(shape)
    turned = weights.flip(2, 3).permute(0, 4, 2, 3, 1, 5).flatten(1, 4)
    return torch.cat((turned, packed[:, count:]), 1).contiguous()


# --- statistics ----------------------------------------------------------------------------------


class Statistics:
    """Sums over what one channel of BN sees: (blocks, groups, K, lanes) to broadcastable ones."""

    def __init__(self, plan: Plan, blocks: int, lanes: int, pixels: int) -> None:
        self.plan, self.pixels = plan, pixels
        valid = torch.arange(blocks * lanes).view(blocks, 1, 1, lanes) < plan.channels
        self.valid = valid.double()

    def count(self, windows: int) -> int:
        """Values of one group and channel."""
        rows = 1 if self.plan.by_window else windows
        return self.pixels * rows * (self.plan.channels if self.plan.shared else 1)

    def total(self, values: Tensor) -> Tensor:
        """Sums in double precision, over channels where they share a kernel."""
        values = values.double() * self.valid
        return values.sum((0, 3), keepdim=True) if self.plan.shared else values

    def moments(self, mean: Tensor, squares: Tensor, windows: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance from those of every lane."""
        each = self.pixels * (1 if self.plan.by_window else windows)
        count = self.count(windows)
        whole = self.total(mean.double() * each) / count
        spread = self.total(squares.double() + each * (mean.double() - whole) ** 2)
        return whole, spread / count

    def by_channel(self, values: Tensor) -> Tensor:
        """(1 or blocks, G, 3, 1 or lanes) -> (G, K), in the order of BN's channels."""
        flat = values.permute(1, 0, 3, 2).flatten(1, 2)
        return flat[:, : 1 if self.plan.shared else self.plan.channels].flatten(1)


class _Norm(NamedTuple):
    """One BN layer in one round: gamma * inverse * (z - mean) + beta; all (…, G, 3, …)."""

    values: int
    mean: Tensor
    inverse: Tensor
    gamma: Tensor
    affine: Tensor  # the table that says so


# --- the pass ------------------------------------------------------------------------------------


class Recursion(torch.autograd.Function):
    """(N, C, h, w) features and packed parameters -> (B, C) pooled results of the recursion."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, values: Tensor, *parameters: Tensor) -> Tensor:
        run = _Run(plan, parameters, tuple(values.shape[2:]))
        keep = any(ctx.needs_input_grad)
        pooled = run.forward(values, keep)
        ctx.run, ctx.values_shape = run, values.shape
        ctx.values_dtype = values.dtype
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        features = run.backward(grad.contiguous(), needs_features=ctx.needs_input_grad[1])
        if features is not None:
            features = features.view(ctx.values_shape).to(ctx.values_dtype)
        return None, features, *run.parameter_gradients()


class _Run:
    """One forward pass and its backward pass.

    Args:
        parameters: for each unit: its packed convolutions, then BN's packed weights and biases,
            layer by layer, if the batch's statistics are taken.
        size: h, w.
    """

    def __init__(self, plan: Plan, parameters: Sequence[Tensor], size: tuple[int, ...]) -> None:
        self.plan, self.size, self.pixels = plan, size, size[0] * size[1]
        self.dtype = plan.dtype
        found = kernels(self.dtype, plan.kernel)
        assert found is not None  # `Dragn` asked before
        self.kernels = found
        self.blocks = found.blocks(plan.channels)
        each = plan.layers + (2 * (plan.layers - 1) if plan.batch_norm else 0)
        self.units = [parameters[k : k + each] for k in range(0, len(parameters), each)]
        self.gradients: list[list[Tensor]] = []
        self.transposed: list[list[Tensor]] = []
        self.statistics = Statistics(plan, self.blocks, found.lanes, self.pixels)
        self.maps: list[Tensor] = []
        self.norms: dict[int, list[_Norm]] = {}

        self.hidden: dict[int, list[Tensor]] = {}
        windows = [len(step.starts) for step in plan.steps]
        self.window_values = self.blocks * INPUTS * self.pixels * found.lanes
        self.most_windows = max(windows)
        each_bytes = self.window_values * (plan.layers - 1) * self.dtype.itemsize
        self.keeps_hidden = plan.batch_norm and sum(windows) * each_bytes <= HIDDEN_BYTES

    def new(self, *shape: int) -> Tensor:
        """(blocks, ..., lanes), not initialised."""
        shape = (self.blocks, *shape, self.kernels.lanes)
        return empty(math.prod(shape), self.dtype).view(shape)

    # forward

    def forward(self, values: Tensor, keep: bool) -> Tensor:
        maps = self.arrange(values.detach())
        room = [] if self.keeps_hidden else self.rooms(self.most_windows)
        pooled, owners = [], []
        for number, step in enumerate(self.plan.steps):
            if len(step.done):
                owners.append(step.done)
                pooled.append(self.pool(maps, step.ends))
            if keep:
                self.maps.append(maps)
            if len(step.starts):
                hidden = self.rooms(len(step.starts)) if self.keeps_hidden else room
                if keep and self.keeps_hidden:
                    self.hidden[number] = hidden
                maps = self.fold(maps, step, number, hidden)
        return torch.cat(pooled).index_select(0, torch.cat(owners).argsort())

    def arrange(self, values: Tensor) -> Tensor:
        """(N, C, h, w) -> (blocks, N, h w, lanes) in the parameters' dtype."""
        if not self.kernels.reads(values.dtype):
            values = values.to(self.dtype)
        values = values.contiguous()
        maps = self.new(len(values), self.pixels)
        job = self.job(rows=len(values), out=maps)
        name = f"arrange_{READABLE[values.dtype]}"
        self.kernels.run(name, job, c_void_p(values.data_ptr()), c_int64(self.plan.channels))
        return maps

    def pool(self, maps: Tensor, ends: Tensor) -> Tensor:
        """(b, C): the mean of a bag's two maps (one map twice where it has one), pooled."""
        pooled = maps[:, ends.flatten()].mean(2).view(self.blocks, len(ends), 2, -1).mean(2)
        return pooled.transpose(0, 1).flatten(1)[:, : self.plan.channels]

    def fold(self, maps: Tensor, step: Step, number: int, hidden: list[Tensor]) -> Tensor:
        out = self.new(len(step.starts), self.pixels)
        job = self.job(rows=maps.shape[1], maps=maps, out=out, starts=step.starts)
        self.set_weights(job, step.unit)
        if not self.plan.batch_norm:
            self.kernels.run("fold", job)
            return out
        for layer, maps_of_layer in enumerate(hidden):
            job.hidden[layer] = maps_of_layer.data_ptr()
        self.norms[number] = self.batch_norms(job, step, number)
        job.layer = self.plan.layers - 1
        self.kernels.run("layer", job)
        return out

    def batch_norms(self, job: _Job, step: Step, number: int) -> list[_Norm]:
        """Run all convolutions but the last, and take the statistics behind each."""
        norms: list[_Norm] = []
        groups = len(step.starts) if self.plan.by_window else 1
        for layer in range(self.plan.layers - 1):
            moments = self.new(groups, 2, INPUTS)
            job.layer, job.moments = layer, moments.data_ptr()
            self.kernels.run("layer", job)
            job.moments = None
            mean, variance = self.statistics.moments(
                moments[:, :, 0], moments[:, :, 1], len(step.starts)
            )
            norms.append(self.normalisation(layer, step, number, mean, variance))
            job.affine[layer] = norms[layer].affine.data_ptr()
        return norms

    def normalisation(
        self, layer: int, step: Step, number: int, mean: Tensor, variance: Tensor
    ) -> _Norm:
        count = self.statistics.count(len(step.starts))
        if count == 1:  # as PyTorch says it
            raise ValueError("Expected more than 1 value per channel when training, got 1")
        inverse = (variance + self.plan.eps).rsqrt()
        self.plan.moments.append(
            Moments(
                step.unit,
                layer,
                number,
                count,
                self.statistics.by_channel(mean),
                self.statistics.by_channel(variance) * (count / (count - 1)),
            )
        )
        gamma, beta = (
            self.units[step.unit][self.plan.layers + 2 * layer + k].double()[:, None]
            for k in (0, 1)
        )
        affine = self.table(mean, gamma * inverse, beta)
        return _Norm(count, mean, inverse, gamma, affine)

    # backward

    def backward(self, grad: Tensor, *, needs_features: bool) -> Tensor | None:
        self.start_gradients()
        hidden = [] if self.keeps_hidden else self.rooms(self.most_windows)
        gradients = self.rooms(self.most_windows)
        above: Tensor | None = None
        for number in reversed(range(len(self.plan.steps))):
            step, maps, below = self.plan.steps[number], self.maps[number], None
            if number or needs_features:
                below = self.new(*maps.shape[1:3]).zero_()
                if len(step.done):
                    self.unpool(grad[step.done], step.ends, below)
            if len(step.starts):
                assert above is not None
                job = self.job(rows=maps.shape[1], maps=maps, starts=step.starts)
                job.grad_out = above.data_ptr()
                job.grad_maps = None if below is None else below.data_ptr()
                self.set_weights(job, step.unit, backward=True)
                if self.plan.batch_norm:
                    self.unfold(job, number, self.hidden.get(number, hidden), gradients)
                else:
                    self.kernels.run("fold_backward", job)
            above = below
        if above is None:
            return None
        return self.restore(above)

    def unpool(self, grad: Tensor, ends: Tensor, below: Tensor) -> None:
        missing = self.blocks * self.kernels.lanes - self.plan.channels
        lanes = nn.functional.pad(grad.to(self.dtype), (0, missing)) / (2 * self.pixels)
        lanes = lanes.view(len(grad), self.blocks, 1, -1).transpose(0, 1)  # (blocks, b, 1, lanes)
        for end in (0, 1):
            below.index_add_(1, ends[:, end], lanes.expand(-1, -1, self.pixels, -1))

    def unfold(self, job: _Job, number: int, hidden: list[Tensor], gradients: list[Tensor]) -> None:
        """Gradients of one round with BN, convolution by convolution."""
        step, norms = self.plan.steps[number], self.norms[number]
        for layer, norm in enumerate(norms):
            job.hidden[layer] = hidden[layer].data_ptr()
            job.grad_hidden[layer] = gradients[layer].data_ptr()
            if not self.keeps_hidden:
                job.layer = layer
                self.kernels.run("layer", job)
            job.affine[layer] = norm.affine.data_ptr()
        kept = [
            self.layer_backward(job, layer, norms, step)
            for layer in reversed(range(self.plan.layers))
        ]
        del kept  # what the job pointed to

    def layer_backward(self, job: _Job, layer: int, norms: list[_Norm], step: Step) -> list[Tensor]:
        """One convolution's gradients, and then those of the BN before it."""
        job.layer = layer
        if layer == 0:
            self.kernels.run("layer_backward", job)
            return []
        norm, groups = norms[layer - 1], len(step.starts) if self.plan.by_window else 1
        sums = self.new(groups, 2, INPUTS)
        job.sums = sums.data_ptr()
        self.kernels.run("layer_backward", job)
        plain = self.statistics.total(sums[:, :, 0])
        scaled = self.statistics.total(sums[:, :, 1]) * norm.inverse
        own = self.gradients[step.unit][self.plan.layers + 2 * (layer - 1) :]
        own[0] += scaled.sum(1)
        own[1] += plain.sum(1)
        scale = norm.gamma * norm.inverse
        valid = self.statistics.valid
        table = self.table(
            scale,
            -scale * norm.inverse * scaled / norm.values * valid,
            norm.mean,
            -scale * plain / norm.values * valid,
        )
        job.backward[layer - 1] = table.data_ptr()
        return [sums, table]

    def start_gradients(self) -> None:
        """Room for the gradients of every unit, and its weights as gradients go back through."""
        self.gradients, self.transposed = [], []
        for unit in self.units:
            convolutions, norms = unit[: self.plan.layers], unit[self.plan.layers :]
            self.gradients.append(
                [p.new_zeros(self.blocks, *p.shape[1:], dtype=torch.float64) for p in convolutions]
                + [torch.zeros_like(p, dtype=torch.float64) for p in norms]
            )
            last = self.plan.layers - 1
            self.transposed.append(
                [
                    _transposed(p, self.plan.kernel, 1 if layer == last else INPUTS)
                    for layer, p in enumerate(convolutions)
                ]
            )

    def parameter_gradients(self) -> list[Tensor]:
        found = []
        for unit, gradients in zip(self.units, self.gradients, strict=True):
            for parameter, gradient in zip(unit, gradients, strict=True):
                if len(gradient) > len(parameter):  # one kernel for all channels
                    gradient = gradient.sum(0, keepdim=True)
                found.append(gradient.to(self.dtype))
        return found

    def restore(self, maps: Tensor) -> Tensor:
        """(blocks, N, h w, lanes) -> (N, C, h w)."""
        values = torch.empty((maps.shape[1], self.plan.channels, self.pixels), dtype=self.dtype)
        job = self.job(rows=maps.shape[1], maps=maps)
        self.kernels.run("restore", job, c_void_p(values.data_ptr()), c_int64(self.plan.channels))
        return values

    # jobs

    def job(
        self,
        *,
        rows: int,
        maps: Tensor | None = None,
        out: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> _Job:
        job = _Job()
        job.blocks, job.rows, (job.h, job.w) = self.blocks, rows, self.size
        job.layers, job.grouped = self.plan.layers, int(self.plan.by_window)
        job.maps = None if maps is None else maps.data_ptr()
        job.out = None if out is None else out.data_ptr()
        if starts is not None:
            job.starts, job.windows = starts.data_ptr(), len(starts)
        return job

    def set_weights(self, job: _Job, unit: int, *, backward: bool = False) -> None:
        for layer in range(self.plan.layers):
            packed, target = self.units[unit][layer], job.layer_of[layer]
            target.outputs = 1 if layer == self.plan.layers - 1 else INPUTS
            target.weights = packed.data_ptr()
            target.stride = 0 if self.plan.shared else packed.shape[1]
            if backward:
                target.transposed = self.transposed[unit][layer].data_ptr()
                target.gradients = self.gradients[unit][layer].data_ptr()

    def rooms(self, windows: int) -> list[Tensor]:
        """For each convolution with BN behind it, room for its maps on so many windows."""
        count = self.plan.layers - 1 if self.plan.batch_norm else 0
        return [empty(windows * self.window_values, self.dtype) for _ in range(count)]

    def table(self, *values: Tensor) -> Tensor:
        """(…, G, 3, …) each -> (blocks, G, values, 3, lanes)."""
        groups = max(value.shape[1] for value in values)
        shape = (self.blocks, groups, INPUTS, self.kernels.lanes)
        return torch.stack([v.expand(shape) for v in values], 2).to(self.dtype).contiguous()
