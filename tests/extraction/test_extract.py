"""Stage one: the same bytes whatever happens, one decode per image, and clear refusals."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_image, write_dataset
from folder_bytes import tree
from PIL import Image
from small_extractions import CONFIG, config
from torchvision.models import shufflenet_v2_x0_5

from dragn_cache.backbones import Backbone, load_backbone
from dragn_cache.errors import (
    DamagedPartError,
    DragnCacheError,
    ImageError,
    InputError,
    StoreError,
    StoreMismatchError,
    UnknownNameError,
    WeightsError,
)
from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.engine import batch_sizes
from dragn_cache.extraction.extract import extract
from dragn_cache.extraction.report import ExtractReport
from dragn_cache.manifest import Manifest, read_manifest
from dragn_cache.store import FORMATS, PartPlan, PartWriter, StoreWriter, open_store

SIZES = [3, 1, 5, 2, 7, 1, 4]
MakeDataset = Callable[..., Manifest]


@cache
def plain_backbone() -> Backbone:
    return load_backbone(
        "shufflenet_v2_x0_5",
        weights="random:3",
        taps=("stage2", "gap"),
        preprocessing={"size": (32, 48)},
    )


def reference(manifest: Manifest, image: str) -> dict[str, np.ndarray]:
    """Features of one whole image, by the shortest way."""
    pixels = Image.open(manifest.image_root / image).convert("RGB")
    resized = np.asarray(pixels.resize((48, 32), Image.Resampling.BILINEAR))
    batch = torch.from_numpy(resized.copy()).permute(2, 0, 1)[None]
    return {name: tap[0].numpy() for name, tap in plain_backbone()(batch).items()}


@pytest.mark.parametrize("format", list(FORMATS))
def test_features_equal_the_backbone_run_on_each_image_alone(
    tmp_path: Path, dataset: MakeDataset, format: str
) -> None:
    manifest = dataset(SIZES)
    extract(manifest, config(format=format, dtype="float32"), tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert [(t.name, t.shape) for t in store.description.taps] == [
        ("stage2", (48, 4, 6)),
        ("gap", (1024,)),
    ]
    for bag in ("000", "004", "006"):
        for tap in ("stage2", "gap"):
            rows = store.bag(bag, tap)
            for row, instance in zip(rows, manifest.instances[bag], strict=True):
                wanted = reference(manifest, instance.image)[tap]
                np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-4)


def test_half_precision_is_the_rounded_single_precision(
    tmp_path: Path, dataset: MakeDataset
) -> None:
    manifest = dataset(SIZES)
    extract(manifest, config(dtype="float32"), tmp_path / "f32")
    extract(manifest, config(dtype="float16"), tmp_path / "f16")
    whole, _ = open_store(tmp_path / "f32").load("stage2")
    half, _ = open_store(tmp_path / "f16").load("stage2")
    np.testing.assert_array_equal(half, whole.astype(np.float16))


def test_worker_processes_change_nothing(tmp_path: Path, dataset: MakeDataset) -> None:
    manifest = dataset(SIZES)
    extract(manifest, config(workers=0), tmp_path / "a")
    extract(manifest, config(workers=2), tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_finished_it_does_nothing(tmp_path: Path, dataset: MakeDataset) -> None:
    manifest = dataset(SIZES)
    first = extract(manifest, CONFIG, tmp_path / "s")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*") if p.is_file()}
    again = extract(manifest, CONFIG, tmp_path / "s")
    assert (first.parts_written, first.instances_done) == (5, sum(SIZES))
    assert (again.parts_written, again.images_decoded) == (0, 0)
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*") if p.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weights": "random:4"}, r"features\.weights_sha256"),
        ({"taps": ("gap",)}, r"features\.taps"),
        ({"size": (40, 48)}, r"features\.preprocessing\.size"),
        ({"grid": 2}, r"features\.grid"),
        ({"mean": (0.5, 0.5, 0.5)}, r"features\.preprocessing\.mean"),
        ({"dtype": "float32"}, r"numerics\.dtype"),
        ({"batch_size": 4}, r"numerics\.batch_size"),
        ({"part_instances": 7}, r"plan\.part_instances"),
        ({"format": "zarr"}, "format is hdf5, asked for zarr"),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, dataset: MakeDataset, change: dict[str, object], field: str
) -> None:
    manifest = dataset([2, 1])
    extract(manifest, CONFIG, tmp_path / "s")
    before = tree(tmp_path / "s")
    with pytest.raises(StoreMismatchError, match=field):
        extract(manifest, config(**change), tmp_path / "s")
    assert tree(tmp_path / "s") == before


def test_another_manifest_is_refused(tmp_path: Path, dataset: MakeDataset) -> None:
    extract(dataset([2, 1]), CONFIG, tmp_path / "s")
    with pytest.raises(StoreMismatchError, match=r"plan\.instances is 3, asked for 4"):
        extract(dataset([2, 2], seed=1), CONFIG, tmp_path / "s")


def test_an_image_with_several_boxes_is_decoded_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for name in ("a", "b"):
        draw_image(tmp_path / f"{name}.png", rng, 61, 83)
    (tmp_path / "table.csv").write_text(
        "bag_id,labels,image,x0,y0,x1,y1\n"
        "p,u,a.png,0,0,31,29\np,u,b.png,,,,\np,u,a.png,40,20,83,61\n"
        "q,v,a.png,10,5,50,45\nq,v,b.png,3,7,40,60\n"
    )
    manifest = read_manifest(tmp_path / "table.csv")
    report = extract(manifest, config(dtype="float32"), tmp_path / "s")
    assert (report.images_decoded, report.instances_done) == (2, 5)
    store = open_store(tmp_path / "s")
    index = store.index(0)
    assert index.images == ("a.png", "b.png", "a.png", "a.png", "b.png")
    assert index.boxes.tolist() == [
        [0, 0, 31, 29],
        [0, 0, 83, 61],
        [40, 20, 83, 61],
        [10, 5, 50, 45],
        [3, 7, 40, 60],
    ]
    Image.open(tmp_path / "a.png").crop((10, 5, 50, 45)).save(tmp_path / "crop.png")
    wanted = reference(manifest, "crop.png")["gap"]
    np.testing.assert_allclose(store.bag("q", "gap")[0], wanted, rtol=1e-4, atol=1e-4)


def test_an_image_with_very_many_boxes_comes_in_pieces_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """23 boxes of one image, of which a message may hold five, or all: the same bytes."""
    draw_image(tmp_path / "a.png", np.random.default_rng(5), 61, 83)
    rows = [f"p,u,a.png,{k},{k},{k + 30},{k + 20}" for k in range(23)]
    (tmp_path / "t.csv").write_text("\n".join(["bag_id,labels,image,x0,y0,x1,y1", *rows]))
    manifest = read_manifest(tmp_path / "t.csv")
    decoded = []
    for name, limit in (("whole", 2**27), ("pieces", 5 * 3 * 32 * 48 + 1)):
        monkeypatch.setattr("dragn_cache.extraction.plan.CROPS_BYTES", limit)
        report = extract(manifest, config(), tmp_path / name)
        decoded.append((report.images_decoded, report.instances_done))
    assert decoded == [(1, 23), (5, 23)]
    assert tree(tmp_path / "whole") == tree(tmp_path / "pieces")


def test_maps_are_pooled_to_a_grid(tmp_path: Path, dataset: MakeDataset) -> None:
    manifest = dataset([2, 1])
    extract(manifest, config(grid=2, dtype="float32"), tmp_path / "grid")
    extract(manifest, config(dtype="float32"), tmp_path / "whole")
    pooled, _ = open_store(tmp_path / "grid").load("stage2")
    whole, _ = open_store(tmp_path / "whole").load("stage2")
    wanted = whole.reshape(3, 48, 2, 2, 2, 3).mean((3, 5))
    np.testing.assert_allclose(pooled, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="grid"):
        extract(manifest, config(grid=9), tmp_path / "too-fine")


@pytest.mark.parametrize("batch", [1, 5, 8, 32])
def test_a_rest_runs_in_the_smallest_of_four_sizes_that_holds_it(batch: int) -> None:
    allowed = {max(1, batch // k) for k in (1, 2, 4, 8)}
    for count in range(3 * batch):
        sizes = batch_sizes(count, batch)
        assert set(sizes) <= allowed
        assert sum(sizes) >= count
        assert sizes[:-1] == [batch] * (count // batch) or sizes == [batch] * (count // batch)
        rest = count % batch
        assert not rest or not any(rest <= size < sizes[-1] for size in allowed)


# --- inputs that cannot be used ----------------------------------------------------------------


def spoil(manifest: Manifest) -> None:
    """One input of each kind that fails."""
    root = manifest.image_root / "img"
    (root / "002_1.png").write_bytes((root / "002_1.png").read_bytes()[:-40])
    (root / "004_0.png").write_bytes(b"")
    (root / "004_6.png").unlink()


def test_stopping_names_bag_and_image_and_keeps_what_is_written(
    tmp_path: Path, dataset: MakeDataset
) -> None:
    manifest = dataset(SIZES)
    good = tree(manifest.image_root)
    spoil(manifest)
    with pytest.raises(
        ImageError, match=r"bag '002', img/002_1\.png: .*or extract with `on_error=skip`"
    ):
        extract(manifest, CONFIG, tmp_path / "s")
    assert open_store(tmp_path / "s").missing_parts() == [1, 2, 3, 4]
    for name, data in good.items():
        (manifest.image_root / name).write_bytes(data)
    extract(manifest, CONFIG, tmp_path / "s")
    extract(manifest, CONFIG, tmp_path / "whole")
    assert tree(tmp_path / "s") == tree(tmp_path / "whole")


def test_skipping_records_every_input_not_used(tmp_path: Path, dataset: MakeDataset) -> None:
    manifest = dataset(SIZES)
    spoil(manifest)
    report = extract(manifest, config(on_error="skip"), tmp_path / "s")
    assert report.instances_done == sum(SIZES) - 3
    with (tmp_path / "s" / "failures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["bag_id"], r["image"]) for r in rows] == [
        ("002", "img/002_1.png"),
        ("004", "img/004_0.png"),
        ("004", "img/004_6.png"),
    ]
    assert "0 bytes" in rows[1]["reason"]
    assert "no such file" in rows[2]["reason"]
    assert str(tmp_path) not in (tmp_path / "s" / "failures.csv").read_text()
    store = open_store(tmp_path / "s")
    assert len(store.bag("004")) == 5
    assert [f.image for f in extract(manifest, CONFIG, tmp_path / "s").failures] == [
        r["image"] for r in rows
    ]


def test_a_bag_without_images_stops_or_stays_empty(tmp_path: Path, dataset: MakeDataset) -> None:
    dataset([2, 0, 1])
    manifest = read_manifest(tmp_path / "tiny0")
    with pytest.raises(InputError, match=r"bags\.csv:3: .*none for bag '001'"):
        extract(manifest, CONFIG, tmp_path / "s")
    report = extract(manifest, config(on_error="skip"), tmp_path / "s")
    assert [(f.bag_id, f.image) for f in report.failures] == [("001", "")]
    assert len(open_store(tmp_path / "s").bag("001")) == 0


def test_a_box_outside_the_image_is_named(tmp_path: Path) -> None:
    draw_image(tmp_path / "a.png", np.random.default_rng(0), 20, 30)
    (tmp_path / "t.csv").write_text("bag_id,labels,image,x0,y0,x1,y1\nb,u,a.png,0,0,31,20\n")
    with pytest.raises(ImageError, match=r"t\.csv:2 \(a\.png\): .*outside the image of 30×20"):
        extract(read_manifest(tmp_path / "t.csv"), CONFIG, tmp_path / "s")


def test_values_beyond_half_precision_are_refused_never_infinite(
    tmp_path: Path, dataset: MakeDataset
) -> None:
    manifest = dataset([2, 1])
    net = shufflenet_v2_x0_5(weights=None)
    with torch.no_grad():
        net.conv5[1].bias.fill_(7e4)
    torch.save(net.state_dict(), tmp_path / "huge.pth")
    huge = config(weights=str(tmp_path / "huge.pth"))
    with pytest.raises(DragnCacheError, match=r"bag '00\d', tap 'gap': .*65504.*`dtype=float32`"):
        extract(manifest, huge, tmp_path / "s")
    assert not list((tmp_path / "s" / "parts").iterdir())
    extract(manifest, config(weights=str(tmp_path / "huge.pth"), dtype="float32"), tmp_path / "t")


def test_unknown_names_offer_the_nearest(tmp_path: Path, dataset: MakeDataset) -> None:
    manifest = dataset([1])
    with pytest.raises(UnknownNameError, match=r"did you mean .*shufflenet_v2_x0_5"):
        extract(manifest, config(backbone="shufflenet_x0_5"), tmp_path / "s")
    with pytest.raises(UnknownNameError, match=r"did you mean .*stage2"):
        extract(manifest, config(taps=("stage_2",)), tmp_path / "s")
    assert not (tmp_path / "s").exists()


# --- disks and deaths --------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A tmpfs of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_full_disk_is_said_and_the_run_goes_on_after_it(
    tmp_path: Path, dataset: MakeDataset, small_disk: Path, format: str
) -> None:
    manifest = dataset(SIZES)
    wanted = config(format=format, dtype="float32")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(4 * 2**20 - 168_576))
    with pytest.raises(StoreError, match=r"No space left on device.*finished parts are kept"):
        extract(manifest, wanted, small_disk / "s")
    ballast.unlink()
    extract(manifest, wanted, small_disk / "s")
    extract(manifest, wanted, tmp_path / "whole")
    assert tree(small_disk / "s") == tree(tmp_path / "whole")


def test_a_read_only_disk_is_said(dataset: MakeDataset, small_disk: Path) -> None:
    manifest = dataset([2, 1])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match="expected a folder that can be written, got Read-only"):
        extract(manifest, CONFIG, small_disk / "s")


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_disk_turned_read_only_in_the_middle_is_said_and_the_run_goes_on_after_it(
    tmp_path: Path,
    dataset: MakeDataset,
    small_disk: Path,
    format: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the second part and the third: the kernel refuses while a file is being written."""
    manifest = dataset([3, 4, 2, 5, 6, 1, 3, 4, 5, 2])
    wanted = config(format=format, part_instances=3, batch_size=2)
    write_part, written = StoreWriter.part, []

    @contextmanager
    def part(writer: StoreWriter, plan: PartPlan) -> Iterator[PartWriter]:
        with write_part(writer, plan) as target:
            yield target
        written.append(plan)
        if len(written) == 2:
            subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "part", part)
        with pytest.raises(StoreError, match=r"Read-only file system.*finished parts are kept"):
            extract(manifest, wanted, small_disk / "s")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    store = open_store(small_disk / "s")
    assert len(store.missing_parts()) == len(store.parts) - 2
    extract(manifest, wanted, small_disk / "s")
    extract(manifest, wanted, tmp_path / "whole")
    assert tree(small_disk / "s") == tree(tmp_path / "whole")


