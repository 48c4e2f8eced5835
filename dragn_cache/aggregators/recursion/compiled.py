"""Recursions on the CPU at the speed of their arithmetic: rounds of windows in C++.

The C++ (``kernels.cpp``) knows one round: a unit on windows of a few maps, with channels side by
side in a vector, and its gradients. This module goes through the rounds of a batch, DRAGN's or the
levels of HAMIL's trees, forward and backward; `lanes` arranges parameters and takes BN's
statistics, `simd` makes the calls.

- What is stored for the backward pass are the maps between the rounds; hidden maps inside a unit
  are computed again, convolutions being cheaper than maps there and back.
- Without batch statistics to wait for (no BN, or BN in evaluation mode, which is folded into the
  convolution) a window passes through the whole unit at once. With them every convolution meets all
  windows of the round before the next begins.
- Sums over windows are taken block by block of channels, so results do not depend on the number of
  threads, and in evaluation mode a bag's not on its batch mates. Gradients of weights go into
  doubles every few windows; BN's sums keep the maps' precision in a lane and are joined in double.

Where this does not apply (`applies`: a GPU, no compiler) `Dragn` and `Hamil` use PyTorch.
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
from dragn_cache.aggregators.recursion.rounds import Moments, Plan, Round
from dragn_cache.aggregators.recursion.units import DragnUnit, NormPass, UnitNorm
from dragn_cache.ragged import RaggedBags

HIDDEN_BYTES = 2**29  # up to so much, hidden maps between BN layers are kept for the backward pass


def applies(units: Sequence[DragnUnit], bags: RaggedBags) -> bool:
    """Whether `fold` can do it: not on a GPU, without a compiler, or with BN in different modes.

    Where parameters are elsewhere or of different dtypes, PyTorch says so.
    """
    parameters = [p for unit in units for p in unit.parameters()]
    dtype = parameters[0].dtype
    modes = {m.training for unit in units for m in unit.modules() if isinstance(m, UnitNorm)}
    return (
        bags.values.device.type == "cpu"
        and dtype in kernels.REALS
        and all(p.device.type == "cpu" and p.dtype == dtype for p in parameters)
        and len(modes) < 2
        and kernels.kernels(dtype, _kernel(units[0], bags), units[0].instances) is not None
    )


def fold(
    bags: RaggedBags,
    units: Sequence[DragnUnit],
    rounds: Sequence[Round],
    norms: NormPass,
    *,
    shared: bool = True,
    by_window: bool = False,
    orders: int = 1,
    grows: bool = False,
) -> Tensor:
    """(B, C): the recursion's results, averaged over pixels; see `Plan` for the options."""
    first = units[0]
    plan = Plan(
        rounds=rounds,
        units=len(units),
        dtype=first.convolutions[0].weight.dtype,
        channels=bags.in_shape[0],
        inputs=first.instances,
        layers=len(first.convolutions),
        kernel=_kernel(first, bags),
        shared=shared,
        batch_norm=any(norm.training for norm in first.norms),
        by_window=by_window,
        eps=first.norms[0].eps if first.norms else 0.0,
        orders=orders,
        grows=grows,
    )
    used = units[: min(len(units), sum(len(step.members) > 0 for step in rounds))]
    values = bags.values if bags.values.dim() == 4 else bags.values[:, :, None, None]
    packed = [p for unit in used for p in pack_unit(unit, plan)]
    pooled: Tensor = Recursion.apply(plan, values, *packed)
    for m in plan.moments:
        norm = used[plan.unit(m.round)].norms[m.layer]
        norms.record(norm, m.values, m.mean, m.variance, rounds[m.round].turns)
    return pooled


def _kernel(unit: DragnUnit, bags: RaggedBags) -> int:
    """The kernel's side; on vectors its centre is all that works."""
    return 1 if bags.values.dim() == 2 else unit.convolutions[0].kernel_size[0]


class _Norm(NamedTuple):
    """One BN layer in one round: gamma * inverse * (z - mean) + beta; all (…, G, inputs, …)."""

    values: int
    mean: Tensor
    inverse: Tensor
    gamma: Tensor
    affine: Tensor  # the table that says so


