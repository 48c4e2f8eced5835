"""Files that older versions wrote, by today's code: ``data/v1``, which ``data/make_v1.py`` made."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dragn_cache_cli.app import app
from numpy.typing import NDArray
from typer.testing import CliRunner

from dragn_cache.store import open_store

V1 = Path(__file__).parent / "data" / "v1"
EXPECTED = V1 / "expected"
STORES = {"hdf5.features": "float32", "zarr.features": "float16"}
RUNS = ("dragn", "abmil", "svm")
UNUSABLE = "007"  # a bag without a usable input
CROSSVAL = shlex.split("--folds 3 --seeds 1 --jobs 1 --epochs 13 --batch-size 5 --intervals 50")
METHODS = "abmil[embed=7],dragn[unit=L3Agg],vlad[words=2]"
# What a processor of other vectors may add: sums of single precision, and of double.
SINGLE, DOUBLE = 1e-6, 1e-12

Row = dict[str, str]


def ok(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def rows_of(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def expected(name: str) -> NDArray[Any]:
    values: NDArray[Any] = np.load(EXPECTED / f"{name}.npy")
    return values


# Resamples of one class have had no mAP since: where all bags are positive, it was 1.
OTHER_SINCE = ("map_low", "map_high")


def same_rows(found: Sequence[Row], wanted: Sequence[Row], tolerance: float) -> None:
    """Fail unless texts are the same, and numbers that are not whole are within a tolerance."""
    assert len(found) == len(wanted)
    for row, other in zip(found, wanted, strict=True):
        assert row.keys() == other.keys()
        for column, cell in other.items():
            if column in OTHER_SINCE:
                assert float(row[column]) == pytest.approx(float(cell), abs=0.02), column
            elif "." in cell:
                assert float(row[column]) == pytest.approx(float(cell), abs=tolerance), column
            else:
                assert row[column] == cell, column


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return shutil.copytree(V1, tmp_path / "v1")


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file below a folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in paths
    }


# --- stores ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORES)
def test_an_old_store_is_whole_and_verifying_changes_nothing(v1: Path, name: str) -> None:
    before = files_of(v1 / name)
    told = json.loads(ok("verify", v1 / name, "--json"))
    assert told["damaged"] == []
    assert told["missing_parts"] == []
    assert told["tables"] == []
    assert "of version 2" in told["unchecked"]
    assert told["parts"] == 2
    assert told["command"].startswith("dragn-cache extract --dataset tiny --backbone resnet18 ")
    assert files_of(v1 / name) == before


@pytest.mark.parametrize("name", STORES)
def test_an_old_stores_damage_is_found(v1: Path, name: str) -> None:
    """Its digests are compared: one other byte of a feature is a fault."""
    row = expected("layer4")[3].astype(STORES[name]).tobytes()
    holding = [path for path in (v1 / name / "parts").rglob("*") if path.is_file()]
    changed = 0
    for path in holding:
        content = path.read_bytes()
        if row in content:
            path.write_bytes(content.replace(row, bytes([row[0] ^ 1]) + row[1:]))
            changed += 1
    assert changed == 1
    result = CliRunner().invoke(app, ["verify", str(v1 / name), "--json"])
    assert result.exit_code == 1
    (damaged,) = json.loads(result.stdout)["damaged"]
    bag = np.searchsorted(expected("offsets"), 3, side="right") - 1
    assert damaged["bag_id"] == f"{bag:03d}"


@pytest.mark.parametrize("name", STORES)
def test_an_old_store_holds_the_values_that_were_written(name: str) -> None:
    store = open_store(V1 / name)
    for tap in ("layer4", "gap"):
        values, offsets = store.load(tap)
        wanted = expected(tap).astype(STORES[name])
        assert values.dtype == wanted.dtype
        np.testing.assert_array_equal(values, wanted)
        np.testing.assert_array_equal(offsets, expected("offsets"))
    assert store.description.schema_version == 2
    assert store.labels == ("actin", "golgi", "nucleus")
    assert [bag.bag_id for bag in store.bags] == [f"{k:03d}" for k in range(31)]
    assert {bag.group for bag in store.bags} == {f"g{k}" for k in range(16)}
    (failure,) = store.failures()
    assert (failure.bag_id, failure.reason) == (UNUSABLE, "truncated")


def test_an_old_stores_second_view_is_the_mirrored_one() -> None:
    store = open_store(V1 / "zarr.features")
    assert store.description.views == ("0", "1")
    values, _ = store.load("layer4", view="1")
    np.testing.assert_array_equal(values, expected("layer4")[..., ::-1].astype("float16"))
    np.testing.assert_array_equal(values, expected("view1").astype("float16"))


# --- runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_an_old_run_predicts_what_it_recorded(run: str, tmp_path: Path) -> None:
    ok("predict", V1 / run, "--store", V1 / "hdf5.features", "--out", tmp_path / "out")
    found, wanted = (rows_of(folder / "predictions.csv") for folder in (tmp_path / "out", V1 / run))
    assert len(wanted) == 30
    assert UNUSABLE not in {row["bag_id"] for row in wanted}
    for row in [*found, *wanted]:  # the store's table has no splits, the run made its own
        del row["split"]
    same_rows(found, wanted, SINGLE)


@pytest.mark.parametrize("run", RUNS)
def test_an_old_runs_predictions_are_its_own(run: str) -> None:
    """The probabilities differ among bags and runs, so that no other model predicts them."""
    rows = rows_of(V1 / run / "predictions.csv")
    own = np.array([[float(row[f"p_{label}"]) for label in ("actin", "golgi")] for row in rows])
    assert (np.ptp(own, axis=0) > 1e3 * SINGLE).all()
    assert len(np.unique(own)) > 50


@pytest.mark.parametrize("run", RUNS)
def test_an_old_runs_scores_are_found_again(run: str, tmp_path: Path) -> None:
    ok("evaluate", V1 / run, "--out", tmp_path / "out")
    recorded = json.loads((V1 / run / "metrics.json").read_text())["test"]
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["test"]
    assert recorded["bags"] > 10
    for name in ("bags", "accuracy", "auc_macro", "f1_macro", "map", "decision", "ece"):
        assert found[name] == pytest.approx(recorded[name], abs=DOUBLE), name


@pytest.mark.parametrize(
    ("run", "method"), [("dragn", "cosine"), ("abmil", "attention"), ("svm", "leave-one-out")]
)
def test_an_old_run_is_explained(run: str, method: str, tmp_path: Path) -> None:
    store = V1 / "hdf5.features"
    ok("explain", V1 / run, "--store", store, "--out", tmp_path / "out", "--method", method)
    rows = rows_of(tmp_path / "out" / "instances.csv")
    column = method.replace("-", "_")
    scores = [[float(v or "nan") for k, v in row.items() if k.startswith(column)] for row in rows]
    values, offsets = np.array(scores), expected("offsets")
    assert len(values) == len(expected("gap"))
    sizes = np.diff(offsets)
    alone = np.repeat(sizes, sizes) == 1  # leaving it out leaves no bag
    assert (np.isnan(values).all(1) == (alone & (method == "leave-one-out"))).all()
    assert np.nanmax(values) - np.nanmin(values) > 1e-3
    if method == "attention":
        sums = [values[start:end].sum() for start, end in pairwise(offsets) if end > start]
        np.testing.assert_allclose(sums, 1, atol=SINGLE)
    if method == "cosine":
        assert np.abs(values).max() <= 1 + SINGLE


# --- cross-validations -------------------------------------------------------------------------


def test_an_old_cross_validation_goes_on_and_trains_nothing(v1: Path) -> None:
    out, store = v1 / "crossval", v1 / "hdf5.features"
    before = files_of(out / "trainings")
    assert len(before) == 9
    tables = ("summary.csv", "folds.csv", "comparison.csv", "predictions.csv", "splits.csv")
    for name in tables:
        (out / name).unlink()
    ok("crossval", "--store", store, "--out", out, "--aggregator", METHODS, *CROSSVAL)
    assert files_of(out / "trainings") == before
    for name in tables:
        same_rows(rows_of(out / name), rows_of(V1 / "crossval" / name), DOUBLE)


def test_a_method_is_not_added_to_an_old_cross_validation(v1: Path) -> None:
    """Its trainings started elsewhere: side by side they would be compared with others."""
    out, store = v1 / "crossval", v1 / "hdf5.features"
    before = files_of(out)
    arguments = ["crossval", "--store", store, "--out", out]
    arguments += ["--aggregator", f"{METHODS},max", *CROSSVAL]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert "expected trainings of this version, got those of one whose heads started" in (
        result.stderr
    )
    assert files_of(out) == before


def test_an_old_cross_validation_refuses_other_settings(v1: Path) -> None:
    arguments = ["crossval", "--store", v1 / "hdf5.features", "--out", v1 / "crossval"]
    arguments += ["--aggregator", METHODS, *CROSSVAL, "--lr", "0.5"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert "lr is 0.0003, asked for 0.5" in result.stderr
