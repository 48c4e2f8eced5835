"""Layers on many rows: block after block, with the results and gradients of all rows at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tracked_memory import TrackedMemory

from dragn_cache.aggregators import layers
from dragn_cache.aggregators.declared import AGGREGATORS
from dragn_cache.aggregators.registry import create_aggregator
from dragn_cache.ragged import RaggedBags

METHODS = [name for name, method in AGGREGATORS.items() if method.need.blocks is not None]
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"labels": 3} for name in ("acmil", "dsmil", "dtfd")},
    # Dropout draws block by block, and so another mask.
    **{name: {"labels": 3, "dropout": 0.0} for name in ("clam_sb", "clam_mb")},
}


def results(name: str) -> list[torch.Tensor]:
    """Embeddings in training, then all gradients of them, then embeddings in evaluation."""
    torch.manual_seed(0)
    aggregator = create_aggregator(name, in_shape=(7,), **OPTIONS.get(name, {})).double()
    values = torch.rand(101, 7, dtype=torch.float64, requires_grad=True)
    bags = RaggedBags(values, torch.tensor([0, 53, 54, 101]))
    trained = aggregator(bags).embedding
    trained.square().sum().backward()
    assert values.grad is not None
    gradients = [p.grad for p in aggregator.parameters() if p.grad is not None]
    with torch.no_grad():
        evaluated = aggregator.eval()(bags).embedding
    return [trained.detach(), values.grad, *gradients, evaluated]


@pytest.mark.parametrize("name", METHODS)
def test_blocks_change_neither_results_nor_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = results(name)
    assert len(whole) > 4
    monkeypatch.setattr(layers, "BLOCK_ROWS", 20)
    calls: list[int] = []
    forward = torch.nn.Linear.forward

    def counted(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    blocked = results(name)
    assert 20 in calls
    for a, b in zip(whole, blocked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_dropout_is_the_same_when_a_block_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layers, "BLOCK_ROWS", 10)
    rows = torch.ones(35, 3, requires_grad=True)
    torch.manual_seed(1)
    kept = layers.in_blocks(torch.nn.Dropout(0.5), rows)
    kept.sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, kept)  # of a row of ones, 0 or 2 as its gradient
    assert set(kept.flatten().tolist()) == {0.0, 2.0}


def test_blocks_need_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a wide network with one output, the hidden values of a block and not of all rows."""
    torch.manual_seed(0)
    wide = torch.nn.Sequential(torch.nn.Linear(4, 512), torch.nn.Tanh(), torch.nn.Linear(512, 1))
    rows, peaks = torch.rand(1000, 4), []
    for limit in (10_000, 100):
        monkeypatch.setattr(layers, "BLOCK_ROWS", limit)
        with TrackedMemory() as memory:
            layers.in_blocks(wide, rows).sum().backward()
        peaks.append(memory.peak)
    assert peaks[0] > 2 * 4 * 512 * 1000
    assert peaks[1] < 4 * 4 * 512 * 100
