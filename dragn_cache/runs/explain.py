"""Explanations: how much each instance of a bag counts, by the model of a run.

Three methods, one score for an instance or one for each label:

- **attention**: the aggregator's own weights, where it has any.
- **cosine**: the cosine of the angle between an instance's vector and its bag's embedding, "DRAGN",
  figure 9: the more alike, the more the aggregation kept of the instance. Both are averaged over h
  and w, as the embedding is; the paper does not say so. It needs an embedding that lies in the
  space of the features, as an aggregator declares (``embedding_among_features``) and DRAGN's and
  HAMIL's do; of another one of the same width it says nothing.
- **leave-one-out**: for each label the bag's probability less that of the bag without the
  instance, so positive where the instance speaks for the label. It asks nothing of the model, so
  classical methods have it as well, and costs n passes over n - 1 instances for a bag of n. A bag
  of one has none: nan.

Nothing here reads an image. OUT/ of `explain_run`:
  h5_files/BAG.h5  ``attention_scores`` (n,) or (n, L) and ``coords`` (n, 2), named as CLAM does,
                   whatever the method; attributes ``method`` and, for (n, L), ``labels``
  instances.csv    bag_id, image, order, x0, y0, x1, y1 and the scores; nan is an empty cell
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dragn_cache.checksums import write_checksums
from dragn_cache.devices import find_device, memory_for_features
from dragn_cache.errors import InputError, SettingError, UnknownNameError
from dragn_cache.files import require_file_names, write_csv
from dragn_cache.loading.labelling import Labelling
from dragn_cache.loading.stored import StoredBags, load_bags
from dragn_cache.manifest import Bag, read_bags
from dragn_cache.ragged import RaggedBags
from dragn_cache.runs.checkpoint import Checkpoint, load_checkpoint, require_same_features
from dragn_cache.runs.config import ExplainConfig
from dragn_cache.runs.folder import run_table
from dragn_cache.runs.instance_scores import Scores, score_instances
from dragn_cache.store import Store
from dragn_cache.store.hdf5_writing import writing_hdf5
from dragn_cache.store.new_path import new_path
from dragn_cache.store.part import corner_coords
from dragn_cache.training.fit import Model, require_room_for
from dragn_cache.training.model import BagClassifier
from dragn_cache.types import Progress, Warn


@dataclass(frozen=True)
class Explained:
    """The scores of the instances of some bags.

    Attributes:
        method: attention, cosine or leave-one-out.
        bags: their ids.
        labels: what the columns are of; empty where a score is of all labels.
        offsets: (B + 1,) int64: bag k has the rows offsets[k]:offsets[k+1].
        scores: (N, 1), or (N, L) float64.
    """

    method: str
    bags: tuple[str, ...]
    labels: tuple[str, ...]
    offsets: NDArray[np.int64]
    scores: Scores

    @property
    def columns(self) -> list[str]:
        """The columns' names."""
        name = self.method.replace("-", "_")
        return [f"{name}_{label}" for label in self.labels] or [name]

    def of_bag(self, k: int) -> Scores:
        """(n,) or (n, L): the scores of bag k's instances."""
        rows = self.scores[self.offsets[k] : self.offsets[k + 1]]
        return rows if self.labels else rows[:, 0]


def explain_run(
    run: Path,
    store: Store,
    out: Path,
    config: ExplainConfig,
    *,
    bags: Sequence[str] | Path | None = None,
    progress: Progress = lambda done, total: None,
    warn: Warn = lambda text: None,
) -> Explained:
    """Score the instances of a store's bags by a run's model, and write the scores.

    Args:
        out: a new folder.
        bags: ids, or a table with a column of them; None is all.

    Raises:
        InputError: there is no usable checkpoint, the method does not go with its aggregator, no
            bag is left, a bag's id cannot be a file's name, or ``out`` holds files.
        StoreMismatchError: the store's features are not those that the model was trained on.
        StoreError: the store is incomplete or damaged.
    """
    device = find_device(config.device)
    model, checkpoint = load_checkpoint(run, config.allow_class)
    require_same_features(run, checkpoint, store, warn)
    store.require_complete()
    method = choose_method(model, config.method)
    chosen = choose_bags(store, run, bags, config.split)
    if config.h5:
        require_file_names(
            [bag.bag_id for bag in chosen], remedy="leave out the .h5 with `h5=False`"
        )
    with new_path(out) as folder:
        labelling, features = _load_features(checkpoint, store, chosen, device, warn)
        explained = _explain(model, labelling, features, method, progress, warn)
        folder.mkdir()
        if config.h5:
            write_h5_files(folder / "h5_files", store, explained)
        write_instances(folder / "instances.csv", store, explained)
        write_checksums(folder)
    return explained


def _explain(
    model: Model,
    labelling: Labelling,
    features: RaggedBags | StoredBags,
    method: str,
    progress: Progress,
    warn: Warn,
) -> Explained:
    on_device = features.device if isinstance(features, StoredBags) else features.values.device
    require_room_for(model, features, on_device)
    scores = score_instances(model, features, labelling.task, method, progress)
    explained = Explained(
        method,
        tuple(labelling.ids),
        labelling.labels if scores.ndim == 2 else (),
        features.offsets.numpy(),
        scores if scores.ndim == 2 else scores[:, None],
    )
    alone = int((features.offsets.diff() == 1).sum())
    if method == "leave-one-out" and alone:
        warn(f"{alone} bags have one instance only, so none to leave out: their scores are empty")
    return explained


