"""Networks of the families, built by torchvision with random weights or as structure only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from dragn_cache.backbones.families import family


def build(name: str, side: int, *, seed: int = 0) -> nn.Module:
    """A network on the CPU with random weights from `seed`; no global random state is touched."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return _build(name, side)


def build_on_meta(name: str, side: int) -> nn.Module:
    """A network on the meta device: its structure and shapes, no memory and no random numbers."""
    with _EmptyOnMeta():
        return _build(name, side).to("meta")


def _build(name: str, side: int) -> nn.Module:
    spec = family(name)
    sized = spec.size_option(side) if spec.size_option is not None else {}
    network: nn.Module = models.get_model(name, weights=None, **spec.options, **sized)
    return network.eval()


class _EmptyOnMeta(TorchFunctionMode):
    """Puts parameters on the meta device; leaves real the small tensors that builders read.

    (`torch.device("meta")` does not: RegNet computes its widths with tensors.)
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        if func in (Tensor.normal_, Tensor.uniform_) and args[0].is_meta:
            return args[0]  # slow on the meta device, for nothing
        return func(*args, **kwargs)