def test_workers_do_not_import_the_program_that_calls(tmp_path: Path) -> None:
    """They would import its torch as well: half a gigabyte and two seconds each."""
    write_dataset(tmp_path / "data", [9, 11])
    program = tmp_path / "program.py"
    program.write_text(
        f"""
from pathlib import Path
if __name__ != "__main__":
    Path({str(tmp_path / "imported")!r}).touch()
else:
    from dragn_cache.extraction.config import ExtractConfig
    from dragn_cache.extraction.extract import extract
    from dragn_cache.manifest import read_manifest
    settings = ExtractConfig(
        backbone="squeezenet1_1", weights="random", size=(32, 48), workers=3, batch_size=4
    )
    folder = Path({str(tmp_path)!r})
    extract(read_manifest(folder / "data"), settings, folder / "s")
"""
    )
    subprocess.run([sys.executable, str(program)], check=True)
    assert open_store(tmp_path / "s").missing_parts() == []
    assert not (tmp_path / "imported").exists()


def test_a_worker_that_dies_is_said(tmp_path: Path, dataset: MakeDataset) -> None:
    manifest = dataset([4, 9, 11])
    killed: list[int] = []

    def kill_a_worker(done: int, total: int) -> None:
        if done and not killed:
            killed.extend(workers_of(os.getpid()))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(DragnCacheError, match="expected worker processes that live"):
        extract(manifest, config(workers=1, batch_size=1), tmp_path / "s", progress=kill_a_worker)
    extract(manifest, config(workers=1, batch_size=1), tmp_path / "s")
    assert open_store(tmp_path / "s").missing_parts() == []


