"""The tables of docs/results.md: every method by cross-validation on real data.

    python benchmarks/results.py ../shared --out results bdgp hpa musk1 elephant miml_birds

``../shared`` holds ``data/`` and ``weights/``; OUT gets a store and a cross-validation for each
set, and the tables are printed as Markdown. Interrupted, it goes on. All five sets
take long: name the sets that are wanted, and perhaps fewer ``--seeds``. ``--times`` trains every
method once instead, on one thread, and prints the processor time; ``--weights`` prints how evenly
DRAGN and HAMIL weigh the instances of a bag before training.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the program does, before torch comes

import numpy as np
import torch

from dragn_cache.aggregators import create_aggregator
from dragn_cache.devices import one_thread
from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.extract import extract
from dragn_cache.interop import import_features
from dragn_cache.interop.config import ImportConfig
from dragn_cache.loading.labelling import read_labelling
from dragn_cache.loading.splits import make_folds
from dragn_cache.manifest import read_manifest
from dragn_cache.ragged import RaggedBags
from dragn_cache.scoring.scores import ACCURACY, AUC_MACRO, F1_MACRO, F1_MICRO, MAIN_SCORES, Score
from dragn_cache.store import Store, open_store
from dragn_cache.studies.config import CrossvalConfig
from dragn_cache.studies.crossval import CrossvalResult, crossval
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags, choose_tap
from dragn_cache.training.fit import fit_method

Method = tuple[str, Mapping[str, Any]]

# The tables of the DRAGN paper, then what came later, then the classical methods.
PAPERS: tuple[Method, ...] = (
    ("si", {}),
    ("mean", {}),
    ("max", {}),
    ("nan", {"blocks": 1}),
    ("nan", {"blocks": 2}),
    ("spoc", {}),
    *(("dragn", {"unit": unit}) for unit in ("L1Agg", "L2Agg", "L3Agg")),
    *(("hamil", {"unit": unit}) for unit in ("L1Agg", "L2Agg", "L3Agg")),
    ("deepmiml", {}),
    ("annofly", {}),
    ("bilstm", {"hidden": 256}),
    ("imploc", {}),
)
MODERN: tuple[Method, ...] = (
    ("dsmil", {}),
    ("dsmil", {"value": "identity"}),
    *(
        (name, {})
        for name in (
            "abmil",
            "gated_abmil",
            "acmil",
            "bow",
            "clam_mb",
            "clam_sb",
            "deepsets",
            "dtfd",
            "netvlad",
            "rrt",
            "set_transformer",
            "transmil",
        )
    ),
)
CLASSICAL: tuple[Method, ...] = tuple((name, {}) for name in ("bovw", "vlad", "fisher", "svm"))

# Ilse et al. (2018) on the classical sets: the network in front, and Adam with its weight decay.
ABMIL_NETWORK = {"embed": (256, 128, 64), "attn_dim": 64}


@dataclass(frozen=True)
class Protocol:
    """How a set is cross-validated.

    Attributes:
        train: settings of every training.
        methods: in the order of the table.
        folds, seeds: of the cross-validation.
        scores: the table's columns.
    """

    train: TrainConfig
    methods: tuple[Method, ...]
    folds: int
    seeds: int
    scores: tuple[Score, ...]


IMAGES = Protocol(
    TrainConfig(),
    (*PAPERS, *MODERN, *CLASSICAL),
    5,
    3,
    (*MAIN_SCORES, F1_MICRO),
)
VECTORS = Protocol(
    TrainConfig(optimizer="adam", lr=5e-4, weight_decay=5e-3, batch_size=8, epochs=40, keep="last"),
    tuple(
        (name, ABMIL_NETWORK if name in ("abmil", "gated_abmil") else options)
        for name, options in (*MODERN, *PAPERS, *CLASSICAL)
    ),
    10,
    5,
    (ACCURACY, AUC_MACRO, F1_MACRO),
)
PROTOCOLS = {
    "bdgp": IMAGES,
    "hpa": IMAGES,
    "musk1": VECTORS,
    "elephant": VECTORS,
    "miml_birds": replace(VECTORS, scores=(*MAIN_SCORES, F1_MICRO)),
}


def open_set(name: str, shared: Path, out: Path) -> Store:
    """The set's store, extracted or imported at the first call."""
    path = out / f"{name}.features"
    if name in ("bdgp", "hpa"):
        data = shared / "data" / ("bdgp" if name == "bdgp" else "hpa_mosaics")
        config = ExtractConfig(
            backbone="mobilenet_v2",
            weights=str(shared / "weights" / "mobilenet_v2_imagenet.pth"),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )
        extract(read_manifest(data), config, path)
    elif not path.exists():
        import_features(shared / "data" / "mil_features" / f"{name}.npz", path, ImportConfig())
    return open_store(path)


