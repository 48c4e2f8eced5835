"""Import and export: a round trip through a layout keeps everything; errors name the file."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest
import torch
import zarr
from folder_bytes import tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dragn_cache.errors import DragnCacheError, InputError, StoreMismatchError, UnknownNameError
from dragn_cache.files import require_file_names
from dragn_cache.interop import (
    SOURCES,
    TARGETS,
    Glimpse,
    export_features,
    find_layout,
    import_features,
    recognise,
)
from dragn_cache.interop.config import ImportConfig, SourceLayout, TargetLayout
from dragn_cache.interop.source import exact_dtype, row_values
from dragn_cache.manifest import Bag, Instance, Manifest
from dragn_cache.runs.train import train_run
from dragn_cache.store import (
    FORMATS,
    Failure,
    InstanceRecord,
    Store,
    StoreDescription,
    Tap,
    open_store,
    open_writer,
    plan_parts,
)
from dragn_cache.store.new_path import MARK
from dragn_cache.store.verify import verify_part
from dragn_cache.training.config import TrainConfig

SIZES = {"b/": 3, "ä 2": 1, "b10": 7, "b1": 2, "none": 0, "B7": 5}
WIDTH = 11
SUFFIX = {"hdf5": ".h5", "anndata": ".h5ad", "zarr": ".zarr"}
PER_BAG = [name for name, target in TARGETS.items() if target.named_files]


def ids_for(layout: str) -> dict[str, int]:
    """Bag sizes by id; without a slash in an id where the layout makes it a file's name."""
    rename = (lambda i: i.replace("/", "-")) if TARGETS[layout].named_files else str
    return {rename(bag_id): size for bag_id, size in SIZES.items()}


def make_store(
    path: Path,
    sizes: dict[str, int],
    *,
    format: str = "hdf5",
    dtype: str = "float16",
    views: tuple[str, ...] = ("0", "1"),
    task: str = "multilabel",
    boxed: bool = True,
) -> Store:
    """A store of a map and two vectors, in two parts, with labels, splits, groups and a failure."""
    taps = (
        Tap("layer4", (5, 2, 3), dtype),  # type: ignore[arg-type]
        Tap("gap", (WIDTH,), dtype),  # type: ignore[arg-type]
        Tap("head.1", (13,), "float32"),
    )
    provenance: dict[str, dict[str, Any]] = {
        "features": {"backbone": "net/7", "weights_sha256": "00ff", "taps": [t.name for t in taps]},
        "numerics": {"dtype": dtype, "batch_size": 4},
        "plan": {"bags": len(sizes)},
    }
    description = StoreDescription(format, taps, provenance, views)  # type: ignore[arg-type]
    names = ("golgi; cis", "actin", "nucleus")
    bags = tuple(
        Bag(
            bag_id,
            (names[k % 3],) if task == "multiclass" else names[: k % 3],
            ("train", "test", "validation")[k % 3],
            f"g{k // 2}" if k else "",
            {"stage": f"0{k}"},
        )
        for k, bag_id in enumerate(sizes)
    )
    lost = set(list(sizes)[2:3])  # a bag with one more image, which could not be used
    instances = {
        bag_id: tuple(Instance(bag_id, f"img/{k}.png", k) for k in range(size + (bag_id in lost)))
        for bag_id, size in sizes.items()
    }
    manifest = Manifest("tiny set", task, names, bags, instances, Path(), title="T", licence="CC0")  # type: ignore[arg-type]
    planned = [len(instances[bag_id]) for bag_id in sizes]
    rng = np.random.default_rng(17)
    with open_writer(path, description, plan_parts(planned, 1, 7), manifest) as writer:
        for part in writer.missing():
            with writer.part(part) as target:
                row = 0
                for k in part.bags:
                    size = sizes[bags[k].bag_id]
                    for view in views:
                        target.put(
                            range(row, row + size),
                            [_record(j, boxed) for j in range(size)],
                            {
                                t.name: rng.normal(size=(size, *t.shape)).astype(t.dtype)
                                for t in taps
                            },
                            view,
                        )
                    if bags[k].bag_id in lost:
                        target.fail(row + size, Failure(bags[k].bag_id, "img/7.png", "", "torn"))
                    row += planned[k]
        writer.finish()
    return open_store(path)


def _record(j: int, boxed: bool) -> InstanceRecord:
    box = (j * 19, 23, j * 19 + 29, 52) if boxed else (0, 0, 41, 53)
    return InstanceRecord(f"img/{j}.png", box, j, bytes([j]) * 32)


def same_features(a: Store, b: Store, taps: dict[str, str], views: tuple[str, ...]) -> None:
    """Equal bytes, types and orders of bags and instances; ``taps`` maps a's names to b's."""
    assert a.bag_ids == b.bag_ids
    for mine, other in taps.items():
        for view in views:
            values, offsets = a.load(mine, view=view)
            again, again_offsets = b.load(other, view=view)
            assert values.dtype == again.dtype
            assert values.tobytes() == again.tobytes()
            assert offsets.tolist() == again_offsets.tolist()


def labelling(store: Store) -> list[Any]:
    columns = [(b.bag_id, b.labels, b.split, b.group, b.extra["stage"]) for b in store.bags]
    return [store.name, store.task, store.labels, columns]


