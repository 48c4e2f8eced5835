"""How features are computed: decided once, the same on every resume, by one process or several."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_image, write_dataset
from dragn_cache_cli.app import app
from folder_bytes import tree
from PIL import Image
from small_extractions import CONFIG, config
from typer.testing import CliRunner

from dragn_cache.errors import DragnCacheError, ImageError, InputError, StoreMismatchError
from dragn_cache.extraction import forward
from dragn_cache.extraction.doctor import examine
from dragn_cache.extraction.estimate import estimate
from dragn_cache.extraction.extract import extract
from dragn_cache.extraction.forward import Forward, choose_compute
from dragn_cache.extraction.plan import open_backbone
from dragn_cache.extraction.report import ExtractReport
from dragn_cache.images.augment import Augmentation, augmented
from dragn_cache.manifest import Manifest, read_manifest
from dragn_cache.store import FORMATS, open_store

SIZES = [3, 1, 5, 2, 7, 1, 4]

needs_compiler = pytest.mark.skipif(
    forward.find_compiler() is None, reason="needs a C++ compiler for torch.compile"
)


@needs_compiler
@pytest.mark.timeout(280)
def test_compiled_features_are_the_eager_ones_and_resume_as_compiled(tmp_path: Path) -> None:
    manifest = read_manifest(write_dataset(tmp_path / "d", [3, 17, 6]))
    wanted = config(compute="compiled", dtype="float32", part_instances=20)
    extract(manifest, wanted, tmp_path / "c")
    extract(manifest, config(compute="eager", dtype="float32", part_instances=20), tmp_path / "e")
    for tap in ("stage2", "gap"):
        compiled, _ = open_store(tmp_path / "c").load(tap)
        eager, _ = open_store(tmp_path / "e").load(tap)
        np.testing.assert_allclose(compiled, eager, rtol=1e-3, atol=1e-4)
    numerics = open_store(tmp_path / "c").description.provenance["numerics"]
    assert numerics["compute"] == "compiled"
    whole = tree(tmp_path / "c")
    open_store(tmp_path / "c").part_path(1).unlink()
    # Nothing asked for: as it was begun, although this plan alone would be too small to compile.
    report = extract(manifest, config(dtype="float32", part_instances=20), tmp_path / "c")
    assert (report.compute, report.parts_written) == ("compiled", 1)
    assert tree(tmp_path / "c") == whole
    with pytest.raises(StoreMismatchError, match=r"numerics\.compute is \"compiled\""):
        extract(
            manifest,
            config(compute="eager", dtype="float32", part_instances=20),
            tmp_path / "c",
        )


def test_without_a_compiler_compiled_features_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(write_dataset(tmp_path / "d", [2]))
    monkeypatch.setattr(forward, "find_compiler", lambda: None)
    with pytest.raises(DragnCacheError, match=r"C\+\+ compiler.*got no C\+\+ compiler.*eager"):
        extract(manifest, config(compute="compiled"), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert extract(manifest, CONFIG, tmp_path / "s").compute == "eager"


def test_only_large_plans_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = open_backbone(CONFIG)
    monkeypatch.setattr(forward, "find_compiler", lambda: "/usr/bin/g++")
    flops = forward.image_flops(backbone)
    # shufflenet_v2_x0_5's 41 million multiplications at 224² shrink with the area of the image.
    assert 0.2e6 < flops * 224 * 224 / (32 * 48) / 150 < 1e6
    enough = int(1e13 / flops) + 1
    assert choose_compute(backbone, enough, 8) == "compiled"
    assert choose_compute(backbone, enough - 2, 8) == "eager"
    monkeypatch.setattr(forward, "find_compiler", lambda: None)
    assert choose_compute(backbone, enough, 8) == "eager"


def test_bfloat16_is_said_and_close(tmp_path: Path) -> None:
    manifest = read_manifest(write_dataset(tmp_path / "d", [3, 2]))
    extract(manifest, config(precision="bfloat16", dtype="float32"), tmp_path / "b")
    extract(manifest, config(dtype="float32"), tmp_path / "f")
    store = open_store(tmp_path / "b")
    assert store.description.provenance["numerics"]["autocast"] == "bfloat16"
    half, _ = store.load("gap")
    whole, _ = open_store(tmp_path / "f").load("gap")
    assert 0 < np.abs(half - whole).max() < 0.05 * np.abs(whole).max()


def test_a_batch_alone_and_in_forward_are_the_same() -> None:
    backbone = open_backbone(CONFIG)
    forward = Forward(backbone, compute="eager", batch_size=5, dtype="float32", precision="float32")
    batch = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 48), np.uint8)
    values, finite = forward(batch).arrays()
    assert finite
    for name, value in backbone(torch.from_numpy(batch)).items():
        np.testing.assert_array_equal(values[name], value.numpy())


@pytest.mark.timeout(280)
def test_two_devices_share_one_store(tmp_path: Path) -> None:
    manifest = read_manifest(write_dataset(tmp_path / "d", SIZES))
    extract(manifest, CONFIG, tmp_path / "one")
    seen: list[tuple[int, int]] = []
    report = extract(
        manifest,
        config(device="cpu,cpu"),
        tmp_path / "two",
        progress=lambda *pair: seen.append(pair),
    )
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert (report.parts_written, report.instances_done) == (5, sum(SIZES))
    assert seen[-1] == (sum(SIZES), sum(SIZES))
    with pytest.raises(InputError, match=r"^device: expected cpu, cuda"):
        extract(manifest, config(device="cpu,tpu"), tmp_path / "three")


# --- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", list(FORMATS))
def test_views_are_the_augmented_crops_and_the_clean_one_stays(tmp_path: Path, format: str) -> None:
    manifest = read_manifest(write_dataset(tmp_path / "d", SIZES))
    changes = {"format": format, "dtype": "float32"}
    views = {"views": 2, "augment": "flip,crop:0.5,noise", "seed": 5}
    extract(manifest, config(**changes), tmp_path / "clean")
    extract(manifest, config(**changes, **views), tmp_path / "views")
    store = open_store(tmp_path / "views")
    assert store.description.views == ("0", "1", "2")
    augmentation = store.description.provenance["features"]["augmentation"]
    assert augmentation == {"steps": ["flip", "crop:0.5", "noise:0.02"], "views": 2, "seed": 5}
    np.testing.assert_array_equal(
        store.load("gap")[0], open_store(tmp_path / "clean").load("gap")[0]
    )
    instance = manifest.instances["004"][3]
    crop = np.asarray(Image.open(manifest.image_root / instance.image)).transpose(2, 0, 1)
    asked = Augmentation(("flip", "crop:0.5", "noise"), 2, 5)
    backbone = open_backbone(config(**changes))
    for view in ("1", "2"):
        changed = augmented(crop, asked, ("004", instance.image, None, view))
        resized = [
            np.asarray(Image.fromarray(plane).resize((48, 32), Image.Resampling.BILINEAR))
            for plane in changed
        ]
        wanted = backbone(torch.from_numpy(np.stack(resized))[None])["gap"][0].numpy()
        got = store.load("gap", bags=["004"], view=view)[0][3]
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert not np.array_equal(store.load("gap", view="1")[0], store.load("gap", view="2")[0])


# --- errors --------------------------------------------------------------------------------------


def test_more_errors_than_allowed_stop_the_run(tmp_path: Path) -> None:
    manifest = read_manifest(write_dataset(tmp_path / "d", SIZES))
    for image in ("000_1", "002_3", "004_6"):
        (manifest.image_root / "img" / f"{image}.png").write_bytes(b"")
    lenient = {"on_error": "skip"}
    with pytest.raises(ImageError, match=r"bag '004'.*3 inputs failed.*raise `max_errors`"):
        extract(manifest, config(**lenient, max_errors=2), tmp_path / "s")
    # What an earlier run has written counts as well.
    with pytest.raises(ImageError, match="3 inputs failed"):
        extract(manifest, config(**lenient, max_errors=2), tmp_path / "s")
    report = extract(manifest, config(**lenient, max_errors=3), tmp_path / "s")
    assert len(report.failures) == 3


# --- what limits, and the doctor -----------------------------------------------------------------


def jobs(tmp_path: Path) -> dict[str, tuple[Manifest, dict[str, object]]]:
    """A job bound by decoding (large files, a small network on small crops), and one bound by the
    network (small files, made large)."""
    rng = np.random.default_rng(0)
    result = {}
    for name, side, size in (("decoding", 2503, (32, 32)), ("network", 37, (256, 256))):
        folder = tmp_path / name
        rows = ["bag_id,labels,image"]
        for k in range(13):
            draw_image(folder / f"{k}.png", rng, side, side)
            rows.append(f"b{k // 4},x,{k}.png")
        (folder / "table.csv").write_text("\n".join(rows) + "\n")
        result[name] = (read_manifest(folder / "table.csv"), {"size": size})
    return result


def test_report_and_doctor_name_the_right_limit(tmp_path: Path) -> None:
    for limit, (manifest, changes) in jobs(tmp_path).items():
        settings = config(**changes, backbone="shufflenet_v2_x0_5", workers=2, batch_size=4)
        for attempt in range(3):  # other work on the machine may stall the disk or a core
            out = tmp_path / f"{limit}{attempt}.features"
            report, cost = extract(manifest, settings, out), estimate(manifest, settings, tmp_path)
            if (report.limit, cost.limit) == (limit, limit):
                break
        assert (report.limit, cost.limit) == (limit, limit)
        assert (cost.images, cost.instances) == (13, 13)
        assert cost.bytes == 13 * open_store(out).description.row_bytes
        words = "decode" if limit == "decoding" else "lighter `backbone`"
        assert words in report.advice
        assert words in cost.advice


def test_advice_follows_the_limit() -> None:
    slow = ExtractReport(wait_seconds=5, forward_seconds=1, workers=1, cores=4)
    assert (slow.limit, slow.advice) == (
        "decoding",
        "raise `workers` (now 1, the machine has 4 cores)",
    )
    disk = ExtractReport(forward_seconds=2, stall_seconds=6, write_seconds=7, device_seconds=0.1)
    assert disk.limit == "writing"
    assert "faster disk" in disk.advice
    gpu = ExtractReport(
        forward_seconds=1, stall_seconds=6, write_seconds=1, device_seconds=7, device="cuda:1"
    )
    assert (gpu.limit, gpu.advice) == (
        "network",
        "raise `batch_size` (now 32) while GPU memory lasts",
    )


def test_the_doctor_lists_the_machine(tmp_path: Path) -> None:
    found = {finding.what: finding.found for finding in examine(tmp_path / "new" / "store")}
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert "GB free" in found["disk"]
    assert str(tmp_path) in found["disk"]
    folder = write_dataset(tmp_path / "d", [2, 1])
    args = ["doctor", "--dataset", str(folder), "--backbone", "squeezenet1_1", "--size", "64"]
    result = CliRunner().invoke(app, [*args, "--json"])
    assert result.exit_code == 0
    cost = json.loads(result.stdout)["cost"]
    assert (cost["instances"], cost["bytes"]) == (3, 3 * 2 * (512 * 9 + 512))
    assert cost["rate"] > 0
