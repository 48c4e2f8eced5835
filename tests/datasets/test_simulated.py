"""The laws of the simulated data set; and the shipped dataset.toml files are well formed."""

import csv
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dragn_cache.backbone_input import ExtractDefaults
from dragn_cache.datasets import simulated
from dragn_cache.datasets.cells import CHANNELS, LABELS, FieldPlan, Plate, render_field
from dragn_cache.datasets.config import SimulateConfig
from dragn_cache.datasets.simulated import draw_field, plan_bag, simulate
from dragn_cache.errors import InputError
from dragn_cache.manifest.dataset_toml import dataset_text
from dragn_cache.options import declarations

SIZE = (71, 83)
MANIFESTS = Path(simulated.__file__).parents[2] / "data_manifests"
KEYS = {
    *("name", "title", "task", "labels", "channels", "images"),
    *("source", "licence", "citation", "extract"),
}


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def eleven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(
        tmp_path_factory.mktemp("sim") / "eleven", SimulateConfig(bags=11, seed=5, size=SIZE)
    )


@pytest.fixture(scope="module")
def plans() -> list[simulated.BagPlan]:
    return [plan_bag(3, index) for index in range(3001)]


def test_same_arguments_give_the_same_bytes(eleven: Path, tmp_path: Path) -> None:
    again = simulate(tmp_path / "again", SimulateConfig(bags=11, seed=5, size=SIZE))
    assert contents(again) == contents(eleven)


def test_a_smaller_set_is_the_beginning_of_a_larger_one(eleven: Path, tmp_path: Path) -> None:
    seven = contents(simulate(tmp_path / "seven", SimulateConfig(bags=7, seed=5, size=SIZE)))
    larger = contents(eleven)
    images = {name for name in seven if name.startswith("images/")}
    bags = {f"SIM{k:04d}" for k in range(1, 8)}
    assert {name.split("/")[1] for name in images} == bags
    assert images == {n for n in larger if n.startswith("images/") and n.split("/")[1] in bags}
    for name in images:
        assert larger[name] == seven[name]
    for table in ("bags.csv", "instances.csv", "truth.csv"):
        assert larger[table].startswith(seven[table])


def test_seeds_differ_in_plan_and_pixels() -> None:
    assert [plan_bag(0, k) for k in range(5)] != [plan_bag(1, k) for k in range(5)]
    assert not np.array_equal(draw_field(0, 2, 0, SIZE), draw_field(1, 2, 0, SIZE))


def test_fields_of_one_bag_differ() -> None:
    index = next(k for k in range(100) if len(plan_bag(0, k).fields) > 1)
    assert not np.array_equal(draw_field(0, index, 0, SIZE), draw_field(0, index, 1, SIZE))


def test_bag_sizes_are_uneven_like_flyexpress(plans: list[simulated.BagPlan]) -> None:
    sizes = np.array([len(plan.fields) for plan in plans])
    assert sizes.min() == 1
    assert sizes.max() == 15
    assert np.mean(sizes <= 2) == pytest.approx(0.5, abs=0.04)
    assert sizes.mean() == pytest.approx(3.5, abs=0.2)


def test_a_quarter_of_the_fields_is_bad_but_no_bag_is(plans: list[simulated.BagPlan]) -> None:
    counts = Counter(field.quality for plan in plans for field in plan.fields)
    assert set(counts) == {"good", "blurred", "empty", "off_target"}
    assert 1 - counts["good"] / counts.total() == pytest.approx(0.25, abs=0.02)
    assert min(counts.values()) / counts.total() > 0.05
    assert all(any(f.quality == "good" for f in plan.fields) for plan in plans)


def test_labels_are_one_to_three_known_ones_in_order(plans: list[simulated.BagPlan]) -> None:
    for plan in plans:
        assert 1 <= len(plan.labels) <= 3
        assert list(plan.labels) == [label for label in LABELS if label in plan.labels]
    assert np.mean([len(plan.labels) <= 2 for plan in plans]) > 0.85
    frequency = Counter(label for plan in plans for label in plan.labels)
    assert min(frequency[label] for label in LABELS) / len(plans) > 0.08


def test_good_fields_show_their_bags_labels_and_no_other(plans: list[simulated.BagPlan]) -> None:
    for plan in plans:
        good = np.array([f.strengths for f in plan.fields if f.quality == "good"])
        labelled = np.array([label in plan.labels for label in LABELS])
        assert (good[:, ~labelled] == 0).all()
        assert (good.max(axis=1) >= 0.7).all()
        if len(good) >= len(plan.labels):
            assert (good[:, labelled].max(axis=0) >= 0.7).all(), plan.bag_id


def test_one_field_often_lacks_a_label_of_its_bag(plans: list[simulated.BagPlan]) -> None:
    """Otherwise one field would do, and aggregation would be no use."""
    several = [plan for plan in plans if len(plan.labels) > 1]
    hidden = [
        any(field.strengths[LABELS.index(label)] < 0.15 for label in plan.labels)
        for plan in several
        for field in plan.fields
        if field.quality == "good"
    ]
    assert 0.4 < np.mean(hidden) < 0.8