def _load_features(
    checkpoint: Checkpoint, store: Store, bags: Sequence[Bag], device: torch.device, warn: Warn
) -> tuple[Labelling, RaggedBags | StoredBags]:
    """The chosen bags that have a usable instance, and their features on the device."""
    labelling = Labelling(tuple(bags), checkpoint.labels, checkpoint.task)
    tap, memory = store.tap(checkpoint.tap), memory_for_features("auto", device)
    labelling, features = load_bags(store, tap, labelling, memory, warn)
    if not labelling.bags:
        raise _no_bags("a usable instance", "none in the chosen bags", "choose others")
    return labelling, features.to(device=device)


# --- methods and bags --------------------------------------------------------------------------


def choose_method(model: Model, method: str) -> str:
    """The method asked for; ``auto`` is the first of the three that goes with the model.

    Cosine goes by itself where the embedding lies among the features; asked for by name, it goes
    with every embedding as wide as they are.

    Raises:
        InputError: the model has no attention, or an embedding that no feature compares with.
    """
    aggregator = model.aggregator if isinstance(model, BagClassifier) else None
    attends = aggregator is not None and aggregator.has_attention
    name = type(model if aggregator is None else aggregator).__name__
    if method == "auto":
        if attends:
            return "attention"
        among = aggregator is not None and aggregator.embedding_among_features
        return "cosine" if among else "leave-one-out"
    if method == "attention" and not attends:
        raise SettingError(
            "method",
            expected="an aggregator with attention",
            got=name,
            remedy="choose cosine or leave-one-out",
        )
    if method == "cosine" and (aggregator is None or aggregator.out_dim != aggregator.in_shape[0]):
        raise SettingError(
            "method",
            expected="an aggregator whose embedding is as wide as the features",
            got=name if aggregator is None else f"{aggregator.out_dim} of {name}",
            remedy="choose leave-one-out",
        )
    return method


def choose_bags(
    store: Store, run: Path, bags: Sequence[str] | Path | None, split: str | None
) -> list[Bag]:
    """The store's bags that are asked for, in the order asked for, each once.

    Args:
        split: only those that were on this side when the run was trained.
    """
    known = {bag.bag_id: bag for bag in store.bags}
    # By id, where a bag was named, for errors.
    if bags is None:
        sources = dict.fromkeys(known, "")
    elif isinstance(bags, Path):
        sources = {
            bag.bag_id: f"{bag.file}:{bag.line}" for bag in read_bags(bags, image_rows=True)[0]
        }
    else:
        sources = dict.fromkeys(bags, "`bags`")
    for bag_id, where in sources.items():
        if bag_id not in known:
            remedy = f"correct {where}, or see {store.path / 'manifest' / 'bags.csv'}"
            raise UnknownNameError("bag", bag_id, known, remedy=remedy)
    if split is not None:
        rows = run_table(run, "splits.csv", ("bag_id", "split"))
        side = {row.cells["bag_id"]: row.cells["split"] for row in rows}
        sources = {bag_id: where for bag_id, where in sources.items() if side.get(bag_id) == split}
    if not sources:
        expected = "a bag's id" if split is None else f"a bag of the run's {split} split"
        raise _no_bags(expected, "none", f"see the bags in {run / 'splits.csv'}")
    return [known[bag_id] for bag_id in sources]


def _no_bags(expected: str, got: str, remedy: str) -> InputError:
    return InputError("bags to explain", expected=expected, got=got, remedy=remedy)


# --- writing -----------------------------------------------------------------------------------


def write_instances(path: Path, store: Store, explained: Explained) -> None:
    """Write bag_id, image, order, the box in pixels, and the scores, one row per instance."""
    head = ["bag_id", "image", "order", "x0", "y0", "x1", "y1", *explained.columns]
    write_csv(path, head, _instance_rows(store, explained))


def _instance_rows(store: Store, explained: Explained) -> Iterator[list[Any]]:
    for k, bag_id in enumerate(explained.bags):
        index = store.instances(bag_id)
        scores = explained.scores[explained.offsets[k] : explained.offsets[k + 1]].tolist()
        facts = zip(index.images, index.order.tolist(), index.boxes.tolist(), scores, strict=True)
        for image, order, box, row in facts:
            yield [bag_id, image, order, *box, *("" if math.isnan(s) else repr(s) for s in row)]


def write_h5_files(folder: Path, store: Store, explained: Explained) -> None:
    """Write one .h5 per bag."""
    folder.mkdir()
    for k, bag_id in enumerate(explained.bags):
        with writing_hdf5(folder / f"{bag_id}.h5") as (file, _):
            file.create_dataset("attention_scores", data=explained.of_bag(k))
            file.create_dataset("coords", data=corner_coords(store.instances(bag_id)))
            file.attrs["method"] = explained.method
            if explained.labels:
                file.attrs["labels"] = list(explained.labels)
