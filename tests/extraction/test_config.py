"""Settings of an extraction: one declaration behind options, files, checks, digests and words."""

from __future__ import annotations

import dataclasses
import json
import shlex
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w
from command_line import ok, refused
from conftest import write_dataset
from dragn_cache_cli.commands.extract import extract as extract_command
from dragn_cache_cli.options import own_flags, value_of, words
from dragn_cache_cli.rebuild import rebuild_command

from dragn_cache.backbone_input import BackboneInput, ExtractDefaults, Interpolation
from dragn_cache.backbones import Preprocessing
from dragn_cache.errors import InputError, SettingError
from dragn_cache.extraction.config import EstimateConfig, ExtractConfig
from dragn_cache.extraction.plan import (
    choose_precision,
    describe,
    open_backbone,
    with_channels,
)
from dragn_cache.images.crops import RESAMPLING
from dragn_cache.manifest import Manifest, read_manifest
from dragn_cache.options import declarations
from dragn_cache.store import FORMATS, read_description
from dragn_cache.store.schema import KINDS

SMALL = ExtractConfig(
    backbone="squeezenet1_1",
    weights="random:3",
    size=(40, 48),
    compute="eager",
    precision="float32",
    workers=0,
)


# --- one list of everything --------------------------------------------------------------------


def test_a_name_that_settings_allow_is_one_that_is_done() -> None:
    assert tuple(RESAMPLING) == get_args(Interpolation)
    assert declarations(ExtractConfig)["format"].choices == tuple(FORMATS)


