"""The families of torchvision's classification networks: where each keeps its last map and head.

One literal table, from the beginning of a network's name to what the rest of this package must know
about it. Adding a family is one entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from dragn_cache.errors import InputError, UnknownNameError

GAP = "gap"
"""The tap that is the spatial mean of a family's last map."""
CLS = "cls"
"""The tap that is the class token of a family that has one."""


def _vit_image_size(state: Mapping[str, Tensor]) -> int | None:
    """The side in pixels that a vision transformer's own weights were trained for, if they tell."""
    positions, patch = state.get("encoder.pos_embedding"), state.get("conv_proj.weight")
    if positions is None or patch is None or positions.ndim != 3 or patch.ndim != 4:
        return None
    return math.isqrt(max(positions.shape[1] - 1, 0)) * patch.shape[-1] or None


@dataclass(frozen=True)
class Family:
    """The properties that networks of one design share.

    Args:
        last_map: the tap of the last feature map, `(C, h, w)`.
        vector: the tap of that map's spatial mean, `(C,)`: a pooling module, or `gap`.
        classifier: beginnings of the state dict names that belong to the classifier and to heads
            that only training uses; weights may differ from the network there.
        options: what the network's builder is given besides its weights.
        image_size: side in pixels that the design is made for.
        size_option: the builder's option for the side, where the side is part of the network.
        size_from_weights: reads that side from a state dict.
        tokens: `(N, 1 + h·w, D)` outputs are maps, their first token is the class token.
        not_maps: taps matching this pattern are 4-D, but not `(N, C, h, w)`.
        renames: patterns of old state dict names and what they became.
    """

    last_map: str
    vector: str = GAP
    classifier: tuple[str, ...] = ("classifier.",)
    options: Mapping[str, Any] = field(default_factory=dict)
    image_size: int = 224
    size_option: Callable[[int], dict[str, Any]] | None = None
    size_from_weights: Callable[[Mapping[str, Tensor]], int | None] = lambda _: None
    tokens: bool = False
    not_maps: str = r"(?!)"
    renames: tuple[tuple[str, str], ...] = ()

    @property
    def default_taps(self) -> tuple[str, str]:
        """The last map and its spatial mean."""
        return self.last_map, self.vector


_RESNET = Family("layer4", "avgpool", classifier=("fc.",))
_SWIN = Family("permute", "avgpool", classifier=("head.",))
# torchvision's ImageNet weights of these two want inputs scaled by 0.5, which the network does when
# told to. It is always told to, so that a file with those weights gives the same features.
# (Their own random initialisation lets Inception's features grow to 10^11.)
_GOOGLE = {"aux_logits": False, "transform_input": True, "init_weights": False}

FAMILIES: dict[str, Family] = {
    "alexnet": Family("features"),
    "convnext": Family("features", "avgpool"),
    # The last ReLU is a function, not a module: `features` is the map before it.
    "densenet": Family(
        "relu", renames=((r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.", r"\1\2."),)
    ),
    "efficientnet": Family("features", "avgpool"),
    "googlenet": Family(
        "inception5b", "avgpool", classifier=("fc.", "aux1.", "aux2."), options=_GOOGLE
    ),
    "inception": Family(
        "Mixed_7c", "avgpool", classifier=("fc.", "AuxLogits."), options=_GOOGLE, image_size=299
    ),
    "maxvit": Family(
        "blocks",
        size_option=lambda side: {"input_size": (side, side)},
        # Inside, the axes are windows × places in a window × channels.
        not_maps=r".*\.(window|grid)_attention\.(?!departition_op$|departition_op\.reshape_1$)",
    ),
    "mnasnet": Family("layers"),
    "mobilenet_v2": Family("features"),
    "mobilenet_v3": Family("features", "avgpool"),
    "regnet": Family("trunk_output", "avgpool", classifier=("fc.",)),
    "resnet": _RESNET,
    "resnext": _RESNET,
    "shufflenet": Family("conv5", classifier=("fc.",)),
    # Its pooling layer comes after the classes' 1×1 convolution.
    "squeezenet": Family("features"),
    "swin": _SWIN,
    "vgg": Family("features"),
    "vit": Family(
        "encoder",
        classifier=("heads.",),
        size_option=lambda side: {"image_size": side},
        size_from_weights=_vit_image_size,
        tokens=True,
        renames=((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),
    ),
    "wide_resnet": _RESNET,
}


def _prefix(name: str) -> str | None:
    return max((prefix for prefix in FAMILIES if name.startswith(prefix)), key=len, default=None)


def list_backbones() -> list[str]:
    """Names of all backbones: torchvision's classification networks, sorted."""
    return [name for name in models.list_models(module=models) if _prefix(name) is not None]


def family(name: str) -> Family:
    """The family that a backbone belongs to.

    Raises:
        UnknownNameError: no such backbone; offers the nearest names.
    """
    if name not in list_backbones():
        raise UnknownNameError(
            "backbone", name, list_backbones(), remedy="see dragn-cache backbones"
        )
    prefix = _prefix(name)
    assert prefix is not None  # list_backbones holds only names that have one
    return FAMILIES[prefix]


def require_image_size(name: str, size: tuple[int, int], side: int) -> None:
    """Raise InputError if a network built for `side` × `side` cannot take `size` (h, w)."""
    if family(name).size_option is not None and size != (side, side):
        raise InputError(
            f"backbone {name}",
            expected=f"images of exactly {side}×{side}, which its weights are made for",
            got=f"{size[0]}×{size[1]}",
            remedy=f"set the preprocessing size to ({side}, {side})",
        )


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
