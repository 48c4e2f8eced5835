"""Schedules: at which rate an epoch steps, told what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.optim import SGD

from dragn_cache.errors import InputError
from dragn_cache.training.schedules import create_schedule


def rates(
    name: str, options: dict[str, Any], scores: Sequence[float], epochs: int | None = None
) -> list[float]:
    """The rate of each epoch, from 1 on, when its score is what follows it."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = SGD([parameter], 1.0)
    end = create_schedule(name, options).start(optimizer, epochs or len(scores))
    found = []
    for score in scores:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        end(score)
    return found


def test_none_keeps_the_rate() -> None:
    assert rates("none", {}, [0.0] * 5) == [1.0] * 5


def test_cosine_falls_to_its_least_rate_and_stays() -> None:
    found = rates("cosine", {"min_lr": 0.1, "epochs": 4}, [0.0] * 7)
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * e / 4)) for e in range(4)] + [0.1] * 3
    assert found == pytest.approx(expected)
    # Over the whole training by default; the rate of the last epoch is not yet the least.
    found = rates("cosine", {}, [0.0] * 5)
    assert found == pytest.approx([(1 + math.cos(math.pi * e / 5)) / 2 for e in range(5)], abs=1e-7)


def test_steps_fall_after_their_epochs() -> None:
    assert rates("step", {"milestones": (2, 5)}, [0.0] * 7) == pytest.approx(
        [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]
    )
    assert rates("step", {"milestones": 1, "factor": 0.5}, [0.0] * 3) == [1, 0.5, 0.5]


def test_plateau_falls_when_nothing_improves_for_longer_than_its_patience() -> None:
    losses = [3.0, 2.0, 2.0, 2.5, 2.0, 1.0, 1.0]
    assert rates("plateau", {"patience": 2}, losses) == pytest.approx([1] * 5 + [0.1, 0.1])
    options = {"patience": 1, "factor": 0.5, "monitor": "f1_macro"}
    assert rates("plateau", options, [0.1, 0.2, 0.3, 0.2, 0.1, 0.1]) == [1] * 5 + [0.5]
    assert create_schedule("plateau", options).monitors == "f1_macro"
    assert create_schedule("plateau").monitors == "loss"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "none",
            {"factor": 1},
            r"schedule none: expected a known option, got 'factor'; there are none",
        ),
        ("plateau", {"factor": 1}, "schedule plateau, option factor: expected a number from 0 to"),
        ("plateau", {"patience": -1}, "schedule plateau, option patience: expected a whole number"),
        ("plateau", {"monitor": "auc"}, "schedule plateau, option monitor: expected loss or f1_m"),
        ("cosine", {"min_lr": -1}, "schedule cosine, option min_lr: expected a number"),
        ("cosine", {"epochs": 0}, "schedule cosine, option epochs: expected a whole number of at"),
        ("step", {"milestones": (3, 0)}, "schedule step, option milestones: .* got .3, 0."),
        ("step", {"factor": "x"}, "schedule step, option factor: expected a number"),
        ("linear", {}, "schedule: expected a known schedule, got 'linear'"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        create_schedule(name, options)
