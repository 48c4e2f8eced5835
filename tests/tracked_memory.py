"""Memory that PyTorch's tensors take at their peak, counted operation by operation."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TrackedMemory(TorchDispatchMode):
    """Counts the bytes of what is made while it is active, and is not freed yet.

    Memory that an operation takes and frees by itself does not count.

    Attributes:
        peak: the most at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if is_tensor(tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known and id(storage) not in given:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        number, size = id(storage), storage.nbytes()

        def freed(_: Any) -> None:
            self.live -= size
            self._known.pop(number, None)

        self._known[number] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)
