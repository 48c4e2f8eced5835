"""Scores of instances: attention, cosine to the embedding, or leave-one-out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from dragn_cache.loading.feeds import EVALUATION_ROWS, in_order
from dragn_cache.loading.stored import StoredBags
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of, owners
from dragn_cache.training.fit import Model, predict_method
from dragn_cache.training.model import BagClassifier
from dragn_cache.types import Progress, Task

Scores = NDArray[np.float64]

COPY_BYTES = 2**28  # of features that leaving out copies at once


# --- scores ------------------------------------------------------------------------------------


def score_instances(
    model: Model,
    bags: RaggedBags | StoredBags,
    task: Task,
    method: str,
    progress: Progress = lambda done, total: None,
) -> Scores:
    """(N,), or (N, L): the scores of all instances.

    Args:
        method: what `choose_method` gave for this model.
    """
    total, done = int(bags.offsets[-1]), 0
    scores: list[Scores] = []
    for batch in in_order(bags):
        if method != "leave-one-out" and isinstance(model, BagClassifier):
            scores.append(_attention_or_cosine(model.eval(), batch, method))
        else:
            scores.append(leave_one_out(model, batch, task, _behind(done, total, progress)))
        done += len(batch.values)
        progress(done, total)
    return np.concatenate(scores)


def _behind(done: int, total: int, progress: Progress) -> Callable[[int], None]:
    """Progress of a batch that comes after ``done`` instances of ``total``."""
    return lambda left_out: progress(done + left_out, total)


@torch.no_grad()
def _attention_or_cosine(model: BagClassifier, bags: RaggedBags, method: str) -> Scores:
    model = model.to(bags.values.device)
    scaled = bags if model.scaling is None else model.scaling(bags)
    result = model.aggregator(scaled)
    if method == "attention":
        attention: Scores = result.attention.double().cpu().numpy()
        return attention
    vectors = model.aggregator.vectors(scaled).double()
    embedding = result.embedding.double()[scaled.segment_ids]
    lengths = vectors.norm(dim=1) * embedding.norm(dim=1)
    cosine: Scores = ((vectors * embedding).sum(1) / lengths).cpu().numpy()  # 0 / 0 is nan
    return cosine


def leave_one_out(
    model: Model,
    bags: RaggedBags,
    task: Task,
    advance: Callable[[int], None] = lambda left_out: None,
) -> Scores:
    """(N, L): the probability of each instance's bag, less that of the bag without it.

    Args:
        advance: called with the instances that have been left out so far.
    """
    device = bags.values.device
    whole = predict_method(model, bags, task, device)
    bag = owners(bags.offsets).numpy()
    scores = np.full((len(bag), whole.shape[1]), np.nan)
    row_bytes = 4 * math.prod(bags.in_shape)
    most = max(1, min(EVALUATION_ROWS, COPY_BYTES // row_bytes))
    done = 0
    for left_out, smaller in bags_without_one(bags, most):
        scores[left_out] = whole[bag[left_out]] - predict_method(model, smaller, task, device)
        done += len(left_out)
        advance(done)
    return scores


def bags_without_one(bags: RaggedBags, most: int) -> Iterator[tuple[NDArray[np.int64], RaggedBags]]:
    """Bags without one instance: for each instance that has bag mates, many at a time.

    Args:
        most: rows that are copied at once; a bag more begins only below it.

    Returns:
        the rows (m,) of the instances that are left out, and m bags.
    """
    bag = owners(bags.offsets).numpy()
    first, sizes = bags.offsets[:-1].numpy()[bag], bags.offsets.diff().numpy()[bag]
    instances = np.flatnonzero(sizes > 1)
    before = np.cumsum(sizes[instances] - 1) - (sizes[instances] - 1)
    for chosen in _runs(instances, before // most):
        kept = sizes[chosen] - 1
        offsets = offsets_of(torch.from_numpy(kept))
        place = np.arange(kept.sum()) - np.repeat(offsets[:-1].numpy(), kept)
        rows = np.repeat(first[chosen], kept) + place
        rows += rows >= np.repeat(chosen, kept)
        index = torch.from_numpy(rows).to(bags.values.device)
        yield chosen, RaggedBags(bags.values.index_select(0, index), offsets)


def _runs(values: NDArray[np.int64], block: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The values cut where their block changes."""
    cuts = np.flatnonzero(np.diff(block)) + 1
    edges = [0, *cuts.tolist(), len(values)]
    return [values[a:b] for a, b in pairwise(edges) if b > a]
