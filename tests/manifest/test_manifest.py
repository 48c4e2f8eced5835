"""Manifests: four kinds of source, one round trip, and every fault at its file and line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dragn_cache.errors import ManifestError, UnknownNameError
from dragn_cache.manifest import (
    Bag,
    Instance,
    Manifest,
    read_bags,
    read_manifest,
    read_with_faults,
    write_bags,
    write_manifest,
)
from dragn_cache.manifest.reading import infer_task
from dragn_cache.manifest.shipped import shipped_names
from dragn_cache.manifest.sources import find_source

TOML = 'name = "tiny"\ntask = "multilabel"\nlabels = ["nucleus", "actin", "golgi"]\n'
BAGS = "bag_id,labels,split,group\n007,actin;nucleus,train,g1\nNA,,val,g2\nnan,golgi,test,\n"
INSTANCES = "bag_id,image\n007,a.png\nNA,b.png\nnan,c.png\n007,d.png\n"


def folder(
    path: Path, *, toml: str = TOML, bags: str = BAGS, instances: str | None = INSTANCES
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "dataset.toml").write_text(toml)
    (path / "bags.csv").write_text(bags)
    if instances is not None:
        (path / "instances.csv").write_text(instances)
    return path


def table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def images_of(manifest: Manifest) -> dict[str, list[str]]:
    return {bag: [row.image for row in rows] for bag, rows in manifest.instances.items()}


# --- the four kinds of source ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "dataset.toml"])
def test_a_folder_with_dataset_toml(tmp_path: Path, name: str) -> None:
    manifest = read_manifest(folder(tmp_path / "d") / name)
    assert (manifest.name, manifest.task) == ("tiny", "multilabel")
    assert manifest.labels == ("nucleus", "actin", "golgi")
    assert manifest.image_root == tmp_path / "d"
    assert manifest.bags == (
        Bag("007", ("actin", "nucleus"), "train", "g1"),
        Bag("NA", (), "validation", "g2"),
        Bag("nan", ("golgi",), "test", ""),
    )
    assert manifest.instances == {
        "007": (Instance("007", "a.png", 0), Instance("007", "d.png", 1)),
        "NA": (Instance("NA", "b.png", 0),),
        "nan": (Instance("nan", "c.png", 0),),
    }
    assert manifest.n_instances == 4
    assert [(bag.file, bag.line) for bag in manifest.bags] == [("bags.csv", k) for k in (2, 3, 4)]
    assert manifest.instances["007"][1].line == 5


def test_the_table_of_bags_keeps_its_other_columns(tmp_path: Path) -> None:
    bags = "bag_id,stage,image,order,labels\n1,s2,cover.png,9,actin\n"
    manifest = read_manifest(folder(tmp_path, bags=bags, instances="bag_id,image\n1,x.png\n"))
    assert manifest.bags[0].extra == {"stage": "s2", "image": "cover.png", "order": "9"}


def test_a_folder_may_hold_one_table_with_a_row_per_image(tmp_path: Path) -> None:
    bags = "bag_id,image,labels\n1,b.png,actin\n2,c.png,golgi\n1,a.png,actin\n"
    manifest = read_manifest(folder(tmp_path, bags=bags, instances=None))
    assert images_of(manifest) == {"1": ["b.png", "a.png"], "2": ["c.png"]}
    assert [bag.labels for bag in manifest.bags] == [("actin",), ("golgi",)]


@pytest.mark.parametrize(
    ("text", "bags", "images"),
    [
        (
            "bag_id,labels,split,group,stage,image,order\n"
            "01,a;b,val,g,s,z.png,2\n01,a;b,val,g,s,y.png,1\n1,,test,h,t,x.png,\n",
            [
                Bag("01", ("a", "b"), "validation", "g", {"stage": "s"}),
                Bag("1", (), "test", "h", {"stage": "t"}),
            ],
            {"01": ["y.png", "z.png"], "1": ["x.png"]},
        ),
        (
            "case_id,slide_id,label,filename\nP1,S1,tumor,a.png\nP1,S2,normal,b.png\n",
            [Bag("S1", ("tumor",), "", "P1"), Bag("S2", ("normal",), "", "P1")],
            {"S1": ["a.png"], "S2": ["b.png"]},
        ),
        (
            "PATIENT,FILENAME,category\n0012,a b.png,x\n0012,c.png,x\n",
            [Bag("0012", ("x",))],
            {"0012": ["a b.png", "c.png"]},
        ),
        (
            "gene_stage,labels,imgs\n"
            "CG1_2,\"['brain', 'gut; hind']\",\"['i/1.png', 'i/2;3.png']\"\n"
            "CG2_4,gut,b.png;a.png;b.png\n",
            [Bag("CG1_2", ("brain", "gut; hind")), Bag("CG2_4", ("gut",))],
            {"CG1_2": ["i/1.png", "i/2;3.png"], "CG2_4": ["b.png", "a.png"]},
        ),
        ("bag_id,image\n1,a.png\n", [Bag("1", None)], {"1": ["a.png"]}),
    ],
)
def test_one_csv_with_the_names_that_people_have(
    tmp_path: Path, text: str, bags: list[Bag], images: dict[str, list[str]]
) -> None:
    manifest = read_manifest(table(tmp_path / "mine.csv", "\ufeff" + text))
    assert (manifest.name, manifest.image_root) == ("mine", tmp_path)
    assert list(manifest.bags) == bags
    assert images_of(manifest) == images


def test_a_folder_of_bag_folders(tmp_path: Path) -> None:
    table(tmp_path / "labels.csv", "bag_id,labels\nb2,actin\n007,\n")
    for name in [
        "b2/z.PNG", "b2/deep/a.jpe", "b2/a.tif", "b2/notes.txt", "b2/._a.tif",
        "b2/.ipynb_checkpoints/z.png", "007/x.jpg", ".hidden/y.png", "stray.png",
    ]:  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    manifest = read_manifest(tmp_path)
    assert manifest.bags == (Bag("b2", ("actin",)), Bag("007", ()))
    assert images_of(manifest) == {
        "b2": ["b2/a.tif", "b2/deep/a.jpe", "b2/z.PNG"],
        "007": ["007/x.jpg"],
    }
    assert manifest.image_root == tmp_path


def test_the_folders_may_lie_elsewhere_than_their_labels(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "pixels" / "1").mkdir(parents=True)
    (tmp_path / "pixels" / "1" / "a.png").touch()
    table(tmp_path / "labels" / "mine.csv", "bag_id,labels\n1,a\n")
    manifest = read_manifest(tmp_path / "labels", images=tmp_path / "pixels")
    assert images_of(manifest) == {"1": ["1/a.png"]}
    assert manifest.image_root == tmp_path / "pixels"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"expected dataset\.toml, or folders of images .* got neither; put a labels\.csv"),
        (["a.csv", "b.csv"], "got 2 CSV files"),
        (["labels.csv", "bags.csv"], "got 2 CSV files"),
        (["bags.csv", "instances.csv"], r"expected dataset\.toml beside instances\.csv, got none"),
    ],
)
def test_a_folder_that_is_no_data_set(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        table(tmp_path / name, "bag_id,labels\n1,a\n")
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["hpa", "flyexpress", "simulated"])
def test_a_shipped_name_without_tables_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("DRAGN_CACHE_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert name in shipped_names()
    here = re.escape(str(tmp_path / name))
    how = f"put bags.csv and instances.csv into {here} .or set DRAGN_CACHE_DATA. and the images"
    how += f" into {here}/images"
    if name == "simulated":
        how = f"run: dragn-cache simulate --out {here}"
    with pytest.raises(ManifestError, match=f"expected a table {here}/bags.csv, got none; {how}"):
        read_manifest(name)


def test_a_shipped_name_joins_its_description_with_the_users_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    (data / "hpa").mkdir(parents=True)
    monkeypatch.setenv("DRAGN_CACHE_DATA", str(data))
    monkeypatch.chdir(tmp_path)
    table(data / "hpa" / "bags.csv", "bag_id,labels\nENSG1,Cytosol;Nucleoli\n")
    table(data / "hpa" / "instances.csv", "bag_id,image\nENSG1,36_B10_1_{channel}.jpg\n")
    manifest = read_manifest("hpa")
    assert manifest.labels[:2] == ("Nucleoplasm", "Cytosol")
    assert manifest.channels == ("red", "green", "blue", "yellow")
    assert manifest.bags == (Bag("ENSG1", ("Cytosol", "Nucleoli")),)
    assert manifest.image_root == data / "hpa" / "images"
    assert manifest.extract["size"] == [512, 512]


def test_without_a_variable_data_lie_below_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DRAGN_CACHE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ManifestError, match=f"{tmp_path}/.local/share/dragn-cache/hpa/images"):
        find_source("hpa")


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"got 'flyexpres'; did you mean flyexpress\?"):
        read_manifest("flyexpres")


# --- the round trip ----------------------------------------------------------------------------

# No lone carriage return: before Python 3.13 the csv module writes it without quotes.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\r\0")
NASTY = (
    "007",
    "NA",
    "nan",
    "1e5",
    "-1",
    "a,b",
    'say "x"',
    "é漢🧬",
    "a;b",
    "[1]",
    "['x']",
    "#",
    "x y",
)
IDS = st.sampled_from(NASTY) | st.text(CHARACTERS, min_size=1, max_size=8).filter(
    lambda s: s == s.strip()
)
PATHS = IDS.filter(lambda s: ".." not in s.split("/") and not s.startswith("/"))
BOXES = st.tuples(*[st.integers(0, 9)] * 2, *[st.integers(10, 99)] * 2)
FREE_TEXT = st.text(CHARACTERS, max_size=8)


@st.composite
def manifests(draw: st.DrawFn, folder: Path) -> Manifest:
    labels = tuple(draw(st.lists(IDS, unique=True, max_size=5)))
    multiclass = len(labels) > 0 and draw(st.booleans())
    columns = draw(st.lists(st.sampled_from(["stage", "note", "image", "é"]), unique=True))
    bags, instances = [], {}
    splits = {}
    for bag_id in draw(st.lists(IDS, unique=True, min_size=1, max_size=5)):
        most = 1 if multiclass else len(labels)
        chosen = st.sampled_from(labels) if labels else st.nothing()
        carried = draw(st.lists(chosen, unique=True, min_size=int(multiclass), max_size=most))
        group = draw(st.just("") | IDS)
        split = draw(st.sampled_from(["", "train", "validation", "test"]))
        split = splits.setdefault(group, split) if group else split
        extra = {column: draw(st.just("") | IDS) for column in columns}
        bags.append(Bag(bag_id, tuple(carried), split, group, extra))
        rows = draw(st.lists(st.tuples(PATHS, st.none() | BOXES), unique=True, max_size=4))
        if rows:
            instances[bag_id] = tuple(
                Instance(bag_id, image, k, box) for k, (image, box) in enumerate(rows)
            )
    return Manifest(
        name=draw(IDS),
        task="multiclass" if multiclass else "multilabel",
        labels=labels,
        bags=tuple(bags),
        instances=instances,
        image_root=draw(st.sampled_from([folder, folder / "sub" / "images", Path("/else where")])),
        channels=tuple(draw(st.just([]) | st.lists(IDS, unique=True))),
        title=draw(FREE_TEXT),
        source=draw(FREE_TEXT),
        licence=draw(FREE_TEXT),
        citation=draw(FREE_TEXT),
        extract=draw(st.sampled_from([{}, {"size": [41, 53], "backbone": "resnet18"}])),
    )


@given(data=st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "round-trip"
    manifest = data.draw(manifests(folder))
    write_manifest(manifest, folder)
    again, faults = read_with_faults(folder)
    assert again == manifest
    empty = [bag.bag_id for bag in manifest.bags if bag.bag_id not in manifest.instances]
    assert [fault.kind for fault in faults] == ["bag-without-images"] * len(empty)


def test_a_csv_written_as_a_folder_elsewhere_stays_the_same_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    table(tmp_path / "mine" / "t.csv", "slide_id,imgs\n1,\"['b;1.png', 'a.png']\"\n")
    manifest = read_manifest("mine/t.csv")
    assert manifest.image_root == Path("mine")  # relative to the working folder
    write_manifest(manifest, tmp_path / "written" / "t")
    monkeypatch.chdir("/")
    again = read_manifest(tmp_path / "written" / "t")
    assert again.image_root == tmp_path / "mine"
    assert (again.bags, again.instances) == (manifest.bags, manifest.instances)


def test_added_columns_replace_those_of_the_same_name(tmp_path: Path) -> None:
    bags = [Bag("1", ("a",), extra={"part": "mine", "stage": "s"}), Bag("2", (), extra={})]
    write_bags(bags, tmp_path / "bags.csv", added={"part": [0, 1]})
    text = "bag_id,labels,split,group,stage,part\n1,a,,,s,0\n2,,,,,1\n"
    assert (tmp_path / "bags.csv").read_text() == text
    write_bags([Bag("1")], tmp_path / "bags.csv")
    assert (tmp_path / "bags.csv").read_text() == "bag_id,split,group\n1,,\n"


# --- the contents of a manifest ----------------------------------------------------------------


def test_order_is_the_order_column_then_the_tables(tmp_path: Path) -> None:
    instances = (
        "bag_id,image,order\n1,c.png,10\n2,z.png,\n1,b.png,2\n1,a.png,2\n2,y.png,\n1,d.png,-1\n"
    )
    bags = "bag_id,labels\n1,actin\n2,actin\n"
    manifest = read_manifest(folder(tmp_path, bags=bags, instances=instances))
    assert images_of(manifest) == {
        "1": ["d.png", "b.png", "a.png", "c.png"],
        "2": ["z.png", "y.png"],
    }
    assert [row.order for row in manifest.instances["1"]] == [0, 1, 2, 3]


def test_boxes_are_whole_numbers_or_empty(tmp_path: Path) -> None:
    instances = "bag_id,image,x0,y0,x1,y1\n1,a.png,3,5,7,11\n1,a.png,,,,\n1,a.png,3,5,7,13\n"
    manifest = read_manifest(folder(tmp_path, bags="bag_id,labels\n1,actin\n", instances=instances))
    assert [row.box for row in manifest.instances["1"]] == [(3, 5, 7, 11), None, (3, 5, 7, 13)]


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (["a", "b", "b"], "multiclass"),
        (["a", "a"], "multilabel"),
        (["a", "b;a"], "multilabel"),
        (["a", "b", ""], "multilabel"),
    ],
)
def test_the_task_follows_from_the_labels(labels: list[str], task: str) -> None:
    bags = [Bag(str(k), tuple(cell.split(";")) if cell else ()) for k, cell in enumerate(labels)]
    assert infer_task(bags) == task


def test_without_labels_there_is_no_class_to_infer() -> None:
    assert infer_task([Bag("1"), Bag("2")]) == "multilabel"


def test_labels_that_are_not_declared_are_sorted(tmp_path: Path) -> None:
    manifest = read_manifest(folder(tmp_path, toml='name = "n"\n'))
    assert manifest.labels == ("actin", "golgi", "nucleus")


# --- the image root ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["$PIXELS/in", "${PIXELS}/in"])
def test_the_image_root_may_name_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    folder(tmp_path, toml=TOML + f'images = "{text}"\n')
    monkeypatch.setenv("PIXELS", "/scratch/p")
    assert read_manifest(tmp_path).image_root == Path("/scratch/p/in")
    monkeypatch.delenv("PIXELS")
    message = r"dataset\.toml: images: expected the environment variable PIXELS, got unset; set it,"
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path)
    assert read_manifest(tmp_path, images=Path("/other")).image_root == Path("/other")


@pytest.mark.parametrize(
    ("text", "root"), [("pixels", "d/pixels"), ("../p", "d/../p"), (".", "d"), ("/abs", "/abs")]
)
def test_the_image_root_is_relative_to_its_file(tmp_path: Path, text: str, root: str) -> None:
    folder(tmp_path / "d", toml=TOML + f'images = "{text}"\n')
    assert read_manifest(tmp_path / "d").image_root == tmp_path / root


# --- faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("name = \ntitle = 1", r"dataset\.toml: expected valid TOML, got .*line 1"),
        ("titel = 'x'", r"dataset\.toml: expected keys among name, .* got 'titel'"),
        ("labels = 'a'", r"dataset\.toml: labels: expected a list, got 'a'"),
        ("task = 'regression'", r"task: expected 'multilabel' or 'multiclass', got 'regression'"),
        ("labels = ['a', 'a']", r"labels: expected distinct non-empty names, got \['a', 'a'\]"),
        ("channels = ['']", r"channels: expected distinct non-empty names, got \[''\]"),
        ("labels = [1, 2]", r"labels: expected distinct non-empty names, got \[1, 2\]"),
        (
            "[extract]\ncolour = 1",
            r"\[extract\]: expected a known setting, got 'colour'; .* of: backbone, channels, ",
        ),
    ],
)
def test_dataset_toml_is_checked(tmp_path: Path, toml: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_manifest(folder(tmp_path, toml=toml))


def test_a_folder_without_its_tables_says_so(tmp_path: Path) -> None:
    (tmp_path / "dataset.toml").write_text(TOML)
    with pytest.raises(ManifestError, match=r"got none; put bags\.csv and instances\.csv into /"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("bags", "instances", "message"),
    [
        ("bag,labels\n1,a\n", INSTANCES, r"bags\.csv:1: expected a column of bag ids, 'bag_id'"),
        (BAGS, "bag_id,path\n1,a\n", r"instances\.csv:1: expected a column of image paths"),
        (BAGS, "bag_id,image,x0,y0\n1,a,1,2\n", r"csv:1: expected all of x0, .* got x0, y0"),
        ("bag_id,labels\n", INSTANCES, r"bags\.csv: expected bags, got no row below the header"),
        (BAGS, None, r"bags\.csv:1: expected a column of image paths, 'image'"),
    ],
)
def test_tables_without_their_columns_or_rows(
    tmp_path: Path, bags: str, instances: str | None, message: str
) -> None:
    with pytest.raises(ManifestError, match=message):
        read_manifest(folder(tmp_path, bags=bags, instances=instances))


# kind, the change to a clean folder, and every place that must be named
FAULTS: list[tuple[str, dict[str, str], list[str]]] = [
    ("empty-id", {"bags": BAGS + ",actin,,\n"}, ["bags.csv:5"]),
    ("empty-id", {"instances": INSTANCES + ",x.png\n"}, ["instances.csv:6"]),
    ("duplicate-bag", {"bags": BAGS + "NA,,val,g2\n"}, ["bags.csv:5"]),
    ("unknown-label", {"bags": BAGS.replace("golgi", "golgy;actin")}, ["bags.csv:4"]),
    (
        "label-count",
        {"toml": TOML.replace("multilabel", "multiclass")},
        ["bags.csv:2", "bags.csv:3"],
    ),
    ("unknown-split", {"bags": BAGS.replace("test", "Test")}, ["bags.csv:4"]),
    ("group-straddles-splits", {"bags": BAGS.replace("g2", "g1")}, ["bags.csv:3"]),
    ("bag-without-images", {"bags": BAGS + "none,actin,,\n"}, ["bags.csv:5"]),
    (
        "image-without-bag",
        {"instances": INSTANCES + "7,x.png\n7,y.png\n8,x.png\n"},
        ["instances.csv:6", "instances.csv:8"],
    ),
    (
        "duplicate-instance",
        {"instances": INSTANCES + "nan,c.png\nNA,c.png\nnan,c.png\n"},
        ["instances.csv:6", "instances.csv:8"],
    ),
    (
        "bad-path",
        {"instances": INSTANCES + "007,/etc/x.png\nNA,a/../../x.png\nnan,\n"},
        ["instances.csv:6", "instances.csv:7", "instances.csv:8"],
    ),
    (
        "bad-order",
        {"instances": "bag_id,image,order\n007,a,first\nNA,b,1.5\nnan,c,3\n"},
        ["instances.csv:2", "instances.csv:3"],
    ),
    (
        "bad-box",
        {
            "instances": "bag_id,image,x0,y0,x1,y1\n007,a,1,2,3,\n007,a,1,x,3,4\n"
            "NA,b,5,1,5,9\nnan,c,0,7,2,6\n"
        },
        [f"instances.csv:{line}" for line in (2, 3, 4, 5)],
    ),
    (
        "box-outside-image",
        {"instances": "bag_id,image,x0,y0,x1,y1\n007,a,-1,0,3,3\nNA,b,0,-2,5,5\nnan,c,,,,\n"},
        ["instances.csv:2", "instances.csv:3"],
    ),
    (
        "no-channels",
        {"instances": INSTANCES + "nan,c_{channel}.png\n"},
        ["instances.csv:6"],
    ),
    (
        "bad-path",
        {
            "instances": "bag_id,image\n007,a\nNA,{channel}/b.png\nnan,sub/{channel}.png\n",
            "toml": 'name = "tiny"\nchannels = ["../../x", "red", "/etc", "ok/..", "a..b"]\n',
        },
        ["instances.csv:3"] * 3,
    ),
    (
        "bad-path",
        {
            "instances": "bag_id,image\n007,a\nNA,b\nnan,{channel}{channel}/c.png\n",
            "toml": 'name = "tiny"\nchannels = [".", "red"]\n',
        },
        ["instances.csv:4"],
    ),
]


@pytest.mark.parametrize(("kind", "changes", "places"), FAULTS)
def test_every_fault_is_listed_once_where_it_is(
    tmp_path: Path, kind: str, changes: dict[str, str], places: list[str]
) -> None:
    _, faults = read_with_faults(folder(tmp_path, **changes))
    assert [(fault.kind, fault.where) for fault in faults] == [(kind, place) for place in places]
    if kind in ("group-straddles-splits", "bag-without-images"):
        assert read_manifest(tmp_path).name == "tiny"
        return
    more = rf" \(and {len(places) - 1} more: run dragn-cache check\)" if len(places) > 1 else ""
    with pytest.raises(ManifestError, match=re.escape(places[0]) + f": .*{more}$"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "kind", "places"),
    [
        ("bag_id,labels,image\n1,a,x\n2,b,y\n1,b,z\n", "inconsistent-bag", ["t.csv:4"]),
        (
            "bag_id,split,image\n1,val,x\n1,validation,y\n1,test,z\n",
            "inconsistent-bag",
            ["t.csv:4"],
        ),
        ("bag_id,case_id,image\n1,a,x\n1,b,y\n", "inconsistent-bag", ["t.csv:3"]),
        ("bag_id,labels,image\n1,a,x\n,b,y\n", "empty-id", ["t.csv:3"]),
        ("bag_id,imgs\n1,x;/y;z\n", "bad-path", ["t.csv:2"]),
        ("bag_id,imgs\n1,x;y\n1,z;y\n", "duplicate-instance", ["t.csv:3"]),
        ("bag_id,imgs\n1,\n", "bad-path", ["t.csv:2"]),
    ],
)
def test_faults_of_one_table_with_a_row_per_image(
    tmp_path: Path, text: str, kind: str, places: list[str]
) -> None:
    _, faults = read_with_faults(table(tmp_path / "t.csv", text))
    assert [(fault.kind, fault.where) for fault in faults] == [(kind, place) for place in places]


def test_faults_of_bag_folders(tmp_path: Path) -> None:
    table(tmp_path / "labels.csv", "bag_id,labels\nhas,a\nlost,a\n")
    for bag in ("has", "stray"):
        (tmp_path / bag).mkdir()
        (tmp_path / bag / "1.png").touch()
        (tmp_path / bag / "2.png").touch()
    _, faults = read_with_faults(tmp_path)
    assert [(fault.kind, fault.where) for fault in faults] == [
        ("image-without-bag", "stray/1.png"),
        ("bag-without-images", "labels.csv:3"),
    ]


def test_an_unknown_label_offers_the_nearest_one(tmp_path: Path) -> None:
    message = r"bags\.csv:4: expected a known label, got 'golgy'; did you mean golgi\? otherwise "
    message += r"correct it, or add it to the labels of dataset\.toml$"
    with pytest.raises(ManifestError, match=message):
        read_manifest(folder(tmp_path, bags=BAGS.replace("golgi", "golgy")))


# --- a table of bags alone ---------------------------------------------------------------------


def test_a_table_of_bags_alone(tmp_path: Path) -> None:
    path = table(tmp_path / "b.csv", "bag_id,labels,split\n01,b,val\n1,a,train\n")
    bags, labels, task = read_bags(path)
    assert bags == (Bag("01", ("b",), "validation"), Bag("1", ("a",), "train"))
    assert (labels, task) == (("a", "b"), "multiclass")
    assert read_bags(path, labels=["b", "c", "a"], task="multilabel")[1:] == (
        ("b", "c", "a"),
        "multilabel",
    )


@pytest.mark.parametrize(
    ("text", "labels", "message"),
    [
        ("bag_id,labels\n1,a\n1,a\n", None, r"b\.csv:3: expected one row per bag, got '1' again"),
        ("bag_id,labels\n1,a\n2,x\n", ["a", "b"], r"b\.csv:3: expected a known label, got 'x'"),
        ("bag_id,split\n1,dev\n", None, r"b\.csv:2: expected train, validation or test, got 'dev'"),
        ("bag_id\n", None, "expected bags, got no row"),
    ],
)
def test_faults_of_a_table_of_bags(
    tmp_path: Path, text: str, labels: Sequence[str] | None, message: str
) -> None:
    with pytest.raises(ManifestError, match=message):
        read_bags(table(tmp_path / "b.csv", text), labels=labels)


def test_numbered_images_of_a_folder_are_in_the_order_people_mean(tmp_path: Path) -> None:
    for name in ("10.png", "2.png", "1b.png", "1a.png"):
        (tmp_path / "bag").mkdir(exist_ok=True)
        (tmp_path / "bag" / name).write_bytes(b"")
    (tmp_path / "labels.csv").write_text("bag_id,labels\nbag,x\n")
    rows = read_manifest(tmp_path).instances["bag"]
    assert [row.image for row in rows] == ["bag/1a.png", "bag/1b.png", "bag/2.png", "bag/10.png"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("size = [96]", r"\[extract\] size: expected \[height, width\] in pixels, .*, got \[96\]"),
        ('size = ["a", "b"]', r"\[extract\] size"),
        ('rgb = "red"', r"\[extract\] rgb: expected a list of channels, got 'red'"),
        ("backbone = 3", r"\[extract\] backbone: expected a name, got 3"),
        ("mean = [0.5, 0.5]", r"\[extract\] mean: expected three numbers"),
        ("mean = [125, 125, 125]", r"\[extract\] mean: expected three numbers from 0 to 1"),
        ("size = [0, 96]", r"\[extract\] size: .*, got \[0, 96\]"),
        ('channels = "all"', r"\[extract\] channels: expected rgb, average or each, got 'all'"),
        ('interpolation = "cubic"', r"\[extract\] interpolation: .*; did you mean bicubic"),
        ('intensity = "bright"', r"\[extract\] intensity: expected full, LOW:HIGH"),
        ("grid = 4", r"\[extract\]: expected a known setting, got 'grid'"),
    ],
)
def test_faults_of_the_extract_table_name_dataset_toml(
    tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "dataset.toml").write_text(f"[extract]\n{line}\n")
    (tmp_path / "bags.csv").write_text("bag_id,labels\nb,x\n")
    with pytest.raises(ManifestError, match=r"dataset\.toml: " + message):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["x ", "", " ", "x\\u0000"])
@pytest.mark.parametrize("key", ["labels", "channels"])
def test_names_in_dataset_toml_that_no_table_holds_are_refused(
    tmp_path: Path, key: str, name: str
) -> None:
    (tmp_path / "dataset.toml").write_text(f'{key} = ["{name}"]\n')
    (tmp_path / "bags.csv").write_text("bag_id,labels\nb,x\n")
    with pytest.raises(ManifestError, match=rf"dataset.toml: {key}: expected distinct non-empty"):
        read_manifest(tmp_path)
