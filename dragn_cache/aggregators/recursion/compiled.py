"""Recursions on the CPU at the speed of their arithmetic: rounds of windows in C++.

The C++ (``kernels.cpp``) computes one round: a unit on windows of a few maps, with channels side
by side in a vector, and its gradients. This module goes through the rounds of a batch, DRAGN's or
the levels of HAMIL's trees, forward and backward; `packing` arranges parameters and takes BN's
statistics, `kernels` makes the calls.

- The maps between the rounds are stored for the backward pass; of long bags, whose maps would take
  more than `MAPS_BYTES`, those of every √R-th of R rounds, and the rounds between are computed
  again from these, which gives the same bytes. Hidden maps of a unit are computed
  again, since a convolution is cheaper than writing its maps to memory and reading them back; only
  between BN layers they are kept, as long as they are few (`HIDDEN_BYTES`).
- Without statistics of the batch (no BN, or BN in evaluation mode, which becomes part of the
  convolution) a window passes through the whole unit at once. With them each convolution is done on
  all windows of the round before the next begins.
- Sums over windows are taken block by block of channels, so results do not depend on the number of
  threads, and in evaluation mode a bag's result not on its batch mates. Gradients of weights are
  added to doubles every few windows; BN's sums have the maps' precision within a lane, and the
  lanes are added up in double.

Otherwise (`applies`: a GPU, no compiler) `Dragn` and `Hamil` use PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dragn_cache.aggregators.recursion import kernels
from dragn_cache.aggregators.recursion.packing import Statistics, pack_unit, transposed
from dragn_cache.aggregators.recursion.rounds import Moments, Plan, Round, Schedule
from dragn_cache.aggregators.recursion.units import DragnUnit, NormPass, UnitNorm
from dragn_cache.ragged import RaggedBags

MAPS_BYTES = 2**31  # the most that the maps between the rounds may take, unless some are made twice
HIDDEN_BYTES = 2**29  # the most that hidden maps between BN layers may take until the backward pass


def applies(units: Sequence[DragnUnit], device: torch.device, *, vectors: bool) -> bool:
    """Whether `fold` applies: not on a GPU, without a compiler, or with BN in different modes.

    Nor for parameters on another device or of different dtypes, for which PyTorch has its errors.

    Args:
        device: of the features, which are ``vectors`` or maps.
    """
    parameters = [p for unit in units for p in unit.parameters()]
    dtype = parameters[0].dtype
    modes = {m.training for unit in units for m in unit.modules() if isinstance(m, UnitNorm)}
    return (
        device.type == "cpu"
        and dtype in kernels.REALS
        and all(p.device.type == "cpu" and p.dtype == dtype for p in parameters)
        and len(modes) < 2
        and kernels.kernels(dtype, _kernel_side(units[0], vectors), units[0].instances) is not None
    )


def fold(
    bags: RaggedBags,
    units: Sequence[DragnUnit],
    schedule: Schedule,
    norms: NormPass,
    *,
    shared: bool = True,
) -> Tensor:
    """(B, C): the recursion's results, averaged over pixels.

    Args:
        units: one for each of the first rounds; the last serves the rest.
        norms: takes the statistics of BN in training.
        shared: whether one kernel serves all channels.
    """
    first, rounds = units[0], schedule.rounds
    with_statistics = any(norm.training for norm in first.norms)
    # In evaluation BN's statistics, a part of the convolutions then, differ from round to round.
    tables = 0 if with_statistics or not first.norms else first.norms[0].rounds
    count = min(max(len(units), tables), sum(windows > 0 for windows in schedule.windows))
    used = [units[min(number, len(units) - 1)] for number in range(count)]
    plan = Plan(
        schedule=schedule,
        units=count,
        dtype=first.convolutions[0].weight.dtype,
        channels=bags.in_shape[0],
        inputs=first.instances,
        layers=len(first.convolutions),
        kernel=_kernel_side(first, bags.values.dim() == 2),
        shared=shared,
        batch_norm=with_statistics,
        by_window=norms.by_window,
        eps=first.norms[0].eps if first.norms else 0.0,
    )
    values = bags.values if bags.values.dim() == 4 else bags.values[:, :, None, None]
    packed = [p for number, unit in enumerate(used) for p in pack_unit(unit, plan, number)]
    pooled: Tensor = Recursion.apply(plan, values, *packed)
    for m in plan.moments:
        norm = used[plan.unit_of_round(m.round)].norms[m.layer]
        index = rounds[m.round].loop_index if norms.by_window else torch.empty(0)
        norms.record(norm, m.round, m.mean, m.variance, index)
    return pooled


def needed_bytes(
    units: Sequence[DragnUnit], windows: Sequence[int], in_shape: Sequence[int], *, training: bool
) -> int:
    """About the bytes that DRAGN's rounds of so many windows take; `applies` comes before."""
    first = units[0]
    dtype = first.convolutions[0].weight.dtype
    loaded = kernels.kernels(dtype, _kernel_side(first, len(in_shape) == 1), first.instances)
    assert loaded is not None
    lanes = loaded.blocks(in_shape[0]) * loaded.lanes
    map_bytes = lanes * math.prod(in_shape[1:]) * dtype.itemsize
    ends = 6 * max(windows[0], 1) * map_bytes
    if not training:
        return ends
    step = stride(windows, map_bytes)
    kept = (sum(windows[::step]) + (sum(windows[:step]) if step > 1 else 0)) * map_bytes
    hidden = first.instances * len(first.norms)
    all_hidden = hidden * sum(windows) * map_bytes
    kept_hidden = all_hidden if step == 1 and all_hidden <= HIDDEN_BYTES else 0
    buffers = 2 * hidden * windows[0] * map_bytes
    freed = kept + kept_hidden if step == 1 else sum(windows) * map_bytes
    return ends + 2 * kept + kept_hidden + buffers + min(kernels.SPARE_BYTES, freed)


