"""A backbone's weights: their sources, reading, fitting to the network, and digest."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torchvision.models import Weights, WeightsEnum, get_model_weights

from dragn_cache.backbones.families import Family, family
from dragn_cache.errors import InputError, UnknownNameError, WeightsError
from dragn_cache.files import file_sha256, require_sound_archive

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts put a state dict."""
_COUNTER = "num_batches_tracked"  # batch norm's; it has no part in evaluation


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that torchvision publishes, or others as an object of its class."""

    entry: Weights | WeightsEnum


@dataclass(frozen=True)
class RandomWeights:
    """Freshly initialised weights."""

    seed: int


@dataclass(frozen=True)
class WeightsFile:
    """A state dict in a file of the user."""

    path: Path


WeightsSource = PublishedWeights | RandomWeights | WeightsFile


def resolve_weights(name: str, weights: str | Path | Weights | WeightsEnum) -> WeightsSource:
    """Decide the source that a `weights` option means; read and download nothing.

    Args:
        name: the backbone.
        weights: `imagenet` (torchvision's newest), one of torchvision's names for the backbone's
            published weights, `random`, `random:SEED`, a path to a state dict, or a torchvision
            weights object.

    Raises:
        UnknownNameError: neither such a name nor a path.
        InputError: a seed that is not a whole number ≥ 0.
    """
    family(name)
    if isinstance(weights, Weights | WeightsEnum):
        return PublishedWeights(weights)
    published = get_model_weights(name)
    if weights == "imagenet":
        return PublishedWeights(published["DEFAULT"])
    if weights in published.__members__:
        return PublishedWeights(published[str(weights)])
    keyword, _, seed = str(weights).partition(":")
    if keyword == "random":
        return RandomWeights(_seed(str(weights), seed))
    path = Path(weights)
    if isinstance(weights, str) and not path.exists() and path.name == weights and not path.suffix:
        known = ["imagenet", "random", *(w.name for w in published)]
        raise UnknownNameError(f"weights of {name}", weights, known)
    return WeightsFile(path)


def _seed(weights: str, seed: str) -> int:
    if weights == "random":
        return 0
    if not re.fullmatch(r"[0-9]{1,19}", seed) or int(seed) >= 2**63:
        raise InputError(
            "weights",
            expected="random:SEED with a whole number from 0 to 2^63 - 1",
            got=repr(weights),
            remedy="give a seed such as random:0",
        )
    return int(seed)


def image_size(name: str, source: WeightsSource) -> int:
    """The side in pixels that the network is built for; only some networks depend on it.

    Raises:
        WeightsError: a weights file that shows the side cannot be read.
    """
    spec = family(name)
    side = None
    if spec.size_option is not None:
        if isinstance(source, PublishedWeights):
            side = int(source.entry.meta["min_size"][0])
        elif isinstance(source, WeightsFile):
            side = spec.size_from_weights(read_state_dict(source.path))
    return side or spec.image_size


def fetch_weights(weights: Weights | WeightsEnum) -> Path:
    """The local file of published weights: download it unless it exists, and check its hash.

    The file is `$TORCH_HOME/hub/checkpoints/` and the last part of the URL, as for torchvision and
    torch.hub. Its name has the first digits of its SHA-256.

    Raises:
        WeightsError: the download failed, or the file is not the one that was published.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
    named = re.search(r"-([0-9a-f]{8,})\.", file.name)
    if file.exists():
        _require_hash(file, named[1] if named else "")
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            weights.url, str(file), named[1] if named else None, progress=sys.stderr.isatty()
        )
        return file
    # torch.hub reports another hash as a RuntimeError.
    except (OSError, HTTPException, RuntimeError) as error:
        failure = f"{type(error).__name__}: {error}"
    # Raised outside the handler and without the cause: the cause's traceback would keep alive the
    # connection that torch.hub does not close.
    raise WeightsError(
        f"weights {weights.url}",
        expected="a file to download",
        got=failure,
        remedy=f"on a connected machine download that URL and put the file into {file.parent} "
        "($TORCH_HOME/hub/checkpoints), or use `weights=FILE` or `weights=random`",
    )


