"""Every command, as a person types it: its output, its exit code, its one line for a mistake."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from conftest import write_dataset
from dragn_cache_cli.app import COMMANDS, app
from dragn_cache_cli.parsing import parse_aggregators
from typer.testing import CliRunner, Result

SIZES = [3, 1, 4, 2, 5, 1, 2, 3, 1, 4, 2, 1, 3, 2, 1, 2, 6, 1, 2, 3]
EXTRACT = [
    "--backbone",
    "squeezenet1_1",
    "--weights",
    "random",
    "--size",
    "64x64",
    "--workers",
    "0",
]


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def ok(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args: object) -> str:
    """The one line of a refusal."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "internal" not in lines[0]
    return lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("cli") / "tiny", SIZES, seed=3)


@pytest.fixture(scope="module")
def store(data: Path) -> Path:
    path = data.parent / "tiny.features"
    ok("extract", "--dataset", data, "--out", path, *EXTRACT)
    return path


@pytest.fixture(scope="module")
def trained(store: Path) -> Path:
    path = store.parent / "run"
    ok("train-agg", "--store", store, "--out", path, "--epochs", 2, "--unit", "L1Agg")
    return path


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_commands_help_has_an_example(command: str) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", ok(command, "--help"))
    assert f"Example: dragn-cache {command}" in re.sub(r"\s+", " ", text)


def test_version_and_no_arguments() -> None:
    assert re.fullmatch(r"dragn-cache \d+\.\d+\.\d+\n", ok("--version"))
    assert "Usage" in run().output


