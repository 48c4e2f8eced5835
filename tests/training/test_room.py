"""Memory and time said before a method starts, and refused in a line where memory is short."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dragn_cache.aggregators import create_aggregator
from dragn_cache.classical import CLASSICAL
from dragn_cache.devices import CPU
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags
from dragn_cache.training import room
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags
from dragn_cache.training.fit import fit_method, predict_method
from dragn_cache.training.methods import method_names
from dragn_cache.training.room import require_room_to_predict, require_room_to_train
from dragn_cache.training.stacked import train_many

SIZES = torch.tensor([700, 3, 2, 5])


def labelled(sizes: torch.Tensor = SIZES, width: int = 7) -> LabelledBags:
    values = torch.rand(int(sizes.sum()), width)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
    targets = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.int8)
    splits = ("train", "train", "validation", "test")
    return LabelledBags(RaggedBags(values, offsets), targets, splits, "multilabel")


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda device: size)
    monkeypatch.setattr("dragn_cache.classical.model.free_bytes", lambda device: size)


@pytest.mark.parametrize("name", method_names())
def test_each_method_is_refused_in_a_line_where_its_longest_bag_does_not_fit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 20_000)  # its features alone are 19,600 bytes
    monkeypatch.setattr(torch.Tensor, "backward", None)  # no step is begun
    config = TrainConfig(aggregator=name, epochs=1)
    if name in CLASSICAL:
        config = TrainConfig(aggregator=name, options={} if name == "svm" else {"words": 2})
    with pytest.raises(InputError) as error:
        fit_method(labelled(), config, labels=("a", "b"))
    text = str(error.value)
    assert text.startswith(f"aggregator {name}: expected about ")
    assert "the longest bag, of 700 instances" in text
    assert text.count("\n") == 0


def test_a_bag_longer_than_those_of_training_is_refused_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = labelled(torch.tensor([3, 2, 5, 70_000]))
    free(monkeypatch, 10**6)
    with pytest.raises(InputError, match="for predicting the longest bag, of 70,000 instances, "):
        fit_method(data, TrainConfig(aggregator="mean", epochs=1), labels=("a", "b"))


def test_a_trained_model_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled()
    for name in ("abmil", "svm"):
        model = fit_method(data, TrainConfig(aggregator=name), labels=("a", "b")).model
        with monkeypatch.context() as patch:
            patch.setattr(room, "free_bytes", lambda device: 10**4)
            with pytest.raises(InputError, match=f"aggregator {name}: expected about"):
                predict_method(model, data.bags, "multilabel", CPU)


def test_many_models_at_once_need_as_many_times_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = TrainConfig(aggregator="abmil", epochs=1, batch_size=1, shuffle_seed=0)
    needed = create_aggregator("abmil", in_shape=(7,)).needed_bytes([700], training=True)
    free(monkeypatch, 2.5 * needed)
    assert len(train_many(labelled(), [config, config.replace(seed=1)])) == 2
    with pytest.raises(InputError, match=r"aggregator abmil: expected about"):
        train_many(labelled(), [config.replace(seed=seed) for seed in range(3)])


def needed(sizes: list[int], **options: Any) -> int:
    return create_aggregator("abmil", in_shape=(7,), **options).needed_bytes(sizes, training=True)


def test_the_batch_size_that_fits_is_offered() -> None:
    abmil, sizes = create_aggregator("abmil", in_shape=(7,)), torch.tensor([90] * 20)
    require_room_to_train(abmil, sizes, 16, free=needed([90] * 16))
    for fitting, offered in ((9, 8), (5, 4), (1, 1)):
        match = f"and 15 others, got .*; give `batch_size={offered}`; or cut the bag"
        with pytest.raises(InputError, match=match):
            require_room_to_train(abmil, sizes, 16, free=needed([90] * fitting))
    with pytest.raises(InputError) as error:
        require_room_to_train(abmil, sizes, 16, free=needed([90]) - 1)
    assert "batch_size" not in str(error.value)


def test_fewer_jobs_are_offered() -> None:
    abmil = create_aggregator("abmil", in_shape=(7,))
    need = needed([700, 3])
    require_room_to_train(abmil, SIZES, 2, free=2 * need, jobs=2)
    with pytest.raises(InputError, match=r"; give `jobs=1`; or give `batch_size=1`; or cut"):
        require_room_to_train(abmil, SIZES, 2, free=2 * need - 2, jobs=2)


def test_batches_of_the_longest_bags_alone_are_a_warning() -> None:
    """Two bags of 90 and eighteen of 1, in pairs: beside the longest, a mean of 108 / 19."""
    abmil, sizes = create_aggregator("abmil", in_shape=(7,)), torch.tensor([90, 90, *[1] * 18])
    said: list[str] = []
    require_room_to_train(abmil, sizes, 2, free=needed([90, 6]), warn=said.append)
    assert len(said) == 1
    assert said[0].startswith("a step with the 2 longest bags would need about ")
    require_room_to_train(abmil, sizes, 2, free=needed([90, 90]), warn=said.append)
    assert len(said) == 1


def test_quadratic_time_is_said_and_not_refused() -> None:
    dragn = create_aggregator("dragn", in_shape=(64,), unit="L1Agg")
    said: list[str] = []
    require_room_to_train(dragn, torch.tensor([400_000]), 1, free=1e12, warn=said.append)
    # 5e-8 seconds for each two instances, as measured.
    assert said == [
        "dragn takes time with the square of a bag's instances: about 2 hours on one core for a "
        "training step with the longest, of 400,000"
    ]
    require_room_to_train(dragn, torch.tensor([4000]), 1, free=1e12, warn=said.append)
    assert len(said) == 1


def test_short_bags_come_with_the_longest_at_evaluation() -> None:
    mean = create_aggregator("mean", in_shape=(7,))
    together = mean.needed_bytes([700, 10], training=False)
    require_room_to_predict(mean, SIZES, free=together)
    with pytest.raises(InputError, match=r"aggregator mean: expected about .* cut the bag into"):
        require_room_to_predict(mean, SIZES, free=together - 1)


def test_a_cap_lets_a_long_bag_be_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10**7)
    config = TrainConfig(aggregator="dragn", options={"unit": "L2Agg", "bn": False}, epochs=1)
    with pytest.raises(InputError, match="give it cap=4096, say, which takes so many instances"):
        fit_method(labelled(), config, labels=("a", "b"))
    capped = config.replace(options={**config.options, "cap": 20})
    assert fit_method(labelled(), capped, labels=("a", "b")).best_epoch == 1
