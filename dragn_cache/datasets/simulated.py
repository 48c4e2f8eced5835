"""A simulated immunofluorescence data set: proteins with 1–3 locations, seen in a few fields each.

Modelled on the Human Protein Atlas's ICC/IF images: red shows the microtubules, green the protein,
blue the nuclei. It is a multiple-instance problem rather than a stack of copies:

- a field shows one of its bag's locations strongly and each other one only sometimes, so no single
  field holds the bag's label set;
- a quarter of the fields is bad (blurred, empty or off target), but never all fields of a bag;
- bags are small and uneven like FlyExpress's: 1–15 fields, about half of the bags have one or two;
- two successive bags share a plate (staining strength, background, noise, cell size). The plate is
  the bags' ``group``: it must not straddle a split.

Deciding (:func:`plan_bag`) is apart from drawing (:func:`draw_field`), and both take their random
numbers from (seed, bag index) alone. So the same command writes the same bytes, and a larger data
set begins with the smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dragn_cache.datasets.cells import CHANNELS, LABELS, FieldPlan, Plate, Quality, render_field
from dragn_cache.datasets.config import SimulateConfig
from dragn_cache.errors import InputError
from dragn_cache.files import read_text, write_csv
from dragn_cache.manifest import Bag, Instance, Manifest, write_manifest
from dragn_cache.manifest.dataset_toml import dataset_text
from dragn_cache.store.new_path import beside, claimed

# Frequencies of the labels, between those of the Human Protein Atlas and equal ones: the labels are
# uneven, and 200 bags still hold about twenty of the rarest.
_LABEL_WEIGHTS = np.array([0.20, 0.11, 0.09, 0.16, 0.12, 0.10, 0.12, 0.10])
_LABEL_COUNTS = np.array([0.58, 0.34, 0.08])  # one, two, three labels
_BAD: tuple[Quality, ...] = ("blurred", "empty", "off_target")
_BAD_WEIGHTS = np.array([0.3, 0.3, 0.4])
_BAD_SHARE = 0.35  # of all fields but one good one in each bag; a quarter of all fields
_BAGS_PER_PLATE = 2
IMAGES = "images"  # the folder of the images, beside the tables


def _bag_sizes() -> NDArray[np.float64]:
    """Probability of 1, 2, …, 15 fields: half at one or two, then a geometric tail; mean 3.5."""
    tail = 0.745 ** np.arange(13)
    return np.concatenate([[0.28, 0.22], 0.5 * tail / tail.sum()])


_BAG_SIZES = _bag_sizes()


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
    bad[rng.integers(n)] = False  # every bag has a good field
    fields = []
    for order in range(n):
        if bad[order]:
            fields.append(_plan_bad(rng, chosen, brightness))
        else:
            # The labels take turns as the leading one, so with enough fields each one leads.
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
    strengths = np.zeros(len(LABELS))
    if quality == "blurred":
        lead = int(rng.integers(len(chosen)))
        return FieldPlan(quality, _strengths(rng, chosen, brightness, lead))
    if quality == "empty":
        return FieldPlan(quality, tuple(strengths.tolist()))
    if rng.random() < 0.5:
        return FieldPlan(
            quality, tuple(strengths.tolist()), unspecific=float(rng.uniform(0.5, 1.0))
        )
    others = np.setdiff1d(np.arange(len(LABELS)), chosen)
    strengths[rng.choice(others)] = rng.uniform(0.7, 1.0)
    return FieldPlan(quality, tuple(strengths.tolist()))


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


def draw_field(seed: int, index: int, order: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw field ``order`` of bag ``index``.

    Returns:
        (3, h, w) uint8, channels in the order of ``CHANNELS``.
    """
    plate = Plate.draw(_rng(seed, 1, index // _BAGS_PER_PLATE))
    return render_field(
        plan_bag(seed, index).fields[order], plate, _rng(seed, 2, index, order), size
    )


def simulated_manifest(
    plans: Sequence[BagPlan], seed: int, size: tuple[int, int], folder: Path
) -> Manifest:
    """The manifest of a simulation in a folder; its ``source`` names the simulation completely."""
    h, w = size
    return Manifest(
        name="simulated",
        title="Simulated immunofluorescence of protein locations",
        task="multilabel",
        labels=LABELS,
        channels=CHANNELS,
        bags=tuple(Bag(plan.bag_id, plan.labels, group=plan.group) for plan in plans),
        instances={
            plan.bag_id: tuple(
                Instance(plan.bag_id, f"{plan.bag_id}/{order:03d}_{{channel}}.png", order)
                for order in range(len(plan.fields))
            )
            for plan in plans
        },
        image_root=folder / IMAGES,
        source=f"dragn_cache.datasets.simulated: bags={len(plans)}, seed={seed}, size={h}x{w}",
        licence="CC0-1.0",
        extract={
            "backbone": "resnet18",
            "size": [h, w],
            "taps": ["layer4", "avgpool"],
            "rgb": list(CHANNELS),
        },
    )


def simulate(
    out: Path,
    config: SimulateConfig | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the simulated data set as a manifest folder with its images.

    The folder is built under another name and renamed: if it exists, it is complete. When ``out``
    already holds this very simulation, nothing is done.

    Args:
        out: the folder to make; it may exist when it is empty.
        config: how many bags (proteins), of which size, by which seed.
        progress: called after each bag with the number of bags drawn so far.

    Returns:
        ``out``, holding ``dataset.toml``, ``bags.csv``, ``instances.csv``, ``images/`` with 8-bit
        grayscale PNG files, and ``truth.csv``: each field's quality, which no training reads.

    Raises:
        InputError: ``out`` holds something else.
    """
    config = config or SimulateConfig()
    seed, size = config.seed, config.size
    plans = [plan_bag(seed, index) for index in range(config.bags)]
    description = dataset_text(simulated_manifest(plans, seed, size, out), images=IMAGES)
    with claimed(out) as claims:
        if _is_done(out, description):
            return out
        with beside(out, claims) as building:
            _draw_images(building / IMAGES, plans, seed, size, progress)
            write_manifest(simulated_manifest(plans, seed, size, building), building)
            _write_truth(building / "truth.csv", plans)
    return out


def _is_done(out: Path, description: str) -> bool:
    """Whether ``out`` holds this simulation; raise `InputError` if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    toml_path = out / "dataset.toml"
    if toml_path.is_file() and read_text(toml_path) == description:
        return True
    raise InputError(
        str(out),
        expected="a new or empty folder, or this same simulation",
        got="another simulation" if toml_path.is_file() else "other files",
        remedy="choose another folder",
    )


def _draw_images(
    folder: Path,
    plans: Sequence[BagPlan],
    seed: int,
    size: tuple[int, int],
    progress: Callable[[int], None] | None,
) -> None:
    for index, plan in enumerate(plans):
        bag_folder = folder / plan.bag_id
        bag_folder.mkdir(parents=True)
        plate = Plate.draw(_rng(seed, 1, index // _BAGS_PER_PLATE))
        for order, field in enumerate(plan.fields):
            planes = render_field(field, plate, _rng(seed, 2, index, order), size)
            for channel, plane in zip(CHANNELS, planes, strict=True):
                Image.fromarray(plane).save(
                    bag_folder / f"{order:03d}_{channel}.png", compress_level=1
                )
        if progress is not None:
            progress(index + 1)


def _write_truth(path: Path, plans: Sequence[BagPlan]) -> None:
    rows = [(plan.bag_id, k, f.quality) for plan in plans for k, f in enumerate(plan.fields)]
    write_csv(path, ("bag_id", "order", "quality"), rows)