# --- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("layout", list(TARGETS))
@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_what_goes_out_comes_back(tmp_path: Path, layout: str, format: str, task: str) -> None:
    store = make_store(tmp_path / "a", ids_for(layout), format=format, task=task)
    out = tmp_path / f"out{SUFFIX.get(layout, '')}"
    report = export_features(store, out, layout)
    assert find_layout(out) == layout
    again_path = tmp_path / "b"
    config = ImportConfig(format=format, part_instances=7)  # type: ignore[arg-type]
    got = import_features(out, again_path, config)
    again = open_store(again_path)
    assert [verify_part(again, n).bags for n in again.parts] == [()] * len(again.parts)
    assert len(again.parts) > 1
    same_features(store, again, {tap: tap for tap in report.taps}, report.views)
    assert labelling(again) == labelling(store)
    assert (got.bags, got.instances, got.layout) == (6, 18, layout)
    expected = ["layer4", "gap", "head.1"] if TARGETS[layout].holds_all else ["gap"]
    assert [tap.name for tap in again.description.taps] == expected
    assert again.description.views == report.views
    assert again.description.provenance["features"]["backbone"] == "net/7"
    assert again.description.provenance["numerics"]["imported"] is True
    before = tree(again_path)
    assert import_features(out, again_path, config).parts_written == 0
    assert tree(again_path) == before


@pytest.mark.parametrize("layout", ["hdf5", "zarr"])
def test_a_whole_file_keeps_boxes_images_failures_and_the_features_digest(
    tmp_path: Path, layout: str
) -> None:
    store = make_store(tmp_path / "a", SIZES)
    export_features(store, tmp_path / "whole", layout)
    import_features(tmp_path / "whole", tmp_path / "b", ImportConfig(layout=layout))
    again = open_store(tmp_path / "b")
    assert again.description.digest("features") == store.description.digest("features")
    assert set(again.failures()) == set(store.failures())
    assert len(again.failures()) == 2
    for bag_id in SIZES:
        mine, other = store.instances(bag_id), again.instances(bag_id)
        assert mine.images == other.images
        assert mine.boxes.tolist() == other.boxes.tolist()
        assert mine.order.tolist() == other.order.tolist()
        assert mine.image_digests.tobytes() == other.image_digests.tobytes()
        assert mine.digests.tobytes() == other.digests.tobytes()


@pytest.mark.parametrize("layout", list(TARGETS))
def test_coords_are_corners_else_orders(tmp_path: Path, layout: str) -> None:
    sizes = {"p": 2, "q": 3}
    for boxed, expected in [
        (True, [[0, 23], [19, 23], [38, 23]]),
        (False, [[0, 0], [1, 0], [2, 0]]),
    ]:
        store = make_store(tmp_path / f"a{boxed}", {**sizes, "r": 1}, boxed=boxed)
        out = tmp_path / f"out{boxed}{SUFFIX.get(layout, '')}"
        export_features(store, out, layout)
        if layout == "clam":
            with h5py.File(out / "h5_files" / "q.h5") as file:
                assert file["coords"][:].tolist() == expected
        elif layout == "trident":
            with h5py.File(out / "features_net_7" / "q.h5") as file:
                assert file["coords"][:].tolist() == expected
        elif layout == "torchmil":
            assert np.load(out / "coords" / "q.npy").tolist() == expected
        elif layout == "anndata":
            import anndata

            data = anndata.read_h5ad(out)
            assert data.obsm["spatial"][(data.obs["bag_id"] == "q").to_numpy()].tolist() == expected
        import_features(out, tmp_path / f"b{boxed}")
        boxes = open_store(tmp_path / f"b{boxed}").instances("q").boxes.tolist()
        if TARGETS[layout].holds_all or layout == "anndata":
            assert boxes == store.instances("q").boxes.tolist()
        else:
            assert [box[:2] for box in boxes] == expected
        if boxed and layout == "trident":
            assert boxes[1] == [19, 23, 48, 52]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    layout=st.sampled_from(list(TARGETS)),
    seed=st.integers(0, 2**16),
)
def test_any_bits_survive(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], layout: str, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("bits")
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    bits = np.random.default_rng(seed).integers(0, 2**32, (offsets[-1], 7), np.uint64)
    features = bits.astype(np.uint32).view(np.float32)
    features[~np.isfinite(features)] = -0.0
    ids = [f"0{k}" for k in range(len(sizes))]
    np.savez(folder / "x.npz", features=features, offsets=offsets, bag_ids=np.array(ids))
    import_features(folder / "x.npz", folder / "a")
    store = open_store(folder / "a")
    assert store.load()[0].tobytes() == features.tobytes()
    assert all(bag.labels is None for bag in store.bags)
    out = folder / f"out{SUFFIX.get(layout, '')}"
    export_features(store, out, layout)
    import_features(out, folder / "b")
    same_features(store, open_store(folder / "b"), {"features": "features"}, ("0",))


# --- what other tools read ---------------------------------------------------------------------