class Recursion(torch.autograd.Function):
    """(N, C, h, w) features and packed parameters -> (B, C) pooled results of the recursion."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, values: Tensor, *parameters: Tensor) -> Tensor:
        run = _Run(plan, parameters, tuple(values.shape[2:]))
        keep = any(ctx.needs_input_grad)
        pooled, saved = run.forward(values, keep)
        ctx.save_for_backward(*saved)  # let go when the backward pass is done, unlike attributes
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
        parameters: for each unit: its packed convolutions, then BN's packed weights and biases,
            layer by layer, if the batch's statistics are taken.
        size: h, w.
    """

    def __init__(self, plan: Plan, parameters: Sequence[Tensor], size: tuple[int, ...]) -> None:
        self.plan, self.size, self.pixels = plan, size, size[0] * size[1]
        self.dtype = plan.dtype
        found = kernels.kernels(plan.dtype, plan.kernel, plan.inputs)
        assert found is not None  # `applies` asked before
        self.kernels = found
        self.blocks = found.blocks(plan.channels)
        each = plan.layers + (2 * (plan.layers - 1) if plan.batch_norm else 0)
        self.units = [parameters[k : k + each] for k in range(0, len(parameters), each)]
        self.gradients: list[list[Tensor]] = []
        self.transposed: list[list[Tensor]] = []
        self.statistics = Statistics(plan, self.blocks, found.lanes, self.pixels)
        self.norms: list[list[_Norm]] = []  # by round
        windows = [len(step.members) for step in plan.rounds]
        self.window_values = self.blocks * plan.inputs * self.pixels * found.lanes
        self.most_windows = max(windows)
        each_bytes = self.window_values * (plan.layers - 1) * self.dtype.itemsize
        self.keeps_hidden = plan.batch_norm and sum(windows) * each_bytes <= HIDDEN_BYTES

    def new(self, *shape: int) -> Tensor:
        """(blocks, ..., lanes), not initialised."""
        shape = (self.blocks, *shape, self.kernels.lanes)
        return kernels.empty(math.prod(shape), self.dtype).view(shape)

    # forward

    def forward(self, values: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """(B, C), and what `backward` needs if ``keep``: each round's maps, then hidden maps."""
        maps = self.arrange(values.detach())
        room = [] if self.keeps_hidden else self.rooms(self.most_windows)
        kept, kept_hidden = list[Tensor](), list[Tensor]()
        pooled, owners = [], []
        for number, step in enumerate(self.plan.rounds):
            if len(step.done):
                owners.append(step.done)
                pooled.append(self.pool(maps, step.ends))
            kept += [maps] if keep else []
            if len(step.members):
                hidden = self.rooms(len(step.members)) if self.keeps_hidden else room
                kept_hidden += hidden if keep and self.keeps_hidden else []
                maps = self.fold(maps, number, hidden)
        embedding = torch.cat(pooled).index_select(0, torch.cat(owners).argsort())
        return embedding, kept + kept_hidden

    def arrange(self, values: Tensor) -> Tensor:
        """(N, C, h, w) -> (blocks, N, h w, lanes) in the parameters' dtype.

        Where the array grows there is room for all results behind them.
        """
        if not self.kernels.reads(values.dtype):
            values = values.to(self.dtype)
        values = values.contiguous()
        results = sum(map(self.results, self.plan.rounds)) if self.plan.grows else 0
        maps = self.new(len(values) + results, self.pixels)
        name = f"arrange_{kernels.READABLE[values.dtype]}"
        counts = c_int64(len(values)), c_int64(self.plan.channels)
        self.kernels.run(name, self.job(out=maps), c_void_p(values.data_ptr()), *counts)
        return maps

    def pool(self, maps: Tensor, ends: Tensor) -> Tensor:
        """(b, C): the mean of a bag's two maps (one map twice where it has one), pooled."""
        pooled = maps[:, ends.flatten()].mean(2).view(self.blocks, len(ends), 2, -1).mean(2)
        return pooled.transpose(0, 1).flatten(1)[:, : self.plan.channels]

    def fold(self, maps: Tensor, number: int, hidden: list[Tensor]) -> Tensor:
        step = self.plan.rounds[number]
        out = maps if self.plan.grows else self.new(self.results(step), self.pixels)
        job = self.job(maps=maps, out=out, step=step)
        self.set_weights(job, number)
        if not self.plan.batch_norm:
            self.kernels.run("fold", job)
            return out
        for layer, maps_of_layer in enumerate(hidden):
            job.hidden[layer] = maps_of_layer.data_ptr()
        self.norms.append(self.batch_norms(job, number))
        job.layer = self.plan.layers - 1
        self.kernels.run("layer", job)
        return out

    def batch_norms(self, job: kernels.Job, number: int) -> list[_Norm]:
        """Run all convolutions but the last, and take the statistics behind each."""
        norms: list[_Norm] = []
        for layer in range(self.plan.layers - 1):
            moments = self.new(self.groups(job), 2, self.plan.inputs)
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
        count = self.statistics.count(len(self.plan.rounds[number].members))
        inverse = (variance + self.plan.eps).rsqrt()
        self.plan.moments.append(
            Moments(
                layer,
                number,
                count,
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
        """Gradients of the features as maps, and in `gradients` those of the units."""
        self.start_gradients()
        kept_hidden = saved[len(self.plan.rounds) :]
        room = [] if self.keeps_hidden else self.rooms(self.most_windows)
        gradients = self.rooms(self.most_windows)
        above: Tensor | None = None
        for number in reversed(range(len(self.plan.rounds))):
            step, maps, below = self.plan.rounds[number], saved[number], None
            if number or needs_features:
                same = self.plan.grows and above is not None
                below = above if same else self.new(*maps.shape[1:3]).zero_()
                assert below is not None
                if len(step.done):
                    self.unpool(grad[step.done], step.ends, below)
            if len(step.members):
                assert above is not None
                job = self.job(maps=maps, grad_out=above, step=step)
                job.grad_maps = None if below is None else below.data_ptr()
                self.set_weights(job, number, backward=True)
                if self.plan.batch_norm:
                    first, count = number * len(gradients), len(gradients)
                    hidden = kept_hidden[first : first + count] if self.keeps_hidden else room
                    self.unfold(job, number, hidden, gradients)
                else:
                    self.kernels.run("fold_backward", job)
            above = below
        return above

    def unpool(self, grad: Tensor, ends: Tensor, below: Tensor) -> None:
        missing = self.blocks * self.kernels.lanes - self.plan.channels
        lanes = nn.functional.pad(grad.to(self.dtype), (0, missing)) / (2 * self.pixels)
        lanes = lanes.view(len(grad), self.blocks, 1, -1).transpose(0, 1)  # (blocks, b, 1, lanes)
        for end in (0, 1):
            below.index_add_(1, ends[:, end], lanes.expand(-1, -1, self.pixels, -1))

    def unfold(
        self, job: kernels.Job, number: int, hidden: Sequence[Tensor], gradients: list[Tensor]
    ) -> None:
        """Gradients of one round with BN, convolution by convolution."""
        for layer, norm in enumerate(self.norms[number]):
            job.hidden[layer] = hidden[layer].data_ptr()
            job.grad_hidden[layer] = gradients[layer].data_ptr()
            if not self.keeps_hidden:
                job.layer = layer
                self.kernels.run("layer", job)
            job.affine[layer] = norm.affine.data_ptr()
        kept = [
            self.layer_backward(job, layer, number) for layer in reversed(range(self.plan.layers))
        ]
        del kept  # what the job pointed to

    def layer_backward(self, job: kernels.Job, layer: int, number: int) -> list[Tensor]:
        """One convolution's gradients, and then those of the BN before it."""
        job.layer = layer
        if layer == 0:
            self.kernels.run("layer_backward", job)
            return []
        norm = self.norms[number][layer - 1]
        sums = self.new(self.groups(job), 2, self.plan.inputs)
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
                    transposed(p, self.plan, 1 if layer == last else self.plan.inputs)
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
        """``out`` or ``grad_out`` is the array that holds the results from the step's first on."""
        job = kernels.Job()
        job.blocks, (job.h, job.w) = self.blocks, self.size
        job.layers, job.grouped = self.plan.layers, int(self.plan.by_window)
        job.orders = self.plan.orders
        if maps is not None:
            job.maps, job.rows = maps.data_ptr(), maps.shape[1]
        first = 0
        if step is not None:
            job.members, job.windows = step.members.data_ptr(), len(step.members)
            first = step.first * self.pixels * self.kernels.lanes * self.dtype.itemsize
        for name, results in (("out", out), ("grad_out", grad_out)):
            if results is not None:
                setattr(job, name, results.data_ptr() + first)
                job.out_rows = results.shape[1]
        return job

    def results(self, step: Round) -> int:
        """How many maps a round makes."""
        return len(step.members) // self.plan.orders

    def groups(self, job: kernels.Job) -> int:
        """How many groups of windows BN normalises, each by itself."""
        return job.windows if self.plan.by_window else 1

    def bn_part(
        self, of_units: Sequence[Sequence[Tensor]], number: int, layer: int
    ) -> Sequence[Tensor]:
        """What belongs to BN's weights and biases behind a convolution, in the unit of a round."""
        first = self.plan.layers + 2 * layer
        return of_units[self.plan.unit(number)][first : first + 2]

    def set_weights(self, job: kernels.Job, number: int, *, backward: bool = False) -> None:
        unit = self.plan.unit(number)
        for layer in range(self.plan.layers):
            packed, target = self.units[unit][layer], job.layer_of[layer]
            target.outputs = 1 if layer == self.plan.layers - 1 else self.plan.inputs
            target.weights = packed.data_ptr()
            target.stride = 0 if self.plan.shared else packed.shape[1]
            if backward:
                target.transposed = self.transposed[unit][layer].data_ptr()
                target.gradients = self.gradients[unit][layer].data_ptr()

    def rooms(self, windows: int) -> list[Tensor]:
        """For each convolution with BN behind it, room for its maps on so many windows."""
        count = self.plan.layers - 1 if self.plan.batch_norm else 0
        return [kernels.empty(windows * self.window_values, self.dtype) for _ in range(count)]

    def table(self, *values: Tensor) -> Tensor:
        """(…, G, inputs, …) each -> (blocks, G, values, inputs, lanes)."""
        groups = max(value.shape[1] for value in values)
        shape = (self.blocks, groups, self.plan.inputs, self.kernels.lanes)
        return torch.stack([v.expand(shape) for v in values], 2).to(self.dtype).contiguous()
