"""The families of torchvision's classification networks: where each keeps its last map and head.

One literal table, from the beginning of a network's name to what the rest of this package must know
about it. Adding a family is one entry. Neither torch nor torchvision is imported here, so that
names and default taps can be listed without waiting for them; `building` makes the networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dragn_cache.errors import SettingError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor

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


# torchvision's classification networks. A test compares them with the installed version's.
# fmt: off
NAMES = (
    "alexnet", "convnext_base", "convnext_large", "convnext_small", "convnext_tiny",
    "densenet121", "densenet161", "densenet169", "densenet201", "efficientnet_b0",
    "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4", "efficientnet_b5",
    "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_l", "efficientnet_v2_m",
    "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mnasnet0_75",
    "mnasnet1_0", "mnasnet1_3", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small",
    "regnet_x_16gf", "regnet_x_1_6gf", "regnet_x_32gf", "regnet_x_3_2gf", "regnet_x_400mf",
    "regnet_x_800mf", "regnet_x_8gf", "regnet_y_128gf", "regnet_y_16gf", "regnet_y_1_6gf",
    "regnet_y_32gf", "regnet_y_3_2gf", "regnet_y_400mf", "regnet_y_800mf", "regnet_y_8gf",
    "resnet101", "resnet152", "resnet18", "resnet34", "resnet50", "resnext101_32x8d",
    "resnext101_64x4d", "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "squeezenet1_0", "squeezenet1_1", "swin_b",
    "swin_s", "swin_t", "swin_v2_b", "swin_v2_s", "swin_v2_t", "vgg11", "vgg11_bn", "vgg13",
    "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vit_b_16", "vit_b_32", "vit_h_14",
    "vit_l_16", "vit_l_32", "wide_resnet101_2", "wide_resnet50_2",
)
# fmt: on


def list_backbones() -> list[str]:
    """Names of all backbones: torchvision's classification networks, sorted."""
    return list(NAMES)


def family(name: str) -> Family:
    """The family that a backbone belongs to.

    Raises:
        UnknownNameError: no such backbone; offers the nearest names.
    """
    if name not in NAMES:
        raise UnknownNameError("backbone", name, NAMES, remedy="see dragn-cache backbones")
    return FAMILIES[max((prefix for prefix in FAMILIES if name.startswith(prefix)), key=len)]


def require_image_size(name: str, size: tuple[int, int], side: int) -> None:
    """Raise SettingError if a network built for `side` × `side` cannot take `size` (h, w)."""
    if family(name).size_option is not None and size != (side, side):
        raise SettingError(
            "size",
            expected=f"images of exactly {side}×{side}, which {name}'s weights are made for",
            got=f"{size[0]}×{size[1]}",
            remedy=f"use `size={side}x{side}`",
        )