def test_check_tells_a_clean_set_from_a_faulty_one(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", [2, 3])
    assert "2 bags, 5 instances, 5 images, 3 labels (multilabel): 0 faults" in ok("check", folder)
    (folder / "img" / "001_2.png").write_bytes(b"")
    result = run("check", folder, "--json")
    assert result.exit_code == 1
    (fault,) = json.loads(result.stdout)["faults"]
    assert (fault["kind"], fault["file"], fault["line"]) == ("unreadable-image", "instances.csv", 6)
    assert "instances.csv:6: unreadable-image" in run("check", folder).stdout


def test_extract_reports_goes_on_and_refuses(data: Path, store: Path) -> None:
    again = ok("extract", "--dataset", data, "--out", store, *EXTRACT)
    assert "complete, nothing to compute" in again
    line = refused("extract", "--dataset", data, "--out", store, *EXTRACT, "--dtype", "float32")
    assert "numerics.dtype" in line


def test_skipped_inputs_give_exit_code_1(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", [2, 3])
    (folder / "img" / "001_2.png").write_bytes(b"")
    out = tmp_path / "s"
    assert "0 bytes" in refused("extract", "--dataset", folder, "--out", out, *EXTRACT)
    for _ in range(2):
        result = run("extract", "--dataset", folder, "--out", out, *EXTRACT, "--on-error", "skip")
        assert result.exit_code == 1
        assert "1 inputs were not used" in result.stderr


def test_info_shows_the_store(store: Path) -> None:
    facts = json.loads(ok("info", store, "--json"))
    assert (facts["bags"], facts["instances"], facts["missing_parts"]) == (20, sum(SIZES), [])
    assert [(t["name"], t["shape"]) for t in facts["taps"]] == [
        ("features", [512, 3, 3]),
        ("gap", [512]),
    ]
    text = ok("info", store)
    assert "20 bags, 49 instances" in text
    assert "complete" in text
    assert facts["digests"]["features"] in text


def test_verify_names_damage(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    ok("extract", "--dataset", data, "--out", out, *EXTRACT, "--part-instances", 20)
    assert "0 damaged bags" in ok("verify", out)
    part = out / "parts" / "00001.h5"
    part.write_bytes(part.read_bytes()[:-1000])
    result = run("verify", out, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert {row["part"] for row in found["damaged"]} == {"00001.h5"}
    assert "damaged: bag '008' in 00001.h5" in run("verify", out).stdout
    result = run("verify", out, "--repair")
    assert result.exit_code == 1
    assert f"moved aside: {out / 'damaged' / '00001.1.h5'}" in result.stdout
    command = result.stderr.strip().splitlines()[-1].replace("--dataset tiny", f"--dataset {data}")
    assert sorted(p.name for p in (out / "parts").iterdir()) == ["00000.h5", "00002.h5"]
    result = run("verify", out)
    assert result.exit_code == 1
    assert "missing: 00001.h5" in result.stdout
    assert "run the same extract command again" in refused(
        "train-agg", "--store", out, "--out", tmp_path / "r"
    )
    assert "parts 1 of 3" in ok(*shlex.split(command)[1:])
    ok("verify", out)


def test_training_writes_a_run(store: Path, trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert list(metrics) == ["train", "validation", "test"]
    assert sum(m["bags"] for m in metrics.values()) == 20
    with (trained / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "bag_id",
        "split",
        "y_actin",
        "y_nucleus",
        "y_golgi",
        "p_actin",
        "p_nucleus",
        "p_golgi",
        "d_actin",
        "d_nucleus",
        "d_golgi",
    ]
    assert len(rows) == 20
    printed = ok(
        "train-agg",
        "--store",
        store,
        "--out",
        store.parent / "j",
        "--epochs",
        2,
        "--unit",
        "L1Agg",
        "--json",
    )
    assert json.loads(printed) == metrics


def test_predicting_repeats_the_runs_probabilities(
    store: Path, trained: Path, tmp_path: Path
) -> None:
    text = ok("predict", trained, "--store", store, "--out", tmp_path / "p")
    assert "auc_macro over 20 bags" in text

    def columns(path: Path) -> list[list[str]]:
        with path.open() as file:
            return [[r["bag_id"], r["p_actin"], r["p_golgi"]] for r in csv.DictReader(file)]

    assert columns(tmp_path / "p" / "predictions.csv") == columns(trained / "predictions.csv")


def test_evaluating_scores_the_runs_test_bags(store: Path, trained: Path, tmp_path: Path) -> None:
    scores = json.loads((trained / "metrics.json").read_text())["test"]
    printed = ok("evaluate", trained, "--out", tmp_path / "a", "--json")
    assert json.loads(printed) == {"test": scores}
    text = ok("evaluate", trained, "--store", store, "--split", "test", "--out", tmp_path / "b")
    assert f"test: {scores['bags']} bags, decided by default" in text
    assert re.search(rf"f1_macro +{scores['f1_macro']:.3f} \(", text)
    assert re.search(rf"actin +{scores['positives'][0]} ", text)
    text = ok("evaluate", trained, "--decision", "half", "--out", tmp_path / "c")
    assert "decided by half" in text
    assert "0.500" in text
    args = ("--store", store, "--out", tmp_path / "d")
    assert "of 20 that it was: '0" in refused("evaluate", trained, *args)
    assert "--decision: expected default, half, thresholds or top-K" in refused(
        "evaluate", trained, "--decision", "best", "--out", tmp_path / "d"
    )
    assert "got 'best'" in refused("train-agg", *args, "--decision", "best")
    assert "at most top-3 of 3" in refused("train-agg", *args, "--decision", "top-4")
    assert not (tmp_path / "d").exists()


def test_another_table_of_bags(store: Path, tmp_path: Path) -> None:
    table = tmp_path / "other.csv"
    ids = [f"0{k:02d}" for k in range(12)]
    splits = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    table.write_text(
        "bag_id,labels,split\n"
        + "".join(
            f"{b},{'left' if k % 2 else 'right;left'},{s}\n"
            for k, (b, s) in enumerate(zip(ids, splits, strict=True))
        )
    )
    out = tmp_path / "r"
    ok(
        "train-agg",
        "--store",
        store,
        "--bags",
        table,
        "--aggregator",
        "max",
        "--epochs",
        1,
        "--out",
        out,
    )
    with (out / "splits.csv").open() as file:
        rows = {r["bag_id"]: r["split"] for r in csv.DictReader(file)}
    assert rows == dict(zip(ids, [s.replace("val", "validation") for s in splits], strict=True))
    assert "y_left" in (out / "predictions.csv").read_text()
    table.write_text("bag_id,labels\n0000,left\n")
    assert "did you mean" in refused(
        "train-agg", "--store", store, "--bags", table, "--out", tmp_path / "q"
    )


def test_lists() -> None:
    assert "resnet50" in ok("backbones")
    assert json.loads(ok("backbones", "--json"))["resnet50"] == {
        "map": "layer4",
        "vector": "avgpool",
    }
    taps = {t["name"]: t for t in json.loads(ok("taps", "resnet18", "--size", "128x320", "--json"))}
    assert taps["layer4"]["shape"] == [512, 4, 10]
    assert taps["layer4"]["bytes_fp16"] == 512 * 40 * 2
    assert taps["gap"]["shape"] == [512]
    assert "512×4×10" in ok("taps", "resnet18", "--size", "128x320")
    assert "resnet18 at 224×224" in ok("taps", "resnet18")
    assert json.loads(ok("aggregators", "--json"))["dragn"]["order_sensitive"] is True
    assert "dragn" in ok("aggregators")
    options = json.loads(ok("aggregators", "vlad", "--json"))["vlad"]["options"]
    assert (options["svm"], options["pca"]) == ("linear", None)
    told = ok("aggregators", "clam_mb")
    assert re.search(r"attn_dim +256", told)
    assert "labels " not in told.split("--option")[1]
    assert "did you mean clam_mb" in refused("aggregators", "clam_mbb")


def test_simulate_then_extract_with_its_defaults(tmp_path: Path) -> None:
    ok("simulate", "--out", tmp_path / "sim", "--bags", 4, "--seed", 1)
    ok("check", tmp_path / "sim")
    ok("extract", "--dataset", tmp_path / "sim", "--weights", "random", "--out", tmp_path / "s")
    facts = json.loads(ok("info", tmp_path / "s", "--json"))
    assert facts["provenance"]["features"]["backbone"] == "resnet18"
    assert facts["provenance"]["features"]["preprocessing"]["size"] == [96, 96]


def test_the_demo_ends_with_a_table_a_figure_and_what_to_do_next(tmp_path: Path) -> None:
    text = ok("demo", "--out", tmp_path / "demo", "--bags", 40)
    assert "dragn-cache extract --dataset my_data/" in text
    for method in ("L3Agg", "mean", "max"):
        assert method in text
        assert (tmp_path / "demo" / "runs" / method / "metrics.json").is_file()
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 20_000


MISTAKES = {
    "unknown backbone": (["--backbone", "resnet19"], r"did you mean .*resnet18"),
    "unknown tap": (["--taps", "featurs"], "did you mean features"),
    "bad size": (["--size", "224by224"], "--size: expected HEIGHTxWIDTH"),
    "bad mean": (["--mean", "0.5,0.5"], "--mean: expected one number or three"),
    "no weights file": (["--weights", "lost.pth"], "lost.pth"),
    "unknown channel": (["--rgb", "violet"], "violet"),
    "unknown device": (["--device", "abacus"], "abacus"),
    "unknown data set": (["--dataset", "flyexpres"], "flyexpress"),
    "no batch": (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_one_line_and_writes_nothing(data: Path, tmp_path: Path, mistake: str) -> None:
    args, message = MISTAKES[mistake]
    line = refused("extract", "--dataset", data, "--out", tmp_path / "s", *EXTRACT, *args)
    assert re.search(message, line), line
    assert not (tmp_path / "s").exists()


def test_cross_validation_compares_methods(store: Path, tmp_path: Path) -> None:
    base = ["crossval", "--store", store, "--out", tmp_path / "cv", "--folds", 3, "--seeds", 1]
    base += ["--epochs", 1, "--jobs", 1, "--aggregator", "abmil[attn_dim=5],mean"]
    text = ok(*base, "--aggregator", "dragn[unit=L1Agg]")
    assert all(name in text for name in ("abmil-attn_dim=5", "mean", "dragn-L1Agg", "trainings"))
    tables = json.loads(ok(*base, "--json"))  # two of the three, trained already
    assert [row["aggregator"] for row in tables["summary"]] == ["abmil-attn_dim=5", "mean"]
    assert len(tables["comparison"]) == 4
    assert tables["failed"] == []
    assert "epochs is 1, asked for 2" in refused(*base, "--epochs", 2)


def test_a_recipe_gives_its_own_method_its_options(store: Path, tmp_path: Path) -> None:
    args = ["--recipe", "abmil", "--aggregator", "abmil,mean", "--epochs", 1, "--folds", 3]
    ok("crossval", "--store", store, "--out", tmp_path / "cv", "--seeds", 1, "--jobs", 1, *args)
    methods = tomllib.loads((tmp_path / "cv" / "config.toml").read_text())["methods"]
    first, second = methods.values()
    assert first["options"] == {"embed": [256, 128, 64], "attn_dim": 64}
    assert (second["options"], first["lr"], second["lr"]) == ({}, 5e-4, 5e-4)


def test_failed_trainings_of_a_cross_validation_give_exit_code_1(
    store: Path, tmp_path: Path
) -> None:
    args = ["--aggregator", "max", "--folds", 3, "--seeds", 1, "--epochs", 40, "--jobs", 1]
    args += ["--lr", 1000, "--weight-decay", 1000]
    result = run("crossval", "--store", store, "--out", tmp_path / "cv", *args)
    assert result.exit_code == 1, result.output
    assert "max, seed 0, fold 2 failed: epoch" in " ".join(result.stderr.split())
    assert "–" in result.stdout


def test_an_error_in_code_of_ones_own_names_its_line(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_faulty.py").write_text(
        "from dragn_cache.aggregators.mean import Mean\n"
        "class Faulty(Mean):\n"
        "    def aggregate(self, bags):\n"
        "        return self.vectors(bags).median_of_means()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    said = refused("train-agg", "--store", store, "--aggregator", "my_faulty:Faulty", "--out", "r")
    assert f"error: {tmp_path / 'my_faulty.py'}:4: AttributeError" in said
    assert "correct it with the traceback that DRAGN_CACHE_DEBUG=1 shows" in said


def test_a_class_of_ones_own_in_the_working_directory(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_half.py").write_text(
        "from dragn_cache.aggregators import Aggregated\n"
        "from dragn_cache.aggregators.mean import Mean\n"
        "class Half(Mean):\n"
        "    def aggregate(self, bags):\n"
        "        return Aggregated(super().aggregate(bags).embedding / 2, None)\n"
    )
    monkeypatch.chdir(tmp_path)

    def typed(*args: object) -> str:
        """A fresh process, whose own path lacks the working directory, as the program's does."""
        command = [sys.executable, "-P", "-c", "from dragn_cache_cli.app import main; main()"]
        done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    name, short = "my_half:Half", ("--epochs", 1, "--intervals", 0)
    assert "my_half:Half" in typed("aggregators", name)
    typed("train-agg", "--store", store, "--aggregator", name, *short, "--out", "r")
    typed("predict", "r", "--store", store, "--out", "p")
    assert (tmp_path / "p" / "metrics.json").is_file()
    args = ["--aggregator", f"{name},mean", "--folds", 3, "--seeds", 1, "--jobs", 2, *short]
    summary = json.loads(typed("crossval", "--store", store, *args, "--out", "cv", "--json"))
    assert summary["failed"] == []
    assert [row["trainings"] for row in summary["summary"]] == [3, 3]


def test_mistakes_in_cross_validating_are_one_line(store: Path, tmp_path: Path) -> None:
    base = ["crossval", "--store", store, "--out", tmp_path / "cv", "--aggregator"]
    assert "did you mean abmil" in refused(*base, "abmul")
    assert "names, as abmil,dragn[unit=L3Agg]" in refused(*base, "dragn[unit=L3Agg")
    assert "option 'depth'" in refused(*base, "mean[depth=3]")
    assert "mean twice" in refused(*base, "mean,max,mean")
    assert "--folds" in refused(*base, "mean", "--folds", 2)
    assert "one group of bags for each of 99 folds" in refused(*base, "mean", "--folds", 99)
    assert "--device: expected cpu" in refused(*base, "mean", "--device", "gpu")
    assert "--decision" in refused(*base, "mean", "--decision", "top")
    assert "known recipe" in refused(*base, "mean", "--recipe", "abmul")
    assert not (tmp_path / "cv").exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("abmil, mean", (("abmil", {}), ("mean", {}))),
        ("mine.net:Net[a=1,2,b=x],max", (("mine.net:Net", {"a": (1, 2), "b": "x"}), ("max", {}))),
        ("dragn[unit=L3Agg,bn=false]", (("dragn", {"unit": "L3Agg", "bn": False}),)),
        ("mean[]", (("mean", {}),)),
    ],
)
def test_aggregators_with_options_as_text(text: str, found: object) -> None:
    assert parse_aggregators([text]) == found


def test_mistakes_in_training_are_one_line(store: Path, tmp_path: Path) -> None:
    base = ["train-agg", "--store", store, "--out", tmp_path / "r"]
    assert "did you mean L3Agg" in refused(*base, "--unit", "L4Agg")
    assert "did you mean mean" in refused(*base, "--aggregator", "men")
    assert "option 'unit'" in refused(*base, "--aggregator", "mean", "--unit", "L1Agg")
    assert "name=value" in refused(*base, "--option", "bn")
    assert "a number or balanced, got 'even'" in refused(*base, "--pos-weight", "even")
    assert "--shuffle-seed: expected at least 0" in refused(*base, "--shuffle-seed", -1)
    assert "did you mean gap" in refused(*base, "--tap", "gp")
    assert "expected auto or a size with its unit, as 8GB" in refused(*base, "--memory", "much")
    assert "no such folder" in refused("train-agg", "--store", tmp_path / "none")
    assert "no such folder" in refused("info", tmp_path / "none")
    assert "no such folder" in refused(
        "predict", tmp_path / "x", "--store", store, "--out", tmp_path / "p"
    )
    assert not (tmp_path / "r").exists()


def test_shipped_sets_without_their_files_say_what_to_put_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DRAGN_CACHE_DATA", str(tmp_path))
    line = refused("extract", "--dataset", "hpa", "--out", tmp_path / "s")
    assert f"put bags.csv and instances.csv into {tmp_path / 'hpa'}" in line
    assert "dragn-cache simulate --out" in refused("check", "simulated")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_with_its_code_and_the_run_goes_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    folder = write_dataset(tmp_path / "d", [8] * 6)
    out = tmp_path / "s"
    program = Path(sys.executable).with_name("dragn-cache")
    args = ["extract", "--dataset", folder, "--out", out, *EXTRACT[:-2], "--part-instances", "8"]
    command = [program, *args, "--workers", "2", "--batch-size", "4", "--size", "128"]
    process = subprocess.Popen(
        [str(a) for a in command],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests that a shell runs in the background ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not list((out / "parts").glob("0*")):
        assert process.poll() is None
        time.sleep(0.01)
    if number == signal.SIGINT:  # Ctrl-C reaches the whole foreground group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert subprocess.run([str(a) for a in command], check=False).returncode == 0
    assert run("verify", out).exit_code == 0
    assert not list((out / "parts").glob(".*"))


def test_devices_that_are_not_there_are_refused_by_every_command(
    store: Path, trained: Path, tmp_path: Path
) -> None:
    for device in ("abacus", "meta", "cuda:99"):
        args = ["--store", store, "--out", tmp_path / "r", "--device", device]
        assert "--device: expected cpu" in refused("train-agg", *args)
        assert "--device: expected cpu" in refused("predict", trained, *args)
        assert "--device: expected cpu" in refused("evaluate", trained, *args)


def test_predicting_bags_with_other_labels_gives_no_scores(trained: Path, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", [2, 1], seed=9)
    (folder / "dataset.toml").write_text('name = "other"\ntask = "multilabel"\n')
    (folder / "bags.csv").write_text("bag_id,labels\n000,strange\n001,odd\n")
    ok("extract", "--dataset", folder, "--out", tmp_path / "s", *EXTRACT)
    result = run("predict", trained, "--store", tmp_path / "s", "--out", tmp_path / "p")
    assert result.exit_code == 0
    assert "predictions without scores" in result.stderr
    with (tmp_path / "p" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["y_actin"] for r in rows] == ["", ""]
    assert all(0 < float(r["p_actin"]) < 1 for r in rows)


def test_training_needs_a_label(store: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("bag_id,labels\n" + "".join(f"0{k:02d},\n" for k in range(12)))
    line = refused("train-agg", "--store", store, "--bags", table, "--out", tmp_path / "r")
    assert "empty labels for all 12 bags" in line


def test_features_go_out_and_come_back(store: Path, tmp_path: Path) -> None:
    text = ok("export", store, "--layout", "clam", "--out", tmp_path / "clam")
    assert re.search(r"clam: 20 bags as clam, tap gap, view 0$", text.strip())
    out = tmp_path / "again.features"
    text = ok("import", tmp_path / "clam", "--out", out, "--format", "zarr")
    assert "20 bags, 49 instances from clam, gap 512 float16; parts 1 of 1" in text
    assert "complete already" in ok("import", tmp_path / "clam", "--out", out, "--format", "zarr")
    facts = json.loads(ok("import", tmp_path / "clam", "--out", tmp_path / "b", "--json"))
    assert (facts["layout"], facts["bags"], facts["labelled"]) == ("clam", 20, True)
    assert facts["taps"] == [{"name": "gap", "shape": [512], "dtype": "float16"}]
    facts = json.loads(ok("export", out, "--layout", "hdf5", "--out", tmp_path / "x.h5", "--json"))
    assert (facts["layout"], facts["bags"], facts["taps"]) == ("hdf5", 20, ["gap"])
    ok("verify", out)
    weighted = ("--pos-weight", "balanced", "--shuffle-seed", 4)
    base = ("train-agg", "--store", out, "--aggregator", "mean", "--epochs", 1, *weighted)
    ok(*base, "--out", tmp_path / "r")
    config = tomllib.loads((tmp_path / "r" / "config.toml").read_text())["train"]
    assert (config["pos_weight"], config["shuffle_seed"]) == ("balanced", 4)
    shutil.rmtree(out / "parts" / "00000.zarr" / "taps")
    result = run("verify", out, "--repair")
    assert result.exit_code == 1
    command = re.search(r"^dragn-cache import clam (.*)$", result.stderr, re.MULTILINE)
    assert command is not None
    assert "--layout clam --encoder squeezenet1_1 --format zarr --dtype float16" in command[1]
    ok("import", tmp_path / "clam", *shlex.split(command[1]))
    ok("verify", out)


def test_recipes_are_listed_and_applied(store: Path, tmp_path: Path) -> None:
    recipes = json.loads(ok("recipes", "--json"))
    assert recipes["dragn-fly"]["lr"] == {"value": 1e-4, "source": "DRAGN, experiments on HPA"}
    assert re.search(r"dragn-fly +dragn +13 ", ok("recipes"))
    assert "options.unit" in ok("recipes", "dragn-fly")
    assert re.search(r"options.embed +256,128,64 ", ok("recipes", "abmil"))
    assert list(json.loads(ok("recipes", "frn", "--json"))) == ["frn"]
    assert "did you mean frn" in refused("recipes", "frm")
    table = tmp_path / "stages.csv"
    given = ("--recipe", "dragn-fly", "--epochs", 2, "--loss", "frn", "--loss-option", "anneal=3")
    steps = ("--schedule", "step", "--schedule-option", "milestones=1", "--patience", 5)
    base = ("train-agg", "--store", store, "--out", tmp_path / "r")
    ok(*base, *given, *steps)
    config = tomllib.loads((tmp_path / "r" / "config.toml").read_text())["train"]
    found = {name: config[name] for name in ("lr", "batch_size", "epochs", "loss", "patience")}
    assert found == {"lr": 1e-4, "batch_size": 4, "epochs": 2, "loss": "frn", "patience": 5}
    assert config["options"] == {"unit": "L1Agg"}
    assert config["loss_options"] == {"anneal": 3}
    assert config["schedule_options"] == {"milestones": 1}
    with (tmp_path / "r" / "history.csv").open() as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == pytest.approx([1e-4, 1e-5])
    table.write_text("label,stages\n")
    base = ("train-agg", "--store", store, "--out", tmp_path / "q")
    assert "got no row" in refused(*base, "--stage-mask", "both", "--stage-table", table)
    assert "--stage-table as well" in refused(*base, "--stage-mask", "both")
    assert "--loss-option: expected name=value" in refused(*base, "--loss-option", "gamma")
    assert "loss: expected a known loss, got 'hinge'" in refused(*base, "--loss", "hinge")
    assert not (tmp_path / "q").exists()


def test_mistakes_in_and_out_are_one_line(store: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.h5").write_bytes(b"no HDF5")
    assert "a.h5: expected a whole clam file" in refused(
        "import", tmp_path / "t", "--out", tmp_path / "s"
    )
    assert "got a store" in refused("import", store, "--out", tmp_path / "s")
    assert "expected a path where nothing is" in refused(
        "export", store, "--layout", "clam", "--out", tmp_path
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t"]
