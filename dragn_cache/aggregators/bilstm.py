"""FRN's head: a bidirectional LSTM over a bag's instances, then a mean over its steps.

The Feature Reconcile Network reads a bag with a two-layer Bi-LSTM of 1024 units a direction; every
step goes through dropout 0.5, a linear layer from 2·1024 to 1024 and a ReLU, and the mean over the
steps is classified. That is the authors' code; their paper has the network's ends, [h_N, h_0], in
place of all steps: ``readout="ends"`` takes the forward direction at the last instance and the
backward one at the first, through the same layers.

- Their mean runs over the zero padding of a batch as well, so that a prediction depends on its
  batch mates. Here bags are packed and the mean is over a bag's own steps.
- Their dropout is the one in here. Training puts another in front of the classifier, unless
  it is told to use none (`dropout=0`), as published.

Maps are averaged over h and w first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import BiLstmOptions
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.packed import run_over_bags
from dragn_cache.ragged.segments import segment_mean

LAYERS = 2
DROPOUT = 0.5


class BiLstm(Aggregator, declared="bilstm"):
    """Embedding (B, H), not negative. The order of the instances matters. No attention.

    Args:
        in_shape: (C, h, w) or (C,).
        options: `BiLstmOptions`.
    """

    options: BiLstmOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        hidden = self.options.hidden
        self.lstm = nn.LSTM(self.out_dim, hidden, num_layers=LAYERS, bidirectional=True)
        self.project = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(2 * hidden, hidden), nn.ReLU())
        self.out_dim = hidden

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        steps = run_over_bags(self.lstm, self.vectors(bags), bags.offsets)
        if self.options.readout == "mean":
            return Aggregated(segment_mean(self.project(steps), bags.offsets), None)
        first, last = (rows.to(steps.device) for rows in (bags.offsets[:-1], bags.offsets[1:] - 1))
        ends = torch.cat((steps[last, : self.out_dim], steps[first, self.out_dim :]), 1)
        return Aggregated(self.project(ends), None)