def test_off_target_fields_show_none_of_their_bags_labels(plans: list[simulated.BagPlan]) -> None:
    unspecific = []
    for plan in plans:
        for field in (f for f in plan.fields if f.quality == "off_target"):
            assert all(field.strengths[LABELS.index(label)] == 0 for label in plan.labels)
            assert (max(field.strengths) > 0) != (field.unspecific > 0)
            unspecific.append(field.unspecific > 0)
    assert 0.3 < np.mean(unspecific) < 0.7


def test_tables_and_images_agree(eleven: Path) -> None:
    bags, instances = read_table(eleven / "bags.csv"), read_table(eleven / "instances.csv")
    truth = read_table(eleven / "truth.csv")
    expected = [plan_bag(5, index) for index in range(11)]
    assert [(b["bag_id"], b["labels"], b["group"]) for b in bags] == [
        (plan.bag_id, ";".join(plan.labels), plan.group) for plan in expected
    ]
    assert [b["group"] for b in bags[:3]] == ["PLATE0001", "PLATE0001", "PLATE0002"]
    qualities = [(p.bag_id, str(k), f.quality) for p in expected for k, f in enumerate(p.fields)]
    assert [(t["bag_id"], t["order"], t["quality"]) for t in truth] == qualities
    assert [(i["bag_id"], i["order"]) for i in instances] == [row[:2] for row in qualities]
    named = {i["image"].format(channel=c) for i in instances for c in CHANNELS}
    assert instances[0]["image"] == "SIM0001/000_{channel}.png"
    images = eleven / "images"
    assert named == {p.relative_to(images).as_posix() for p in images.rglob("*.png")}


def test_images_are_8_bit_gray_of_the_declared_size_and_hold_the_drawn_planes(eleven: Path) -> None:
    planes = draw_field(5, 3, 0, SIZE)
    assert planes.shape == (3, *SIZE)
    assert planes.dtype == np.uint8
    for channel, plane in zip(CHANNELS, planes, strict=True):
        with Image.open(eleven / "images" / "SIM0004" / f"000_{channel}.png") as image:
            assert image.mode == "L"
            assert image.size == (SIZE[1], SIZE[0])
            np.testing.assert_array_equal(np.asarray(image), plane)


def fields_of(quality: str, count: int) -> list[np.ndarray]:
    """The first ``count`` drawn fields of that quality, (3, h, w) in 0–255."""
    places = (
        (index, order)
        for index in range(300)
        for order, field in enumerate(plan_bag(3, index).fields)
        if field.quality == quality
    )
    return [draw_field(3, *next(places), SIZE).astype(np.float64) for _ in range(count)]


def high_frequency_share(plane: np.ndarray) -> float:
    """Share of the variance at more than an eighth of a cycle per pixel."""
    power = np.abs(np.fft.fft2(plane - plane.mean())) ** 2
    y, x = (np.abs(np.fft.fftfreq(n)) for n in plane.shape)
    return float(power[np.hypot(y[:, None], x) > 1 / 8].sum() / power.sum())


def test_blurred_fields_have_less_high_frequency_energy_than_good_ones() -> None:
    for channel in (0, 2):  # the counterstains: the same structures in every field
        blurred = [high_frequency_share(field[channel]) for field in fields_of("blurred", 23)]
        good = [high_frequency_share(field[channel]) for field in fields_of("good", 23)]
        assert np.median(blurred) < np.median(good) / 3
        assert np.quantile(blurred, 0.9) < np.quantile(good, 0.1)


def test_empty_fields_hold_little_signal() -> None:
    empty = [field.std(axis=(1, 2)) for field in fields_of("empty", 13)]
    good = [field.std(axis=(1, 2)) for field in fields_of("good", 13)]
    assert np.max(empty) < 6  # gray levels: read noise alone
    assert np.min(good) > 8


def alone(label: str, size: tuple[int, int] = (96, 96)) -> tuple[np.ndarray, np.ndarray]:
    """Green of a field that shows one location only, with the mask of its nuclei."""
    plan = FieldPlan("good", tuple(float(name == label) for name in LABELS))
    plate = Plate.draw(simulated._rng(0, 1, 0))
    planes = render_field(plan, plate, simulated._rng(0, 2, 0, 0), size)
    return planes[1].astype(np.float64), planes[2] > 0.5 * planes[2].max()


@pytest.mark.parametrize(
    ("label", "inside"),
    [
        ("Nucleoplasm", True),
        ("Nucleoli", True),
        ("Cytosol", False),
        ("Mitochondria", False),
        ("Golgi apparatus", False),
        ("Plasma membrane", False),
        ("Vesicles", False),
    ],
)
def test_a_location_lies_in_or_outside_the_nucleus(label: str, inside: bool) -> None:
    green, nuclei = alone(label)
    within, without = green[nuclei].mean(), green[~nuclei].mean()
    assert (within > 2 * without) if inside else (without > 1.5 * within)


