"""Looking inside a run: every score against plain arithmetic or the run's own predictions."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from dragn_cache_cli.app import app
from file_limit import file_limit
from numpy.typing import NDArray
from run_stores import CHANNELS, LABELS, make_bags, make_features, with_splits, write_store
from typer.testing import CliRunner

from dragn_cache.aggregators import AGGREGATORS, create_aggregator, options_of
from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.ragged import RaggedBags
from dragn_cache.runs import explain, instance_scores
from dragn_cache.runs.checkpoint import load_checkpoint
from dragn_cache.runs.config import ExplainConfig
from dragn_cache.runs.explain import choose_method, explain_run
from dragn_cache.runs.instance_scores import bags_without_one, leave_one_out, score_instances
from dragn_cache.runs.train import train_run
from dragn_cache.store import Store
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.fit import predict_method
from dragn_cache.training.model import BagClassifier, predict

SIZES = [3, 1, 5, 2]
BAGS = 29
CONFIG = TrainConfig(
    aggregator="mean", epochs=2, batch_size=8, lr=3e-2, dropout=0.0, intervals=0, seed=5
)
METHODS: dict[str, dict[str, Any]] = {
    "abmil": {"options": {"attn_dim": 7}, "scale": "standard"},
    "dragn": {"options": {"unit": "L1Agg"}, "scale": "standard"},
    "mean": {},
    "svm": {"epochs": 60, "batch_size": 16, "lr": 3e-4, "dropout": 0.5},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Bags with splits; 003 has one instance and 005 none that is usable."""
    bags = with_splits(make_bags(BAGS))
    features = make_features(bags)
    features["003"] = features["003"][:1]
    features["005"] = features["005"][:0]
    return write_store(tmp_path_factory.mktemp("s") / "made.features", bags, features)


