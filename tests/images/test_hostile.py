"""A folder of unusual and damaged files: each is read exactly or recorded with its reason.

Each file is the only image of a bag. `check` and `extract --on-error skip`, with worker processes,
go through all of them, and no error but an `ImageError` comes out of any.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from dragn_cache.errors import ImageError
from dragn_cache.extraction.check import check_dataset
from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.extract import extract
from dragn_cache.extraction.workers import Decoder, FromDecoder, Mark, ToDecode
from dragn_cache.images.crops import Crops, Geometry, ImageRequest
from dragn_cache.manifest import Manifest, read_manifest
from dragn_cache.store import open_store

H, W = 47, 59
Pixels = NDArray[np.uint8]
TRUNCATED = r"expected (a whole image|a PNG, JPEG|pages that end)"
TOO_LARGE = r"expected at most 268435456 pixels, got 30000×30000; cut it into tiles first"


@dataclass(frozen=True)
class Case:
    """One file and its expected result: pixels (h, w[, 3]), or the pattern of a reason.

    With an empty pattern both are allowed."""

    name: str
    make: bytes | Callable[[Path], object]
    expected: Pixels | str


def noise(*shape: int, dtype: str = "u1") -> NDArray[Any]:
    rng = np.random.default_rng(3)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


COLOUR, GREY = noise(H, W, 3), noise(H, W)
DEEP, DEEP_COLOUR = noise(H, W, dtype="u2"), noise(H, W, 3, dtype="u2")


def encoded(array: Pixels, format: str, mode: str | None = None, **options: Any) -> bytes:
    target = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(target, format, **options)
    return target.getvalue()


def decoded(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def tiff(array: NDArray[Any], **options: Any) -> bytes:
    target = io.BytesIO()
    tifffile.imwrite(target, array, **options)
    return target.getvalue()


def reduced(array: NDArray[Any]) -> Pixels:
    return ((array.astype(int) + 128) // 257).astype(np.uint8)


def opaque(colour: Pixels) -> Pixels:
    """Red, green, blue, and an alpha that hides nothing."""
    return np.concatenate([colour, np.full_like(colour[..., :1], 255)], -1)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_with(*chunks: bytes) -> bytes:
    """The colour PNG with chunks inserted after its header."""
    data = encoded(COLOUR, "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def bmp_header(width: int, height: int) -> bytes:
    data = bytearray(encoded(COLOUR, "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def tiff_header(width: int, height: int, bits: int = 8) -> bytes:
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1)]
    return tiff_of([*tags, (278, height), (279, 64)])


def tiff_of(tags: list[tuple[int, int]], next_page: int = 0) -> bytes:
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + 64)
    return (
        head + bytes(64) + struct.pack("<H", len(tags)) + directory + struct.pack("<I", next_page)
    )


def tiff_in_circles(pages: int) -> bytes:
    """A TIFF of ``pages`` pages, the last followed by the first."""
    tags = [(256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (279, 64)]
    length = 2 + 12 * len(tags) + 4
    data = tiff_of(tags)[: 8 + 64]
    for k in range(pages):
        page = tiff_of(tags, next_page=72 + (k + 1) % pages * length)
        data += page[72:]
    return data


def tiff_bomb() -> bytes:
    """Deflated zeros: 60 MB, where the header says 4 KB."""
    data = bytearray(tiff(np.zeros((64, 64), "u2"), compression="zlib"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        page = file.pages[0]
        offset, count = page.tags[273].valueoffset, page.tags[279].valueoffset  # type: ignore[union-attr]
    bomb = zlib.compress(bytes(60 * 10**6), 9)
    end = len(data)
    data[offset : offset + 4], data[count : count + 4] = (
        struct.pack("<I", end),
        struct.pack("<I", len(bomb)),
    )
    return bytes(data) + bomb


def with_orientation(format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(COLOUR, format, exif=exif, **({"quality": 95} if format == "JPEG" else {}))


def turned(array: Pixels, orientation: int) -> Pixels:
    """The standard's definition: the sides of the picture where row 0 and column 0 lie."""
    rows_are_columns = orientation > 4
    shown = array.transpose(1, 0, 2) if rows_are_columns else array
    flip_rows, flip_columns = {
        1: (False, False), 2: (False, True), 3: (True, True), 4: (True, False),
        5: (False, False), 6: (False, True), 7: (True, True), 8: (True, False),
    }[orientation]  # fmt: skip
    return shown[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def frames(format: str) -> bytes:
    target = io.BytesIO()
    first, second = Image.fromarray(COLOUR), Image.fromarray(COLOUR[::-1])
    first.save(target, format, save_all=True, append_images=[second])
    return target.getvalue()


def truncated() -> list[Case]:
    sources = {
        "png": encoded(COLOUR, "PNG"),
        "jpg": encoded(COLOUR, "JPEG", quality=90),
        "bmp": encoded(COLOUR, "BMP"),
        "tif": encoded(COLOUR, "TIFF"),
        "lzw.tif": tiff(DEEP, compression="lzw"),
        "deep.png": imagecodecs.png_encode(DEEP_COLOUR),
        "deep.tif": tiff(DEEP_COLOUR, photometric="rgb"),
    }
    return [
        Case(f"cut{tenth}.{suffix}", data[: len(data) * tenth // 10], TRUNCATED)
        for suffix, data in sources.items()
        for tenth in range(1, 10)
    ]


def oriented() -> list[Case]:
    cases = []
    for k in range(1, 9):
        cases.append(Case(f"turn{k}.png", with_orientation("PNG", k), turned(COLOUR, k)))
        jpeg = with_orientation("JPEG", k)
        cases.append(Case(f"turn{k}.jpg", jpeg, turned(decoded(jpeg), k)))
        deep = tiff(DEEP_COLOUR, photometric="rgb", extratags=[(274, 3, 1, k, True)])
        cases.append(Case(f"turn{k}.tif", deep, turned(reduced(DEEP_COLOUR), k)))
    return cases


def torn_jpegs() -> list[Case]:
    """JPEGs that libjpeg reads to the end, with a warning that Pillow drops."""
    data = encoded(noise(199, 211, 3), "JPEG", quality=90)
    frame = data.index(b"\xff\xc0")
    claims = data[: frame + 5] + struct.pack(">HH", 16000, 16000) + data[frame + 9 :]
    half = len(data) // 2
    return [
        Case("cutend.jpg", data[:half] + b"\xff\xd9", "expected a whole image, got .*truncated"),
        Case("hole.jpg", data[:half] + bytes(4096) + data[half + 4096 :], "expected a whole image"),
        Case("claims.jpg", claims, "expected a whole image, got .* for 16000×16000 pixels"),
    ]


def inner_pictures() -> list[Case]:
    """TIFF files of 8 × 8 pixels whose one strip is a JPEG of another size."""
    tags = [(256, 8), (257, 8), (258, 8), (259, 7), (262, 1), (273, 8), (277, 1), (279, 64)]
    cases = []
    for name, side in (("larger", 640), ("huge", 16000)):
        jpeg = encoded(noise(640, 640), "JPEG")
        frame = jpeg.index(b"\xff\xc0")
        jpeg = jpeg[: frame + 5] + struct.pack(">HH", side, side) + jpeg[frame + 9 :]
        start = len(tiff_of(tags))
        strip = {273: start, 279: len(jpeg)}
        data = tiff_of([(tag, strip.get(tag, value)) for tag, value in tags]) + jpeg
        cases.append(Case(f"{name}.jpg.tif", data, "640×640×1 in a strip|16000×16000×1 in a strip"))
    return cases


def odd() -> list[Case]:
    nan = noise(H, W).astype("f4")
    nan[5, 7:10] = np.nan
    cmyk = encoded(COLOUR, "JPEG", "CMYK")
    palette = encoded(GREY, "PNG", "P")
    many = tiff(noise(3, H, W), photometric="minisblack")
    return [
        Case("empty.png", b"", "expected an image, got 0 bytes"),
        Case("text.png", b"bag_id,labels\n", "expected a PNG, JPEG, BMP or TIFF image, got anoth"),
        Case("zeros.tif", bytes(5000), "got another kind of file"),
        Case("magic.png", b"\x89PNG\r\n\x1a\n", "expected a"),
        Case("magic.jpg", b"\xff\xd8\xff", "expected a"),
        Case("magic.bmp", b"BM", "expected a"),
        Case("magic.tif", b"II*\0", "expected a"),
        Case("gif.png", encoded(COLOUR, "GIF"), "got another kind of file"),
        Case("webp.png", encoded(COLOUR, "WEBP"), "got another kind of file"),
        Case("jpeg.png", encoded(COLOUR, "BMP"), COLOUR),
        Case("one.png", encoded(COLOUR[:1, :1], "PNG"), COLOUR[:1, :1]),
        Case("one.tif", tiff(DEEP[:1, :1]), reduced(DEEP[:1, :1])),
        Case("huge.png", png_header(30000, 30000), TOO_LARGE),
        Case("huge.bmp", bmp_header(30000, 30000), TOO_LARGE),
        Case("huge8.tif", tiff_header(30000, 30000), TOO_LARGE),
        Case("huge16.tif", tiff_header(30000, 30000, 16), TOO_LARGE),
        Case("endless.tif", tiff_header(2**31, 2**31, 16), "expected "),
        Case("flat.png", png_header(0, 7), "expected a"),
        Case("negative.bmp", bmp_header(-5, 7), "expected a"),
        Case("grey16.png", imagecodecs.png_encode(DEEP), reduced(DEEP)),
        Case("rgb16.png", imagecodecs.png_encode(DEEP_COLOUR), reduced(DEEP_COLOUR)),
        Case("grey16.tif", tiff(DEEP), reduced(DEEP)),
        Case("rgb16.tif", tiff(DEEP_COLOUR, photometric="rgb"), reduced(DEEP_COLOUR)),
        Case("nan.tif", tiff(nan), "expected finite pixels, got 3 that are NaN or infinite"),
        Case("float.tif", tiff(noise(H, W).astype("f4")), "no full range, got full, for float32"),
        Case("complex.tif", tiff(noise(H, W).astype("c8")), "got MINISBLACK of complex64"),
        Case("lzw8.tif", tiff(GREY, compression="lzw"), GREY),
        Case("lzw16.tif", tiff(DEEP, compression="lzw", predictor=True), reduced(DEEP)),
        Case("cmyk.jpg", cmyk, decoded(cmyk)),
        Case("palette.png", palette, decoded(palette)),
        Case("pages.tif", many, "got 3 pages or samples; name a file's channels"),
        Case("five.tif", tiff(noise(H, W, 5), planarconfig="contig"), "got 5 pages or samples"),
        Case("four.tif", tiff(noise(H, W, 4), photometric="rgb"), "got 4 pages or samples; name"),
        Case("opaque.tif", tiff(opaque(COLOUR), photometric="rgb"), COLOUR),
        Case("moving.png", frames("PNG"), r"expected one picture, got 2 in one file"),
        Case("circle1.tif", tiff_in_circles(1), np.zeros((8, 8), np.uint8)),
        Case("circle149.tif", tiff_in_circles(149), "expected pages that end, got pages in a c"),
        Case("bomb.tif", tiff_bomb(), "expected a whole image, got .*INSUFFICIENT_SPACE"),
        Case("text9.png", png_with(chunk(b"tEXt", b"a\0" + bytes(9))), COLOUR),
        Case("text6m.png", png_with(chunk(b"tEXt", b"a\0" + b"b" * 6 * 10**6)), COLOUR),
        Case("ztxt.png", png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8), 9))), ""),
        Case("icc.png", png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8), 9))), ""),
        Case("exif.png", png_with(chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")), COLOUR),
        Case("folder.png", lambda path: path.mkdir(), "got a folder, not a regular file"),
        Case("pipe.png", lambda path: os.mkfifo(path), "got a pipe, .* not a regular file"),
        Case("link.png", lambda path: path.symlink_to("nowhere"), "got no such file"),
        Case("loop.png", lambda path: path.symlink_to(path), "expected a readable file, got"),
        Case("device.png", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        Case("good.png", encoded(COLOUR, "PNG"), COLOUR),
    ]


CASES = [*truncated(), *oriented(), *torn_jpegs(), *inner_pictures(), *odd()]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """All the files, each in a bag of its own that is named after it."""
    folder = tmp_path_factory.mktemp("hostile")
    for case in CASES:
        if isinstance(case.make, bytes):
            (folder / case.name).write_bytes(case.make)
        else:
            case.make(folder / case.name)
    (folder / "dataset.toml").write_text('name = "hostile"\nlabels = ["u"]\n')
    rows = "".join(f"{case.name},u\n" for case in CASES)
    (folder / "bags.csv").write_text("bag_id,labels\n" + rows)
    rows = "".join(f"{case.name},{case.name}\n" for case in CASES)
    (folder / "instances.csv").write_text("bag_id,image\n" + rows)
    return read_manifest(folder)


@pytest.fixture(scope="module")
def results(hostile: Manifest) -> dict[str, Crops | ImageError]:
    """The results of worker processes for the files, each in its own size."""
    requests = []
    for case in CASES:
        size = (H, W) if isinstance(case.expected, str) else case.expected.shape[:2]
        path = hostile.image_root / case.name
        requests.append(ImageRequest(case.name, (path,), (0, 1, 2), (None,), Geometry(size)))
    with Decoder(workers=2, ahead_crops=16) as decoder:
        items: list[ToDecode[str] | Mark[None]] = [ToDecode(r.image, r) for r in requests]
        return {
            item.tag: item.decoded
            for item in decoder.stream(items)
            if isinstance(item, FromDecoder)
        }


def test_there_are_many() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 100


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_is_read_exactly_or_refused_with_a_reason(
    case: Case, results: dict[str, Crops | ImageError]
) -> None:
    result = results[case.name]
    if isinstance(case.expected, str) and not case.expected:
        assert isinstance(result, Crops | ImageError)
    elif isinstance(case.expected, str):
        assert isinstance(result, ImageError)
        with pytest.raises(ImageError, match=case.expected):
            raise result
        assert str(result).startswith(f"{case.name}: expected ")
        assert len(str(result)) < 400
    else:
        assert isinstance(result, Crops)
        pixels = case.expected
        planes = [pixels] * 3 if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        np.testing.assert_array_equal(result.pixels[0], planes)


def test_check_lists_them_and_extract_records_them(
    hostile: Manifest, results: dict[str, Crops | ImageError], tmp_path: Path
) -> None:
    recorded = {name for name, result in results.items() if isinstance(result, ImageError)}
    with warnings.catch_warnings():  # Pillow warns of damaged metadata
        warnings.simplefilter("ignore")
        listed = check_dataset(hostile.image_root).faults
    lines = {fault.line for fault in listed if fault.file == "instances.csv"}
    names = {CASES[line - 2].name for line in lines}
    assert names == recorded - {"float.tif"}  # which --intensity makes readable
    config = ExtractConfig(
        backbone="shufflenet_v2_x0_5",
        weights="random:3",
        taps=("stage2",),
        size=(32, 48),
        workers=2,
        on_error="skip",
    )
    report = extract(hostile, config, tmp_path / "s")
    assert {failure.image for failure in report.failures} == recorded
    store = open_store(tmp_path / "s")
    for case in CASES:
        assert len(store.bag(case.name, "stage2")) == (case.name not in recorded)
