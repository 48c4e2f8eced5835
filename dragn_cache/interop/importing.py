"""Features of another layout → a store, bag by bag, resumable like an extraction.

First the whole source is read once: every bag is checked before anything is written, and what
decides the parts is known. Then the parts that are missing are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dragn_cache.config import ImportConfig
from dragn_cache.errors import InputError
from dragn_cache.interop.layouts import SOURCES, find_layout, require_layout
from dragn_cache.interop.source import (
    UNKNOWN,
    BagFeatures,
    MadeBy,
    Source,
    exact_dtype,
    refuse_other_kinds,
    row_values,
    stored_values,
)
from dragn_cache.manifest import Bag, Manifest, read_bags
from dragn_cache.store import (
    Failure,
    PartWriter,
    StoreDescription,
    Tap,
    json_digest,
    open_writer,
    plan_parts,
)
from dragn_cache.store.part import Array
from dragn_cache.store.plan import PART_BYTES
from dragn_cache.store.schema import DType

Progress = Callable[[int, int], None]
"""Called with bags done and bags in total."""


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        bags, instances: in the store.
        without_features: bags of the table that the source lacks; ``without_row`` the reverse.
        parts_written, parts_total: parts written by this call, and planned.
    """

    layout: str
    bags: int
    instances: int
    labelled: bool
    taps: tuple[Tap, ...]
    without_features: tuple[str, ...]
    without_row: tuple[str, ...]
    parts_written: int
    parts_total: int


@dataclass(frozen=True)
class Joined:
    """The bags to import, and those that only the table or only the source has."""

    manifest: Manifest
    without_features: tuple[str, ...]
    without_row: tuple[str, ...]


@dataclass(frozen=True)
class Survey:
    """What a reading of the whole source found out: all that decides the store's parts."""

    sizes: tuple[int, ...]
    digests: tuple[str, ...]
    taps: tuple[Tap, ...]
    made_by: MadeBy


def import_features(
    path: Path,
    out: Path,
    config: ImportConfig | None = None,
    *,
    bags_csv: Path | None = None,
    checking: Progress = lambda done, total: None,
    writing: Progress = lambda done, total: None,
) -> ImportReport:
    """Bring features that another tool has made into a store.

    The same call goes on after a kill and does nothing when the store is complete.

    Raises:
        InputError: the source, or the join with the table, cannot be used; it names the file.
        StoreMismatchError: there is a store of other settings or of other sources at ``out``.
    """
    config = config or ImportConfig()
    layout = config.layout or find_layout(path)
    require_layout(layout, SOURCES)
    source = SOURCES[layout](path)
    joined = join_table(source, bags_csv, config)
    survey = survey_source(source, joined.manifest.bags, config, checking)
    description = describe(source, joined.manifest, survey, config)
    parts = plan_parts(survey.sizes, description.row_bytes, config.part_instances)
    writer = open_writer(out, description, parts, joined.manifest)
    missing = writer.missing()
    bags = joined.manifest.bags
    done = len(bags) - sum(part.last_bag - part.first_bag for part in missing)
    for part in missing:
        held = bags[part.first_bag : part.last_bag]
        sizes = survey.sizes[part.first_bag : part.last_bag]
        with writer.part(part, [bag.bag_id for bag in held], sizes) as target:
            _fill(target, source, survey, lambda n, done=done: writing(done + n, len(bags)))  # type: ignore[misc]
        done += len(held)
    writer.write_failures()
    return ImportReport(
        layout=layout,
        bags=len(bags),
        instances=sum(survey.sizes),
        labelled=all(bag.labels is not None for bag in bags),
        taps=survey.taps,
        without_features=joined.without_features,
        without_row=joined.without_row,
        parts_written=len(missing),
        parts_total=len(parts),
    )


# --- joining -----------------------------------------------------------------------------------


def join_table(source: Source, bags_csv: Path | None, config: ImportConfig) -> Joined:
    """The bags that the table and the source both have, in the table's order.

    Raises:
        InputError: they do not have the same bags, and ``config.unmatched`` is ``refuse``.
    """
    manifest, where = source.manifest, "the source's table"
    if bags_csv is not None:
        bags, labels, task = read_bags(bags_csv)
        manifest = replace(manifest, bags=bags, labels=labels, task=task)
        where = str(bags_csv)
    found, listed = set(source.ids), {bag.bag_id for bag in manifest.bags}
    without_features = tuple(b.bag_id for b in manifest.bags if b.bag_id not in found)
    without_row = tuple(bag_id for bag_id in source.ids if bag_id not in listed)
    kept = tuple(bag for bag in manifest.bags if bag.bag_id in found)
    if config.unmatched == "refuse" or not kept:
        _refuse_unmatched(where, without_features, without_row)
    return Joined(replace(manifest, bags=kept), without_features, without_row)


def _refuse_unmatched(
    where: str, without_features: Sequence[str], without_row: Sequence[str]
) -> None:
    found = []
    if without_features:
        found.append(f"{len(without_features)} rows without features ({_some(without_features)})")
    if without_row:
        found.append(f"{len(without_row)} bags of features without a row ({_some(without_row)})")
    if found:
        raise InputError(
            where,
            expected="one row for each bag of features",
            got=" and ".join(found),
            remedy="correct the table, or give --unmatched drop to leave them out",
        )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")


# --- the first reading -------------------------------------------------------------------------


