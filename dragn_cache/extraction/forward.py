"""Forward passes of a backbone: eager or compiled, in one precision, on one device.

The way is decided once, from the whole plan, and written into the store's *numerics*: every resume
and every process computes the same way or refuses.

- *compiled*: full batches go through ``torch.compile`` with frozen weights, which folds batch
  normalisation into the convolutions and fixes their memory layout. The last batch of a part has
  one of three smaller sizes and stays eager: compiling each size costs more than it saves.
- On a GPU, batches go there from pinned memory and results come back to it while the next batch
  computes; autocast to bfloat16 unless float32 is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dragn_cache.backbones import Backbone
from dragn_cache.errors import DragnCacheError
from dragn_cache.machine import find_compiler

# Compiling takes half a minute and saves a quarter to half of the time: worth it from about here.
COMPILE_FROM_FLOPS = {"cpu": 1e13, "cuda": 1e15}


def can_compile(device_type: str) -> bool:
    """Whether torch.compile works here: a C++ compiler, and Triton for a GPU."""
    triton = device_type == "cpu" or importlib.util.find_spec("triton") is not None
    return find_compiler() is not None and triton


def image_flops(backbone: Backbone) -> int:
    """Floating-point operations of one image's forward pass."""
    planes = np.zeros((1, *backbone.input_shape), np.uint8)
    with FlopCounterMode(display=False) as counter:
        backbone(torch.from_numpy(planes).to(backbone.mean.device))
    return int(counter.get_total_flops())


def choose_compute(backbone: Backbone, images: int, batch_size: int) -> str:
    """``compiled`` where that is possible and the plan is large enough to pay for it."""
    device = backbone.mean.device.type
    if images < 4 * batch_size or not can_compile(device):
        return "eager"
    large = images * image_flops(backbone) >= COMPILE_FROM_FLOPS[device]
    return "compiled" if large else "eager"


def require_compute(compute: str, device_type: str) -> None:
    """Raise `DragnCacheError` if this machine cannot compute in the way asked for."""
    if compute == "compiled" and not can_compile(device_type):
        missing = "Triton" if find_compiler() else "a C++ compiler (none of $CXX, g++, clang++)"
        raise DragnCacheError(
            "compiled features",
            expected=f"{'Triton' if find_compiler() else 'a C++ compiler'} for torch.compile",
            got=f"no {missing.removeprefix('a ')}",
            remedy="install it (apt install g++), or extract into a new store with "
            "`compute=eager`; this store's features were or would be compiled",
        )


@dataclass
class Pending:
    """Features of a batch that may still be on their way; `arrays` waits for them."""

    outputs: dict[str, Tensor]
    finite: Tensor
    ready: torch.cuda.Event | None

    def arrays(self) -> tuple[dict[str, NDArray[Any]], bool]:
        """By tap, (N, *shape) in the store's dtype; and whether all of them are finite."""
        if self.ready is not None:
            self.ready.synchronize()
        return {name: value.numpy() for name, value in self.outputs.items()}, bool(self.finite)


class Forward:
    """The network: takes uint8 batches and gives features in the store's dtype.

    Args:
        backbone: on its device.
        compute: ``eager`` or ``compiled``.
        batch_size: the size of full batches, the only one that is compiled.
        dtype: of the features, ``float16`` or ``float32``.
        precision: ``float32``, or ``bfloat16`` for autocast.
    """

    def __init__(
        self, backbone: Backbone, *, compute: str, batch_size: int, dtype: str, precision: str
    ) -> None:
        self.backbone, self.batch_size = backbone, batch_size
        self.device = backbone.mean.device
        self._dtype = getattr(torch, dtype)
        self._autocast = precision == "bfloat16"
        self._full: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]] = self._features
        if compute == "compiled":
            self._full = torch.compile(
                self._features, dynamic=False, fullgraph=True, options={"freezing": True}
            )

    def warm_up(self) -> None:
        """Compile, or let libraries choose their kernels, before anything is timed."""
        self(np.zeros((self.batch_size, *self.backbone.input_shape), np.uint8)).arrays()

    @torch.inference_mode()
    def __call__(self, batch: NDArray[np.uint8]) -> Pending:
        """Start computing a batch (N, P, h, w)."""
        images = torch.from_numpy(batch)
        run = self._full if len(batch) == self.batch_size else self._features
        if self.device.type == "cpu":
            return Pending(*run(images), None)
        outputs, finite = run(images.pin_memory().to(self.device, non_blocking=True))
        # Allocated and copied in the same stream, so the GPU's buffers may be reused behind it.
        host_outputs = {name: _pinned(value) for name, value in outputs.items()}
        host_finite = _pinned(finite)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(self.device))
        return Pending(host_outputs, host_finite, ready)

    def _features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            exact = self.backbone.compute(images)
        outputs = {name: value.to(self._dtype) for name, value in exact.items()}
        finite = torch.stack([torch.isfinite(value).all() for value in outputs.values()]).all()
        return outputs, finite


def _pinned(value: Tensor) -> Tensor:
    """A copy in pinned memory of the host, on its way."""
    copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return copy.copy_(value, non_blocking=True)
