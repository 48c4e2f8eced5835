"""A store → another layout, written under a hidden name and renamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dragn_cache.errors import InputError, SettingError, UnknownNameError
from dragn_cache.files import require_file_names
from dragn_cache.interop.layouts import TARGETS
from dragn_cache.interop.target import Target
from dragn_cache.store import Store, Tap
from dragn_cache.store.new_path import beside, claimed


@dataclass(frozen=True)
class ExportReport:
    """The result of an export: the taps and views, and the number of bags."""

    layout: str
    bags: int
    taps: tuple[str, ...]
    views: tuple[str, ...]


def export_features(
    store: Store,
    out: Path,
    layout: str,
    *,
    tap: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportReport:
    """Write a store's features in another layout.

    Args:
        tap: for layouts that hold one array per bag; None is the first vector, else the first map.
        progress: called with bags done and in total.

    Raises:
        InputError: ``out`` holds something, a bag id cannot be a file's name, or the layout cannot
            hold the tap.
        StoreError: the store is incomplete or damaged.
    """
    if layout not in TARGETS:
        raise UnknownNameError("layout", layout, TARGETS)
    target = TARGETS[layout]()
    chosen = choose_tap(store, target, tap)
    store.require_complete()
    if target.named_files:
        require_file_names(store.bag_ids)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, len(store.bags))

    with claimed(out) as claims:
        _require_new_target(out, target)
        with beside(out, claims) as path:
            target.write(store, chosen, path, advance)
    taps = [t.name for t in store.description.taps] if target.holds_all else [chosen.name]
    views = store.description.views if target.holds_all else store.description.views[:1]
    return ExportReport(layout, len(store.bags), tuple(taps), tuple(views))


def choose_tap(store: Store, target: Target, name: str | None) -> Tap:
    """The tap called ``name``; None is the first vector, else the first map.

    Raises:
        InputError: one tap was asked for of a layout that holds all, or a map of one without maps.
    """
    if name is not None and target.holds_all:
        raise SettingError(
            "tap",
            expected=f"none: layout {target.layout} holds every tap",
            got=repr(name),
            remedy="leave it out",
        )
    taps = store.description.taps
    vectors = [tap for tap in taps if len(tap.shape) == 1]
    tap = store.tap(name) if name is not None else (vectors or list(taps))[0]
    if len(tap.shape) == 3 and not (target.holds_maps or target.holds_all):
        raise InputError(
            f"layout {target.layout}",
            expected="a vector for each instance",
            got=f"tap {tap.name!r}, maps of {'×'.join(map(str, tap.shape))}",
            remedy="give another `tap`, or export to `layout=hdf5` or zarr",
        )
    return tap


def _require_new_target(out: Path, target: Target) -> None:
    empty = out.is_dir() and not any(out.iterdir()) and target.is_folder
    if (out.exists() or out.is_symlink()) and not empty:
        raise InputError(
            str(out),
            expected="a path where nothing is",
            got="a folder" if out.is_dir() else "a file",
            remedy="give another `out`",
        )