@pytest.fixture(scope="module")
def runs(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, settings in METHODS.items():
        train_run(store, CONFIG.replace(aggregator=name, **settings), folder / name)
    return {name: folder / name for name in METHODS}


def draw(*shape: int, sizes: list[int] = SIZES) -> RaggedBags:
    generator = torch.Generator().manual_seed(1)
    return RaggedBags.from_list([torch.rand(n, *shape, generator=generator) for n in sizes])


def classifier(name: str, in_shape: tuple[int, ...], **options: Any) -> BagClassifier:
    torch.manual_seed(3)
    return BagClassifier(create_aggregator(name, in_shape=in_shape, **options), 3).eval()


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cells(path: Path, columns: list[str]) -> NDArray[np.float64]:
    return np.array([[float(row[c] or "nan") for c in columns] for row in rows_of(path)])


# --- the scores --------------------------------------------------------------------------------


def test_attention_is_the_aggregators() -> None:
    model, bags = classifier("abmil", (11,)), draw(11)
    scores = score_instances(model, bags, "multilabel", "attention")
    w = {k: v.double().numpy() for k, v in model.aggregator.state_dict().items()}
    for start, end in ((0, 3), (3, 4), (4, 9), (9, 11)):
        h = bags.values[start:end].double().numpy()
        powers = np.exp(np.tanh(h @ w["V.weight"].T + w["V.bias"]) @ w["w.weight"][0])
        np.testing.assert_allclose(scores[start:end], powers / powers.sum(), rtol=1e-5)


def test_cosine_by_hand() -> None:
    """The mean of (1, 0) and (0, 1) is 45 degrees from either; (0, 0) has no direction."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-3.0, 4.0], [0.0, 0.0], [2.0, 0.0]])
    bags = RaggedBags(rows, torch.tensor([0, 2, 3, 5]))
    scores = score_instances(classifier("mean", (2,)), bags, "multilabel", "cosine")
    np.testing.assert_allclose(scores, [0.5**0.5, 0.5**0.5, 1, np.nan, 1], rtol=1e-6)


def test_cosine_of_dragn_is_between_averaged_maps() -> None:
    model, bags = classifier("dragn", (5, 2, 3), unit="L2Agg"), draw(5, 2, 3)
    scores = score_instances(model, bags, "multilabel", "cosine")
    vectors = bags.values.mean((2, 3)).double().numpy()
    embedding = model.aggregator(bags).embedding.detach().double().numpy()
    for k, owner in enumerate(bags.segment_ids.tolist()):
        a, b = vectors[k], embedding[owner]
        assert scores[k] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), rel=1e-5)


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
@pytest.mark.parametrize("name", ["dragn", "hamil", "mean", "abmil"])
def test_leaving_out_is_predicting_the_smaller_bag(name: str, task: Any) -> None:
    model, bags = classifier(name, (5, 2, 3)), draw(5, 2, 3)
    scores = leave_one_out(model, bags, task)
    assert scores.shape == (11, 3)
    row = 0
    for k, size in enumerate(SIZES):
        whole = predict(model, bags.select([k]), task)[0]
        for i in range(size):
            if size == 1:
                assert np.isnan(scores[row]).all()
            else:
                smaller = torch.cat((bags.bag(k)[:i], bags.bag(k)[i + 1 :]))
                p = predict(model, RaggedBags.from_list([smaller]), task)[0]
                np.testing.assert_allclose(scores[row], whole - p, atol=1e-6)
            row += 1


def test_leaving_out_of_a_mean_by_hand() -> None:
    """One channel, one label, p = sigmoid(x): the mean of 0, 2 and 4 is 2, without 4 it is 1."""
    model = BagClassifier(create_aggregator("mean", in_shape=(1,)), 1).eval()
    torch.nn.init.ones_(model.head.weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(model.head.bias)  # type: ignore[arg-type]
    bags = RaggedBags(torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([0, 3]))
    p = 1 / (1 + np.exp(-np.array([2.0, 3.0, 2.0, 1.0])))
    scores = leave_one_out(model, bags, "multilabel")
    np.testing.assert_allclose(scores[:, 0], p[0] - p[1:], rtol=1e-6)


@pytest.mark.parametrize("most", [1, 4, 9, 1000])
def test_bags_without_one_are_cut_into_pieces(most: int) -> None:
    rows = torch.arange(11.0)[:, None]
    bags = RaggedBags(rows, torch.tensor([0, 3, 4, 9, 11]))
    found: dict[int, list[float]] = {}
    pieces = list(bags_without_one(bags, most))
    for left_out, smaller in pieces:
        assert len(smaller.values) <= most + 3  # the last bag of a piece may pass the end
        for k, instance in enumerate(left_out.tolist()):
            found[instance] = smaller.bag(k).flatten().tolist()
    expected = {
        i: [float(j) for j in range(start, end) if j != i]
        for start, end in ((0, 3), (4, 9), (9, 11))
        for i in range(start, end)
    }
    assert found == expected
    assert (len(pieces) == 1) == (most > 28)


def test_bags_of_one_alone_leave_nothing_to_leave_out() -> None:
    assert list(bags_without_one(draw(7, sizes=[1, 1]), 5)) == []


def test_progress_counts_instances() -> None:
    seen: list[tuple[int, int]] = []
    for method in ("cosine", "leave-one-out"):
        seen.clear()
        score_instances(
            classifier("mean", (7,)), draw(7), "multilabel", method, lambda *n: seen.append(n)
        )
        assert seen[-1] == (11, 11)
        assert seen == sorted(seen)


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_every_aggregator_can_be_looked_into(name: str) -> None:
    options = {"labels": 3} if "labels" in options_of(name) else {}
    model, bags = classifier(name, (5, 2, 3), **options), draw(5, 2, 3)
    scores = score_instances(model, bags, "multilabel", choose_method(model, "auto"))
    assert scores.shape in ((11,), (11, 3))
    lonely = bags.segment_ids.numpy() == 1  # the bag of one
    assert np.isfinite(scores[~lonely]).all()


# --- which method ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("abmil", "attention"), ("dragn", "cosine"), ("hamil", "cosine"), ("mean", "leave-one-out")],
)
def test_auto_takes_what_there_is(name: str, chosen: str) -> None:
    model = classifier(name, (7, 2, 3))
    assert choose_method(model, "auto") == chosen
    assert choose_method(model, "leave-one-out") == "leave-one-out"


@pytest.mark.parametrize(("name", "chosen"), [("Among", "cosine"), ("Attending", "attention")])
def test_auto_asks_a_class_of_ones_own(name: str, chosen: str) -> None:
    assert choose_method(classifier(f"own_aggregators:{name}", (7,)), "auto") == chosen


def test_methods_that_do_not_go_with_the_model_are_refused(runs: dict[str, Path]) -> None:
    machines, _ = load_checkpoint(runs["svm"])
    assert choose_method(machines, "auto") == "leave-one-out"
    for model, name in ((classifier("mean", (7,)), "Mean"), (machines, "ClassicalModel")):
        with pytest.raises(InputError, match=f"an aggregator with attention, got {name}; choose"):
            choose_method(model, "attention")
    with pytest.raises(InputError, match="as wide as the features, got 3 of Abmil; choose leave"):
        choose_method(classifier("abmil", (7,), embed=3), "cosine")
    with pytest.raises(InputError, match="as wide as the features, got ClassicalModel; choose"):
        choose_method(machines, "cosine")
    with pytest.raises(InputError, match=r"^method: expected auto, .*, got 'gradient'"):
        ExplainConfig(method="gradient")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^split: expected train, .*, got 'tests'"):
        ExplainConfig(split="tests")  # type: ignore[arg-type]


# --- a run's files -----------------------------------------------------------------------------


def test_the_table_has_every_instance_with_its_place(
    store: Store, runs: dict[str, Path], tmp_path: Path
) -> None:
    warned: list[str] = []
    explained = explain_run(
        runs["dragn"], store, tmp_path / "out", ExplainConfig(), warn=warned.append
    )
    assert explained.method == "cosine"
    assert warned == ["1 bags have no usable instance and are left out: 005"]
    rows = rows_of(tmp_path / "out" / "instances.csv")
    assert list(rows[0]) == ["bag_id", "image", "order", "x0", "y0", "x1", "y1", "cosine"]
    sizes = store.sizes(store.bag_ids)
    places = [(b, k) for b, n in zip(store.bag_ids, sizes, strict=True) for k in range(n)]
    assert [(row["bag_id"], int(row["order"])) for row in rows] == places
    assert [row["image"] for row in rows] == [f"{b}/{k}.png" for b, k in places]
    assert {(row["x0"], row["y0"], row["x1"], row["y1"]) for row in rows} == {
        ("0", "0", "53", "41")
    }
    model, _ = load_checkpoint(runs["dragn"])
    assert isinstance(model, BagClassifier)
    values = torch.from_numpy(store.bag("007", "layer4"))
    bags = RaggedBags.from_list([values])
    assert model.scaling is not None
    scaled = model.scaling(bags)
    embedding = model.aggregator(scaled).embedding
    expected = torch.cosine_similarity(scaled.values.mean((2, 3)), embedding).tolist()
    found = [float(row["cosine"]) for row in rows if row["bag_id"] == "007"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_leaving_out_has_a_column_per_label_and_empty_cells(
    store: Store, runs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    explain_run(runs["mean"], store, out, ExplainConfig(), bags=("004", "003"))
    columns = [f"leave_one_out_{label}" for label in LABELS]
    rows = rows_of(out / "instances.csv")
    assert list(rows[0])[7:] == columns
    assert {row["bag_id"] for row in rows[:-1]} == {"004"}
    assert [rows[-1][c] for c in ("bag_id", *columns)] == ["003", "", "", ""]
    assert np.isfinite(cells(out / "instances.csv", columns)[:-1]).all()


def test_leaving_out_works_for_classical_methods(
    store: Store, runs: dict[str, Path], tmp_path: Path
) -> None:
    explained = explain_run(runs["svm"], store, tmp_path / "out", ExplainConfig(), bags=("004",))
    assert explained.method == "leave-one-out"
    model, checkpoint = load_checkpoint(runs["svm"])
    values = torch.from_numpy(store.bag("004", checkpoint.tap))
    without = torch.cat((values[:1], values[2:]))
    device = torch.device("cpu")
    whole, less = (
        predict_method(model, RaggedBags.from_list([bag]), "multilabel", device)[0]
        for bag in (values, without)
    )
    np.testing.assert_allclose(explained.scores[1], whole - less, atol=1e-9)


def test_h5_files_on_a_disk_that_refuses_are_an_error(
    store: Store, runs: dict[str, Path], tmp_path: Path
) -> None:
    for limit in (0, 900, 2100):
        with file_limit(limit), pytest.raises(InputError, match="File too large"):
            explain_run(runs["mean"], store, tmp_path / "out", ExplainConfig(h5=True))
        assert list(tmp_path.iterdir()) == []
    explain_run(runs["mean"], store, tmp_path / "out", ExplainConfig(h5=True))


def test_h5_files_are_named_as_clams(store: Store, runs: dict[str, Path], tmp_path: Path) -> None:
    for name, method, shape in (("abmil", "auto", ()), ("mean", "leave-one-out", (3,))):
        out = tmp_path / name
        config = ExplainConfig(method=method)  # type: ignore[arg-type]
        explained = explain_run(runs[name], store, out, config, bags=("006", "004"))
        assert sorted(p.name for p in (out / "h5_files").iterdir()) == ["004.h5", "006.h5"]
        table = cells(out / "instances.csv", explained.columns)
        start = 0
        for bag_id in ("006", "004"):
            n = int(store.sizes([bag_id])[0])
            with h5py.File(out / "h5_files" / f"{bag_id}.h5") as file:
                assert file["attention_scores"].shape == (n, *shape)
                found = file["attention_scores"][...].reshape(n, -1)
                np.testing.assert_array_equal(found, table[start : start + n])
                assert file["coords"][...].tolist() == [[k, 0] for k in range(n)]
                assert file.attrs["method"] == explained.method
                assert list(file.attrs.get("labels", [])) == (list(LABELS) if shape else [])
            start += n
        assert start == len(table)
        if name == "abmil":
            assert explained.columns == ["attention"]
            assert table[:, 0].sum() == pytest.approx(2)


def test_attention_per_label_has_a_column_for_each(store: Store, tmp_path: Path) -> None:
    config = CONFIG.replace(aggregator="own_aggregators:Branches")
    train_run(store, config, tmp_path / "run")
    out = tmp_path / "out"
    own = ExplainConfig(h5=False, allow_class="own_aggregators:Branches")
    explain_run(tmp_path / "run", store, out, own, bags=("004",))
    table = cells(out / "instances.csv", [f"attention_{label}" for label in LABELS])
    assert table.shape[1] < CHANNELS
    np.testing.assert_array_equal(table, store.bag("004", "gap")[:, :3].astype(np.float64))
    assert not (out / "h5_files").exists()


def test_streamed_bags_have_the_same_scores(
    store: Store, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExplainConfig(method="leave-one-out", h5=False)
    whole = explain_run(runs["dragn"], store, tmp_path / "a", config)
    monkeypatch.setattr(explain, "memory_for_features", lambda text, device: 4000)
    monkeypatch.setattr(instance_scores, "COPY_BYTES", 1000)
    warned: list[str] = []
    streamed = explain_run(runs["dragn"], store, tmp_path / "b", config, warn=warned.append)
    assert "streamed from the store" in warned[-2]
    alone = int((np.diff(whole.offsets) == 1).sum())
    assert f"{alone} bags have one instance only" in warned[-1]
    np.testing.assert_allclose(streamed.scores, whole.scores, atol=1e-6)
    assert streamed.bags == whole.bags


# --- which bags --------------------------------------------------------------------------------


def test_splits_are_those_of_the_run(store: Store, runs: dict[str, Path], tmp_path: Path) -> None:
    table = tmp_path / "some.csv"
    table.write_text("bag_id,labels\n" + "".join(f"{k:03d},other\n" for k in (9, 8, 7, 6, 4)))
    rows = rows_of(runs["mean"] / "splits.csv")
    tested = [row["bag_id"] for row in rows if row["split"] == "test"]
    config = ExplainConfig(split="test", h5=False)
    explained = explain_run(runs["mean"], store, tmp_path / "a", config)
    assert list(explained.bags) == [b for b in tested if b != "005"]
    explained = explain_run(runs["mean"], store, tmp_path / "b", config, bags=table)
    assert list(explained.bags) == [b for b in ("009", "008", "007", "006", "004") if b in tested]


def test_bags_that_are_not_there_are_named(
    store: Store, runs: dict[str, Path], tmp_path: Path
) -> None:
    def explained(split: Any = None, **given: Any) -> None:
        explain_run(runs["mean"], store, tmp_path / "out", ExplainConfig(split=split), **given)

    with pytest.raises(
        UnknownNameError, match=r"got '0004'; did you mean '004' .* or see .*bags\.csv"
    ):
        explained(bags=("0004",))
    table = tmp_path / "t.csv"
    table.write_text("bag_id\n004\n104\n")
    with pytest.raises(UnknownNameError, match=r"got '104'; .*correct .*t\.csv:3"):
        explained(bags=table)
    with pytest.raises(InputError, match="expected a bag of the run's test split, got none"):
        explained("test", bags=("000",))
    with pytest.raises(InputError, match="expected a bag's id, got none"):
        explained(bags=())
    with pytest.raises(InputError, match="expected a usable instance"):
        explained(bags=("005",))
    assert not (tmp_path / "out").exists()


def test_ids_that_are_no_file_names_are_refused_unless_h5_is_off(tmp_path: Path) -> None:
    bags = [replace(b, bag_id=f"a/{b.bag_id}") for b in with_splits(make_bags(11))]
    store = write_store(tmp_path / "s", bags, make_features(bags))
    train_run(store, CONFIG, tmp_path / "run")
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"got a slash in it; leave out the \.h5 with `h5=False`"):
        explain_run(tmp_path / "run", store, out, ExplainConfig())
    assert len(explain_run(tmp_path / "run", store, out, ExplainConfig(h5=False)).bags) == 11


# --- the command -------------------------------------------------------------------------------


def test_the_command_writes_and_reports(
    store: Store, runs: dict[str, Path], tmp_path: Path
) -> None:
    base = ["explain", str(runs["dragn"]), "--store", str(store.path), "--out"]
    result = CliRunner().invoke(app, [*base, str(tmp_path / "a"), "--bags", "006,004"])
    assert result.exit_code == 0, result.output
    n = int(store.sizes(["006", "004"]).sum())
    assert result.stdout.startswith(f"cosine of {n} instances of 2 bags: {tmp_path / 'a'}")
    table = tmp_path / "some.csv"
    table.write_text("bag_id\n004\n006\n")
    args = [*base, str(tmp_path / "b"), "--bags", str(table), "--json", "--no-h5"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "method": "cosine",
        "bags": 2,
        "instances": n,
        "columns": ["cosine"],
        "instances_csv": str(tmp_path / "b" / "instances.csv"),
        "h5_files": None,
    }


def test_mistakes_are_one_line(store: Store, runs: dict[str, Path], tmp_path: Path) -> None:
    def refused(run: Path, *args: str, out: str = "new") -> str:
        base = ["explain", str(run), "--store", str(store.path), "--out", str(tmp_path / out)]
        result = CliRunner().invoke(app, [*base, *args])
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("error: ")
        assert "internal" not in line
        return line

    mean = runs["mean"]
    assert "expected an aggregator with attention" in refused(mean, "--method", "attention")
    assert "expected a known bag, got '999'" in refused(mean, "--bags", "004,999")
    assert "lost.csv" in refused(mean, "--bags", str(tmp_path / "lost.csv"))
    assert "no such folder" in refused(tmp_path / "none")
    assert "--device: expected cpu" in refused(mean, "--device", "abacus")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert "expected a new folder, got one with files" in refused(mean, out="full")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(mean.joinpath("checkpoint.pt").read_bytes())
    assert "splits.csv" in refused(tmp_path / "run", "--split", "test")
    assert not (tmp_path / "new").exists()
