"""Cross-validation: several methods on the same folds of one store, without a leak.

OUT/
  config.toml        every setting, resolved, and the digests of features and bags
  trainings/         one small file for each method, seed and fold that is finished
  splits.csv         bag_id, group, and the fold of each seed
  folds.csv          one row for each method, seed and fold: all scores
  summary.csv        one row for each method: means, deviations, 95 % intervals
  comparison.csv     every two methods, paired by fold
  predictions.csv    every bag's probabilities when it was tested
  crossval.png       the main scores
  SHA256SUMS         the digests of these files; a training's file has its own

- In fold f of a seed, fold f is the test, the next one validation, the rest training: validation
  chooses the epoch, test only reports. Groups are whole; all methods see the same folds.
- A training depends on its method, seed and fold alone, and computes on one thread, so the results
  are the same however many run at once, and whenever the work was interrupted.
- Features lie in memory once, whatever the number of processes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dragn_cache.checksums import write_checksums
from dragn_cache.files import write_bytes, write_csv
from dragn_cache.scoring.decisions import decide
from dragn_cache.store import Store
from dragn_cache.studies.config import CrossvalConfig
from dragn_cache.studies.folder import claimed_folder, read_training, write_training
from dragn_cache.studies.plan import StudyPlan, count_jobs, plan_study
from dragn_cache.studies.tables import (
    COMPARISON,
    ResultRow,
    Training,
    comparison_rows,
    fold_row,
    summary_row,
)
from dragn_cache.studies.trainings import train_all
from dragn_cache.types import Progress, Warn


@dataclass(frozen=True)
class CrossvalResult:
    """The result of a cross-validation: the rows of its tables, and the trainings that failed."""

    summary: tuple[ResultRow, ...]
    comparison: tuple[ResultRow, ...]
    failed: tuple[Training, ...]


def crossval(
    store: Store,
    config: CrossvalConfig,
    out: Path,
    *,
    bags_csv: Path | None = None,
    progress: Progress = lambda done, total: None,
    warn: Warn = lambda text: None,
) -> CrossvalResult:
    """Train every method on every fold of every seed, and write the tables.

    Called again with the same settings, it goes on where it was interrupted and tries failed
    trainings again. Methods and seeds may be added; the rule of decision and the number of
    resamples may change.

    Args:
        bags_csv: other labels or groups for the store's bags.
        progress: see `Progress`.
        warn: called with one line for everything that was left out.

    Raises:
        InputError: the labels, an option or the number of groups cannot be used, ``out`` holds
            something else or cannot be written, or another process works in it.
        StoreMismatchError: ``out`` was begun with other settings, features or bags.
        StoreError: the store is incomplete or damaged.
    """
    with claimed_folder(out):
        plan = plan_study(store, config, bags_csv, out, warn)
        tasks = plan.tasks()
        done = {task: old for task in tasks if (old := read_training(out, task, plan.truth))}
        waiting = [task for task in tasks if task not in done]
        progress(len(done), len(tasks))
        with closing(train_all(plan, waiting, count_jobs(config, plan))) as finished:
            for training in finished:
                write_training(out, training)
                done[training.task] = training
                progress(len(done), len(tasks))
        return _report(out, plan, [done[task] for task in tasks], config.train.intervals)


def _report(
    out: Path, plan: StudyPlan, trainings: Sequence[Training], intervals: int
) -> CrossvalResult:
    """Write the tables and the picture."""
    from dragn_cache.figures.crossval import plot_crossval  # here: processes that train do without

    by_method: dict[str, list[Training]] = {label: [] for label in plan.methods}
    for training in trainings:
        by_method[training.aggregator].append(training)
    rows = {
        label: [fold_row(training, plan.truth) for training in of_method]
        for label, of_method in by_method.items()
    }
    summary = [
        summary_row(of_method, rows[label], plan.truth, intervals)
        for label, of_method in by_method.items()
    ]
    fold_rows = [row for of_method in rows.values() for row in of_method]
    comparison = comparison_rows(fold_rows)
    _write_splits(out / "splits.csv", plan)
    _write_predictions(out / "predictions.csv", plan, by_method)
    write_csv(out / "folds.csv", list(fold_rows[0]), (row.values() for row in fold_rows))
    write_csv(out / "comparison.csv", COMPARISON, (row.values() for row in comparison))
    picture = io.BytesIO()
    plot_crossval(picture, summary, fold_rows)
    write_bytes(out / "crossval.png", picture.getvalue())
    write_csv(out / "summary.csv", list(summary[0]), (row.values() for row in summary))
    write_checksums(out)
    failed = tuple(training for training in trainings if training.error)
    return CrossvalResult(tuple(summary), tuple(comparison), failed)


def _write_splits(path: Path, plan: StudyPlan) -> None:
    folds = plan.truth.folds
    write_csv(
        path,
        ["bag_id", "group", *(f"fold_seed{seed}" for seed in range(len(folds)))],
        (
            [bag.bag_id, bag.group, *folds_of_bag]
            for bag, folds_of_bag in zip(plan.labelling.bags, folds.T.tolist(), strict=True)
        ),
    )


def _write_predictions(
    path: Path, plan: StudyPlan, by_method: Mapping[str, list[Training]]
) -> None:
    labels, ids = plan.labelling.labels, plan.labelling.ids

    def rows() -> Iterator[list[Any]]:
        for training in (t for of_method in by_method.values() for t in of_method):
            if training.error:
                continue
            tested = plan.truth.tested(training)
            p = tested.probabilities
            d = decide(p, plan.truth.task, tested.decision).tolist()
            for k, row in enumerate(tested.rows.tolist()):
                y, texts = tested.targets[k].tolist(), map(repr, p[k].tolist())
                yield [*training.task, ids[row], *y, *texts, *d[k]]

    head = ["aggregator", "seed", "fold", "bag_id"]
    columns = [f"{kind}_{label}" for kind in "ypd" for label in labels]
    write_csv(path, [*head, *columns], rows())