def validate(
    store: Store, protocol: Protocol, out: Path, *, seeds: int, jobs: int | None
) -> CrossvalResult:
    """Cross-validate all methods of a protocol."""

    def show(done: int, total: int) -> None:
        print(f"\r{out.name}: {done} of {total} trainings", end="", flush=True)

    config = CrossvalConfig(
        train=protocol.train,
        aggregators=protocol.methods,
        folds=protocol.folds,
        seeds=seeds,
        jobs=jobs,
    )
    result = crossval(store, config, out, progress=show, warn=lambda text: print(f"\n{text}"))
    print()
    return result


def print_times(store: Store, protocol: Protocol) -> None:
    """The processor time of one training of each method, alone on one thread, predicting included.

    It does not grow by what else the machine does.
    """
    labelling = read_labelling(store)
    groups = tuple(bag.group for bag in labelling.bags)
    targets = labelling.targets()
    folds = np.array(make_folds(labelling.ids, targets, groups, folds=protocol.folds, seed=0))
    splits = tuple(np.choose(np.minimum(folds, 2), ["test", "validation", "train"]).tolist())
    print("| method | CPU s |\n| --- | --- |")
    for name, options in protocol.methods:
        config = protocol.train.replace(aggregator=name, options=options)
        values, offsets = store.load(choose_tap(store, config).name)
        bags = RaggedBags(torch.from_numpy(values), torch.from_numpy(offsets))
        data = LabelledBags(bags, targets, splits, labelling.task, groups=groups)
        with one_thread():
            fit_method(data, config.replace(epochs=1), labels=labelling.labels)  # what is lazy
            started = time.process_time()
            fit_method(data, config, labels=labelling.labels)
        print(f"| {config.label} | {time.process_time() - started:.1f} |", flush=True)


def print_weights(store: Store, protocol: Protocol) -> None:
    """How evenly untrained L1Agg units, which are linear, weigh the instances of a bag.

    An instance's weight is the gradient that the embedding sends to it; those of a bag sum to 1,
    and 1 / Σ w² equal ones would be as even.
    """
    for name in ("dragn", "hamil"):
        config = protocol.train.replace(aggregator=name, options={"unit": "L1Agg"})
        values, offsets = store.load(choose_tap(store, config).name)
        aggregator = create_aggregator(name, in_shape=values.shape[1:], unit="L1Agg")
        features = torch.from_numpy(values).float().requires_grad_()
        bags = RaggedBags(features, torch.from_numpy(offsets))
        aggregator(bags).embedding.mean(1).sum().backward()
        assert features.grad is not None
        weights = features.grad.flatten(1).sum(1)
        largest = torch.stack([weights[a:b].max() for a, b in pairwise(offsets.tolist())])
        even = torch.stack([1 / weights[a:b].square().sum() for a, b in pairwise(offsets.tolist())])
        print(
            f"{name}: one instance has half of the weight or more in {(largest > 0.499).sum()} of "
            f"{len(bags)} bags; 1 / Σ w² is {even.mean():.2f} on average, of the mean "
            f"{len(weights) / len(bags):.2f}"
        )


def table(rows: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> str:
    """Markdown: mean ± sd over folds and seeds, the interval over bags, size and time."""
    head = ["method", *(score.label for score in scores), "parameters", "s a training"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    means = {
        score: [m for row in rows if (m := row[f"{score.name}_mean"]) is not None]
        for score in scores
    }
    best = {
        score: (max if score.higher_is_better else min)(defined, default=None)
        for score, defined in means.items()
    }
    for row in rows:
        cells = [row["aggregator"] + (f", {row['failed']} failed" if row["failed"] else "")]
        for score in scores:
            mean, sd = row[f"{score.name}_mean"], row[f"{score.name}_sd"]
            if mean is None:
                cells.append("–")
                continue
            text = f"{mean:.3f} ± {sd:.3f}"
            text = f"**{text}**" if mean == best[score] else text
            if score in scores[:2] and row[f"{score.name}_low"] is not None:
                text += f" ({row[f'{score.name}_low']:.2f}–{row[f'{score.name}_high']:.2f})"
            cells.append(text)
        if row["trainings"]:
            cells += [f"{row['parameters']:,}", f"{row['seconds_mean']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("sets", nargs="*", metavar="SET", help="all: " + ", ".join(PROTOCOLS))
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--weights", action="store_true")
    given = parser.parse_args()
    unknown = [name for name in given.sets if name not in PROTOCOLS]
    if unknown:
        parser.error(f"no set {unknown[0]!r}; there are {', '.join(PROTOCOLS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.sets or PROTOCOLS:
        protocol = PROTOCOLS[name]
        store = open_set(name, given.shared, given.out)
        if given.times:
            print_times(store, protocol)
            continue
        if given.weights:
            print_weights(store, protocol)
            continue
        result = validate(
            store,
            protocol,
            given.out / name,
            seeds=given.seeds or protocol.seeds,
            jobs=given.jobs,
        )
        for training in result.failed:
            print(f"failed: {training.task}: {training.error}")
        print(f"\n## {name}\n\n{table(result.summary, protocol.scores)}\n")


if __name__ == "__main__":
    main()
