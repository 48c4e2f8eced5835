"""A network traced once: the layout and shape of every module's output."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchvision.ops import Permute

from dragn_cache.errors import InputError

Layout = Literal["nchw", "nhwc", "tokens"]

TRACED_BATCH = 2  # images in the run for shapes
_PERMUTED: dict[tuple[int, ...], Layout] = {(0, 2, 3, 1): "nhwc", (0, 3, 1, 2): "nchw"}
_OPS_LAYERS = tuple(
    member
    for member in vars(torchvision.ops).values()
    if isinstance(member, type) and issubclass(member, nn.Module)
)
_SHAPE_KEEPING = (F.batch_norm, F.layer_norm, F.gelu, F.hardsigmoid, F.hardswish, F.relu, F.silu)


class _Tracer(fx.Tracer):
    """Traces a network down to single layers; a layer of torchvision.ops counts as one."""

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math, torchvision.ops))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _OPS_LAYERS) or super().is_leaf_module(m, module_qualified_name)


def trace_network(network: nn.Module) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    """A network's graph and its operations by path, in forward order.

    The path of a layer is its module's path. The path of a function is that of the calling module
    and the function's name. From the second call on, `_1`, `_2`, … is added. torchvision's names
    are the same, except for layers that end in a number: it calls a vision transformer's `ln_1`
    and `ln_2` `ln` and `ln_1`.
    """
    graph = _Tracer().trace(network)
    calls: Counter[str] = Counter()
    nodes: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            path = str(node.target)
        elif node.op in ("call_function", "call_method"):
            # The modules around the call; the network's own operations have none.
            callers = [caller for caller, _ in node.meta.get("nn_module_stack", {}).values()]
            path = ".".join([*callers[-1:], re.sub(r"_\d+$", "", node.name)])
        else:
            continue
        nodes[f"{path}_{calls[path]}" if calls[path] else path] = node
        calls[path] += 1
    return fx.GraphModule(network, graph), nodes


def trace_layouts(module: fx.GraphModule) -> dict[fx.Node, Layout]:
    """The axis order of everything that depends on the images."""
    layouts: dict[fx.Node, Layout] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            layouts[node] = "nchw"
            continue
        source = next((n for n in node.all_input_nodes if n in layouts), None)
        if source is not None:
            layouts[node] = _PERMUTED.get(_permutation(node, module), layouts[source])
    return layouts


def _permutation(node: fx.Node, module: nn.Module) -> tuple[int, ...]:
    """The axes of a node's input in their new order; empty if it does not permute them."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        return tuple(layer.dims) if isinstance(layer, Permute) else ()
    if node.target in ("permute", torch.permute):
        axes = node.args[1:] if len(node.args) > 2 else node.args[1]
        return tuple(axes) if isinstance(axes, Iterable) else ()  # type: ignore[arg-type]
    return ()


def trace_shapes(
    module: fx.GraphModule, size: tuple[int, int], name: str
) -> dict[fx.Node, tuple[int, ...]]:
    """The output shapes of a graph's operations, for a batch of `TRACED_BATCH` images."""
    run = _ShapeRun(module)
    try:
        with torch.no_grad(), ShapeKeeping():
            run.run(torch.empty(TRACED_BATCH, 3, *size, device="meta"))
    # Layers refuse an input by any of these: mostly a pooling window is larger than its map.
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(
            f"backbone {name}",
            expected="images that are large enough for all its layers",
            got=f"{size[0]}×{size[1]}",
            remedy="use a larger size, such as 224×224",
        ) from error
    return run.shapes


class ShapeKeeping(TorchFunctionMode):
    """Skips functions that keep their input's shape; they would take most of a run on meta."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        if func in _SHAPE_KEEPING:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class _ShapeRun(fx.Interpreter):
    """Runs a graph and notes the shapes of its floating-point outputs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point():
            self.shapes[n] = tuple(value.shape)
        return value
