"""A simulated immunofluorescence data set: proteins with 1–3 locations, seen in a few fields each.

Modelled on the Human Protein Atlas's ICC/IF images: red shows the microtubules, green the protein,
blue the nuclei. What makes it a multiple-instance problem rather than a stack of copies:

- a field shows one of its bag's locations strongly and each other one only sometimes, so no single
  field holds the bag's label set;
- a quarter of the fields is bad (blurred, empty or off target), but never a whole bag;
- bags are small and uneven like FlyExpress's: 1–15 fields, about half of the bags have one or two;
- two successive bags share a plate (staining strength, background, noise, cell size). The plate is
  the bags' ``group``: it must not straddle a split.

Deciding (:func:`plan_bag`) is apart from drawing (:func:`draw_field`), and both take their random
numbers from (seed, bag index) alone. So the same command writes the same bytes, and a larger data
set begins with the smaller one.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

import numpy as np
import tomli_w
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from dragn_cache.errors import InputError

Floats = NDArray[np.float32]
Complexes = NDArray[np.complex64]
Quality = Literal["good", "blurred", "empty", "off_target"]

CHANNELS = ("red", "green", "blue")
LABELS = (
    "Nucleoplasm",
    "Nucleoli",
    "Nuclear membrane",
    "Cytosol",
    "Mitochondria",
    "Golgi apparatus",
    "Plasma membrane",
    "Vesicles",
)
# How common each label is: between the Human Protein Atlas's frequencies and equal ones, so that
# the labels are uneven and 200 bags still hold some twenty of the rarest.
_LABEL_WEIGHTS = np.array([0.20, 0.11, 0.09, 0.16, 0.12, 0.10, 0.12, 0.10])
_LABEL_COUNTS = np.array([0.58, 0.34, 0.08])  # one, two, three labels
_BAD: tuple[Quality, ...] = ("blurred", "empty", "off_target")
_BAD_WEIGHTS = np.array([0.3, 0.3, 0.4])
_BAD_SHARE = 0.35  # of the fields that are not spared; a quarter of all fields
_BAGS_PER_PLATE = 2
_MIN_SIDE_PX = 32
# The counterstains are dimmer than the protein, which carries the labels.
_GAIN = np.array([0.45, 1.0, 0.55])
_DRAWN_AT_PX = 96  # lengths below are in pixels of a field with this shorter side


def _bag_sizes() -> NDArray[np.float64]:
    """Probability of 1, 2, …, 15 fields: half at one or two, then a geometric tail; mean 3.5."""
    tail = 0.745 ** np.arange(13)
    return np.concatenate([[0.28, 0.22], 0.5 * tail / tail.sum()])


_BAG_SIZES = _bag_sizes()


@dataclass(frozen=True)
class FieldPlan:
    """One field of view before it is drawn.

    Attributes:
        quality: good, blurred, empty (no cell in view) or off_target (the protein channel shows
            another location than the bag's, or unspecific staining).
        strengths: per entry of ``LABELS``, how bright its pattern is, 0–1.
        unspecific: how bright staining without any location is, 0–1.
    """

    quality: Quality
    strengths: tuple[float, ...]
    unspecific: float = 0.0


@dataclass(frozen=True)
class BagPlan:
    """One bag before it is drawn: its id, its plate, its labels in the order of ``LABELS``."""

    bag_id: str
    group: str
    labels: tuple[str, ...]
    fields: tuple[FieldPlan, ...]


def _rng(seed: int, *key: int) -> np.random.Generator:
    """An independent stream for each (seed, key)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def plan_bag(seed: int, index: int) -> BagPlan:
    """Decide everything about bag ``index`` but its pixels; a pure function of its arguments."""
    rng = _rng(seed, 0, index)
    count = 1 + int(rng.choice(len(_LABEL_COUNTS), p=_LABEL_COUNTS))
    chosen = rng.choice(len(LABELS), size=count, replace=False, p=_LABEL_WEIGHTS)
    brightness = rng.uniform(0.75, 1.0, size=count)
    n = 1 + int(rng.choice(len(_BAG_SIZES), p=_BAG_SIZES))
    bad = rng.random(n) < _BAD_SHARE
    bad[rng.integers(n)] = False  # one field is always spared
    fields = []
    for order in range(n):
        if bad[order]:
            fields.append(_plan_bad(rng, chosen, brightness))
        else:
            # The leading label goes round, so every label leads once there are fields enough.
            lead = int((~bad[:order]).sum()) % count
            fields.append(FieldPlan("good", _strengths(rng, chosen, brightness, lead)))
    return BagPlan(
        bag_id=f"SIM{index + 1:04d}",
        group=f"PLATE{index // _BAGS_PER_PLATE + 1:04d}",
        labels=tuple(LABELS[k] for k in sorted(chosen)),
        fields=tuple(fields),
    )


def _plan_bad(
    rng: np.random.Generator, chosen: NDArray[np.int64], brightness: NDArray[np.float64]
) -> FieldPlan:
    quality = _BAD[rng.choice(len(_BAD), p=_BAD_WEIGHTS)]
    nothing = np.zeros(len(LABELS))
    if quality == "blurred":
        lead = int(rng.integers(len(chosen)))
        return FieldPlan(quality, _strengths(rng, chosen, brightness, lead))
    if quality == "empty":
        return FieldPlan(quality, tuple(nothing.tolist()))
    if rng.random() < 0.5:
        return FieldPlan(quality, tuple(nothing.tolist()), unspecific=float(rng.uniform(0.5, 1.0)))
    others = np.setdiff1d(np.arange(len(LABELS)), chosen)
    nothing[rng.choice(others)] = rng.uniform(0.7, 1.0)
    return FieldPlan(quality, tuple(nothing.tolist()))


def _strengths(
    rng: np.random.Generator,
    chosen: NDArray[np.int64],
    brightness: NDArray[np.float64],
    lead: int,
) -> tuple[float, ...]:
    """The leading label at full brightness; every other one strong in two fields of five."""
    shown = np.where(rng.random(len(chosen)) < 0.4, rng.uniform(0.6, 1.0), rng.uniform(0.0, 0.12))
    shown[lead] = 1.0
    strengths = np.zeros(len(LABELS))
    strengths[chosen] = brightness * shown
    return tuple(strengths.tolist())


@dataclass(frozen=True)
class _Plate:
    """What the fields of one plate have in common; channels in the order of ``CHANNELS``."""

    cell_radius_px: float
    irregularity: float
    gain: Floats  # (3,)
    background: Floats  # (3,)
    read_noise: float
    shot_noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Plate:
        return cls(
            cell_radius_px=float(rng.uniform(23.0, 27.0)),
            irregularity=float(rng.uniform(0.07, 0.14)),
            gain=(_GAIN * rng.uniform(0.85, 1.0, 3)).astype(np.float32),
            background=rng.uniform(0.01, 0.035, 3).astype(np.float32),
            read_noise=float(rng.uniform(0.006, 0.014)),
            shot_noise=float(rng.uniform(0.0003, 0.001)),
        )


@dataclass(frozen=True)
class _Outlines:
    """K star-shaped closed curves: the radius in direction u (unit complex) is a polynomial in u.

    Points are complex numbers x + iy, so that a direction's harmonics are its powers: no
    trigonometry per pixel.
    """

    centres: Complexes  # (K,)
    radii: Floats  # (K,)
    waves: Complexes  # (K, 4): amplitudes of the harmonics 2 to 5, relative to the radius

    @classmethod
    def draw(
        cls, rng: np.random.Generator, centres: Complexes, radii: Floats, irregularity: float
    ) -> _Outlines:
        K = len(centres)
        falling = irregularity * np.array([1.6, 0.8, 0.5, 0.3])  # mostly elliptical
        amplitudes = rng.uniform(0.3, 1.0, (K, 4)) * falling
        waves = amplitudes * np.exp(2j * np.pi * rng.random((K, 4)))
        return cls(centres, radii, waves.astype(np.complex64))

    def of(self, k: NDArray[np.int64]) -> _Outlines:
        """One curve per element of ``k``, in its shape."""
        return _Outlines(self.centres[k], self.radii[k], self.waves[k])

    def radius(self, directions: Complexes) -> Floats:
        """Each curve's radius in its directions: (K, …) unit complex → (K, …)."""
        over = self.radii.shape + (1,) * (directions.ndim - self.radii.ndim)
        w2, w3, w4, w5 = (self.waves[..., k].reshape(over) for k in range(4))
        u = directions
        wave = ((w5 * u + w4) * u + w3) * u + w2
        return np.asarray(self.radii.reshape(over) * (1 + (wave * u * u).real), np.float32)

    def depth(self, offsets: Complexes) -> tuple[Floats, Floats]:
        """How deep points lie, and the radius there: depth is the distance over the radius.

        offsets: points minus their curve's centre, (K, …); 0 is the centre, 1 the curve.
        """
        distance: Floats = np.maximum(np.abs(offsets), np.float32(1e-6))
        directions: Complexes = np.divide(offsets, distance, dtype=np.complex64)
        radius = self.radius(directions)
        return distance / radius, radius

    def at(self, directions: Complexes) -> Complexes:
        """The curves' points in the directions (K, m) → (K, m)."""
        return np.asarray(self.centres[:, None] + self.radius(directions) * directions)


@dataclass(frozen=True)
class _Scene:
    """The cells of one field. Distances are in pixels, positive inside, of shape (h, w)."""

    rng: np.random.Generator
    size: tuple[int, int]
    scale: float  # pixels per pixel of a 96-pixel field
    cells: _Outlines
    nuclei: _Outlines
    in_cell: Floats
    in_nucleus: Floats
    body: Floats  # 0–1
    nucleus: Floats  # 0–1
    nucleoli: Floats  # 0–1

    @property
    def cytoplasm(self) -> Floats:
        return self.body * (1 - self.nucleus)

    def texture(self, grain_px: float, contrast: float) -> Floats:
        """Smooth positive noise of mean 1 and standard deviation about ``contrast``."""
        white = self.rng.standard_normal(self.size, dtype=np.float32)
        smooth = _blur(white, grain_px * self.scale)
        return np.asarray(np.maximum(0, 1 + contrast / smooth.std() * smooth), np.float32)

    def between(self, angles: NDArray[np.floating], fractions: NDArray[np.floating]) -> Complexes:
        """Points from the nuclear membrane (fraction 0) to the cell's edge (1): (K, m) → (K, m)."""
        u = np.exp(1j * angles).astype(np.complex64)
        inner, outer = self.nuclei.at(u), self.cells.at(u)
        return np.asarray(inner + fractions.astype(np.float32) * (outer - inner))

    def spots(self, points: Complexes, weights: Floats, sigma_px: float) -> Floats:
        """Sum of round spots; one of weight 1 has a peak of about 1. Any shape → (h, w)."""
        sigma = sigma_px * self.scale
        peak = 1 + 2 * np.pi * sigma * sigma
        return _blur(_splat(points, weights, self.size), sigma) * np.float32(peak)


def _step(distance_px: Floats, width_px: float) -> Floats:
    """0 outside, 1 inside, a ramp of ``width_px`` between."""
    return np.asarray(np.clip(distance_px / width_px + 0.5, 0, 1), np.float32)


def _blur(planes: Floats, sigma_px: float) -> Floats:
    """Gaussian blur of the last two axes."""
    return np.asarray(gaussian_filter(planes, sigma_px, axes=(-2, -1), truncate=3.0), np.float32)


def _splat(points: Complexes, weights: Floats, size: tuple[int, int]) -> Floats:
    """Add each weight to the four pixels around its point, bilinearly; what is outside is lost."""
    h, w = size
    x, y = points.real.ravel(), points.imag.ravel()
    weights = np.broadcast_to(weights, points.shape).ravel()
    inside = (x >= 0) & (y >= 0) & (x < w - 1) & (y < h - 1)
    x, y, weights = x[inside], y[inside], weights[inside]
    column, row = x.astype(np.int64), y.astype(np.int64)
    dx, dy = x - column, y - row
    first = row * w + column
    where = np.concatenate([first, first + 1, first + w, first + w + 1])
    share = [(1 - dx) * (1 - dy), dx * (1 - dy), (1 - dx) * dy, dx * dy]
    total = np.bincount(where, np.concatenate(share) * np.tile(weights, 4), minlength=h * w)
    return total.reshape(size).astype(np.float32)


def _place_cells(rng: np.random.Generator, size: tuple[int, int], radius_px: float) -> Complexes:
    """Centres of five to seven cells per square of the shorter side, not too close: (K,)."""
    h, w = size
    wanted = max(1, round(int(rng.integers(5, 8)) * max(h, w) / min(h, w)))
    margin = 0.35 * radius_px
    x = rng.uniform(margin, w - margin, 12 * wanted)
    y = rng.uniform(margin, h - margin, 12 * wanted)
    placed: list[complex] = []
    for point in (x + 1j * y).tolist():
        if all(abs(point - other) > 1.25 * radius_px for other in placed):
            placed.append(point)
        if len(placed) == wanted:
            break
    return np.array(placed, np.complex64)


def _draw_scene(rng: np.random.Generator, plate: _Plate, size: tuple[int, int]) -> _Scene:
    h, w = size
    scale = min(size) / _DRAWN_AT_PX
    typical = plate.cell_radius_px * scale
    centres = _place_cells(rng, size, typical)
    K = len(centres)
    radii = (typical * rng.uniform(0.85, 1.15, K)).astype(np.float32)
    cells = _Outlines.draw(rng, centres, radii, plate.irregularity)
    shift = 0.12 * radii * rng.random(K) * np.exp(2j * np.pi * rng.random(K))
    nucleus_radii = (radii * rng.uniform(0.42, 0.52, K)).astype(np.float32)
    nuclei = _Outlines.draw(rng, (centres + shift).astype(np.complex64), nucleus_radii, 0.06)

    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    points = (x + 1j * y).astype(np.complex64)
    depth, radius = cells.depth(points - centres[:, None, None])
    owner = depth.argmin(0)
    nearest = np.take_along_axis(depth, owner[None], 0)[0]
    np.put_along_axis(depth, owner[None], np.float32(np.inf), 0)
    # Where two cells meet, the border is where both are equally deep.
    inside = np.minimum(1 - nearest, (depth.min(0) - nearest) / 2)
    in_cell = inside * np.take_along_axis(radius, owner[None], 0)[0]
    depth, radius = nuclei.of(owner).depth(points - nuclei.centres[owner])
    # A nucleus never leaves its cell.
    in_nucleus = np.minimum((1 - depth) * radius, in_cell - 2 * scale)
    return _Scene(
        rng=rng,
        size=size,
        scale=scale,
        cells=cells,
        nuclei=nuclei,
        in_cell=in_cell,
        in_nucleus=in_nucleus,
        body=_step(in_cell, 2.0 * scale),
        nucleus=_step(in_nucleus, 1.5 * scale),
        nucleoli=_draw_nucleoli(rng, nuclei, scale, points),
    )


def _draw_nucleoli(
    rng: np.random.Generator, nuclei: _Outlines, scale: float, points: Complexes
) -> Floats:
    """Two to four compact round bodies in each nucleus: (h, w), 0–1."""
    where: list[complex] = []
    for centre, radius in zip(nuclei.centres.tolist(), nuclei.radii.tolist(), strict=True):
        count = int(rng.integers(2, 5))
        turn = 2 * np.pi * (np.arange(count) + rng.uniform(0, 0.7, count)) / count
        where += (centre + radius * rng.uniform(0.3, 0.55, count) * np.exp(1j * turn)).tolist()
    radii = rng.uniform(1.6, 2.9, len(where)).astype(np.float32) * np.float32(scale)
    centres = np.array(where, np.complex64)
    distance = np.abs(points - centres[:, None, None])
    return _step((radii[:, None, None] - distance).max(0), 1.5 * scale)


def _nucleoplasm(scene: _Scene) -> Floats:
    return scene.nucleus * (1 - 0.8 * scene.nucleoli) * scene.texture(1.3, 0.25) * 0.8


def _nucleoli(scene: _Scene) -> Floats:
    return scene.nucleus * (1.4 * scene.nucleoli + 0.08)


def _nuclear_membrane(scene: _Scene) -> Floats:
    rim: Floats = np.exp(-((scene.in_nucleus / (1.8 * scene.scale)) ** 2))
    return 1.2 * rim * scene.texture(2.0, 0.2) + 0.08 * scene.nucleus


def _cytosol(scene: _Scene) -> Floats:
    thinning = 0.45 + 0.55 * _step(scene.in_cell - 5 * scene.scale, 10 * scene.scale)
    return scene.cytoplasm * thinning * scene.texture(2.0, 0.15) * 0.75


def _mitochondria(scene: _Scene) -> Floats:
    """Short bent threads, denser around the nucleus."""
    rng, K, worms, steps = scene.rng, len(scene.cells.centres), 38, 9
    start = scene.between(
        rng.uniform(0, 2 * np.pi, (K, worms)), 0.08 + 0.75 * rng.random((K, worms)) ** 1.4
    )
    heading = rng.uniform(0, 2 * np.pi, (K, worms, 1))
    bend = rng.normal(0, 0.18, (K, worms, 1))
    along = np.arange(steps)
    stride = np.exp(1j * (heading + bend * along)) * (0.7 * scene.scale)
    points = (start[..., None] + stride.cumsum(-1)).astype(np.complex64)
    weights = rng.uniform(0.2, 0.5, (K, worms, 1)).astype(np.float32)
    return scene.spots(points, weights, 0.65) * scene.cytoplasm


def _golgi(scene: _Scene) -> Floats:
    """A ribbon of small stacks to one side of each nucleus."""
    rng, K, stacks = scene.rng, len(scene.cells.centres), 26
    side = rng.uniform(0, 2 * np.pi, (K, 1))
    angles = side + rng.normal(0, 0.38, (K, stacks))
    points = scene.between(angles, rng.uniform(0.05, 0.36, (K, stacks)))
    weights = rng.uniform(0.4, 1.0, (K, stacks)).astype(np.float32)
    return np.minimum(1.4, scene.spots(points, weights, 1.0)) * scene.body


def _plasma_membrane(scene: _Scene) -> Floats:
    rim: Floats = np.exp(-(((scene.in_cell - scene.scale) / (1.7 * scene.scale)) ** 2))
    return rim * scene.texture(2.5, 0.25) + 0.1 * scene.body


def _vesicles(scene: _Scene) -> Floats:
    """Separate round dots of two sizes all over the cytoplasm."""
    rng, K = scene.rng, len(scene.cells.centres)
    total = np.zeros(scene.size, np.float32)
    for dots, sigma_px in ((36, 0.9), (12, 1.4)):
        angles = rng.uniform(0, 2 * np.pi, (K, dots))
        points = scene.between(angles, rng.uniform(0.08, 0.92, (K, dots)) ** 0.8)
        weights = rng.uniform(0.6, 1.3, (K, dots)).astype(np.float32)
        total += scene.spots(points, weights, sigma_px)
    return np.minimum(total, 1.4) * scene.body


_PATTERNS: dict[str, Callable[[_Scene], Floats]] = {
    "Nucleoplasm": _nucleoplasm,
    "Nucleoli": _nucleoli,
    "Nuclear membrane": _nuclear_membrane,
    "Cytosol": _cytosol,
    "Mitochondria": _mitochondria,
    "Golgi apparatus": _golgi,
    "Plasma membrane": _plasma_membrane,
    "Vesicles": _vesicles,
}


def _microtubules(scene: _Scene) -> Floats:
    """Bent filaments from beside the nucleus out to the cell's edge, over a faint haze."""
    rng, K, filaments, steps = scene.rng, len(scene.cells.centres), 64, 28
    angles = rng.uniform(0, 2 * np.pi, (K, filaments, 1))
    sweep = rng.normal(0, 0.5, (K, filaments, 1))
    along = np.linspace(-0.15, 1, steps)
    reach = rng.uniform(0.75, 1.0, (K, filaments, 1))
    wiggle = 0.05 * np.sin(rng.uniform(4, 9, (K, filaments, 1)) * along + angles)
    turned = (angles + sweep * along**2 + wiggle).reshape(K, -1)
    points = scene.between(turned, (along * reach).reshape(K, -1))
    weights = rng.uniform(0.03, 0.16, (K, filaments, 1)) * np.ones(steps)
    threads = scene.spots(points, weights.reshape(K, -1).astype(np.float32), 0.6)
    haze: Floats = 0.18 * scene.texture(3.0, 0.2)
    light: Floats = np.minimum(threads, 1.1) + haze
    return light * scene.body * (1 - 0.6 * scene.nucleus)


def _protein(scene: _Scene, field: FieldPlan) -> Floats:
    green = 0.03 * scene.body
    for label, strength in zip(LABELS, field.strengths, strict=True):
        if strength > 0:
            green = green + np.float32(strength) * _PATTERNS[label](scene)
    if field.unspecific > 0:
        smear = 0.2 * scene.texture(5.0, 0.5) + 0.35 * scene.body * scene.texture(1.5, 0.3)
        green = green + np.float32(field.unspecific) * smear
    return green


def draw_field(seed: int, index: int, order: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw field ``order`` of bag ``index``.

    Returns:
        (3, h, w) uint8, channels in the order of ``CHANNELS``.
    """
    plate = _Plate.draw(_rng(seed, 1, index // _BAGS_PER_PLATE))
    return _draw(plan_bag(seed, index).fields[order], plate, _rng(seed, 2, index, order), size)


def _draw(
    field: FieldPlan, plate: _Plate, rng: np.random.Generator, size: tuple[int, int]
) -> NDArray[np.uint8]:
    light = np.zeros((len(CHANNELS), *size), np.float32)
    if field.quality != "empty":
        scene = _draw_scene(rng, plate, size)
        chromatin = scene.texture(1.5, 0.18) * (1 - 0.45 * scene.nucleoli)
        light[0] = _microtubules(scene)
        light[1] = _protein(scene, field)
        light[2] = 0.8 * scene.nucleus * chromatin
    scale = min(size) / _DRAWN_AT_PX
    sigma = rng.uniform(3.0, 5.0) if field.quality == "blurred" else rng.uniform(0.3, 0.6)
    light = _blur(light, sigma * scale)
    light *= (plate.gain * rng.uniform(0.9, 1.1, 3))[:, None, None]
    light += _uneven_background(rng, plate, size)
    # The sensor's noise comes after the optics: a blurred field is not free of it.
    spread = np.sqrt(plate.read_noise**2 + plate.shot_noise * light)
    light += spread * rng.standard_normal(light.shape, dtype=np.float32)
    return np.rint(np.clip(light, 0, 1) * 255).astype(np.uint8)


def _uneven_background(rng: np.random.Generator, plate: _Plate, size: tuple[int, int]) -> Floats:
    """Each channel's background with a slope of up to a third across the field: (3, h, w)."""
    h, w = size
    down, across = rng.uniform(-0.3, 0.3, (2, 3, 1, 1))
    y, x = np.linspace(-0.5, 0.5, h)[:, None], np.linspace(-0.5, 0.5, w)
    level = plate.background[:, None, None] * (1 + down * y + across * x)
    return np.asarray(level, np.float32)


def describe(*, bags: int, seed: int, size: tuple[int, int]) -> dict[str, object]:
    """The content of ``dataset.toml``; its ``source`` names the simulation completely."""
    h, w = size
    return {
        "name": "simulated",
        "title": "Simulated immunofluorescence of protein locations",
        "task": "multilabel",
        "labels": list(LABELS),
        "channels": list(CHANNELS),
        "images": "images",
        "source": f"dragn_cache.datasets.simulated: bags={bags}, seed={seed}, size={h}x{w}",
        "licence": "CC0-1.0",
        "extract": {
            "backbone": "resnet18",
            "size": [h, w],
            "taps": ["layer4", "avgpool"],
            "rgb": list(CHANNELS),
        },
    }


def simulate(
    out: Path,
    *,
    bags: int,
    seed: int,
    size: tuple[int, int] = (96, 96),
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the simulated data set as a manifest folder with its images.

    The folder is built beside ``out`` and renamed: it exists, so it is complete. When ``out``
    already holds this very simulation, nothing is done.

    Args:
        out: the folder to make; it may exist when it is empty.
        bags: number of bags (proteins), at least 1.
        seed: any integer from 0.
        size: height and width of a field in pixels, each at least 32.
        progress: called after each bag with the number of bags drawn so far.

    Returns:
        ``out``, holding ``dataset.toml``, ``bags.csv``, ``instances.csv``, ``images/`` with 8-bit
        grayscale PNG files, and ``truth.csv``: each field's quality, which no training reads.

    Raises:
        InputError: a value is out of range, or ``out`` holds something else.
    """
    _check("bags", bags, 1)
    _check("seed", seed, 0)
    for side in size:
        _check("size", side, _MIN_SIDE_PX)
    description = tomli_w.dumps(describe(bags=bags, seed=seed, size=size))
    if _is_done(out, description):
        return out
    target = out.resolve()
    building = target.with_name(f".{target.name}.{uuid4().hex}")
    building.mkdir(parents=True)
    try:
        _write(building, [plan_bag(seed, index) for index in range(bags)], seed, size, progress)
        (building / "dataset.toml").write_text(description, encoding="utf-8")
        building.rename(target)
    except BaseException:
        shutil.rmtree(building)
        raise
    return out


def _check(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(
            f"simulated data set, {name}",
            expected=f"at least {least}",
            got=str(value),
            remedy=f"choose a larger {name}",
        )


def _is_done(out: Path, description: str) -> bool:
    """Whether ``out`` holds this simulation already; an error when it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    there = out / "dataset.toml"
    if there.is_file() and there.read_text(encoding="utf-8") == description:
        return True
    raise InputError(
        str(out),
        expected="a new or empty folder, or this same simulation",
        got="another simulation" if there.is_file() else "other files",
        remedy="choose another folder or remove this one",
    )


def _write(
    folder: Path,
    plans: Sequence[BagPlan],
    seed: int,
    size: tuple[int, int],
    progress: Callable[[int], None] | None,
) -> None:
    """Images first, tables after."""
    for index, plan in enumerate(plans):
        bag_folder = folder / "images" / plan.bag_id
        bag_folder.mkdir(parents=True)
        plate = _Plate.draw(_rng(seed, 1, index // _BAGS_PER_PLATE))
        for order, field in enumerate(plan.fields):
            planes = _draw(field, plate, _rng(seed, 2, index, order), size)
            for channel, plane in zip(CHANNELS, planes, strict=True):
                Image.fromarray(plane).save(
                    bag_folder / f"{order:03d}_{channel}.png", compress_level=1
                )
        if progress is not None:
            progress(index + 1)
    fields = [(p.bag_id, order, f) for p in plans for order, f in enumerate(p.fields)]
    _write_table(
        folder / "bags.csv",
        ("bag_id", "labels", "group"),
        ((p.bag_id, ";".join(p.labels), p.group) for p in plans),
    )
    _write_table(
        folder / "instances.csv",
        ("bag_id", "image", "order"),
        ((bag, f"{bag}/{order:03d}_{{channel}}.png", order) for bag, order, _ in fields),
    )
    _write_table(
        folder / "truth.csv",
        ("bag_id", "order", "quality"),
        ((bag, order, field.quality) for bag, order, field in fields),
    )


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)
