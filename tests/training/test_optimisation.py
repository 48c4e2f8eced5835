"""Optimisers: PyTorch's, with the settings that are theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from dragn_cache.training.config import TrainConfig
from dragn_cache.training.optimisation import create_optimizer


@pytest.mark.parametrize(
    ("name", "cls", "expected"),
    [
        ("adamw", AdamW, {"weight_decay": 0.3, "lr": 0.02, "betas": (0.9, 0.999)}),
        ("adam", Adam, {"weight_decay": 0.3, "lr": 0.02, "betas": (0.9, 0.999)}),
        ("sgd", SGD, {"weight_decay": 0.3, "lr": 0.02, "momentum": 0.7, "nesterov": False}),
    ],
)
def test_optimisers_are_pytorchs(name: Any, cls: type, expected: dict[str, Any]) -> None:
    momentum = {"momentum": 0.7} if name == "sgd" else {}
    config = TrainConfig(optimizer=name, lr=0.02, weight_decay=0.3, **momentum)
    optimizer = create_optimizer(config, [torch.nn.Parameter(torch.zeros(3))])
    assert type(optimizer) is cls
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected
