"""One ``.pt`` per bag: a tensor, a list of tensors, or a dictionary with ``features``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dragn_cache.errors import InputError
from dragn_cache.files import require_sound_archive
from dragn_cache.interop.bag_files import BagFiles, FileFeatures, join_rows
from dragn_cache.store.part import Array


class TensorSource(BagFiles):
    """``.pt`` files (of CLAM's ``pt_files/``, too), loaded as data only, never as code."""

    layout = "pt"
    suffix = ".pt"
    folder_name = "pt_files"

    def read_file(self, path: Path) -> FileFeatures:
        import torch

        require_sound_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        corners = None
        if isinstance(content, dict):
            name = next((name for name in ("features", "feats") if name in content), None)
            if name is None:
                raise KeyError("features")
            corners = _array(path, content["coords"]) if "coords" in content else None
            content = content[name]
        if isinstance(content, list | tuple) and content:
            return FileFeatures(join_rows([_array(path, item) for item in content]), corners)
        return FileFeatures(_array(path, content), corners)


def write_tensor(path: Path, values: Array) -> None:
    """Write rows (n, C[, h, w]) as one tensor of the same dtype."""
    import torch

    with path.open("wb") as file:  # torch's own ends with a RuntimeError on a full disk
        torch.save(torch.from_numpy(values), file)


def _array(path: Path, tensor: Any) -> Array:
    """A tensor as an array; numpy has no bfloat16, and float32 holds each of its values."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise InputError(
            str(path),
            expected="a tensor, a list of tensors, or a dictionary with 'features'",
            got=type(tensor).__name__,
            remedy="save the features alone",
        )
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return np.asarray(tensor.detach().numpy())
