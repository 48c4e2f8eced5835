"""Taps: the places in a network whose output can be stored, found on its graph without weights.

The network is traced and run once on the meta device, which gives every output's shape in about a
second and takes no memory. The trace also gives each map's axis order: Swin and ConvNeXt work on
`(N, h, w, C)` inside, vision transformers on tokens, and every tap is given as `(N, C, h, w)`.

Names and values are those of torchvision's `create_feature_extractor`, and are tested against it.
It is not used for two reasons. It traces four to five times slower: twice, with a search over all
earlier names for each name. And it takes a wrong node where one tap is the last part of another:
with `layer4` and `layer4.1` together, the value of one is from before the last ReLU.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models import Weights, WeightsEnum

from dragn_cache.backbones.building import build_on_meta
from dragn_cache.backbones.families import CLS, GAP, family, require_image_size
from dragn_cache.backbones.preprocessing import default_preprocessing
from dragn_cache.backbones.tracing import (
    TRACED_BATCH,
    Layout,
    trace_layouts,
    trace_network,
    trace_shapes,
)
from dragn_cache.backbones.weights import image_size, resolve_weights
from dragn_cache.errors import InputError, UnknownNameError


@dataclass(frozen=True)
class TapInfo:
    """One tap in a list of taps: `shape` is one image's, `(C, h, w)` or `(C,)`."""

    name: str
    kind: Literal["map", "vector"]
    shape: tuple[int, ...]
    bytes_fp16: int
    default: bool


@dataclass(frozen=True)
class Tap:
    """One tap, and the reading of its value from the graph.

    Args:
        name: the tap's name, as users write it.
        node: path of the operation that computes it.
        layout: the axes of the node's output.
        shape: of one image's value, `(C, h, w)` or `(C,)`, before any grid.
    """

    name: str
    node: str
    layout: Layout
    shape: tuple[int, ...]

    def read(self, output: Tensor, grid: int | None) -> Tensor:
        """Its value from its node's output: `(N, C, h, w)` or `(N, C)`, float32, contiguous."""
        value = output.float()
        if self.name == CLS:
            return value[:, 0].contiguous()
        if self.layout == "nhwc" and value.ndim == 4:
            value = value.permute(0, 3, 1, 2)
        if self.layout == "tokens":
            side = math.isqrt(value.shape[1] - 1)
            value = value[:, 1:].transpose(1, 2).reshape(len(value), -1, side, side)
        if self.name == GAP:
            return value.mean((2, 3))
        if grid is not None and len(self.shape) == 3:
            value = F.adaptive_avg_pool2d(value, grid)
        if value.ndim == 4 and value.shape[2:] == (1, 1):
            value = value.flatten(1)
        return value.contiguous()

    def grid_shape(self, grid: int | None) -> tuple[int, ...]:
        """The shape of one image's value after a grid.

        Raises:
            InputError: the grid is larger than the map.
        """
        if grid is None or len(self.shape) == 1:
            return self.shape
        channels, height, width = self.shape
        if grid > min(height, width):
            raise InputError(
                f"grid for tap {self.name}",
                expected=f"at most {min(height, width)}, its map being {height}×{width}",
                got=str(grid),
                remedy="use a smaller grid or larger images",
            )
        return (channels,) if grid == 1 else (channels, grid, grid)


@dataclass(frozen=True)
class Output:
    """The output of a graph node; `layout` is None if it does not depend on the images."""

    layout: Layout | None
    shape: tuple[int, ...]


