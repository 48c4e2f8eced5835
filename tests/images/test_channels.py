"""Any number of channels from files to the store: averaged, each alone, chosen, and recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from dragn_cache_cli.app import app
from typer.testing import CliRunner

from dragn_cache.backbones import load_backbone
from dragn_cache.errors import ImageError, InputError, ManifestError, UnknownNameError
from dragn_cache.extraction.check import check_dataset
from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.extract import extract
from dragn_cache.manifest import read_manifest
from dragn_cache.store import open_store

H, W = 37, 53
NAMES = ("dapi", "er", "actin", "mito", "rna")
CONFIG = ExtractConfig(
    backbone="shufflenet_v2_x0_5",
    weights="random:3",
    taps=("stage2", "gap"),
    size=(H, W),
    dtype="float32",
    workers=0,
)


def write(folder: Path, *, apart: bool, extract_table: str = "") -> Path:
    """Three bags of one 16-bit image of five channels, in one OME-TIFF or in five files."""
    folder.mkdir()
    rng = np.random.default_rng(2)
    for bag in "abc":
        array = rng.integers(0, 4096, (5, H, W), np.uint16)
        if apart:
            for name, plane in zip(NAMES, array, strict=True):
                tifffile.imwrite(folder / f"{bag}_{name}.tif", plane, compression="lzw")
        else:
            tifffile.imwrite(folder / f"{bag}.ome.tif", array, ome=True, metadata={"axes": "CYX"})
    channels = ", ".join(f'"{name}"' for name in NAMES)
    (folder / "dataset.toml").write_text(f"channels = [{channels}]\n{extract_table}")
    (folder / "bags.csv").write_text("bag_id,labels\na,u\nb,u\nc,u\n")
    image = "{bag}_{{channel}}.tif" if apart else "{bag}.ome.tif"
    rows = "".join(f"{bag},{image.format(bag=bag)}\n" for bag in "abc")
    (folder / "instances.csv").write_text("bag_id,image\n" + rows)
    return folder


def pixels() -> np.ndarray[Any, Any]:
    """The images, scaled by hand from 0 to 4095: (3, 5, H, W) uint8."""
    rng = np.random.default_rng(2)
    arrays = [rng.integers(0, 4096, (5, H, W), np.uint16) for _ in "abc"]
    return np.rint(255 * np.array(arrays, float) / 4095).astype(np.uint8)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("mode", ["average", "each"])
@pytest.mark.parametrize("chosen", [None, ("rna",), ("mito", "dapi", "er", "rna")])
def test_stored_features_are_the_backbones(
    tmp_path: Path, apart: bool, mode: str, chosen: tuple[str, ...] | None
) -> None:
    manifest = read_manifest(write(tmp_path / "d", apart=apart))
    assert check_dataset(tmp_path / "d").faults == ()
    config = CONFIG.replace(channels=mode, rgb=chosen, intensity="0:4095")
    extract(manifest, config, tmp_path / "s")
    store = open_store(tmp_path / "s")
    names = chosen or NAMES
    backbone = load_backbone(
        "shufflenet_v2_x0_5",
        weights="random:3",
        taps=("stage2", "gap"),
        preprocessing={"size": (H, W), "channels": mode, "rgb": names},
    )
    inputs = pixels()[:, [NAMES.index(name) for name in names]]
    for tap, expected in backbone(torch.from_numpy(inputs)).items():
        rows, _ = store.load(tap)
        np.testing.assert_allclose(rows, expected.numpy(), rtol=1e-4, atol=1e-4)
    recorded = store.description.provenance["features"]["preprocessing"]
    assert (recorded["channels"], recorded["rgb"]) == (mode, list(names))
    assert recorded["intensity"] == "0:4095"


def test_the_data_set_may_say_so(tmp_path: Path) -> None:
    table = '[extract]\nchannels = "each"\nintensity = "0:4095"\nrgb = ["er"]\n'
    config = CONFIG.with_defaults(
        read_manifest(write(tmp_path / "d", apart=False, extract_table=table)).extract
    )
    assert (config.channels, config.rgb, config.intensity) == ("each", ("er",), "0:4095")
    back = CONFIG.replace(channels="rgb").with_defaults({"channels": "each", "rgb": ["er"]})
    assert (back.channels, back.rgb) == ("rgb", ("er",) * 3)
    wrong = write(tmp_path / "e", apart=False, extract_table="[extract]\nintensity = 5\n")
    with pytest.raises(ManifestError, match=r"\[extract\] intensity: expected a text, as full"):
        read_manifest(wrong)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^intensity: expected full, LOW:HIGH"):
        CONFIG.replace(intensity="bright")
    with pytest.raises(InputError, match=r"^channels: expected rgb, average or each, got 'all'"):
        CONFIG.replace(channels="all")
    manifest = read_manifest(write(tmp_path / "d", apart=False))
    with pytest.raises(UnknownNameError, match="did you mean mito"):
        extract(manifest, CONFIG.replace(channels="each", rgb=("mitos",)), tmp_path / "s")
    with pytest.raises(
        InputError, match=r"three channels' names, got .*, or take any number with `ch"
    ):
        extract(manifest, CONFIG.replace(rgb=NAMES), tmp_path / "s")
    fewer = replace(manifest, channels=NAMES[:4])
    with pytest.raises(ImageError, match=r"bag 'a', a\.ome\.tif: expected 4 channels, got 5 pages"):
        extract(fewer, CONFIG.replace(channels="each"), tmp_path / "t")


def test_from_the_command_line(tmp_path: Path) -> None:
    write(tmp_path / "d", apart=False)
    options = "--backbone shufflenet_v2_x0_5 --weights random:3 --taps gap --size 37x53 --workers 0"
    command = ["extract", "--dataset", str(tmp_path / "d"), "--out", str(tmp_path / "s")]
    more = ["--channels", "each", "--rgb", "er,rna", "--intensity", "channel-percentile:1:99"]
    done = CliRunner().invoke(app, [*command, *options.split(), *more])
    assert done.exit_code == 0, done.output
    (tap,) = open_store(tmp_path / "s").description.taps
    assert tap.shape == (2 * 1024,)
    other = CliRunner().invoke(app, [*command, *options.split(), *more[:-1], "full"])
    assert "features.preprocessing.intensity" in str(other.exception) + other.output