def test_every_location_has_a_pattern_of_its_own() -> None:
    greens = np.stack([alone(label)[0].ravel() for label in LABELS])
    correlation = np.corrcoef(greens)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 0.85


@pytest.mark.parametrize("size", [(32, 32), (37, 131), (127, 41)])
def test_any_size_from_32_is_drawn(size: tuple[int, int]) -> None:
    assert draw_field(0, 0, 0, size).shape == (3, *size)


def test_progress_counts_bags(tmp_path: Path) -> None:
    seen: list[int] = []
    simulate(tmp_path / "sim", SimulateConfig(bags=3, seed=0, size=(32, 32)), progress=seen.append)
    assert seen == [1, 2, 3]


def test_a_finished_simulation_is_left_alone(tmp_path: Path) -> None:
    out = simulate(tmp_path / "sim", SimulateConfig(bags=2, seed=0, size=(32, 32)))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert simulate(out, SimulateConfig(bags=2, seed=0, size=(32, 32))) == out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    simulate(tmp_path, SimulateConfig(bags=1, seed=0, size=(32, 32)))
    assert (tmp_path / "dataset.toml").is_file()


def test_a_folder_with_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"new or empty folder.*got other files"):
        simulate(tmp_path, SimulateConfig(bags=1, seed=0))
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_another_simulation_is_refused(tmp_path: Path) -> None:
    out = simulate(tmp_path / "sim", SimulateConfig(bags=2, seed=0, size=(32, 32)))
    with pytest.raises(InputError, match="got another simulation"):
        simulate(out, SimulateConfig(bags=2, seed=1, size=(32, 32)))


def test_an_interrupted_simulation_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "sim", SimulateConfig(bags=3, seed=0, size=(32, 32)), progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bags", "seed", "size", "text"),
    [
        (0, 0, (32, 32), "bags: expected a whole number of at least 1, got 0"),
        (1, -1, (32, 32), "seed: expected a whole number from 0 to 9223372036854775807, got -1"),
        (1, 0, (32, 31), r"size: expected .* each of at least 32, got \(32, 31\)"),
    ],
)
def test_values_out_of_range_are_refused(
    bags: int, seed: int, size: tuple[int, int], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        SimulateConfig(bags=bags, seed=seed, size=size)


def check_description(described: dict[str, object]) -> None:
    assert set(described) <= KEYS
    assert described["task"] == "multilabel"
    for key in ("title", "images", "source", "licence"):
        assert isinstance(described[key], str)
        assert described[key]
    labels, extract = described["labels"], described["extract"]
    assert isinstance(labels, list)
    assert isinstance(extract, dict)
    assert len(set(labels)) == len(labels)
    assert set(extract) <= {*declarations(ExtractDefaults)}
    assert extract["taps"] == ["layer4", "avgpool"]
    assert set(extract.get("rgb", [])) <= set(described.get("channels", []))  # type: ignore[call-overload]


def test_the_written_description_parses(eleven: Path) -> None:
    described = tomllib.loads((eleven / "dataset.toml").read_text(encoding="utf-8"))
    check_description(described)
    assert described["images"] == "images"
    assert described["extract"]["size"] == list(SIZE)


@pytest.mark.parametrize(
    ("name", "labels", "channels", "backbone", "size"),
    [
        ("simulated", 8, 3, "resnet18", [96, 96]),
        ("hpa", 10, 4, "resnet50", [512, 512]),
        ("flyexpress", 10, 0, "resnet18", [128, 320]),
    ],
)
def test_shipped_descriptions(
    name: str, labels: int, channels: int, backbone: str, size: list[int]
) -> None:
    text = (MANIFESTS / name / "dataset.toml").read_text(encoding="utf-8")
    described = tomllib.loads(text)
    check_description(described)
    assert described["name"] == name
    assert described["images"] == f"$DRAGN_CACHE_DATA/{name}/images"
    assert len(described["labels"]) == labels
    assert len(described.get("channels", [])) == channels
    assert described["extract"]["backbone"] == backbone
    assert described["extract"]["size"] == size


def test_the_shipped_simulated_description_is_the_written_one_elsewhere() -> None:
    text = (MANIFESTS / "simulated" / "dataset.toml").read_text(encoding="utf-8")
    made = simulated.simulated_manifest([plan_bag(0, 0)], 0, (96, 96), Path())
    written = tomllib.loads(dataset_text(made, images="images"))
    elsewhere = {
        "images": "$DRAGN_CACHE_DATA/simulated/images",
        "source": "dragn_cache.datasets.simulated",
    }
    assert tomllib.loads(text) == written | elsewhere
