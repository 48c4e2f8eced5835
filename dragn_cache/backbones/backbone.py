"""A frozen backbone: uint8 images in, the values of its taps out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchvision.models import Weights, WeightsEnum

from dragn_cache.backbones.building import build
from dragn_cache.backbones.families import family
from dragn_cache.backbones.inputs import average_inputs, require_channel_mode
from dragn_cache.backbones.preprocessing import Preprocessing, default_preprocessing
from dragn_cache.backbones.taps import Tap, tap_graph, tap_network
from dragn_cache.backbones.weights import (
    PublishedWeights,
    RandomWeights,
    WeightsFile,
    fetch_weights,
    fit_state_dict,
    image_size,
    read_state_dict,
    resolve_weights,
    weights_digest,
)
from dragn_cache.devices import find_device
from dragn_cache.errors import InputError


class Backbone(nn.Module):
    """A network with fixed weights, cut off after its last tap. Made by `load_backbone`.

    Attributes:
        name: the backbone's name.
        network: from normalised images `(N, 3, h, w)` (`(N, P, h, w)` where channels are averaged)
            to the taps' graph outputs by node.
        taps: the taps in the order of the call.
        grid: side of the grid that maps are pooled to, or None.
        preprocessing: the settings of its images; `forward` itself does the normalisation.
        weights_digest: SHA-256 (hex) of the tensors that the taps depend on.
        tap_shapes: one image's shape by tap, `(C, h, w)` or `(C,)`, after any grid; where each of
            P channels is run by itself, their P·C features are in channel order.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        network: fx.GraphModule,
        taps: Sequence[Tap],
        *,
        preprocessing: Preprocessing,
        grid: int | None,
        digest: str,
    ) -> None:
        super().__init__()
        self.name, self.network, self.taps, self.grid = name, network, tuple(taps), grid
        self.preprocessing, self.weights_digest = preprocessing, digest
        self.tap_shapes = {tap.name: tap.grid_shape(grid) for tap in taps}
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        if preprocessing.channels == "each":
            p = preprocessing.planes
            self.tap_shapes = {name: (p * s[0], *s[1:]) for name, s in self.tap_shapes.items()}
        if preprocessing.channels == "average":
            average_inputs(name, network, preprocessing.planes)
            mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode whatever `mode` is: the backbone is frozen."""
        return super().train(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalise images, run the network once, and read all taps, in inference mode.

        Args:
            images: `(N, P, h, w)` uint8 of the preprocessing's size, on the backbone's device;
                P = 3 unless channels are averaged or run each by itself.

        Returns:
            By tap, in the order of `taps`: `(N, C, h, w)` or `(N, C)` float32, contiguous. An
            output `(N, C, 1, 1)` is given as `(N, C)`.

        Raises:
            InputError: the images have another dtype or shape.
        """
        self._require_pixels(images)
        with torch.inference_mode():
            return self.compute(images)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """`forward` without its check and its mode, as one graph for `torch.compile`."""
        if self.preprocessing.channels != "each":
            return self._run(images)
        planes = range(self.preprocessing.planes)
        by_plane = [self._run(images[:, k : k + 1].expand(-1, 3, -1, -1)) for k in planes]
        return {tap.name: torch.cat([out[tap.name] for out in by_plane], 1) for tap in self.taps}

    def _run(self, images: Tensor) -> dict[str, Tensor]:
        # As torchvision's evaluation transform: scaled to 0–1 first, then normalised.
        scaled = images.to(torch.float32, memory_format=torch.channels_last) / 255
        outputs = self.network((scaled - self.mean) / self.std)
        return {tap.name: tap.read(outputs[tap.node], self.grid) for tap in self.taps}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """One image's shape: planes, height, width."""
        return (self.preprocessing.planes, *self.preprocessing.size)

    def _require_pixels(self, images: Tensor) -> None:
        shape = self.input_shape
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != shape:
            raise InputError(
                f"images for backbone {self.name}",
                expected=f"uint8 (N, {', '.join(map(str, shape))})",
                got=f"{images.dtype} ({', '.join(map(str, images.shape))})",
                remedy="prepare them with the backbone's preprocessing",
            )

    def provenance(self) -> dict[str, Any]:
        """Everything besides the images that its features depend on, as JSON values."""
        return {
            "backbone": self.name,
            "weights_sha256": self.weights_digest,
            "taps": [tap.name for tap in self.taps],
            "grid": self.grid,
            "preprocessing": self.preprocessing.to_dict(),
        }


def load_backbone(
    name: str,
    *,
    weights: str | Path | Weights | WeightsEnum = "imagenet",
    taps: Sequence[str] | None = None,
    grid: int | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> Backbone:
    """Load a frozen backbone with its weights.

    Everything is checked before anything is downloaded.

    Args:
        name: one of `list_backbones()`.
        weights: `imagenet` (torchvision's newest, downloaded once), a name of published weights
            such as `IMAGENET1K_V1`, `random` or `random:SEED` (without touching the global random
            state), a path to a state dict, or a torchvision weights object.
        taps: names of modules (`layer4`), of graph nodes (`layer4.1.add`), `gap` (the last map's
            spatial mean) or, for vision transformers, `cls`. Default: the last map and its mean.
        grid: pool maps to grid × grid by adaptive averaging; vectors stay as they are.
        preprocessing: all settings, or those that differ from `default_preprocessing`.
        device: where the network runs.

    Raises:
        UnknownNameError: no such backbone, weights, tap or preprocessing setting.
        InputError: an image size that the network cannot take, a tap that is neither map nor
            vector, a grid larger than a map, or averaged channels where the network itself
            scales each of its inputs.
        WeightsError: weights that cannot be downloaded, read or fitted.
    """
    spec, source = family(name), resolve_weights(name, weights)
    _require_grid(grid)
    target = find_device(device)
    if not isinstance(preprocessing, Preprocessing):
        preprocessing = default_preprocessing(name, weights).override(**(preprocessing or {}))
    require_channel_mode(name, preprocessing.channels)
    names = _tap_names(spec.default_taps if taps is None else taps)
    side = image_size(name, source)
    graph = tap_graph(name, preprocessing.size, side)
    chosen = [graph.tap(tap) for tap in names]
    for tap in chosen:
        tap.grid_shape(grid)

    needed = graph.tensors(chosen)
    whole = build(name, side, seed=source.seed if isinstance(source, RandomWeights) else 0)
    if not isinstance(source, RandomWeights):
        where = f"weights {weights} for {name}"
        fit_state_dict(whole, _read(source), spec=spec, needed=needed, where=where)
    state = whole.state_dict()
    digest = weights_digest({key: state[key] for key in needed})
    network = tap_network(whole, chosen)
    backbone = Backbone(
        name, network, chosen, preprocessing=preprocessing, grid=grid, digest=digest
    )
    return backbone.to(target).to(memory_format=torch.channels_last)


def _read(source: PublishedWeights | WeightsFile) -> dict[str, Tensor]:
    path = source.path if isinstance(source, WeightsFile) else fetch_weights(source.entry)
    return read_state_dict(path)


def _require_grid(grid: int | None) -> None:
    if grid is not None and (not isinstance(grid, int) or isinstance(grid, bool) or grid < 1):
        raise InputError(
            "grid", expected="None or a whole number ≥ 1", got=repr(grid), remedy="change it"
        )


def _tap_names(taps: Sequence[str]) -> list[str]:
    names = [taps] if isinstance(taps, str) else list(taps)
    if not names or len(set(names)) < len(names):
        raise InputError(
            "taps", expected="one or more different taps", got=repr(names), remedy="change them"
        )
    return names
