"""Codebooks: samples by their law, centres by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from dragn_cache.ragged import codebook
from dragn_cache.ragged.codebook import sample_rows, train_centres

ROWS = torch.arange(31 * 3, dtype=torch.float64).reshape(31, 3)


def test_a_sample_is_of_different_rows_in_their_order_however_they_come() -> None:
    sample = sample_rows([ROWS], 7)
    numbers = sample[:, 0] / 3
    assert (sample.dtype, sample.shape) == (torch.float32, (7, 3))
    assert (numbers.diff() > 0).all()
    assert torch.equal(sample, ROWS[numbers.long()].float())
    for lengths in ([1] * 31, [5, 0, 13, 2, 11], [30, 1]):
        assert torch.equal(sample_rows(ROWS.split(lengths), 7), sample)
    assert torch.equal(sample_rows(ROWS.split(11), 31), ROWS.float())
    assert torch.equal(sample_rows(ROWS.split(11), 37), ROWS.float())


def test_rows_are_equally_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[int] = Counter()
    draws, rows, taken = 2000, 11, 3
    for seed in range(draws):
        monkeypatch.setattr(codebook, "SEED", seed)
        batches = torch.arange(rows, dtype=torch.float32)[:, None].split(4)
        counts.update(sample_rows(batches, taken)[:, 0].int().tolist())
    expected = draws * taken / rows
    deviation = np.sqrt(expected * (1 - taken / rows))
    assert all(abs(counts[row] - expected) < 5 * deviation for row in range(rows))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_centres_are_the_means_of_what_lies_together(dtype: type) -> None:
    around = np.array([[0, 0], [100, 0], [0, 100]])
    near = np.array([[1, 0], [-1, 0], [0, 2], [0, -2], [5, 0]])
    rows = (around[:, None] + near).reshape(15, 2).astype(dtype)
    centres, with_rows = train_centres(rows, 3, seed=5, starts=2, most_steps=17)
    assert (centres.dtype, with_rows) == (dtype, 3)
    ordered = centres[np.lexsort(np.round(centres).T)]
    np.testing.assert_allclose(ordered, np.add(around, [1, 0]), atol=1e-4)


def test_centres_without_rows_are_not_counted() -> None:
    rows = np.repeat(np.eye(3), 5, axis=0)
    centres, with_rows = train_centres(rows, 7, seed=0, starts=1, most_steps=11)
    assert (centres.shape, with_rows) == ((7, 3), 3)


def test_seed_starts_and_steps_are_read() -> None:
    rows = np.random.default_rng(3).normal(size=(401, 2))

    def spread(**changed: int) -> float:
        settings = {"seed": 1, "starts": 1, "most_steps": 50, **changed}
        centres, _ = train_centres(rows, 13, **settings)
        return float(((rows[:, None] - centres) ** 2).sum(2).min(1).sum())

    assert spread() == spread()
    assert spread(seed=2) != spread()
    assert spread(starts=19) < spread()
    assert spread(most_steps=1) > spread()