def test_preprocessing_decides_every_setting_of_the_input() -> None:
    decided = {field.name for field in dataclasses.fields(Preprocessing)}
    assert decided == {*declarations(BackboneInput), "resize_shorter"}
    assert {*declarations(ExtractDefaults)} == {*declarations(BackboneInput), "backbone", "taps"}
    assert {*declarations(EstimateConfig)} == {*declarations(ExtractConfig)}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"size": (0, 9)}, "size: expected [height, width] in pixels, each from 1 to 8192, got"),
        ({"std": (0.5, 0.5, 0.0)}, "std: expected three numbers above 0, on a scale of 0 to 1"),
        ({"rgb": ()}, "rgb: expected names, none of them empty, got (); correct them"),
        ({"grid": 0}, "grid: expected a whole number of at least 1, got 0; change it"),
        ({"interpolation": "bicubit"}, "interpolation: expected bilinear, bicubic, nearest or lan"),
        ({"views": 1}, "augment: expected steps that make the views differ, got none; give `aug"),
        ({"augment": "flip"}, "views: expected at least 1 with `augment`, got 0"),
        ({"max_errors": -1}, "max_errors: expected a whole number of at least 0, got -1"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(values: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingError) as caught:
        ExtractConfig(**values)
    assert str(caught.value).startswith(line)


# --- layers ------------------------------------------------------------------------------------


def test_a_data_set_fills_what_was_not_asked_for() -> None:
    table = {"backbone": "resnet18", "taps": ["layer3"], "size": [32, 48], "rgb": ["red"]}
    filled = ExtractConfig(size=(64, 64)).with_defaults(table)
    assert (filled.backbone, filled.taps, filled.size) == ("resnet18", ("layer3",), (64, 64))
    assert filled.rgb == ("red", "red", "red")
    other = ExtractConfig(backbone="vgg11").with_defaults(table)
    assert (other.backbone, other.taps, other.size) == ("vgg11", None, (32, 48))


def test_options_come_before_config_config_before_the_data_set(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [2])
    table = '[extract]\nbackbone = "squeezenet1_1"\nsize = [41, 43]\nintensity = "1:200"\n'
    (data / "dataset.toml").write_text((data / "dataset.toml").read_text() + table)
    config = tmp_path / "my.toml"
    config.write_text('[extract]\nintensity = "2:200"\nbatch_size = 5\nweights = "random"\n')
    given = ["--dataset", data, "--config", config, "--batch-size", 7, "--workers", 0]
    ok("extract", *given, "--compute", "eager", "--out", tmp_path / "s")
    made = read_description(tmp_path / "s").provenance
    assert made["features"]["preprocessing"]["size"] == [41, 43]
    assert made["features"]["preprocessing"]["intensity"] == "2:200"
    assert made["numerics"]["batch_size"] == 7
    config.write_text("batch_size = 0\n")
    line = refused("extract", *given[:4], "--out", tmp_path / "t")
    assert f"{config}: batch_size: expected a whole number of at least 1, got 0" in line
    config.write_text("[extract]\nbatchsize = 2\n")
    line = refused("extract", *given[:4], "--out", tmp_path / "t")
    assert f"{config}: expected a known setting, got 'batchsize'; did you mean batch_size" in line


# --- digests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return read_manifest(write_dataset(tmp_path_factory.mktemp("config") / "data", [3, 2]))


def digests_of(manifest: Manifest, config: ExtractConfig) -> dict[str, str]:
    config = with_channels(manifest, config.with_defaults(manifest.extract))
    description = describe(
        manifest, config, open_backbone(config), config.compute, choose_precision(config)
    )
    return {kind: description.digest(kind) for kind in KINDS}


OTHERS: dict[str, dict[str, Any]] = {
    "backbone": {"backbone": "squeezenet1_0"},
    "taps": {"taps": ("gap",)},
    "size": {"size": (48, 40)},
    "mean": {"mean": (0.5, 0.5, 0.5)},
    "std": {"std": (0.5, 0.5, 0.5)},
    "interpolation": {"interpolation": "nearest"},
    "channels": {"channels": "each"},
    "rgb": {"rgb": ("red", "red", "green")},
    "intensity": {"intensity": "0:200"},
    "weights": {"weights": "random:4"},
    "grid": {"grid": 1},
    "views": {"views": 2, "augment": "flip"},
    "augment": {"views": 1, "augment": "hflip"},
    "seed": {"views": 1, "augment": "flip", "seed": 2},
    "dtype": {"dtype": "float32"},
    "batch_size": {"batch_size": 31},
    "compute": {"compute": "compiled"},
    "precision": {"precision": "bfloat16"},
    "part_instances": {"part_instances": 4095},
}


def test_a_setting_is_in_the_digest_that_it_declares_and_in_no_other(manifest: Manifest) -> None:
    kinds = {name: d.kind for name, d in declarations(ExtractConfig).items()}
    assert {name for name, kind in kinds.items() if kind} - {*OTHERS} == {"device"}
    base = digests_of(manifest, SMALL)
    flipped = digests_of(manifest, SMALL.replace(views=1, augment="flip"))
    for name, changes in OTHERS.items():
        before = flipped if name in ("views", "augment", "seed") else base
        after = digests_of(manifest, SMALL.replace(**changes))
        different = {kind for kind in after if after[kind] != before[kind]}
        assert different == {kinds[name]}, name
    for changes in ({"format": "zarr"}, {"workers": 3}, {"on_error": "skip"}, {"max_errors": 3}):
        (name,) = changes
        assert kinds[name] is None
        config = SMALL.replace(**changes)  # type: ignore[arg-type]
        assert digests_of(manifest, config) == base


# --- words -------------------------------------------------------------------------------------


def test_the_words_of_all_settings_give_them_back() -> None:
    config = ExtractConfig(
        backbone="resnet18",
        taps=("layer4", "gap"),
        size=(128, 320),
        mean=(0.25, 0.5, 1 / 3),
        std=(0.1, 0.2, 1e-3),
        interpolation="lanczos",
        channels="each",
        rgb=("a b", "c"),
        intensity="channel-percentile:1:99.8",
        weights="random:7",
        grid=4,
        format="zarr",
        views=2,
        augment="flip,crop:0.7",
        seed=3,
        workers=5,
        max_errors=9,
    )
    line = words(ExtractConfig, config.to_dict())
    known = {f"--{d.flag}": d for d in declarations(ExtractConfig).values()}
    assert len(line) == 2 * len(known)
    pairs = zip(line[::2], line[1::2], strict=True)
    assert ExtractConfig(**{known[f].name: value_of(known[f], t) for f, t in pairs}) == config


def test_a_square_and_one_number_for_three_are_short_for_all() -> None:
    known = declarations(ExtractConfig)
    assert value_of(known["size"], "64") == (64, 64)
    assert value_of(known["mean"], "0.5") == (0.5, 0.5, 0.5)
    with pytest.raises(InputError, match=r"--std: expected one number or three, as .* got '1,2'"):
        value_of(known["std"], "1,2")


@pytest.mark.parametrize("name", ["--views 2 --augment flip,crop:0.7 --seed 3", "--channels each"])
def test_the_command_of_a_stores_record_makes_that_store(tmp_path: Path, name: str) -> None:
    data = write_dataset(tmp_path / "data", [3, 2])
    small = "--backbone squeezenet1_1 --weights random:3 --workers 0 --batch-size 4 --grid 1"
    line = f"--dataset {data} {small} --size 40x48 --mean 0.5 --intensity 0:200 {name}"
    ok("extract", *line.split(), "--out", tmp_path / "a")
    made = read_description(tmp_path / "a")
    command = rebuild_command(made, tmp_path / "b")
    assert command is not None
    program, *arguments = shlex.split(command.replace("--dataset tiny", f"--dataset {data}"))
    assert program == "dragn-cache"
    ok(*arguments, "--workers", 0)
    assert read_description(tmp_path / "b").provenance == made.provenance


# --- a setting more ----------------------------------------------------------------------------


def test_every_setting_has_an_option_and_a_key(tmp_path: Path) -> None:
    known = declarations(ExtractConfig)
    assert {*known} <= {*own_flags(extract_command)}
    text = " ".join(ok("extract", "--help").replace("│", " ").split())
    for declared in known.values():
        assert f"--{declared.flag} " in text
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(SMALL.to_table()))
    assert {*tomllib.loads(path.read_text())} <= {*known}
    assert ExtractConfig.from_table(tomllib.loads(path.read_text()), "x") == SMALL
    assert json.loads(json.dumps(SMALL.to_table())) == SMALL.to_table()
