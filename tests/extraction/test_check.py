"""Checking: one folder with one of every fault, each listed once, with its file and line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dragn_cache.errors import ManifestError
from dragn_cache.extraction.check import check_dataset
from dragn_cache.extraction.config import CheckConfig

H, W = 11, 13
TOML = 'name = "faulty"\ntask = "multilabel"\nlabels = ["actin", "golgi"]\n'

# Each line that is at fault, and the kind that must be listed for it.
BAGS = [
    ("bag_id,labels,split,group", None),
    ("good,actin,train,g", None),
    ("boxed,golgi;actin,test,h", None),
    ("bad,actin,val,", None),
    ("bad,actin,val,", "duplicate-bag"),
    (",actin,,", "empty-id"),
    ("alone,actin,,", "bag-without-images"),
    ("typo,aktin,,", "unknown-label"),
    ("late,actin,dev,", "unknown-split"),
    ("leak,actin,test,g", "group-straddles-splits"),
]
INSTANCES = [
    ("bag_id,image,order,x0,y0,x1,y1", None),
    ("good,good.png,1,,,,", None),
    ("good,good.png,0,3,2,13,11", None),
    ("boxed,good.png,,0,0,14,11", "box-outside-image"),
    ("boxed,good.png,,0,0,13,12", "box-outside-image"),
    ("boxed,good.png,,-1,0,13,11", "box-outside-image"),
    ("boxed,good.png,,5,0,5,11", "bad-box"),
    ("boxed,good.png,,5,0,,11", "bad-box"),
    ("boxed,good.png,first,,,,", "bad-order"),
    ("bad,none.png,,,,,", "missing-file"),
    ("bad,none.png,,1,1,3,3", "missing-file"),
    ("bad,empty.png,,,,,", "unreadable-image"),
    ("bad,cut.jpg,,,,,", "unreadable-image"),
    ("bad,text.png,,,,,", "unreadable-image"),
    ("bad,../good.png,,,,,", "bad-path"),
    ("stray,good.png,,,,,", "image-without-bag"),
    (",good.png,,,,,", "empty-id"),
    ("typo,good.png,,,,,", None),
    ("typo,good.png,,,,,", "duplicate-instance"),
    ("late,good.png,,,,,", None),
    ("leak,{channel}.png,,,,,", "no-channels"),
]


def image(path: Path, height: int = H, width: int = W) -> Path:
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    (tmp_path / "dataset.toml").write_text(TOML)
    (tmp_path / "bags.csv").write_text("\n".join(line for line, _ in BAGS))
    (tmp_path / "instances.csv").write_text("\n".join(line for line, _ in INSTANCES))
    image(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    whole = image(tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    return tmp_path


def expected() -> set[tuple[str, str]]:
    tables = (("bags.csv", BAGS), ("instances.csv", INSTANCES))
    return {
        (kind, f"{name}:{number}")
        for name, rows in tables
        for number, (_, kind) in enumerate(rows, start=1)
        if kind is not None
    }


def test_every_fault_is_listed_once_with_its_line(faulty: Path) -> None:
    report = check_dataset(faulty)
    listed = [(fault.kind, fault.where) for fault in report.faults]
    assert set(listed) == expected()
    assert len(listed) == len(expected())


def test_no_text_of_a_fault_has_the_machines_path(faulty: Path) -> None:
    for fault in check_dataset(faulty).faults:
        assert str(faulty) not in str(fault)
        assert "\n" not in str(fault)


def test_texts_say_what_is_wrong(faulty: Path) -> None:
    texts = {fault.where: str(fault) for fault in check_dataset(faulty).faults}
    assert texts["instances.csv:4"] == (
        "instances.csv:4: box-outside-image: expected a box inside 13×11 pixels (w×h), "
        "got (0, 0, 14, 11); correct the box"
    )
    assert texts["instances.csv:10"] == (
        "instances.csv:10: missing-file: expected an image file, got no such file (none.png); "
        "add it or correct the path"
    )
    assert texts["bags.csv:8"].startswith(
        "bags.csv:8: unknown-label: expected a known label, got 'aktin'; did you mean actin?"
    )


def test_the_result_does_not_depend_on_the_workers(faulty: Path) -> None:
    one, three = (check_dataset(faulty, CheckConfig(workers=workers)) for workers in (1, 3))
    assert one == three


def test_a_clean_data_set_has_no_fault(tmp_path: Path) -> None:
    (tmp_path / "dataset.toml").write_text(TOML)
    (tmp_path / "bags.csv").write_text("bag_id,labels,split,group\n1,actin,train,g\n2,,train,g\n")
    rows = "bag_id,image,x0,y0,x1,y1\n1,a.png,0,0,13,11\n1,b.png,,,,\n2,a.png,12,10,13,11\n"
    (tmp_path / "instances.csv").write_text(rows)
    image(tmp_path / "a.png")
    image(tmp_path / "b.png", 7, 5)
    seen: list[tuple[int, int]] = []
    report = check_dataset(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert report.faults == report.doubts == ()
    assert report.images == 2
    assert report.manifest.n_instances == 3
    assert seen == [(1, 2), (2, 2)]


def test_every_channel_is_looked_at(tmp_path: Path) -> None:
    toml = TOML + 'channels = ["red", "green", "blue", "yellow"]\nimages = "px"\n'
    (tmp_path / "dataset.toml").write_text(toml)
    (tmp_path / "bags.csv").write_text("bag_id,labels\n1,actin\n2,golgi\n3,\n")
    (tmp_path / "instances.csv").write_text(
        "bag_id,image\n" + "".join(f"{k},{k}_{{channel}}.png\n" for k in (1, 2, 3))
    )
    for bag in (1, 2, 3):
        for channel in ("red", "green", "blue", "yellow"):
            image(tmp_path / "px" / f"{bag}_{channel}.png")
    assert check_dataset(tmp_path).faults == ()
    (tmp_path / "px" / "1_yellow.png").unlink()
    image(tmp_path / "px" / "2_green.png", H, W + 1)
    faults = check_dataset(tmp_path).faults
    assert [(fault.kind, fault.where) for fault in faults] == [
        ("missing-file", "instances.csv:2"),
        ("unreadable-image", "instances.csv:3"),
    ]
    assert "(1_{channel}.png (1_yellow.png))" in faults[0].got
    assert "14×11" in faults[1].got


def test_a_channel_outside_the_image_root_is_listed_and_not_opened(tmp_path: Path) -> None:
    toml = TOML + 'channels = ["red", "../secret"]\nimages = "px"\n'
    (tmp_path / "dataset.toml").write_text(toml)
    (tmp_path / "bags.csv").write_text("bag_id,labels\n1,actin\n2,golgi\n3,\n")
    (tmp_path / "instances.csv").write_text(
        "bag_id,image\n" + "".join(f"{k},{{channel}}{k}.png\n" for k in (1, 2, 3))
    )
    for bag in (1, 2, 3):
        image(tmp_path / "px" / f"red{bag}.png")
        image(tmp_path / f"secret{bag}.png", H + 1)  # if it were read, another size were a fault
    (fault,) = check_dataset(tmp_path).faults
    assert (fault.kind, fault.where) == ("bad-path", "instances.csv:2")
    assert fault.got == "'../secret1.png'"


def test_another_image_root_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("bag_id,labels,image\n1,a,x.png\n")
    image(tmp_path / "elsewhere" / "x.png")
    assert [fault.kind for fault in check_dataset(tmp_path / "t.csv").faults] == ["missing-file"]
    assert check_dataset(tmp_path / "t.csv", images=tmp_path / "elsewhere").faults == ()


def test_bag_folders_are_named_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("bag_id,labels\nb,a\n")
    image(tmp_path / "b" / "1.png")
    (tmp_path / "b" / "2.png").touch()
    faults = check_dataset(tmp_path).faults
    assert [(fault.kind, fault.where) for fault in faults] == [("unreadable-image", "b/2.png")]


def test_a_table_that_cannot_be_read_ends_the_check(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("bag_id,image\n1\n")
    with pytest.raises(ManifestError, match=r"t\.csv:2: expected 2 cells, as in the header, got 1"):
        check_dataset(tmp_path / "t.csv")


# --- doubts ------------------------------------------------------------------------------------


def tables(folder: Path, bags: str, instances: str) -> Path:
    (folder / "bags.csv").write_text("bag_id,labels,split,group\n" + bags, encoding="utf-8")
    (folder / "instances.csv").write_text("bag_id,image,x0,y0,x1,y1\n" + instances)
    (folder / "dataset.toml").write_text('images = "."\n')
    return folder


def shared(folder: Path) -> list[tuple[str, str]]:
    report = check_dataset(folder)
    assert report.faults == ()
    return [(d.where, d.got) for d in report.doubts if d.kind == "shared-image"]


def test_the_same_pixels_in_bags_of_two_groups_are_told(tmp_path: Path) -> None:
    """As PNG, BMP and TIFF; a copy; and grey saved as colours."""
    image(tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    Image.fromarray(pixels).save(tmp_path / "b.bmp")
    Image.fromarray(pixels).save(tmp_path / "c.tif")
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes())
    grey = pixels[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "e.png")
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "f.png")
    changed = pixels.copy()
    changed[7, 5, 1] ^= 1
    Image.fromarray(changed).save(tmp_path / "g.png")
    bags = "".join(f"{k},x;y,,{'one' if k == 3 else f'group{k}'}\n" for k in range(1, 8))
    names = ["a.png", "b.bmp", "c.tif", "d.png", "e.png", "f.png", "g.png"]
    rows = "".join(f"{k},{name},,,,\n" for k, name in enumerate(names, start=1))
    text = "the pixels of {!r} of bag {!r} in {!r} of bag {!r}"
    assert shared(tables(tmp_path, bags, rows)) == [
        ("instances.csv:3", text.format("a.png", "1", "b.bmp", "2")),
        ("instances.csv:4", text.format("a.png", "1", "c.tif", "3")),
        ("instances.csv:5", text.format("a.png", "1", "d.png", "4")),
        ("instances.csv:7", text.format("e.png", "5", "f.png", "6")),
    ]


def test_images_are_shared_where_bags_may_come_apart(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    image(tmp_path / "b.png", H, W + 2)
    Image.fromarray(np.full((H, W, 3), (9, 8, 7), np.uint8)).save(tmp_path / "empty.png")
    both = "1,a.png,,,,\n1,b.png,,,,\n2,a.png,,,,\n2,b.png,,,,\n"
    (pair,) = shared(tables(tmp_path, "1,x;y,,\n2,y;x,,\n", both))
    assert pair[1].endswith(" of bag '2' (and 1 more)")
    apart = "1,x;y,train,\n2,y;x,test,\n"
    assert len(shared(tables(tmp_path, apart, both))) == 1
    assert shared(tables(tmp_path, "1,x;y,,g\n2,y;x,,g\n", both)) == []
    assert shared(tables(tmp_path, "1,x;y,test,g\n2,y;x,test,h\n", both)) == []
    whole = f"1,a.png,0,0,{W},{H}\n2,a.png,,,,\n"
    assert len(shared(tables(tmp_path, apart, whole))) == 1
    crops = "1,a.png,0,0,4,4\n2,a.png,4,0,8,4\n"
    assert shared(tables(tmp_path, apart, crops)) == []
    empty = "1,empty.png,,,,\n2,empty.png,,,,\n"
    assert shared(tables(tmp_path, apart, empty)) == []


@pytest.mark.parametrize(
    ("kind", "most", "toml", "levels", "remedy"),
    [
        (np.uint16, 4095, "", "16", "give `intensity=0:4095` if they are of 12 bits"),
        (np.uint16, 4095, 'intensity = "0:4095"', "", ""),
        (np.uint16, 4095, 'intensity = "percentile:1:99"', "", ""),
        (np.uint16, 40000, "", "", ""),
        (np.uint8, 15, "", "15", "give `intensity=0:15` if they are of 4 bits"),
        (np.uint8, 255, 'intensity = "0:65535"', "1", "give `intensity=percentile:0.1:99.9`"),
        (np.uint8, 255, "", "", ""),
    ],
)
def test_pixels_that_fill_few_grey_levels_are_told(
    tmp_path: Path, kind: type, most: int, toml: str, levels: str, remedy: str
) -> None:
    rng = np.random.default_rng(0)
    for k, high in enumerate((most // 3, most)):
        pixels = rng.integers(0, high + 1, (H, W)).astype(kind)
        pixels[0, :2] = 0, high
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    folder = tables(tmp_path, "1,x;y,,\n2,y;x,,\n", "1,0.png,,,,\n2,1.png,,,,\n")
    (folder / "dataset.toml").write_text(f'images = "."\n[extract]\n{toml}\n')
    report = check_dataset(folder)
    assert report.faults == ()
    assert [doubt.kind for doubt in report.doubts] == (["few-grey-levels"] if levels else [])
    for doubt in report.doubts:
        expected = f"numbers from 0 to {most} in all images, which become levels 0 to {levels}"
        assert doubt.got == expected
        assert doubt.where == "instances.csv:2"
        assert doubt.remedy.startswith(remedy)


def test_names_that_mislead_are_doubts_and_no_faults(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    report = check_dataset(tables(tmp_path, "1,0,,\n2,1.0,,\n3,,,\n", "1,a.png,,,,\n"))
    assert [d.kind for d in report.doubts] == ["mixed-number-label", "empty-labels"]
    assert {fault.kind for fault in report.faults} == {"bag-without-images"}


def test_what_is_missing_is_offered_by_what_looks_like_it(tmp_path: Path) -> None:
    image(tmp_path / "caf\u00e9.png")
    image(tmp_path / "B.PNG")
    rows = "1,cafe\u0301.png,,,,\n1,b.png,,,,\n01,caf\u00e9.png,,,,\n1,none.png,,,,\n"
    faults = check_dataset(tables(tmp_path, "1,x,,\n", rows)).faults
    stray, *missing = faults
    assert stray.got == "'01', while '1' is one: leading zeros"
    assert [fault.remedy for fault in missing] == [
        "did you mean 'caf\u00e9.png' (they differ by U+0065 U+0301 against U+00E9)? otherwise "
        "add it or correct the path",
        "did you mean 'B.PNG' (they differ by case)? otherwise add it or correct the path",
        "add it or correct the path",
    ]
