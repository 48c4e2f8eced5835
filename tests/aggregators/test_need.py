"""What methods say that they need, against what their tensors take."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tracked_memory import TrackedMemory

from dragn_cache.aggregators.declared import AGGREGATORS
from dragn_cache.aggregators.recursion import compiled, kernels
from dragn_cache.ragged import RaggedBags
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags
from dragn_cache.training.model import build_model
from dragn_cache.training.objective import Objective

MORE: dict[str, list[dict[str, Any]]] = {
    "abmil": [{"attn_dim": 512}, {"embed": 256}],
    "annofly": [{"cell": "lstm", "hidden": 16}],
    "deepsets": [{"embed": (512, 256), "after": 64}],
    "dsmil": [{"query": "mlp", "value": "relu"}],
    "dtfd": [{"distill": "maxmin"}],
    "imploc": [{"layers": 1}],
    "netvlad": [{"clusters": 16}],
    "set_transformer": [{"embed": 256, "heads": 8}],
    "si": [{"test": "mean"}],
    "transmil": [{"embed": 128, "heads": 4}, {"landmarks": 64}],
    "rrt": [{"embed": 128}, {"regions": 2, "heads": 4}],
    "dragn": [
        {"unit": "L1Agg"},
        {"unit": "L1Agg", "mixing": "per_channel"},
        {"unit": "L2Agg", "bn": False},
        {"bn_scope": "window", "cap": 100},
        {"order": "permuted", "permutations": 2, "cap": 200},
        {"mixing": "full", "cap": 100},
    ],
}
SMALLER = {"annofly": {"hidden": 16}, "bilstm": {"hidden": 16}}
CASES = [
    (name, {**SMALLER.get(name, {}), **options})
    for name in AGGREGATORS
    for options in ({}, *MORE.get(name, []))
]
LABELS = 5


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("sizes", [[700], [300, 37, 150]], ids=str)
def test_the_need_of_a_batch_is_not_less_than_its_tensors_take(
    name: str, options: dict[str, Any], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Memory of the C++ recursion is NumPy's; as tensors it is tracked too.
    monkeypatch.setattr(kernels, "empty", lambda count, dtype: torch.empty(count, dtype=dtype))
    shape = (16, 2, 2) if AGGREGATORS[name].needs == "map" else (64,)
    config = TrainConfig(aggregator=name, options=options)
    model = build_model(config, shape, LABELS)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    bags = RaggedBags(torch.rand(int(offsets[-1]), *shape), offsets)
    copies = 2 * 4 * math.prod(shape) * len(bags.values)  # of the features, which are not made here
    for training in (True, False):
        needed = model.aggregator.needed_bytes(sizes, training=training)
        taken = (taken_by_a_step if training else taken_by_predicting)(model, bags, config)
        assert taken <= needed
        if name not in ("dragn", "hamil"):  # whose spare memory and trees are NumPy's
            assert needed <= 4.5 * (taken + copies)


def taken_by_a_step(model: Any, bags: RaggedBags, config: TrainConfig) -> int:
    targets = np.zeros((len(bags), LABELS), np.int8)
    targets[:, :2] = 1
    data = LabelledBags(bags, targets, ("train",) * len(bags), "multilabel")
    objective = Objective(data, config, torch.device("cpu"))
    supervision = objective.supervision(torch.arange(len(bags)), None, 1)
    model.train()
    with TrackedMemory() as memory:
        logits, auxiliary = model(bags, supervision=supervision)
        loss = supervision.loss(logits)
        (loss if auxiliary is None else loss + auxiliary).backward()
    return memory.peak


def taken_by_predicting(model: Any, bags: RaggedBags, config: TrainConfig) -> int:
    model.eval()
    with torch.no_grad(), TrackedMemory() as memory:
        model(bags)
    return memory.peak


def test_tracked_memory_counts_what_is_alive() -> None:
    with TrackedMemory() as memory:
        first = torch.zeros(1000)
        view = first.view(10, 100)
        del first
        second = torch.ones(500) + 1  # two arrays of 2,000 bytes, of which one is let go
        assert memory.live == 6000
        del view
        assert memory.live == 2000
        second.add_(1)
    assert memory.peak == 8000


def test_the_recursion_on_long_bags_needs_memory_with_the_power_of_one_and_a_half() -> None:
    dragn = build_model(TrainConfig(aggregator="dragn"), (64,), LABELS).aggregator
    if not compiled.applies(dragn._all_units(), torch.device("cpu"), vectors=True):
        pytest.skip("no compiler")
    ten, forty = (dragn.needed_bytes([n], training=True) for n in (40_000, 160_000))
    assert 6 < forty / ten < 9
    assert dragn.needed_bytes([160_000], training=False) < 6 * 4 * 64 * 160_000 * 1.5


def test_a_cap_bounds_the_need() -> None:
    capped = build_model(TrainConfig(aggregator="dragn", options={"cap": 100}), (64,), LABELS)
    least = capped.aggregator.needed_bytes([100], training=True)
    assert capped.aggregator.needed_bytes([10**6], training=True) - least < 10**6 * 64 * 4 * 2.1
