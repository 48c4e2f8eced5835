"""Simulated cells: outlines, compartments and protein patterns of one field of view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

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

# The counterstains are dimmer than the protein, which carries the labels.
_GAIN = np.array([0.45, 1.0, 0.55])
_DRAWN_AT_PX = 96  # lengths below are in pixels of a field with this shorter side


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
class Plate:
    """The settings that the fields of one plate share; channels in the order of ``CHANNELS``."""

    cell_radius_px: float
    irregularity: float
    gain: Floats  # (3,)
    background: Floats  # (3,)
    read_noise: float
    shot_noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Plate:
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

    Points are complex numbers x + iy: a direction's harmonics are then its powers, and no pixel
    needs a sine or cosine.
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
        """Depth of points, 0 at the centre and 1 on the curve, and the curve's radius there.

        offsets: points minus their curve's centre, (K, …).
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
    """Add each weight to the four pixels around its point, bilinearly; skip points outside."""
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
    count = max(1, round(int(rng.integers(5, 8)) * max(h, w) / min(h, w)))
    margin = 0.35 * radius_px
    x = rng.uniform(margin, w - margin, 12 * count)
    y = rng.uniform(margin, h - margin, 12 * count)
    placed: list[complex] = []
    for point in (x + 1j * y).tolist():
        if all(abs(point - other) > 1.25 * radius_px for other in placed):
            placed.append(point)
        if len(placed) == count:
            break
    return np.array(placed, np.complex64)


def _draw_scene(rng: np.random.Generator, plate: Plate, size: tuple[int, int]) -> _Scene:
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
    # Two cells meet where their depths are equal.
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
    """Two to four round bodies in each nucleus: (h, w), 0–1."""
    places: list[complex] = []
    for centre, radius in zip(nuclei.centres.tolist(), nuclei.radii.tolist(), strict=True):
        count = int(rng.integers(2, 5))
        turn = 2 * np.pi * (np.arange(count) + rng.uniform(0, 0.7, count)) / count
        places += (centre + radius * rng.uniform(0.3, 0.55, count) * np.exp(1j * turn)).tolist()
    radii = rng.uniform(1.6, 2.9, len(places)).astype(np.float32) * np.float32(scale)
    centres = np.array(places, np.complex64)
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


def render_field(
    field: FieldPlan, plate: Plate, rng: np.random.Generator, size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Draw one field: (3, h, w) uint8, channels in the order of ``CHANNELS``."""
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
    # The sensor adds noise after the optics, so that a blurred field has it too.
    spread = np.sqrt(plate.read_noise**2 + plate.shot_noise * light)
    light += spread * rng.standard_normal(light.shape, dtype=np.float32)
    return np.rint(np.clip(light, 0, 1) * 255).astype(np.uint8)


def _uneven_background(rng: np.random.Generator, plate: Plate, size: tuple[int, int]) -> Floats:
    """Each channel's background with a slope of up to a third across the field: (3, h, w)."""
    h, w = size
    down, across = rng.uniform(-0.3, 0.3, (2, 3, 1, 1))
    y, x = np.linspace(-0.5, 0.5, h)[:, None], np.linspace(-0.5, 0.5, w)
    level = plate.background[:, None, None] * (1 + down * y + across * x)
    return np.asarray(level, np.float32)