def survey_source(
    source: Source, bags: Sequence[Bag], config: ImportConfig, progress: Progress
) -> Survey:
    """Read every bag once, and refuse what a store cannot hold before anything is written."""
    sizes, digests = [], []
    shapes: dict[str, tuple[int, ...]] | None = None
    dtypes: dict[str, DType] = {}
    made_by, first = MadeBy(), ""
    for k, bag in enumerate(bags):
        features = source.read(bag.bag_id)
        rows = _rows(features)
        found = {tap: values.shape[1:] for (tap, _), values in rows.items()}
        if shapes is None:
            shapes, made_by, first = found, features.made_by, features.where
        _refuse_other(features, found, shapes, made_by, first)
        for (tap, view), values in rows.items():
            dtype = config.dtype or exact_dtype(features.where, values)
            refuse_other_kinds(features.where, values)
            stored_values(f"{features.where}, tap {tap!r}, view {view}", bag.bag_id, values, dtype)
            dtypes[tap] = "float32" if "float32" in (dtype, dtypes.get(tap)) else "float16"
        sizes.append(len(features.records))
        digests.append(features.digest.hex())
        progress(k + 1, len(bags))
    taps = tuple(Tap(name, shape, dtypes[name]) for name, shape in (shapes or {}).items())
    if config.encoder is not None:
        made_by = _named(made_by, config.encoder, first)
    return Survey(tuple(sizes), tuple(digests), taps, made_by)


def _rows(features: BagFeatures) -> dict[tuple[str, str], Array]:
    rows = {key: row_values(features.where, values) for key, values in features.values.items()}
    counts = {len(values) for values in rows.values()}
    if counts != {len(features.records)}:
        raise InputError(
            features.where,
            expected=f"{len(features.records)} rows of features",
            got=", ".join(map(str, sorted(counts))),
            remedy="make the file again",
        )
    return rows


def _refuse_other(
    features: BagFeatures,
    found: dict[str, tuple[int, ...]],
    shapes: dict[str, tuple[int, ...]],
    made_by: MadeBy,
    first: str,
) -> None:
    """Raise unless a bag's features are of the shape and the network of the first bag's."""
    if found != shapes or features.made_by != made_by:
        same = found != shapes
        expected, got = (shapes, found) if same else (made_by, features.made_by)
        raise InputError(
            features.where,
            expected=f"what {first} has, {_facts(expected)}",
            got=_facts(got),
            remedy="import features of one network at a time",
        )


def _facts(value: dict[str, tuple[int, ...]] | MadeBy) -> str:
    if isinstance(value, MadeBy):
        return f"encoder {value.encoder}" + (f" ({value.sha256[:12]})" if value.sha256 else "")
    return ", ".join(f"{name} of {'×'.join(map(str, s))}" for name, s in value.items())


def _named(made_by: MadeBy, encoder: str, first: str) -> MadeBy:
    if made_by.encoder not in (UNKNOWN, encoder):
        raise InputError(
            first,
            expected=f"features of {encoder} (--encoder)",
            got=f"features of {made_by.encoder}",
            remedy="leave --encoder out, or correct it",
        )
    return replace(made_by, encoder=encoder)


# --- the store ---------------------------------------------------------------------------------


def describe(
    source: Source, manifest: Manifest, survey: Survey, config: ImportConfig
) -> StoreDescription:
    """What the store will say about itself."""
    features = source.features or {
        "backbone": survey.made_by.encoder,
        "taps": [tap.name for tap in survey.taps],
        "source_layout": source.layout,
        "source_features_sha256": survey.made_by.sha256,
    }
    dtypes = sorted({tap.dtype for tap in survey.taps})
    numerics = {**(source.numerics or {}), "dtype": "+".join(dtypes), "imported": True}
    plan = [
        [bag.bag_id, size, digest]
        for bag, size, digest in zip(manifest.bags, survey.sizes, survey.digests, strict=True)
    ]
    return StoreDescription(
        format=config.format,
        taps=survey.taps,
        views=source.views,
        provenance={
            "features": features,
            "numerics": numerics,
            "plan": {
                "source_layout": source.layout,
                "sources_sha256": json_digest(plan),
                "bags": len(manifest.bags),
                "instances": sum(survey.sizes),
                "part_instances": config.part_instances,
                "part_bytes": PART_BYTES,
            },
        },
    )


def _fill(
    target: PartWriter, source: Source, survey: Survey, advance: Callable[[int], None]
) -> None:
    """Write the bags of one part."""
    dtypes = {tap.name: tap.dtype for tap in survey.taps}
    row = 0
    for done, (bag_id, size) in enumerate(zip(target.bags, target.sizes, strict=True), start=1):
        features = source.read(bag_id)
        rows = _rows(features)
        if len(features.records) != size:
            raise InputError(
                features.where,
                expected=f"{size} rows, as a moment ago",
                got=str(len(features.records)),
                remedy="repeat the command when no other program writes to it",
            )
        for view in source.views:
            values = {
                tap: stored_values(features.where, bag_id, rows[tap, view], dtype)
                for tap, dtype in dtypes.items()
            }
            target.put(range(row, row + size), features.records, values)
        for failure in features.failures:
            target.fail_bag(failure)
        if not size and not features.failures:
            target.fail_bag(Failure(bag_id, "", "", "the source has no instance of this bag"))
        row += size
        advance(done)
