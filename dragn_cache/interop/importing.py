"""Features of another layout → a store, bag by bag, resumable like an extraction.

First the whole source is read once (`survey_source`): every bag is checked before anything is
written, and the sizes that decide the parts are known. Then the missing parts are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dragn_cache.errors import InputError
from dragn_cache.interop.config import ImportConfig
from dragn_cache.interop.layouts import SOURCES, find_layout
from dragn_cache.interop.source import (
    UNKNOWN,
    BagFeatures,
    MadeBy,
    Source,
    exact_dtype,
    reading,
    require_numbers,
    row_values,
    stored_values,
)
from dragn_cache.manifest import Bag, Instance, Manifest, read_bags
from dragn_cache.manifest.doubts import warn_doubts
from dragn_cache.manifest.writing import require_held_bags, require_held_labels
from dragn_cache.store import (
    Failure,
    PartPlan,
    PartWriter,
    StoreDescription,
    Tap,
    instances_of,
    manifest_digest,
    open_store,
    open_writer,
    plan_parts,
)
from dragn_cache.store.config import DType
from dragn_cache.store.disk import disk_error, require_writable
from dragn_cache.store.leaks import warn_leaks
from dragn_cache.store.part import Array
from dragn_cache.store.plan import PART_BYTES
from dragn_cache.store.schema import is_step
from dragn_cache.texts import by_look, difference, look
from dragn_cache.types import Progress, Say, Warn


@dataclass(frozen=True)
class ImportReport:
    """The result of an import.

    Attributes:
        bags, instances: in the store.
        without_features: bags of the table that the source lacks; ``without_row`` the reverse.
        parts_written, parts_total: parts written by this call, and all planned parts.
        parts_missing: parts that another process is writing.
    """

    layout: str
    bags: int
    instances: int
    labelled: bool
    taps: tuple[Tap, ...]
    without_features: tuple[str, ...]
    without_row: tuple[str, ...]
    parts_written: int
    parts_missing: int
    parts_total: int


@dataclass(frozen=True)
class Joined:
    """The bags to import, and those that only the table or only the source has."""

    manifest: Manifest
    without_features: tuple[str, ...]
    without_row: tuple[str, ...]


@dataclass(frozen=True)
class Survey:
    """Facts from one reading of the whole source: everything that decides the store's parts.

    Attributes:
        sizes: rows of each bag.
        lost: images of each bag that the source records as not used.
        digests: hex sha256 of the bytes that each bag is read from.
    """

    sizes: tuple[int, ...]
    lost: tuple[int, ...]
    digests: tuple[str, ...]
    taps: tuple[Tap, ...]
    made_by: MadeBy


def import_features(
    path: Path,
    out: Path,
    config: ImportConfig | None = None,
    *,
    bags_csv: Path | None = None,
    progress: Progress = lambda done, total: None,
    say: Say = lambda line: None,
    warn: Warn = lambda text: None,
) -> ImportReport:
    """Write features that another tool has made into a store.

    The same call continues after a kill, and does nothing when the store is complete.

    Args:
        progress: called with bags done, in both readings of the source, and twice their number.
        say: called with whom a long wait is for.
        warn: called with one line for bags that are left out or empty, and for what may mislead.

    Raises:
        InputError: the source, or the join with the table, cannot be used; it names the file.
        StoreMismatchError: there is a store of other settings or of other sources at ``out``.
        StoreError: the disk is full or cannot be written. What was complete stays.
    """
    config = config or ImportConfig()
    layout = config.layout or find_layout(path)
    with reading(path, f"features in the layout {layout}"):
        source = SOURCES[layout](path)
    require_writable(out)
    _require_held(path, [Bag(bag_id) for bag_id in source.ids], source.manifest.labels)
    joined = join_table(source, bags_csv, config)
    _require_held(path, joined.manifest.bags, joined.manifest.labels)
    if joined.without_features or joined.without_row:
        warn(f"left out: {_unmatched(joined.without_features, joined.without_row)}")
    warn_doubts(joined.manifest.bags, joined.manifest.task, warn)
    survey = survey_source(source, joined.manifest.bags, config, progress)
    counts = zip(joined.manifest.bags, survey.sizes, strict=True)
    empty = [bag.bag_id for bag, size in counts if not size]
    if empty:
        warn(f"{len(empty)} bags have no instance, and training leaves them out: {_some(empty)}")
    manifest = with_instances(joined.manifest, layout, survey)
    made_from = {"source": path.name} | ({"bags": bags_csv.name} if bags_csv else {})
    description = describe(source, manifest, survey, config, made_from)
    sizes = [len(instances_of(manifest, k)) for k in range(len(manifest.bags))]
    parts = plan_parts(sizes, description.row_bytes, config.part_instances)
    try:
        with open_writer(out, description, parts, manifest, say) as writer:
            missing = writer.missing()
            done = len(sizes) - sum(len(part.bags) for part in missing)
            written = 0
            for part in writer.claim_missing():
                with writer.part(part) as target:
                    _fill(target, part, source, survey)
                done, written = done + len(part.bags), written + 1
                progress(len(sizes) + done, 2 * len(sizes))
            writer.finish()
            missing = writer.missing()
    except OSError as error:
        raise disk_error(out, error) from error
    if not missing:
        warn_leaks(open_store(out), manifest.bags, warn)
    return ImportReport(
        layout=layout,
        bags=len(sizes),
        instances=sum(survey.sizes),
        labelled=all(bag.labels is not None for bag in manifest.bags),
        taps=survey.taps,
        without_features=joined.without_features,
        without_row=joined.without_row,
        parts_written=written,
        parts_missing=len(missing),
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
        bags, labels, task = read_bags(bags_csv, image_rows=True)
        manifest = replace(manifest, bags=bags, labels=labels, task=task)
        where = str(bags_csv)
    source_ids, table_ids = set(source.ids), {bag.bag_id for bag in manifest.bags}
    without_features = tuple(b.bag_id for b in manifest.bags if b.bag_id not in source_ids)
    without_row = tuple(bag_id for bag_id in source.ids if bag_id not in table_ids)
    kept = tuple(bag for bag in manifest.bags if bag.bag_id in source_ids)
    if config.unmatched == "refuse" or not kept:
        _require_matched(where, without_features, without_row)
    return Joined(replace(manifest, bags=kept), without_features, without_row)


def _require_held(path: Path, bags: Sequence[Bag], labels: Sequence[str]) -> None:
    """Raise `InputError` for what a source has and the store's tables could not hold."""
    try:
        require_held_bags(bags)
        require_held_labels("the data set", labels)
    except InputError as error:
        raise error.at(f"{path}, {error.where}") from error


