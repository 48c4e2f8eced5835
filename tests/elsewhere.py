"""A device that is not the CPU, for machines without a GPU: it computes there and refuses mixtures.

Tensors on it are `Remote`: they say that they are on PyTorch's ``meta`` device, and hold their
values on the CPU. Inside `elsewhere` an operation on tensors of both places raises, as it does with
a GPU: only copies, CPU tensors without dimensions, and CPU indices of a remote tensor may mix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class Remote(Tensor):
    """A tensor on `DEVICE` that has values."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Remote:
        remote: Remote = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        remote.values = values
        return remote

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class elsewhere(TorchDispatchMode):  # noqa: N801 - a context manager
    """Where tensors can be made on `DEVICE` and moved to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def values_of(tensor: Tensor) -> Tensor:
    """The values of a tensor on `DEVICE`."""
    assert isinstance(tensor, Remote)
    return tensor.values


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    remote = [x for x in tensors if isinstance(x, Remote)]
    mixed = any(x.dim() for x in tensors if not isinstance(x, Remote)) and bool(remote)
    indexed = func in INDEXING and isinstance(args[0], Remote)
    if mixed and not indexed and func not in COPIES:
        raise RuntimeError(f"{func}: tensors on two devices")
    there = bool(remote)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif func is aten.copy_.default:
        there = isinstance(args[0], Remote)
    args, kwargs = tree_map(lambda x: x.values if isinstance(x, Remote) else x, (args, kwargs))
    result = func(*args, **kwargs)
    # What works in place gives back what it was given.
    own = {id(x.values): x for x in remote}
    return tree_map(
        lambda x: own.get(id(x), Remote(x)) if there and isinstance(x, Tensor) else x, result
    )