def _require_hash(file: Path, prefix: str) -> None:
    digest = file_sha256(file).hex()
    if not digest.startswith(prefix):
        raise WeightsError(
            f"weights {file}",
            expected=f"a file whose sha256 begins with {prefix}, as its name says",
            got=digest[: max(len(prefix), 8)],
            remedy="delete it and download it again",
        )


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict: plain, wrapped by a training script, or saved from DataParallel.

    Only tensors are unpickled (`weights_only`), never code.

    Raises:
        WeightsError: the file is missing, truncated, no state dict, or holds code.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on odd pickles, which then load or fail
            require_sound_archive(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    # The unpickler raises nearly any error on damaged bytes.
    except Exception as error:
        raise WeightsError(
            f"weights {os.fspath(path)}",
            expected="a state dict written by torch.save",
            got=_reason(error),
            remedy="check the path, or save it again with torch.save(model.state_dict(), path)",
        ) from error
    wrapped = (loaded[k] for k in WRAPPERS if k in loaded) if isinstance(loaded, Mapping) else ()
    state = next((value for value in wrapped if isinstance(value, Mapping)), loaded)
    if not _is_state_dict(state):
        raise WeightsError(
            f"weights {os.fspath(path)}",
            expected="a state dict (names and tensors), alone or under " + ", ".join(WRAPPERS),
            got=_contents(state),
            remedy="save it with torch.save(model.state_dict(), path)",
        )
    parallel = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if parallel else name: t for name, t in state.items()}


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {error.strerror or error}"
    if isinstance(error, pickle.UnpicklingError):
        return "a file that is damaged or holds more than tensors (a whole pickled model or code)"
    return f"a file that cannot be read ({type(error).__name__}), perhaps damaged or cut short"


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _contents(value: object) -> str:
    if not isinstance(value, Mapping):
        return f"a {type(value).__name__}"
    return f"a dict of {_listed([f'{k}: {type(v).__name__}' for k, v in value.items()])}"


def fit_state_dict(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    spec: Family,
    needed: Collection[str],
    where: str,
) -> None:
    """Copy a state dict into a network.

    The classifier's tensors may be missing or have other shapes, if they are not in `needed`; they
    are then not copied. Batch norm's counters may be missing too.

    Args:
        network: changed in place.
        state: its tensors by name.
        spec: the network's family.
        needed: names that the taps depend on.
        where: the weights' name in an error.

    Raises:
        WeightsError: names or shapes do not fit; lists the first five of each kind.
    """
    target = network.state_dict()
    tensors = {_renamed(name, spec.renames): tensor for name, tensor in state.items()}

    def must_fit(name: str) -> bool:
        return name in needed or not name.startswith(spec.classifier)

    missing = [n for n in target if n not in tensors and must_fit(n) and not n.endswith(_COUNTER)]
    unexpected = [n for n in tensors if n not in target and must_fit(n)]
    misshapen = [n for n in tensors if n in target and tensors[n].shape != target[n].shape]
    unfit = [n for n in misshapen if must_fit(n)]
    wrong = [f"{n} has {_shape(tensors[n])} for {_shape(target[n])}" for n in unfit]
    if missing or unexpected or wrong:
        raise WeightsError(
            where,
            expected="the names and shapes of the network",
            got=f"{len(missing)} missing {_listed(missing)}, {len(unexpected)} unexpected "
            f"{_listed(unexpected)}, {len(wrong)} of wrong shape {_listed(wrong)}",
            remedy="check that the weights are of this backbone",
        )
    fitting = {n: t for n, t in tensors.items() if n in target and n not in misshapen}
    target.update(fitting)  # keeps the metadata of the network's state dict: versions of its layers
    network.load_state_dict(target)


def _renamed(name: str, renames: Sequence[tuple[str, str]]) -> str:
    for old, new in renames:
        name = re.sub(old, new, name)
    return name


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(str(s) for s in tensor.shape)})"


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "()"
    return f"({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over tensors: sorted names, dtypes, shapes, little-endian bytes in C order.

    Batch norm's counters are left out: they have no part in evaluation.
    """
    digest = hashlib.sha256()
    for name in sorted(n for n in state if not n.endswith(_COUNTER)):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
