"""Runs whose model was trained and whose files could not be written: the same command finishes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from folder_bytes import tree
from run_stores import make_bags, make_features, with_splits, write_store

from dragn_cache.errors import InputError
from dragn_cache.manifest import write_bags
from dragn_cache.runs import train
from dragn_cache.runs.train import TRAINED, train_run
from dragn_cache.store import Store, open_store
from dragn_cache.training.config import TrainConfig

CONFIG = TrainConfig(aggregator="abmil", epochs=3, intervals=11, lr=1e-2, keep="last")
CONFIGS = {
    "maps": TrainConfig(options={"unit": "L1Agg"}, epochs=2, intervals=11, scale="standard"),
    "views": CONFIG.replace(views="random", decision="thresholds"),
    "streamed": CONFIG.replace(memory="5kB"),
    "masked": CONFIG.replace(stage_mask="both", stages={"actin": ["s0"]}),
    "classical": TrainConfig(aggregator="svm", intervals=11),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    bags = with_splits(make_bags(41))
    bags = [replace(bag, extra={"stage": f"s{k % 3 % 2}"}) for k, bag in enumerate(bags)]
    views = [make_features(bags, seed=seed) for seed in (0, 0, 0)]
    for view in views[1:]:
        view.update({bag_id: maps * 1.1 for bag_id, maps in view.items()})
    return write_store(tmp_path / "s", bags, views[0], augmented=views[1:])


def fail(*args: object, **settings: object) -> None:
    raise OSError(28, "No space left on device")


def train_and_fail(
    monkeypatch: pytest.MonkeyPatch, store: Store, config: TrainConfig, out: Path
) -> None:
    """Train on a disk that is full when the tables come."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_predictions", fail)
        with pytest.raises(InputError, match=r"run: .* got No space left on device"):
            train_run(store, config, out)
    assert not out.exists()


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The aggregator of every training that is made."""
    made: list[str] = []
    fit = train.fit_method

    def counted(data: object, config: TrainConfig, **settings: object) -> object:
        made.append(config.aggregator)
        return fit(data, config, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "fit_method", counted)
    return made


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_trained_model_is_not_trained_again(
    name: str, store: Store, trainings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS[name]
    train_run(store, config, tmp_path / "whole")
    train_and_fail(monkeypatch, store, config, tmp_path / "run")
    said: list[str] = []
    metrics = train_run(store, config, tmp_path / "run", warn=said.append)
    assert trainings == [config.aggregator] * 2
    assert sum(line.startswith("trained already") for line in said) == 1
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")
    assert metrics == train_run(store, config, tmp_path / "again")
    assert not list(tmp_path.glob(".*"))


def other_settings(store: Store, folder: Path) -> tuple[Store, TrainConfig]:
    return store, CONFIG.replace(seed=1)


def other_labels(store: Store, folder: Path) -> tuple[Store, TrainConfig]:
    bags = list(store.bags)
    assert (bags[0].split, bags[0].labels) == ("train", ("golgi", "nucleus"))
    bags[0] = replace(bags[0], labels=("actin",))
    write_bags(bags, store.path / "manifest" / "bags.csv")
    return open_store(store.path), CONFIG


def a_damaged_model(store: Store, folder: Path) -> tuple[Store, TrainConfig]:
    (path,) = folder.glob(f".run.*/{TRAINED}")
    checkpoint = path.with_name("run") / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    return store, CONFIG


@pytest.mark.parametrize("change", [other_settings, other_labels, a_damaged_model])
def test_another_training_is_made_anew(
    change: Callable[[Store, Path], tuple[Store, TrainConfig]],
    store: Store,
    trainings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train_and_fail(monkeypatch, store, CONFIG, tmp_path / "run")
    changed, config = change(store, tmp_path)
    train_run(changed, config, tmp_path / "run")
    assert len(trainings) == 2
    train_run(changed, config, tmp_path / "whole")
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))