def stride(windows: Sequence[int], map_bytes: int) -> int:
    """Of every how many rounds the maps are kept for the backward pass: all, or each √R-th."""
    return 1 if sum(windows) * map_bytes <= MAPS_BYTES else math.isqrt(len(windows))


def _kernel_side(unit: DragnUnit, vectors: bool) -> int:
    """The kernel's side in pixels; on vectors only its centre has an effect."""
    return 1 if vectors else unit.convolutions[0].kernel_size[0]


class _Norm(NamedTuple):
    """One BN layer in one round: gamma * inverse * (z - mean) + beta; all (…, G, inputs, …)."""

    values: int
    mean: Tensor
    inverse: Tensor
    gamma: Tensor
    affine: Tensor  # mean, gamma * inverse and beta as one table


class Recursion(torch.autograd.Function):
    """(N, C, h, w) features and packed parameters -> (B, C) pooled results of the recursion."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, values: Tensor, *parameters: Tensor) -> Tensor:
        run = _Run(plan, parameters, tuple(values.shape[2:]))
        pooled, saved = run.forward(values, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(*saved)  # freed after the backward pass, unlike attributes
        ctx.run, ctx.values_shape = run, values.shape
        ctx.values_dtype = values.dtype
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        needs_features = ctx.needs_input_grad[1]
        maps = run.backward(grad.contiguous(), ctx.saved_tensors, needs_features=needs_features)
        features = None
        if maps is not None:
            features = run.restore(maps, ctx.values_shape).to(ctx.values_dtype)
        return None, features, *run.parameter_gradients()


class _Run:
    """One forward pass and its backward pass.

    Args:
        parameters: of all units, as `pack_unit` makes them.
        size: h, w.
    """

    def __init__(self, plan: Plan, parameters: Sequence[Tensor], size: tuple[int, ...]) -> None:
        self.plan, self.size, self.pixels = plan, size, size[0] * size[1]
        self.dtype = plan.dtype
        loaded = kernels.kernels(plan.dtype, plan.kernel, plan.inputs)
        assert loaded is not None  # `applies` comes before
        self.kernels = loaded
        self.blocks = loaded.blocks(plan.channels)
        each = plan.layers + (2 * (plan.layers - 1) if plan.batch_norm else 0)
        self.units = [parameters[k : k + each] for k in range(0, len(parameters), each)]
        self.gradients: list[list[Tensor]] = []
        self.transposed: list[list[Tensor]] = []
        self.statistics = Statistics(plan, self.blocks, loaded.lanes, self.pixels)
        self.norms: list[list[_Norm]] = []  # by round
        self.window_values = self.blocks * plan.inputs * self.pixels * loaded.lanes
        self.most_windows, all_windows = max(plan.windows), sum(plan.windows)
        map_bytes = self.window_values // plan.inputs * self.dtype.itemsize
        self.stride = 1 if plan.one_array else stride(plan.windows, map_bytes)
        window_bytes = map_bytes * plan.inputs * (plan.layers - 1)
        few = all_windows * window_bytes <= HIDDEN_BYTES
        self.keeps_hidden = plan.batch_norm and few and self.stride == 1

    def empty(self, *shape: int) -> Tensor:
        """(blocks, ..., lanes), not initialised."""
        shape = (self.blocks, *shape, self.kernels.lanes)
        return kernels.empty(math.prod(shape), self.dtype).view(shape)

    # forward

    def forward(self, values: Tensor, *, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """(B, C), and with ``keep`` the tensors for `backward`: maps of rounds, hidden maps."""
        maps = self.arrange(values.detach())
        hidden = [] if self.keeps_hidden else self.hidden_buffers(self.most_windows)
        kept, kept_hidden = list[Tensor](), list[Tensor]()
        pooled, bags = [], []
        for number, step in enumerate(self.plan.rounds):
            if len(step.finished):
                bags.append(step.finished)
                pooled.append(self.pool(maps, step.last_rows))
            if keep and number % self.stride == 0:
                kept.append(maps)
            if len(step.members):
                if self.keeps_hidden:
                    hidden = self.hidden_buffers(len(step.members))
                    kept_hidden += hidden if keep else []
                maps = self.fold(maps, number, hidden)
        embedding = torch.cat(pooled).index_select(0, torch.cat(bags).argsort())
        return embedding, kept + kept_hidden

    def arrange(self, values: Tensor) -> Tensor:
        """(N, C, h, w) -> (blocks, N, h w, lanes) in the parameters' dtype.

        With one array for all rounds there is memory for all results behind the features.
        """
        if not self.kernels.reads(values.dtype):
            values = values.to(self.dtype)
        values = values.contiguous()
        results = sum(map(self.result_count, self.plan.rounds)) if self.plan.one_array else 0
        maps = self.empty(len(values) + results, self.pixels)
        name = f"arrange_{kernels.READABLE[values.dtype]}"
        counts = c_int64(len(values)), c_int64(self.plan.channels)
        self.kernels.run(name, self.job(out=maps), c_void_p(values.data_ptr()), *counts)
        return maps

    def pool(self, maps: Tensor, rows: Tensor) -> Tensor:
        """(b, C): the mean of a bag's two last maps, ``rows`` (b, 2), averaged over pixels."""
        pooled = maps[:, rows.flatten()].mean(2).view(self.blocks, len(rows), 2, -1).mean(2)
        return pooled.transpose(0, 1).flatten(1)[:, : self.plan.channels]

    def fold(self, maps: Tensor, number: int, hidden: list[Tensor]) -> Tensor:
        """The array with the results of a round, where ``hidden`` takes its hidden maps with BN."""
        step = self.plan.rounds[number]
        out = maps if self.plan.one_array else self.empty(self.result_count(step), self.pixels)
        job = self.job(maps=maps, out=out, step=step)
        self.set_weights(job, number)
        if not self.plan.batch_norm:
            self.kernels.run("fold", job)
            return out
        for layer, maps_of_layer in enumerate(hidden):
            job.hidden[layer] = maps_of_layer.data_ptr()
        if number < len(self.norms):  # of a round that is computed again
            self.run_hidden(job, number)
        else:
            self.norms.append(self.batch_norms(job, number))
        job.layer = self.plan.layers - 1
        self.kernels.run("layer", job)
        return out

    def run_hidden(self, job: kernels.Job, number: int) -> None:
        """Run all convolutions but the last, by the statistics that the round is known to have."""
        for layer, norm in enumerate(self.norms[number]):
            job.layer = layer
            self.kernels.run("layer", job)
            job.affine[layer] = norm.affine.data_ptr()

    def batch_norms(self, job: kernels.Job, number: int) -> list[_Norm]:
        """Run all convolutions but the last, and take the statistics behind each."""
        norms: list[_Norm] = []
        for layer in range(self.plan.layers - 1):
            moments = self.empty(self.groups(job), 2, self.plan.inputs)
            job.layer, job.moments = layer, moments.data_ptr()
            self.kernels.run("layer", job)
            job.moments = None
            mean, variance = self.statistics.moments(
                moments[:, :, 0], moments[:, :, 1], job.windows
            )
            norms.append(self.normalisation(layer, number, mean, variance))
            job.affine[layer] = norms[layer].affine.data_ptr()
        return norms

    def normalisation(self, layer: int, number: int, mean: Tensor, variance: Tensor) -> _Norm:
        """BN by these statistics, which the plan keeps for the running ones."""
        count = self.statistics.count(self.plan.windows[number])
        inverse = (variance + self.plan.eps).rsqrt()
        self.plan.moments.append(
            Moments(
                layer,
                number,
                self.statistics.by_channel(mean),
                self.statistics.by_channel(variance) * (count / (count - 1)),
            )
        )
        gamma, beta = (p.double()[:, None] for p in self.bn_part(self.units, number, layer))
        affine = self.table(mean, gamma * inverse, beta)
        return _Norm(count, mean, inverse, gamma, affine)

    # backward

    def backward(
        self, grad: Tensor, saved: Sequence[Tensor], *, needs_features: bool
    ) -> Tensor | None:
        """Gradients of the features as maps; those of the units are in `gradients` afterwards."""
        self.start_gradients()
        kept_hidden = saved[-(-len(self.plan.rounds) // self.stride) :]
        maps_of_round: list[Tensor] = []  # of the last rounds whose maps are there
        hidden = [] if self.keeps_hidden else self.hidden_buffers(self.most_windows)
        grad_hidden = self.hidden_buffers(self.most_windows)
        count = len(grad_hidden)
        grad_results: Tensor | None = None
        for number in reversed(range(len(self.plan.rounds))):
            step, grad_maps = self.plan.rounds[number], None
            if not maps_of_round:
                maps_of_round = self.computed_again(saved, number, hidden)
            maps = maps_of_round.pop()
            if number or needs_features:
                same = self.plan.one_array and grad_results is not None
                grad_maps = grad_results if same else self.empty(*maps.shape[1:3]).zero_()
                assert grad_maps is not None
                if len(step.finished):
                    self.pool_backward(grad[step.finished], step.last_rows, grad_maps)
            if len(step.members):
                assert grad_results is not None
                job = self.job(maps=maps, grad_out=grad_results, step=step)
                job.grad_maps = None if grad_maps is None else grad_maps.data_ptr()
                self.set_weights(job, number, backward=True)
                if self.keeps_hidden:
                    hidden = list(kept_hidden[number * count : (number + 1) * count])
                self.fold_backward(job, number, hidden, grad_hidden)
            grad_results = grad_maps
        return grad_results

    def computed_again(
        self, saved: Sequence[Tensor], last: int, hidden: list[Tensor]
    ) -> list[Tensor]:
        """The maps of the rounds from the one before ``last``, or itself, that are kept, to it."""
        first = last - last % self.stride
        maps = [saved[first // self.stride]]
        for number in range(first, last):
            maps.append(self.fold(maps[-1], number, hidden))
        return maps

    def pool_backward(self, grad: Tensor, rows: Tensor, grad_maps: Tensor) -> None:
        """Add the gradients (b, C) of pooled results to those of the bags' last maps (b, 2)."""
        missing = self.blocks * self.kernels.lanes - self.plan.channels
        lanes = nn.functional.pad(grad.to(self.dtype), (0, missing)) / (2 * self.pixels)
        lanes = lanes.view(len(grad), self.blocks, 1, -1).transpose(0, 1)  # (blocks, b, 1, lanes)
        for column in rows.T:
            grad_maps.index_add_(1, column, lanes.expand(-1, -1, self.pixels, -1))

    def fold_backward(
        self, job: kernels.Job, number: int, hidden: list[Tensor], grad_hidden: list[Tensor]
    ) -> None:
        """Gradients of one round; with BN convolution by convolution."""
        if not self.plan.batch_norm:
            self.kernels.run("fold_backward", job)
            return
        for layer, norm in enumerate(self.norms[number]):
            job.hidden[layer] = hidden[layer].data_ptr()
            job.grad_hidden[layer] = grad_hidden[layer].data_ptr()
            if not self.keeps_hidden:
                job.layer = layer
                self.kernels.run("layer", job)
            job.affine[layer] = norm.affine.data_ptr()
        tables = [
            self.layer_backward(job, layer, number) for layer in reversed(range(self.plan.layers))
        ]
        del tables  # alive until here, since the job has their addresses

    def layer_backward(self, job: kernels.Job, layer: int, number: int) -> list[Tensor]:
        """One convolution's gradients, then those of the BN before it: tables of the job."""
        job.layer = layer
        if layer == 0:
            self.kernels.run("layer_backward", job)
            return []
        norm = self.norms[number][layer - 1]
        sums = self.empty(self.groups(job), 2, self.plan.inputs)
        job.sums = sums.data_ptr()
        self.kernels.run("layer_backward", job)
        plain = self.statistics.total(sums[:, :, 0])
        scaled = self.statistics.total(sums[:, :, 1]) * norm.inverse
        of_gamma, of_beta = self.bn_part(self.gradients, number, layer - 1)
        of_gamma += scaled.sum(1)
        of_beta += plain.sum(1)
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
        """Set the gradients of every unit to 0, and transpose its weights for those of the maps."""
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
                    transposed(p, self.plan, 1 if layer == last else self.plan.inputs)
                    for layer, p in enumerate(convolutions)
                ]
            )

    def parameter_gradients(self) -> list[Tensor]:
        """Gradients of all packed parameters, in their order and dtype."""
        summed = []
        for unit, gradients in zip(self.units, self.gradients, strict=True):
            for parameter, gradient in zip(unit, gradients, strict=True):
                if len(gradient) > len(parameter):  # one kernel for all channels
                    gradient = gradient.sum(0, keepdim=True)
                summed.append(gradient.to(self.dtype))
        return summed

    def restore(self, maps: Tensor, shape: Sequence[int]) -> Tensor:
        """(blocks, N or more, h w, lanes) -> (N, C, h, w)."""
        values = torch.empty(tuple(shape), dtype=self.dtype)
        counts = c_int64(shape[0]), c_int64(self.plan.channels)
        self.kernels.run("restore", self.job(maps=maps), c_void_p(values.data_ptr()), *counts)
        return values

    # jobs

    def job(
        self,
        *,
        maps: Tensor | None = None,
        out: Tensor | None = None,
        grad_out: Tensor | None = None,
        step: Round | None = None,
    ) -> kernels.Job:
        """A job on these arrays; in ``out`` or ``grad_out`` results begin at the step's first."""
        job = kernels.Job()
        job.blocks, (job.h, job.w) = self.blocks, self.size
        job.layers, job.grouped = self.plan.layers, int(self.plan.by_window)
        job.orders = self.plan.orders
        if maps is not None:
            job.maps, job.rows = maps.data_ptr(), maps.shape[1]
        first = 0
        if step is not None:
            job.members, job.windows = step.members.data_ptr(), len(step.members)
            first = step.first_result * self.pixels * self.kernels.lanes * self.dtype.itemsize
        for name, results in (("out", out), ("grad_out", grad_out)):
            if results is not None:
                setattr(job, name, results.data_ptr() + first)
                job.out_rows = results.shape[1]
        return job

    def result_count(self, step: Round) -> int:
        """The number of maps that a round results in."""
        return len(step.members) // self.plan.orders

    def groups(self, job: kernels.Job) -> int:
        """The number of groups of windows that BN normalises, each by itself."""
        return job.windows if self.plan.by_window else 1

    def bn_part(
        self, of_units: Sequence[Sequence[Tensor]], number: int, layer: int
    ) -> Sequence[Tensor]:
        """Of a round's unit the two tensors for BN's weights and biases behind a convolution."""
        first = self.plan.layers + 2 * layer
        return of_units[self.plan.unit_of_round(number)][first : first + 2]

    def set_weights(self, job: kernels.Job, number: int, *, backward: bool = False) -> None:
        """Point a job to the weights of a round's unit, and to their gradients for ``backward``."""
        unit = self.plan.unit_of_round(number)
        for layer in range(self.plan.layers):
            packed, target = self.units[unit][layer], job.layer_of[layer]
            target.outputs = 1 if layer == self.plan.layers - 1 else self.plan.inputs
            target.weights = packed.data_ptr()
            target.stride = 0 if self.plan.shared else packed.shape[1]
            if backward:
                target.transposed = self.transposed[unit][layer].data_ptr()
                target.gradients = self.gradients[unit][layer].data_ptr()

    def hidden_buffers(self, windows: int) -> list[Tensor]:
        """Memory for the maps of each convolution with BN behind it, on so many windows."""
        count = self.plan.layers - 1 if self.plan.batch_norm else 0
        return [kernels.empty(windows * self.window_values, self.dtype) for _ in range(count)]

    def table(self, *values: Tensor) -> Tensor:
        """(…, G, inputs, …) each -> (blocks, G, values, inputs, lanes)."""
        groups = max(value.shape[1] for value in values)
        shape = (self.blocks, groups, self.plan.inputs, self.kernels.lanes)
        return torch.stack([v.expand(shape) for v in values], 2).to(self.dtype).contiguous()