def test_clams_way_of_reading(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a", {"s1": 3, "s2": 5})
    out = tmp_path / "clam"
    export_features(store, out, "clam")
    for bag_id, size in [("s1", 3), ("s2", 5)]:
        with h5py.File(out / "h5_files" / f"{bag_id}.h5", "r") as file:
            features, coords = file["features"][:], file["coords"][:]
        tensor = torch.load(out / "pt_files" / f"{bag_id}.pt")
        assert tensor.shape == (size, WIDTH)
        assert tensor.dtype == torch.float16
        assert tensor.numpy().tobytes() == features.tobytes() == store.bag(bag_id, "gap").tobytes()
        assert coords.shape == (size, 2)
    text = (out / "slides.csv").read_text()
    assert text == "case_id,slide_id,label\ns1,s1,\ns2,g0,golgi; cis\n".replace("s2,g0", "g0,s2")
    shutil.rmtree(out / "h5_files")  # the tensors alone do as well
    assert find_layout(out) == "pt"
    import_features(out, tmp_path / "b")
    same_features(store, open_store(tmp_path / "b"), {"gap": "gap"}, ("0",))


def test_rows_of_a_large_bag_are_chunked_in_at_least_256_kib(tmp_path: Path) -> None:
    features = np.ones((20011, 7), np.float32)
    np.savez(tmp_path / "x.npz", features=features, offsets=[0, 20011], bag_ids=["a"])
    import_features(tmp_path / "x.npz", tmp_path / "a")
    export_features(open_store(tmp_path / "a"), tmp_path / "out", "trident")
    with h5py.File(tmp_path / "out" / "features_unknown" / "a.h5") as file:
        assert file["features"].chunks == (9363, 7)  # 262,164 bytes
        assert file["features"].attrs["encoder"] == "unknown"
        assert file["features"].attrs["name"] == "a"


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torchmil leaves them as they are
@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_torchmil_reads_its_folders(tmp_path: Path, task: str) -> None:
    datasets = pytest.importorskip("torchmil.datasets", reason="torchmil is not installed")
    store = make_store(tmp_path / "a", {"s1": 3, "s2": 5, "s3": 7}, task=task)
    out = tmp_path / "out"
    export_features(store, out, "torchmil")
    data = datasets.ProcessedMILDataset(
        features_path=str(out / "features"),
        labels_path=str(out / "labels"),
        coords_path=str(out / "coords"),
        bag_keys=["X", "Y", "coords", "adj"],
    )
    assert data.get_bag_names() == ["s1", "s2", "s3"]
    expected = [[0], [1], [2]] if task == "multiclass" else [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    for k, bag_id in enumerate(store.bag_ids):
        bag = data[k]
        assert bag["X"].numpy().tobytes() == store.bag(bag_id, "gap").tobytes()
        assert bag["Y"].tolist() == expected[k]
        assert bag["coords"].shape == (len(bag["X"]), 2)
        assert bag["adj"].shape == (len(bag["X"]),) * 2
    (out / "bags.csv").unlink()  # without the table, numbers name the classes
    import_features(out, tmp_path / "b")
    again = open_store(tmp_path / "b")
    numbers = [("0",), ("1",), ("2",)] if task == "multiclass" else [(), ("0",), ("0", "1")]
    assert [bag.labels for bag in again.bags] == numbers
    assert again.task == task


def test_anndata_reads_its_file(tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata", reason="anndata is not installed")
    store = make_store(tmp_path / "a", SIZES)
    export_features(store, tmp_path / "x.h5ad", "anndata", tap="head.1")
    data = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert data.X.dtype == np.float32
    assert data.X.tobytes() == store.load("head.1")[0].tobytes()
    assert data.obs["bag_id"].tolist() == [b for b, size in SIZES.items() for _ in range(size)]
    assert data.obs["order"].tolist() == [j for size in SIZES.values() for j in range(size)]
    assert data.obs["image"].tolist()[4] == "img/0.png"
    record = json.loads(data.uns["dragn_cache"]["store_json"])
    assert record["digests"]["features"] == store.description.digest("features")


def test_a_foreign_anndata_of_mixed_rows(tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata", reason="anndata is not installed")
    import pandas as pd

    values = np.arange(35, dtype=np.float32).reshape(7, 5)
    obs = pd.DataFrame(
        {"patient": list("pqpqrpq"), "label": list("xyxyzxy")}, index=[f"c{k}" for k in range(7)]
    )
    anndata.AnnData(values, obs=obs).write_h5ad(tmp_path / "x.h5ad")
    import_features(tmp_path / "x.h5ad", tmp_path / "a")
    store = open_store(tmp_path / "a")
    assert store.bag_ids == ["p", "q", "r"]
    assert store.bag("q")[:, 0].tolist() == [5, 15, 30]
    assert [bag.labels for bag in store.bags] == [("x",), ("y",), ("z",)]
    assert store.task == "multiclass"
    obs["label"] = list("xyxyzxx")
    anndata.AnnData(values, obs=obs).write_h5ad(tmp_path / "y.h5ad")
    with pytest.raises(InputError, match="other values for 'q' than at line 3"):
        import_features(tmp_path / "y.h5ad", tmp_path / "b")
    obs = obs.rename(columns={"patient": "who"})
    anndata.AnnData(values, obs=obs).write_h5ad(tmp_path / "z.h5ad")
    with pytest.raises(InputError, match=r"a column of bag ids in obs.*got who"):
        import_features(tmp_path / "z.h5ad", tmp_path / "b")


def test_an_anndata_keeps_ids_and_cells_as_they_are_or_refuses_them(tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata", reason="anndata is not installed")
    import pandas as pd

    values = np.arange(15, dtype=np.float32).reshape(3, 5)
    obs = pd.DataFrame({"bag_id": ["p", "p\rq", "p"], "group": ["g\rh", "", "g\rh"]})
    obs.index = obs.index.astype(str)
    anndata.AnnData(values, obs=obs).write_h5ad(tmp_path / "x.h5ad")
    import_features(tmp_path / "x.h5ad", tmp_path / "a")
    store = open_store(tmp_path / "a")
    assert [(bag.bag_id, bag.group) for bag in store.bags] == [("p", "g\rh"), ("p\rq", "")]
    assert store.bag("p")[:, 0].tolist() == [0, 10]
    obs = obs.assign(
        bag_id=["p", "p ", "p"], group="g"
    )  # two bags: read as one, their rows would be mixed
    anndata.AnnData(values, obs=obs).write_h5ad(tmp_path / "y.h5ad")
    with pytest.raises(InputError, match=r"y.h5ad, bag 'p ', bag_id: .*'p ': space around it"):
        import_features(tmp_path / "y.h5ad", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_padded_label_in_an_exports_description_is_refused(tmp_path: Path) -> None:
    export_features(
        make_store(tmp_path / "a", ids_for("clam")), tmp_path / "x", "clam", tap="head.1"
    )
    toml = tmp_path / "x" / "dataset.toml"
    text = toml.read_text()
    label = open_store(tmp_path / "a").labels[0]
    toml.write_text(text.replace(f'"{label}"', f'"{label} "'))
    assert toml.read_text() != text
    with pytest.raises(InputError, match=r"dataset.toml: labels: expected distinct non-empty"):
        import_features(tmp_path / "x", tmp_path / "b")


def test_without_anndata_the_install_line_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "anndata", None)
    store = make_store(tmp_path / "a", {"s1": 3, "s2": 1, "s3": 2})
    with pytest.raises(InputError, match=r"pip install 'dragn-cache\[anndata\]'"):
        export_features(store, tmp_path / "x.h5ad", "anndata")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("layout", ["hdf5", "zarr"])
def test_plain_libraries_read_a_whole_file(tmp_path: Path, layout: str) -> None:
    store = make_store(tmp_path / "a", SIZES)
    export_features(store, tmp_path / "x", layout)
    root: Any = (
        h5py.File(tmp_path / "x") if layout == "hdf5" else zarr.open_group(tmp_path / "x", mode="r")
    )
    offsets = root["bags/offsets"][:]
    assert offsets.tolist() == [0, 3, 4, 11, 13, 13, 18]
    rows = root["taps/layer4/1"][offsets[2] : offsets[3]]
    assert rows.tobytes() == store.bag("b10", "layer4", view="1").tobytes()
    text = root["store/bags_csv"][0]
    assert (text.decode() if isinstance(text, bytes) else str(text)).startswith("bag_id,labels,")
    if layout == "hdf5":
        root.close()


# --- what other tools write --------------------------------------------------------------------

ROWS = np.linspace(-3, 3, 35, dtype=np.float32).reshape(7, 5)


def write_h5(path: Path, name: str, values: Any, coords: Any = None, **attributes: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[name] = values
        if coords is not None:
            file["coords"] = coords
        file.attrs.update(attributes)


def test_stamps_micrometres_become_pixels(tmp_path: Path) -> None:
    facts = {"extractor": "uni-1234", "unit": "um", "tile_size_um": 256.0, "tile_size_px": 224}
    coords = np.array([[0, 256], [512, 0], [768, 1024]], np.float32)
    write_h5(tmp_path / "s" / "p.h5", "feats", ROWS[:3].astype(np.float16), coords, **facts)
    assert find_layout(tmp_path / "s") == "stamp"
    import_features(tmp_path / "s", tmp_path / "a")
    store = open_store(tmp_path / "a")
    features = store.description.provenance["features"]
    assert (features["backbone"], features["source_layout"]) == ("uni-1234", "stamp")
    assert len(features["source_features_sha256"]) == 64
    assert store.bag("p").dtype == np.float16
    assert store.instances("p").boxes.tolist() == [
        [0, 224, 224, 448],
        [448, 0, 672, 224],
        [672, 896, 896, 1120],
    ]


def test_a_trident_job_folder(tmp_path: Path) -> None:
    job = tmp_path / "20x_512px"
    write_h5(job / "patches" / "s1_patches.h5", "coords", np.zeros((3, 2), np.int64))
    for name, k in [("s1", 3), ("s2", 7)]:
        file = job / "features_uni" / f"{name}.h5"
        write_h5(file, "features", ROWS[None, :k], np.zeros((k, 2), np.int64) + k)
        with h5py.File(file, "r+") as opened:
            opened["features"].attrs["encoder"] = "uni"
            opened["coords"].attrs["patch_size_level0"] = 1024
    assert find_layout(job) == "trident"
    import_features(job, tmp_path / "a")
    store = open_store(tmp_path / "a")
    assert store.bag_ids == ["s1", "s2"]
    assert store.bag("s2").tolist() == ROWS.tolist()
    assert store.instances("s1").boxes[1].tolist() == [3, 3, 1027, 1027]
    assert store.description.provenance["features"]["backbone"] == "uni"
    with h5py.File(job / "features_uni" / "s2.h5", "r+") as opened:
        opened["features"].attrs["encoder"] = "gigapath"
    with pytest.raises(InputError, match=r"s2\.h5: expected what .*s1\.h5 has, encoder uni, got"):
        import_features(job, tmp_path / "b")
    (job / "features_conch").mkdir()
    with pytest.raises(InputError, match="features_conch, features_uni; give one of them"):
        import_features(job, tmp_path / "b")


TENSORS: dict[str, tuple[Any, Any]] = {
    "plain": (torch.from_numpy(ROWS), ROWS),
    "half": (torch.from_numpy(ROWS).half(), ROWS.astype(np.float16)),
    "bfloat16": (torch.from_numpy(ROWS).bfloat16(), None),
    "one more dimension": (torch.from_numpy(ROWS)[None], ROWS),
    "rows": ([torch.from_numpy(row) for row in ROWS], ROWS),
    "pieces": ([torch.from_numpy(ROWS[:2]), torch.from_numpy(ROWS[2:])], ROWS),
    "dictionary": ({"features": torch.from_numpy(ROWS), "x": 1}, ROWS),
    "double": (torch.from_numpy(ROWS).double(), ROWS),
    "pooled map": (torch.from_numpy(ROWS)[:, :, None, None], ROWS),
    "needs a gradient": (torch.from_numpy(ROWS).requires_grad_(), ROWS),
}


@pytest.mark.parametrize("form", list(TENSORS))
def test_tensors_of_every_form(tmp_path: Path, form: str) -> None:
    content, expected = TENSORS[form]
    (tmp_path / "t").mkdir()
    torch.save(content, tmp_path / "t" / "a.pt")
    import_features(tmp_path / "t", tmp_path / "s")
    got = open_store(tmp_path / "s").bag("a")
    if expected is None:  # each bfloat16 is the upper half of a float32
        assert got.dtype == np.float32
        assert not (got.view(np.uint32) & 0xFFFF).any()
        np.testing.assert_allclose(got, ROWS, rtol=2**-8)
    else:
        assert (got.dtype, got.tobytes()) == (expected.dtype, expected.tobytes())


def test_maps_are_kept(tmp_path: Path) -> None:
    maps = np.arange(2 * 5 * 3 * 7, dtype=np.float32).reshape(2, 5, 3, 7)
    (tmp_path / "n").mkdir()
    np.save(tmp_path / "n" / "a.npy", maps)
    import_features(tmp_path / "n", tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert store.bag("a").tobytes() == maps.tobytes()
    export_features(store, tmp_path / "clam", "clam")  # as (N, C, h, w)
    assert torch.load(tmp_path / "clam" / "pt_files" / "a.pt").shape == (2, 5, 3, 7)
    with pytest.raises(InputError, match=r"layout anndata: expected a vector.*maps of 5×3×7"):
        export_features(store, tmp_path / "x.h5ad", "anndata")


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


def test_code_in_a_source_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    torch.save(Trap(str(tmp_path / "sprung")), tmp_path / "t" / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt: expected a whole pt file"):
        import_features(tmp_path / "t", tmp_path / "s")
    (tmp_path / "n").mkdir()
    np.save(tmp_path / "n" / "a.npy", np.array([Trap(str(tmp_path / "sprung"))]), allow_pickle=True)
    with pytest.raises(InputError, match=r"a\.npy: expected a whole npy file"):
        import_features(tmp_path / "n", tmp_path / "s")
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "s").exists()


def write_npz(path: Path, **changes: Any) -> Path:
    """Pooled rows in the form of the classic benchmarks."""
    arrays = {
        "features": ROWS,
        "offsets": np.array([0, 2, 2, 7]),
        "targets": np.array([[1, 0], [0, 0], [1, 1]], np.int8),
        "bag_ids": np.array(["007", "NA", "x/y"]),
        "labels": np.array(["musk", "other"]),
    } | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bag_ids": ["x", "x ", "y"]}, "bag 'x ', bag_id: .* got 'x ': space around it"),
        ({"bag_ids": ["x", "", "y"]}, "expected ids that tell bags apart, got an empty id"),
        ({"bag_ids": ["x", "y" * 131_073, "z"]}, "131073 characters, more than 131072"),
        ({"labels": ["p", " q"]}, "labels: expected labels without space around them"),
        ({"labels": ["p", ""]}, "labels: expected labels without space around them, none empty"),
    ],
)
def test_an_npz_of_texts_that_no_table_holds_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_npz(tmp_path / "x.npz", **changes)
    with pytest.raises(InputError, match=f"x.npz, .*{message}"):
        import_features(path, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_an_npz_brings_its_labels(tmp_path: Path) -> None:
    import_features(write_npz(tmp_path / "x.npz"), tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert [(b.bag_id, b.labels) for b in store.bags] == [
        ("007", ("musk",)),
        ("NA", ()),
        ("x/y", ("musk", "other")),
    ]
    assert (store.name, store.task, store.labels) == ("x", "multilabel", ("musk", "other"))
    assert store.bag("x/y").tolist() == ROWS[2:].tolist()
    assert store.bag("NA").shape == (0, 5)
    assert store.failures() == [Failure("NA", "", "", "the manifest has no image for this bag")]


def test_imported_features_train(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 7, 43)
    targets = rng.integers(0, 2, (43, 1)).astype(np.int8)
    values = rng.normal(size=(sizes.sum(), 13)) + 2 * np.repeat(targets, sizes, axis=0)
    np.savez(
        tmp_path / "x.npz",
        features=values.astype(np.float32),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        targets=targets,
        bag_ids=[f"m{k}" for k in range(43)],
        labels=["musk"],
    )
    import_features(tmp_path / "x.npz", tmp_path / "s")
    for aggregator in ("mean", "max"):
        config = TrainConfig(aggregator=aggregator, epochs=20, lr=0.03, intervals=0)
        scores = train_run(open_store(tmp_path / "s"), config, tmp_path / aggregator)
        assert scores["test"]["auc_macro"] > 0.8


# --- labels ------------------------------------------------------------------------------------


def write_rows(folder: Path, sizes: dict[str, int]) -> Path:
    folder.mkdir()
    for bag_id, size in sizes.items():
        np.save(folder / f"{bag_id}.npy", ROWS[:size])
    return folder


def test_a_table_gives_order_labels_splits_and_groups(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "n", {"s1": 2, "s2": 3, "s3": 5})
    table = tmp_path / "slides.csv"
    table.write_text(
        "case_id,slide_id,label,split\nc1,s3,tumour,val\nc1,s1,normal,\nc2,s2,tumour,\n"
    )
    import_features(source, tmp_path / "a", bags_csv=table)
    store = open_store(tmp_path / "a")
    assert [(b.bag_id, b.labels, b.split, b.group) for b in store.bags] == [
        ("s3", ("tumour",), "validation", "c1"),
        ("s1", ("normal",), "", "c1"),
        ("s2", ("tumour",), "", "c2"),
    ]
    assert store.task == "multiclass"
    assert np.diff(store.load()[1]).tolist() == [5, 2, 3]
    table.write_text("slide_id,label\ns3,other\ns1,normal\ns2,other\n")
    assert import_features(source, tmp_path / "a", bags_csv=table).parts_written == 0
    assert open_store(tmp_path / "a").bags[0].labels == ("other",)


def test_a_table_of_other_bags_is_refused_or_joined(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "n", {"s1": 2, "s2": 3, "s3": 5})
    table = tmp_path / "t.csv"
    table.write_text("bag_id,labels\ns2,x\ns9,y\ns8,y\n")
    match = (
        r"t\.csv: expected one row for each bag of features, got 2 rows without features "
        r"\(s9, s8\) and 2 bags of features without a row \(s1, s3\); .*`unmatched=drop`"
    )
    with pytest.raises(InputError, match=match):
        import_features(source, tmp_path / "a", bags_csv=table)
    report = import_features(source, tmp_path / "a", ImportConfig(unmatched="drop"), bags_csv=table)
    assert (report.without_features, report.without_row) == (("s9", "s8"), ("s1", "s3"))
    assert open_store(tmp_path / "a").bag_ids == ["s2"]
    table.write_text("bag_id,labels\ns9,y\n")
    with pytest.raises(InputError, match="1 rows without features"):
        import_features(source, tmp_path / "b", ImportConfig(unmatched="drop"), bags_csv=table)


def test_an_import_tells_what_misleads(tmp_path: Path) -> None:
    """An empty bag, ids and labels that look alike, and two bags of the same features."""
    source = write_rows(tmp_path / "n", {"07": 2, "7": 0, "c": 2, "d": 3})
    table = tmp_path / "t.csv"
    table.write_text("bag_id,labels\n07,x;y\n7,X\nc,y\nd,\n")
    said: list[str] = []
    import_features(source, tmp_path / "s", bags_csv=table, warn=said.append)
    labels, ids, empty, same = said
    assert "'X' here and 'x' at line 2, which differ by case" in labels
    assert "'7' here and '07' at line 2, which differ by leading zeros" in ids
    assert empty == "1 bags have no instance, and training leaves them out: 7"
    assert same.startswith("bags with the same features perhaps on two sides of a fold: '07' and")
    said.clear()
    import_features(write_npz(tmp_path / "x.npz"), tmp_path / "t", warn=said.append)
    assert said == ["1 bags have no instance, and training leaves them out: NA"]


def test_bags_that_do_not_match_are_told_by_what_they_differ_in(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "n", {"007": 2, "008": 3, "a": 5})
    table = tmp_path / "t.csv"
    table.write_text("bag_id,labels\n7,x\n8,y\na,y\n")
    hint = ": row '7' and features '007' differ by leading zeros alone, and 1 more such"
    with pytest.raises(InputError, match=hint):
        import_features(source, tmp_path / "a", bags_csv=table)
    said: list[str] = []
    drop = ImportConfig(unmatched="drop")
    import_features(source, tmp_path / "a", drop, bags_csv=table, warn=said.append)
    assert said[0].startswith("left out: 2 rows without features (7, 8) and 2 bags of features ")
    assert said[0].endswith(hint)


# --- refusals ----------------------------------------------------------------------------------


def nan_at(row: int) -> np.ndarray:
    values = ROWS.copy()
    values[row, 1] = np.nan
    return values


BAD_ARRAYS: dict[str, tuple[np.ndarray, str]] = {
    "not a number": (nan_at(4), r"b\.npy.*bag 'b': expected finite values.*got nan"),
    "one dimension": (ROWS[0], r"b\.npy: expected features of shape .*got \(5,\)"),
    "three dimensions": (ROWS.reshape(7, 5, 1), r"got \(7, 5, 1\)"),
    "another width": (ROWS[:, :3], r"b\.npy: expected what .*a\.npy has, features of 5, got .*3"),
    "text": (np.full((2, 5), "x"), r"b\.npy: expected numbers, got type <U1"),
    "complex": (ROWS.astype(np.complex64), r"expected numbers, got type complex64"),
    "too fine": (ROWS.astype(np.float64) + 1e-12, r"float32 holds exactly.*`dtype=float32`"),
    "too long": (np.full((2, 5), 2**24 + 1), r"float32 holds exactly, got int64 with .*16777217"),
}


@pytest.mark.parametrize("fault", list(BAD_ARRAYS))
def test_a_bag_that_a_store_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, fault: str
) -> None:
    values, match = BAD_ARRAYS[fault]
    source = write_rows(tmp_path / "n", {"a": 3})
    np.save(source / "b.npy", values)
    with pytest.raises(InputError, match=match):
        import_features(source, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_type_asked_for_rounds(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "n", {"a": 3})
    np.save(source / "a.npy", ROWS.astype(np.float64) + 1e-12)
    import_features(source, tmp_path / "s", ImportConfig(dtype="float32"))
    assert open_store(tmp_path / "s").bag("a").tolist() == (ROWS + 1e-12).astype("f4").tolist()
    np.save(source / "a.npy", np.array([[7e4]]))
    with pytest.raises(InputError, match=r"up to 65504.*got 70000; use `dtype=float32`"):
        import_features(source, tmp_path / "t", ImportConfig(dtype="float16"))


def test_mixed_types_take_the_wider(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "n", {"a": 3})
    np.save(source / "b.npy", ROWS.astype(np.float16))
    np.save(source / "c.npy", ROWS.astype(">f4"))
    import_features(source, tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert store.bag("b").dtype == np.float32
    assert store.bag("b").tolist() == ROWS.astype(np.float16).tolist()
    assert store.bag("c").tolist() == ROWS.tolist()


def damage_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(ROWS[1].tobytes())
    data[at] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", [".h5", ".pt", ".npy", ".npz", ".h5ad"])
def test_a_truncated_source_is_named(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / "n"
    source.mkdir()
    path = source / f"a{suffix}"
    if suffix == ".h5":
        write_h5(path, "features", ROWS)
    elif suffix == ".pt":
        torch.save(torch.from_numpy(ROWS), path)
    elif suffix == ".npy":
        np.save(path, ROWS)
    elif suffix == ".npz":
        write_npz(path)
    else:
        anndata = pytest.importorskip("anndata", reason="anndata is not installed")
        anndata.AnnData(ROWS).write_h5ad(path)
    damage_half(path)
    with pytest.raises(InputError, match=rf"a\{suffix}: expected an? ") as caught:
        import_features(path, tmp_path / "s")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_a_changed_bit_in_a_tensor_or_a_whole_file_is_found(tmp_path: Path) -> None:
    torch.save(torch.from_numpy(ROWS), tmp_path / "a.pt")
    damage_bit(tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt: .*other bytes than were written"):
        import_features(tmp_path / "a.pt", tmp_path / "s")
    import_features(write_npz(tmp_path / "x.npz"), tmp_path / "a")
    export_features(open_store(tmp_path / "a"), tmp_path / "x.h5", "hdf5")
    damage_bit(tmp_path / "x.h5")
    with pytest.raises(InputError, match=r"x\.h5, bag '007': expected features that give their"):
        import_features(tmp_path / "x.h5", tmp_path / "s")


def test_a_source_that_is_still_written_is_refused(tmp_path: Path) -> None:
    write_h5(tmp_path / "f" / "a.h5", "features", ROWS)
    (tmp_path / "f" / "a.h5.lock").touch()
    with pytest.raises(InputError, match=r"a\.h5: expected a finished file, got a lock beside it"):
        import_features(tmp_path / "f", tmp_path / "s")


def test_a_bag_in_two_folders_is_refused(tmp_path: Path) -> None:
    for folder in ("train", "test"):
        write_h5(tmp_path / "f" / folder / "a.h5", "features", ROWS)
    with pytest.raises(InputError, match=r"train/a\.h5: expected one file per bag, got bag 'a' al"):
        import_features(tmp_path / "f", tmp_path / "s")


def test_coords_must_fit_the_features(tmp_path: Path) -> None:
    write_h5(tmp_path / "f" / "a.h5", "features", ROWS, np.zeros((6, 2)))
    with pytest.raises(InputError, match=r"coords of shape \(7, 2\).*got float64 \(6, 2\)"):
        import_features(tmp_path / "f", tmp_path / "s")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"offsets": np.array([0, 2, 7])}, "3 distinct bag_ids, and offsets"),
        ({"offsets": np.array([0, 5, 2, 7])}, "offsets that run from 0 to 7"),
        ({"offsets": np.array([0, 2, 2, 6])}, "offsets .* from 0 to 6"),
        ({"bag_ids": np.array(["a", "a", "b"])}, "got 2 bag_ids"),
        ({"targets": np.array([[1, 2], [0, 0], [0, 0]])}, "targets of 0 and 1, 3 × 2"),
        ({"labels": np.array(["musk"])}, "targets of 0 and 1, 3 × 1"),
        ({"features": None}, "nothing named .*features"),
    ],
)
def test_an_npz_that_cannot_be_right_is_refused(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=rf"x\.npz: expected .*{match}"):
        import_features(write_npz(tmp_path / "x.npz", **changes), tmp_path / "s")


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (["a", "b/c"], r"bag 'b/c': .*a slash"),
        (["a", "b\\c"], "a slash"),
        (["a", ".."], "a dot at its start"),
        (["a", ""], "an empty one"),
        (["a", "b\0"], "a control character"),
        (["a", "ä" * 126], "252 bytes"),
        (["slide", "Slide"], "differs from 'slide' only by case"),
        (["é", "é"], "only by case"),
    ],
)
def test_ids_that_are_no_file_name_are_refused(ids: list[str], match: str) -> None:
    with pytest.raises(InputError, match=rf"{match}.*export to `layout=hdf5`"):
        require_file_names(ids)
    require_file_names(["a", "b.c", "ä" * 125, "b c"])


@pytest.mark.parametrize("layout", PER_BAG)
def test_an_id_with_a_slash_is_not_exported_as_a_file(tmp_path: Path, layout: str) -> None:
    store = make_store(tmp_path / "a", SIZES)
    with pytest.raises(InputError, match="bag 'b/'"):
        export_features(store, tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", list(TARGETS))
def test_what_is_there_is_never_overwritten(tmp_path: Path, layout: str) -> None:
    store = make_store(tmp_path / "a", ids_for(layout))
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.doc").write_text("mine")
    with pytest.raises(InputError, match="out: expected a path where nothing is, got a folder"):
        export_features(store, out, layout)
    assert [p.name for p in out.iterdir()] == ["thesis.doc"]
    with pytest.raises(InputError, match=r"thesis\.doc: expected a path .*got a file"):
        export_features(store, out / "thesis.doc", layout)


@pytest.mark.parametrize("layout", list(TARGETS))
def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "a", ids_for(layout))
    shutil.copytree(tmp_path / "a", tmp_path / "whole")
    killed, not_ours = tmp_path / ".out.0123.new", tmp_path / ".out.4567.new"
    for folder in (killed, not_ours):
        folder.mkdir()
        (folder / "half").touch()
    (killed / MARK).touch()
    part = store.part_path(store.parts[-1])
    part.write_bytes(part.read_bytes()[:5000])
    with pytest.raises(DragnCacheError, match="expected the part as it was written"):
        export_features(open_store(tmp_path / "a"), tmp_path / "out", layout)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.4567.new", "a", "whole"]
    assert [p.name for p in not_ours.iterdir()] == ["half"]
    export_features(open_store(tmp_path / "whole"), tmp_path / "out", layout)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.4567.new", "a", "out", "whole"]


def test_the_layouts_that_settings_allow_are_those_there_are() -> None:
    assert get_args(SourceLayout) == tuple(SOURCES)
    assert get_args(TargetLayout) == tuple(TARGETS)


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a", {"s1": 3, "s2": 1, "s3": 2})
    with pytest.raises(UnknownNameError, match=r"layout: .*did you mean clam"):
        export_features(store, tmp_path / "out", "clan")
    with pytest.raises(InputError, match=r"^tap: expected none: layout zarr holds every tap"):
        export_features(store, tmp_path / "out", "zarr", tap="gap")
    with pytest.raises(UnknownNameError, match=r"tap: .*did you mean gap"):
        export_features(store, tmp_path / "out", "clam", tap="gaps")
    with pytest.raises(InputError, match=r"layout: expected clam, .*; did you mean torchmil"):
        ImportConfig(layout="torchmill")  # type: ignore[arg-type]
    export_features(store, tmp_path / "out", "clam")
    with pytest.raises(InputError, match=r"`encoder`\), got features of net/7"):
        import_features(tmp_path / "out", tmp_path / "b", ImportConfig(encoder="net7"))


# --- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("reads", [8, 11, 15])
def test_an_interrupted_import_goes_on_to_the_same_bytes(
    tmp_path: Path, format: str, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {f"s{k}": 1 + k % 5 for k in range(8)}
    source = write_rows(tmp_path / "n", sizes)
    config = ImportConfig(format=format, part_instances=5)  # type: ignore[arg-type]
    import_features(source, tmp_path / "whole", config)
    done: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(np, "load", _stop_after(np.load, reads, done))
        with pytest.raises(KeyboardInterrupt):
            import_features(source, tmp_path / "broken", config)
    assert open_store(tmp_path / "broken").missing_parts()
    import_features(source, tmp_path / "broken", config)
    assert tree(tmp_path / "broken") == tree(tmp_path / "whole")


def _stop_after(load: Callable[..., Any], reads: int, done: list[int]) -> Callable[..., Any]:
    def stopping(*args: Any, **kwargs: Any) -> Any:
        done.append(1)
        if len(done) > reads:
            raise KeyboardInterrupt
        return load(*args, **kwargs)

    return stopping


def test_a_changed_source_is_refused(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "n", {"a": 3, "b": 2})
    import_features(source, tmp_path / "s")
    np.save(source / "b.npy", ROWS[:2] + 1)
    with pytest.raises(StoreMismatchError, match=r"plan\.sources_sha256.*sources have changed"):
        import_features(source, tmp_path / "s")
    np.save(source / "b.npy", ROWS[:2])
    assert import_features(source, tmp_path / "s").parts_written == 0


# --- recognising -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "keys", "layout"),
    [
        (("h5_files/a.h5", "pt_files/a.pt", "bags.csv"), {"features"}, "clam"),
        (("pt_files/a.pt",), set(), "pt"),
        (("a.h5", "b.h5"), {"features", "coords"}, "clam"),
        (("x/features_uni/a.h5",), {"features", "features@encoder"}, "trident"),
        (("a.h5",), {"feats", "coords"}, "stamp"),
        (("a.npy", "notes.txt"), set(), "npy"),
        (("features/a.npy", "labels/a.npy"), set(), "torchmil"),
        (("taps/", "store/", "zarr.json"), set(), "zarr"),
        (("a.h5", "b.pt"), {"features"}, None),
        (("a.h5",), {"images"}, None),
        (("a.npz", "b.npz"), set(), None),
        (("store.json", "parts/00000.h5"), {"bags", "taps"}, None),
        ((), set(), None),
    ],
)
def test_folders_are_recognised(files: tuple[str, ...], keys: set[str], layout: str | None) -> None:
    seen = tuple(f.rstrip("/") + "/x" if f.endswith("/") else f for f in files)
    assert recognise(Glimpse(True, seen, frozenset(keys))) == layout


@pytest.mark.parametrize(
    ("file", "keys", "layout"),
    [
        ("x.npz", set(), "npz"),
        ("x.h5ad", set(), "anndata"),
        ("x.pt", set(), "pt"),
        ("x.npy", set(), "npy"),
        ("x.h5", {"taps", "store", "bags"}, "hdf5"),
        ("x.h5", {"features"}, "clam"),
        ("x.csv", set(), None),
    ],
)
def test_files_are_recognised(file: str, keys: set[str], layout: str | None) -> None:
    assert recognise(Glimpse(False, (file,), frozenset(keys))) == layout


def test_what_is_no_source_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: expected features.*got no such file"):
        find_layout(tmp_path / "nowhere")
    with pytest.raises(InputError, match="got an empty folder"):
        find_layout(tmp_path)
    store = make_store(tmp_path / "a", {"s1": 3, "s2": 1, "s3": 2})
    with pytest.raises(InputError, match="got a store"):
        find_layout(store.path)
    with pytest.raises(InputError, match=r"expected files named BAG\.pt, got none"):
        import_features(tmp_path / "a", tmp_path / "b", ImportConfig(layout="pt"))


def test_every_layout_names_itself() -> None:
    assert {name: cls.layout for name, cls in {**SOURCES}.items()} == {n: n for n in SOURCES}
    assert {name: cls.layout for name, cls in {**TARGETS}.items()} == {n: n for n in TARGETS}


def test_shapes_and_types_by_hand() -> None:
    assert row_values("x", np.zeros((1, 3, 5))).shape == (3, 5)
    assert row_values("x", np.zeros((3, 5, 1, 1))).shape == (3, 5)
    assert row_values("x", np.zeros((1, 3, 5, 7))).shape == (1, 3, 5, 7)
    assert exact_dtype("x", np.zeros(2, ">f2")) == "float16"
    assert exact_dtype("x", np.array([0.1], np.float32).astype(np.float64)) == "float32"
    with pytest.raises(InputError, match="float32 holds exactly"):
        exact_dtype("x", np.array([0.1]))