def _require_matched(
    where: str, without_features: Sequence[str], without_row: Sequence[str]
) -> None:
    if without_features or without_row:
        raise InputError(
            where,
            expected="one row for each bag of features",
            got=_unmatched(without_features, without_row),
            remedy="correct the table, or give `unmatched=drop` to leave them out",
        )


def _unmatched(without_features: Sequence[str], without_row: Sequence[str]) -> str:
    """Bags that only the table or only the source has, and how two of them differ that look alike.

    A table and file names that disagree about leading zeros, say, have such pairs.
    """
    texts = []
    if without_features:
        texts.append(f"{len(without_features)} rows without features ({_some(without_features)})")
    if without_row:
        texts.append(f"{len(without_row)} bags of features without a row ({_some(without_row)})")
    alike = by_look(without_row)
    pairs = [(row, alike[look(row)]) for row in without_features if look(row) in alike]
    hint = ""
    if pairs:
        (row, other), more = pairs[0], f", and {len(pairs) - 1} more such" * (len(pairs) > 1)
        way = difference(row, other)
        hint = f": row {row!r} and features {other!r} differ by {way} alone{more}"
    return " and ".join(texts) + hint


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")


# --- the first reading -------------------------------------------------------------------------


def survey_source(
    source: Source, bags: Sequence[Bag], config: ImportConfig, progress: Progress
) -> Survey:
    """Read every bag once; raise for what a store cannot hold, before anything is written."""
    sizes, lost, digests = [], [], []
    shapes: dict[str, tuple[int, ...]] | None = None
    dtypes: dict[str, DType] = {}
    made_by, first = MadeBy(), ""
    for k, bag in enumerate(bags):
        features, rows = _read(source, bag.bag_id)
        bag_shapes = {tap: values.shape[1:] for (tap, _), values in rows.items()}
        if shapes is None:
            shapes, made_by, first = bag_shapes, features.made_by, features.where
        _require_alike(features, bag_shapes, shapes, made_by, first)
        for (tap, view), values in rows.items():
            dtype = config.dtype or exact_dtype(features.where, values)
            require_numbers(features.where, values)
            stored_values(f"{features.where}, tap {tap!r}, view {view}", bag.bag_id, values, dtype)
            dtypes[tap] = "float32" if "float32" in (dtype, dtypes.get(tap)) else "float16"
        sizes.append(len(features.records))
        lost.append(len(_lost_images(features)))
        digests.append(features.digest.hex())
        progress(k + 1, 2 * len(bags))
    for name in shapes or {}:
        if not is_step(name):
            raise InputError(
                first,
                expected="a tap's name without slashes",
                got=repr(name),
                remedy="correct it where the source names it",
            )
    taps = tuple(Tap(name, shape, dtypes[name]) for name, shape in (shapes or {}).items())
    if config.encoder is not None:
        made_by = _named(made_by, config.encoder, first)
    return Survey(tuple(sizes), tuple(lost), tuple(digests), taps, made_by)