def workers_of(parent: int) -> list[int]:
    """Decoding processes: children of the fork server, which is a child of ``parent``."""

    def children(pid: int) -> list[int]:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in text.split()]

    return [grandchild for child in children(parent) for grandchild in children(child)]


def test_the_report_adds_up(tmp_path: Path, dataset: MakeDataset) -> None:
    seen: list[tuple[int, int]] = []
    report: ExtractReport = extract(
        dataset(SIZES), CONFIG, tmp_path / "s", progress=lambda *pair: seen.append(pair)
    )
    assert seen[0] == (0, 23)
    assert seen[-1] == (23, 23)
    here = report.start_seconds + report.wait_seconds + report.forward_seconds
    assert here + report.stall_seconds <= report.total_seconds
    behind = report.device_seconds + report.write_seconds
    assert 0 < behind <= report.total_seconds - report.start_seconds


# --- what a second look found ------------------------------------------------------------------


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_disk_that_fills_between_small_parts_is_said_and_survived(
    tmp_path: Path, small_disk: Path, format: str
) -> None:
    """In a child process: HDF5 on a full disk could end the whole program."""
    folder = write_dataset(tmp_path / "d", [3] * 12)
    out = small_disk / "s"
    (small_disk / "ballast").write_bytes(bytes(4 * 2**20 - 248_576))
    program = Path(sys.executable).with_name("dragn-cache")
    command = [program, "extract", "--dataset", folder, "--out", out, "--format", format]
    command += ["--backbone", "squeezenet1_1", "--weights", "random", "--size", "64"]
    command += ["--workers", "0", "--part-instances", "3"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "No space left on device; free space" in done.stderr
    assert 0 < len(open_store(out).missing_parts()) < 12
    (small_disk / "ballast").unlink()
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_labels_follow_the_manifest_without_a_new_extraction(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", [2, 1])
    extract(read_manifest(folder), CONFIG, tmp_path / "s")
    table = folder / "bags.csv"
    table.write_text("bag_id,labels,split\n000,golgi,test\n001,actin;golgi,train\n")
    report = extract(read_manifest(folder), CONFIG, tmp_path / "s")
    assert report.parts_written == 0
    assert [bag.labels for bag in open_store(tmp_path / "s").bags] == [
        ("golgi",),
        ("actin", "golgi"),
    ]


def test_what_a_kill_leaves_before_store_json_is_no_obstacle(
    tmp_path: Path, dataset: MakeDataset
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ".store.json.99999.tmp").write_text("{")
    extract(dataset([2, 1]), CONFIG, tmp_path / "s")
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "failures.csv",
        "manifest",
        "parts",
        "store.json",
    ]


def test_a_lost_manifest_folder_is_made_again(tmp_path: Path, dataset: MakeDataset) -> None:
    manifest = dataset([2, 1])
    extract(manifest, CONFIG, tmp_path / "s")
    before = tree(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "manifest")
    extract(manifest, CONFIG, tmp_path / "s")
    assert tree(tmp_path / "s") == before


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_part_that_another_process_finished_first_is_kept(
    tmp_path: Path, dataset: MakeDataset, format: str
) -> None:
    manifest, wanted = dataset(SIZES), config(format=format)
    extract(manifest, wanted, tmp_path / "whole")
    out = tmp_path / "s"

    def race(done: int, total: int) -> None:
        for part in (tmp_path / "whole" / "parts").iterdir():
            if done == 1 and not (out / "parts" / part.name).exists():
                shutil.copytree(part, out / "parts" / part.name) if part.is_dir() else shutil.copy(
                    part, out / "parts" / part.name
                )

    extract(manifest, wanted.replace(batch_size=8), out, progress=race)
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_damaged_part_is_named_by_extract(
    tmp_path: Path, dataset: MakeDataset, format: str
) -> None:
    manifest = dataset(SIZES)
    extract(manifest, config(format=format), tmp_path / "s")
    part = open_store(tmp_path / "s").part_path(1)
    (part / "zarr.json" if part.is_dir() else part).write_bytes(b"")
    with pytest.raises(DamagedPartError, match=r"00001\.\w+: .*verify .* `repair=True`"):
        extract(manifest, config(format=format), tmp_path / "s")


@pytest.mark.parametrize(
    ("asked", "named", "backbone", "taps"),
    [
        (None, None, "resnet50", ("layer4",)),
        (None, "resnet18", "resnet18", ("layer4",)),
        ("vgg11", None, "vgg11", ("layer4",)),
        ("resnet18", "resnet18", "resnet18", ("layer4",)),
        ("vgg11", "resnet18", "vgg11", None),
    ],
)
def test_taps_of_the_data_set_are_for_its_backbone_only(
    asked: str | None, named: str | None, backbone: str, taps: tuple[str, ...] | None
) -> None:
    defaults: dict[str, object] = {"taps": ["layer4"], "size": [96, 64]}
    if named is not None:
        defaults["backbone"] = named
    filled = ExtractConfig(backbone=asked).with_defaults(defaults)
    assert (filled.backbone, filled.taps, filled.size) == (backbone, taps, (96, 64))


def test_one_channel_feeds_all_three_inputs() -> None:
    assert ExtractConfig(rgb=("green",)).with_defaults({}).rgb == ("green",) * 3
    assert ExtractConfig().with_defaults({"rgb": ["red"]}).rgb == ("red",) * 3
    assert ExtractConfig().with_defaults({}).rgb is None


def test_provenance_names_the_channels_that_fed_the_network(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for channel in ("blue", "red", "er", "green"):
        draw_image(tmp_path / "d" / f"a_{channel}.png", rng, 20, 30)
    (tmp_path / "d" / "bags.csv").write_text("bag_id,labels\nb,u\n")
    (tmp_path / "d" / "instances.csv").write_text("bag_id,image\nb,a_{channel}.png\n")
    toml = 'name = "four"\nchannels = ["blue", "red", "er", "green"]\n'
    (tmp_path / "d" / "dataset.toml").write_text(toml)
    manifest = read_manifest(tmp_path / "d")
    extract(manifest, CONFIG, tmp_path / "s")
    chosen = open_store(tmp_path / "s").description.provenance["features"]["preprocessing"]["rgb"]
    assert chosen == ["red", "green", "blue"]
    again = extract(manifest, config(rgb=("red", "green", "blue")), tmp_path / "s")
    assert again.parts_written == 0


def test_absurd_sizes_and_lost_image_roots_are_refused(
    tmp_path: Path, dataset: MakeDataset
) -> None:
    manifest = dataset([1])
    with pytest.raises(InputError, match=r"size: .* each from 1 to 8192"):
        extract(manifest, config(size=(10**6, 10**6)), tmp_path / "s")
    lost = replace(manifest, image_root=tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"image root .*nowhere: expected a folder"):
        extract(lost, config(on_error="skip"), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_weights_file_with_one_changed_bit_is_refused(
    tmp_path: Path, dataset: MakeDataset
) -> None:
    path = tmp_path / "net.pth"
    torch.save(shufflenet_v2_x0_5(weights=None).state_dict(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"net\.pth: .*perhaps damaged"):
        extract(dataset([1]), config(weights=str(path)), tmp_path / "s")


def test_waiting_for_another_host_says_whom_for_and_how_to_end_it(
    dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, out = dataset(SIZES), tmp_path / "s"
    extract(manifest, CONFIG, out)
    (out / "parts" / "00001.h5").unlink()
    claim = out / "parts" / ".00001.claim"
    claim.write_text('{"host": "elsewhere", "pid": 7, "start": "5", "token": "t"}')
    monkeypatch.setattr("dragn_cache.extraction.one_device.SILENT_SECONDS", 0.0)
    lines: list[str] = []

    def end_it(line: str) -> None:
        lines.append(line)
        claim.unlink()

    extract(manifest, CONFIG, out, say=end_it)
    assert (out / "parts" / "00001.h5").exists()
    (line,) = lines
    assert line.startswith("waiting for part 00001: process 7 on elsewhere, renewed 0 s ago; ")
    assert line.endswith(f"remove {claim}")


def test_what_misleads_is_told(tmp_path: Path) -> None:
    """Twelve bits in sixteen, images that bags share, and ids that look alike."""
    folder = write_dataset(tmp_path / "d", [2, 1, 1])
    bags = (folder / "bags.csv").read_text()
    for name in ("bags.csv", "instances.csv"):
        (folder / name).write_text((folder / name).read_text().replace("\n002,", "\n1,"))
    rng = np.random.default_rng(0)
    for path in sorted((folder / "img").iterdir()):
        Image.fromarray(rng.integers(0, 4096, (41, 53)).astype(np.uint16)).save(path)
    (folder / "img" / "001_0.png").write_bytes((folder / "img" / "000_1.png").read_bytes())
    assert bags.count("\n") == 4
    said: list[str] = []
    report = extract(read_manifest(folder), CONFIG, tmp_path / "s", warn=said.append)
    names, levels, images = said
    assert names.startswith("bags.csv:4: look-alike-bag: ")
    assert levels.startswith("all images lie between the grey levels 0 and 16 of 0 to 255: ")
    assert report.levels == (0, 16)
    assert images == (
        "bags with the same images perhaps on two sides of a fold: '000' and '001'; give them one "
        "group"
    )
