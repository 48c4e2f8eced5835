"""Recurrent networks over bags of any sizes, without padding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def run_over_bags(network: nn.LSTM | nn.GRU, values: Tensor, offsets: Tensor) -> Tensor:
    """(N, C) → (N, H or 2 H): the network's outputs; each bag is a sequence, its first state zero.

    The rows are packed step by step: the first instances of all bags, then the second ones, and so
    on, larger bags first. A step holds only the bags that still have an instance, and the backward
    direction begins at each bag's last instance.
    """
    rows, sizes = _by_step(offsets)
    order = rows.to(values.device)
    packed = PackedSequence(values.index_select(0, order), sizes)
    states: Tensor = network(packed)[0].data
    return states.index_select(0, rows.argsort().to(values.device))


def _by_step(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) int64, rows in the order of steps; (n_max,) int64, bags in each step. On the host."""
    sizes = np.diff(offsets.numpy())
    bag = np.repeat(np.arange(len(sizes)), sizes)
    step = np.arange(len(bag)) - offsets.numpy()[bag]
    # Stable, so equally large bags keep their order.
    rows = np.lexsort((-sizes[bag], step))
    return torch.from_numpy(rows), torch.from_numpy(np.bincount(step))