def _read(source: Source, bag_id: str) -> tuple[BagFeatures, dict[tuple[str, str], Array]]:
    """A bag, and its rows as a store takes them."""
    with reading(source.path, f"bag {bag_id!r} in the layout {source.layout}"):
        features = source.read(bag_id)
        return features, _rows(features)


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


def _require_alike(
    features: BagFeatures,
    bag_shapes: dict[str, tuple[int, ...]],
    shapes: dict[str, tuple[int, ...]],
    made_by: MadeBy,
    first: str,
) -> None:
    """Raise unless a bag's features are of the shape and the network of the first bag's."""
    if bag_shapes != shapes or features.made_by != made_by:
        reshaped = bag_shapes != shapes
        expected, got = (shapes, bag_shapes) if reshaped else (made_by, features.made_by)
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
            expected=f"features of {encoder} (`encoder`)",
            got=f"features of {made_by.encoder}",
            remedy="leave `encoder` out, or correct it",
        )
    return replace(made_by, encoder=encoder)


# --- the store ---------------------------------------------------------------------------------


def with_instances(manifest: Manifest, layout: str, survey: Survey) -> Manifest:
    """The manifest with each bag's instances for the plan: as many rows, named by their digest.

    All rows of a bag are one object, so that large bags take no memory.
    """
    instances = {}
    counts = zip(manifest.bags, survey.sizes, survey.lost, survey.digests, strict=True)
    for bag, rows, lost, digest in counts:
        row = Instance(bag.bag_id, f"{layout}:{digest}", 0)
        instances[bag.bag_id] = (row,) * (rows + lost)
    return replace(manifest, instances=instances)


def describe(
    source: Source,
    manifest: Manifest,
    survey: Survey,
    config: ImportConfig,
    made_from: Mapping[str, str],
) -> StoreDescription:
    """The description of the store to write."""
    features = source.features or {
        "backbone": survey.made_by.encoder,
        "taps": [tap.name for tap in survey.taps],
        "source_layout": source.layout,
        "source_features_sha256": survey.made_by.sha256,
    }
    dtypes = sorted({tap.dtype for tap in survey.taps})
    numerics = {**(source.numerics or {}), "dtype": "+".join(dtypes), "imported": True}
    return StoreDescription(
        format=config.format,
        taps=survey.taps,
        views=source.views,
        made_from=made_from,
        provenance={
            "features": features,
            "numerics": numerics,
            "plan": {
                "source_layout": source.layout,
                "sources_sha256": manifest_digest(manifest),
                "bags": len(manifest.bags),
                "instances": sum(survey.sizes),
                "part_instances": config.part_instances,
                "part_bytes": PART_BYTES,
            },
        },
    )


def _fill(target: PartWriter, part: PartPlan, source: Source, survey: Survey) -> None:
    """Write the bags of one part: for each its rows, then its inputs that were not used."""
    dtypes = {tap.name: tap.dtype for tap in survey.taps}
    row = 0
    for k, bag_id, size in zip(part.bags, target.bags, target.sizes, strict=True):
        features, values = _read(source, bag_id)
        if features.digest.hex() != survey.digests[k]:
            raise InputError(
                features.where,
                expected="the bytes of a moment ago",
                got="others",
                remedy="repeat the command when no other program writes to it",
            )
        lost = _lost_images(features)
        rows = range(row, row + len(features.records))
        for view in source.views:
            stored = {
                tap: stored_values(features.where, bag_id, values[tap, view], dtype)
                for tap, dtype in dtypes.items()
            }
            target.put(rows, features.records, stored, view)
        for place, failure in enumerate(lost, start=rows.stop):
            target.fail(place, failure)
        row += size


def _lost_images(features: BagFeatures) -> list[Failure]:
    """Failures of single images; the writer itself records a bag without any."""
    return [failure for failure in features.failures if failure.image]
