"""Trainings of a cross-validation, one after the other or in several processes."""

from __future__ import annotations

import importlib
import time
from collections.abc import Generator, Sequence
from dataclasses import replace

import numpy as np
import torch

from dragn_cache.classical import CLASSICAL
from dragn_cache.devices import one_thread
from dragn_cache.errors import DragnCacheError, OutOfMemoryError, StoreError, is_out_of_memory
from dragn_cache.loading.feeds import in_order
from dragn_cache.loading.stored import StoredBags
from dragn_cache.parallel.local import SharedArray, run_tasks
from dragn_cache.ragged import RaggedBags
from dragn_cache.studies.plan import StudyPlan
from dragn_cache.studies.tables import Place, Training
from dragn_cache.training.fit import Model, fit_method

# What trainings import at their first use, which takes seconds that are not theirs: PyTorch's
# optimizers the second, classical methods the others.
PRELOAD = (__name__, "torch._dynamo")
PRELOAD_CLASSICAL = ("sklearn.cluster", "sklearn.mixture", "sklearn.svm")


def training_seed(seed: int, fold: int) -> int:
    """The seed of a training: 32 bits that NumPy's ``SeedSequence`` makes of both."""
    return int(np.random.SeedSequence((seed, fold)).generate_state(1)[0])


def train_all(
    plan: StudyPlan, tasks: Sequence[Place], jobs: int
) -> Generator[Training, None, None]:
    """Trainings in the order of their end."""
    if not tasks:
        return
    jobs = min(jobs, len(tasks))
    loaded = plan if plan.streamed else replace(plan, features=_loaded(plan, jobs))
    classical = any(method.aggregator in CLASSICAL for method in plan.methods.values())
    preload = PRELOAD + (PRELOAD_CLASSICAL if classical else ())
    if jobs > 1:
        yield from run_tasks(train_once, loaded, tasks, jobs=jobs, preload=preload)
        return
    for name in preload:
        importlib.import_module(name)
    for task in tasks:
        yield train_once(loaded, task)


def _loaded(plan: StudyPlan, jobs: int) -> dict[str, RaggedBags | SharedArray]:
    """All features in memory, once."""
    loaded: dict[str, RaggedBags | SharedArray] = {}
    for name, stored in plan.features.items():
        assert isinstance(stored, StoredBags)
        if jobs == 1:
            loaded[name] = stored.read(torch.arange(len(stored)))
            continue
        shared = SharedArray((int(plan.sizes.sum()), *stored.in_shape), stored.tap.dtype)
        row = 0
        for bags in in_order(stored):  # some at a time, so that there is never a second copy
            shared.array[row : row + len(bags.values)] = bags.values.numpy()
            row += len(bags.values)
        loaded[name] = shared
    return loaded


def train_once(plan: StudyPlan, task: Place) -> Training:
    """One training; its own error becomes its result, an error of the store is raised."""
    label, seed, fold = task
    config = plan.methods[label].replace(seed=training_seed(seed, fold))
    data = plan.data(task)
    notes: list[str] = []
    started = time.perf_counter()
    try:
        with one_thread():
            trained = fit_method(data, config, labels=plan.labelling.labels, warn=notes.append)
    except StoreError:
        raise
    except Exception as raised:  # noqa: BLE001 - recorded and reported; the others go on
        error = OutOfMemoryError(raised) if is_out_of_memory(raised) else raised
        kind = "" if isinstance(error, DragnCacheError) else f"{type(error).__name__}: "
        return Training(label, seed, fold, error=" ".join(f"{kind}{error}".split()))
    test, validation = (
        tuple(map(tuple, trained.probabilities[data.rows(split)].tolist()))
        for split in ("test", "validation")
    )
    return Training(
        label,
        seed,
        fold,
        probabilities=test,
        validation=validation,
        best_epoch=trained.best_epoch,
        parameters=_parameters(trained.model),
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def _parameters(model: Model) -> int:
    """The number of values that a model has learned."""
    if isinstance(model, torch.nn.Module):
        return sum(p.numel() for p in model.parameters())
    return sum(x.numel() for x in model.state_dict().values())