class TapGraph:
    """A backbone's graph with every node's shape and layout for one image size.

    Args:
        name: the backbone.
        size: (h, w) of the images.
        side: the side that the network is built for, where its weights depend on it.

    Attributes:
        outputs: every operation by its path, in forward order.

    Raises:
        InputError: the network cannot take images of this size.
    """

    def __init__(self, name: str, size: tuple[int, int], side: int) -> None:
        require_image_size(name, size, side)
        self.name, self.family = name, family(name)
        network = build_on_meta(name, side)
        module, nodes = trace_network(network)
        layouts = trace_layouts(module)
        shapes = trace_shapes(module, size, name)
        self.outputs = {
            path: Output(layouts.get(node), shapes.get(node, ())) for path, node in nodes.items()
        }
        self._nodes, self._saved = nodes, list(network.state_dict())
        self._modules = {path for path, node in nodes.items() if node.op == "call_module"}
        self._last = self._last_outputs()

    def _last_outputs(self) -> dict[str, str]:
        """Each tap's name and its output's path: a module's output is the last one inside it."""
        last: dict[str, str] = {}
        for path in self.outputs:
            parts = path.split(".")
            for depth in range(len(parts), 0, -1):
                name = ".".join(parts[:depth])
                last.pop(name, None)  # so that names are in the order of their last outputs
                last[name] = path
                if depth < len(parts):
                    self._modules.add(name)
        last[GAP] = last[self.family.last_map]
        if self.family.tokens:
            last[CLS] = last[self.family.last_map]
        return last

    def tap(self, name: str) -> Tap:
        """The tap of a name.

        Raises:
            UnknownNameError: the network has no such tap.
            InputError: its output is neither a map nor a vector of the images.
        """
        if name not in self._last:
            raise UnknownNameError(
                f"tap of {self.name}",
                name,
                self._last,
                remedy="see dragn-cache taps NAME",
            )
        tap = self._tap_or_none(name)
        if tap is None:
            shape = self.outputs[self._last[name]].shape
            raise InputError(
                f"tap {name} of {self.name}",
                expected="a floating-point map (N, C, h, w) or vector (N, C)",
                got=f"shape {shape}" if shape else "no tensor",
                remedy="choose another tap",
            )
        return tap

    def _tap_or_none(self, name: str) -> Tap | None:
        """The tap of a name, or None if its output is neither a map nor a vector."""
        output = self.outputs[self._last[name]]
        layout, shape = output.layout, output.shape
        if layout is None or 0 in shape or shape[:1] != (TRACED_BATCH,):
            return None
        if len(shape) == 2:
            return Tap(name, self._last[name], layout, shape[1:])
        if len(shape) == 4 and not re.match(self.family.not_maps, name):
            channels, height, width = shape[1:] if layout == "nchw" else (shape[3], *shape[1:3])
        elif len(shape) == 3 and self.family.tokens and shape[1] > 1:
            layout, channels, height = "tokens", shape[2], math.isqrt(shape[1] - 1)
            width = height
            if height * width != shape[1] - 1:
                return None
        else:
            return None
        vector = name in (GAP, CLS) or (height, width) == (1, 1)
        value = (channels,) if vector else (channels, height, width)
        return Tap(name, self._last[name], layout, value)

    def tensors(self, taps: Sequence[Tap]) -> list[str]:
        """Names in the network's state dict of the tensors that the taps depend on."""
        pending = [self._nodes[tap.node] for tap in taps]
        reached: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node not in reached:
                reached.add(node)
                pending.extend(node.all_input_nodes)
        used = {str(n.target) for n in reached if n.op in ("call_module", "get_attr")}
        return [
            name for name in self._saved if any(name[:end] in used for end in _ends_of_parts(name))
        ]

    def describe(self) -> list[TapInfo]:
        """Every module's tap and the default ones, in the order in which they are computed."""
        default = self.family.default_taps
        listed = {*self._modules, *default, GAP, CLS}
        order = {path: i for i, path in enumerate(self.outputs)}
        names = sorted((n for n in self._last if n in listed), key=lambda n: order[self._last[n]])
        taps = [tap for tap in map(self._tap_or_none, names) if tap is not None]
        return [
            TapInfo(
                name=tap.name,
                kind="map" if len(tap.shape) == 3 else "vector",
                shape=tap.shape,
                bytes_fp16=2 * math.prod(tap.shape),
                default=tap.name in default,
            )
            for tap in taps
        ]


@functools.lru_cache(maxsize=8)
def tap_graph(name: str, size: tuple[int, int], side: int) -> TapGraph:
    """A `TapGraph`, cached: taps are usually listed or checked first and loaded next."""
    return TapGraph(name, size, side)


def describe_taps(
    name: str,
    size: tuple[int, int] | None = None,
    *,
    weights: str | Path | Weights | WeightsEnum = "imagenet",
) -> list[TapInfo]:
    """Every tap of a backbone in the order in which it is computed; needs no weights.

    Listed are all modules, from single layers to whole stages, that give a map or a vector, `gap`,
    and `cls` where there is a class token. (`load_backbone` also takes the names of functions
    between them, such as `layer4.1.add`.)

    Args:
        name: the backbone.
        size: (h, w) of the images; by default that of the weights' preprocessing.
        weights: as in `load_backbone`, but nothing is downloaded: they only decide the side of
            networks that take one size.

    Raises:
        UnknownNameError: no such backbone.
        InputError: the network cannot take images of this size.
    """
    height, width = default_preprocessing(name, weights).size if size is None else size
    side = image_size(name, resolve_weights(name, weights))
    return tap_graph(name, (height, width), side).describe()


def tap_network(network: nn.Module, taps: Sequence[Tap]) -> fx.GraphModule:
    """The part of a network that the taps need, as one graph from images to outputs by node.

    The network's tensors are shared, not copied. No operation of the graph works in place, so an
    output is not changed by a later operation.
    """
    module, nodes = trace_network(network)
    (output,) = module.graph.find_nodes(op="output")
    output.args = ({tap.node: nodes[tap.node] for tap in taps},)
    module.graph.eliminate_dead_code()
    # (`x += y` is traced as a sum, which is not in place.)
    for node in module.graph.nodes:
        if node.kwargs.get("inplace"):
            node.update_kwarg("inplace", False)
    for layer in network.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False  # type: ignore[assignment]
    # A new graph module keeps only the layers that the graph still uses.
    return fx.GraphModule(module, module.graph)


def _ends_of_parts(name: str) -> list[int]:
    return [*(match.start() for match in re.finditer(r"\.", name)), len(name)]
