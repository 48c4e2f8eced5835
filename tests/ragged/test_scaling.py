"""Standardising features by training bags."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.scaling import Standardise


@pytest.mark.parametrize("shape", [(5,), (5, 2, 3)])
def test_it_equals_scikit_learns_scaler_per_channel(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(13, *shape)) * 7 + 3).astype(np.float16)
    values[:, 2] = 4.0  # never varies
    bags = RaggedBags(torch.from_numpy(values), torch.tensor([0, 4, 4, 13]))
    scaling = Standardise(5)
    scaling.fit(bags)
    rows = np.moveaxis(values.astype(np.float64), 1, -1).reshape(-1, 5)
    expected = StandardScaler().fit_transform(rows)
    got = scaling(bags)
    assert torch.equal(got.offsets, bags.offsets)
    np.testing.assert_allclose(
        np.moveaxis(got.values.numpy(), 1, -1).reshape(-1, 5), expected, rtol=1e-4, atol=1e-5
    )


def test_what_was_fitted_is_applied_to_other_bags_and_saved() -> None:
    seen = RaggedBags(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([0, 2]))
    other = RaggedBags(torch.tensor([[4.0, 7.0]]), torch.tensor([0, 1]))
    scaling = Standardise(2)
    scaling.fit(seen)
    loaded = Standardise(2)
    loaded.load_state_dict(scaling.state_dict())
    assert loaded(other).values.tolist() == [[2.0, 2.0]]


def test_batches_in_one_pass_give_what_all_at_once_gives() -> None:
    """Also far from 0, where the mean square less the squared mean would be rounding noise."""
    rng = np.random.default_rng(1)
    values = (rng.normal(size=(101, 5, 2, 3)) + 1e4).astype(np.float32)
    values[60:, 3] += 7  # not the same in all batches
    values[:, 2] = 4.0
    batches = [
        RaggedBags(torch.from_numpy(part), torch.tensor([0, len(part)]))
        for part in np.split(values, [3, 4, 67])
    ]
    scaling = Standardise(5)
    scaling.fit_batches(batches)
    rows = np.moveaxis(values.astype(np.float64), 1, -1).reshape(-1, 5)
    np.testing.assert_allclose(scaling.mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(scaling.std, np.where(rows.std(0) > 0, rows.std(0), 1), rtol=1e-4)
