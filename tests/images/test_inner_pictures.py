"""JPEGs that are not whole, and pictures inside TIFF files that are larger than their place."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from dragn_cache.errors import ImageError
from dragn_cache.images.decode import read_picture
from dragn_cache.images.jpeg import read_frame

H, W = 131, 157
Pixels = NDArray[np.uint8]
KINDS: dict[str, dict[str, Any]] = {
    "baseline": {"quality": 90},
    "444": {"quality": 90, "subsampling": 0},
    "422": {"quality": 90, "subsampling": 1},
    "progressive": {"quality": 90, "progressive": True},
    "restarts": {"quality": 90, "restart_marker_blocks": 3},
    "grey": {"quality": 90, "mode": "L"},
    "cmyk": {"quality": 90, "mode": "CMYK"},
    "optimised": {"quality": 25, "optimize": True},
}


def scene(height: int = H, width: int = W) -> Pixels:
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(5).integers(0, 30, (height, width, 3))
    planes = [100 + 90 * np.sin(x / 17), 100 + 90 * np.cos(y / 11), (x * y) % 220]
    return (np.stack(planes, -1) + noise).astype(np.uint8)


def jpeg(kind: str) -> bytes:
    options = dict(KINDS[kind])
    target = io.BytesIO()
    image = Image.fromarray(scene())
    mode = options.pop("mode", None)
    (image.convert(mode) if mode else image).save(target, "JPEG", **options)
    return target.getvalue()


def claiming(data: bytes, height: int, width: int) -> bytes:
    """A JPEG whose frame names another size."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def tiff(array: NDArray[Any], **options: Any) -> bytes:
    target = io.BytesIO()
    tifffile.imwrite(target, array, **options)
    return target.getvalue()


def with_part(data: bytes, part: bytes) -> bytes:
    """A TIFF of one strip that holds other bytes."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        assert len(page.dataoffsets) == 1
        offset, count = page.tags[273].valueoffset, page.tags[279].valueoffset
        size = page.tags[279].dtype.value
    changed = bytearray(data + part)
    changed[offset : offset + 4] = struct.pack("<I", len(data))
    length = struct.pack("<H" if size == 3 else "<I", len(part))
    changed[count : count + len(length)] = length
    return bytes(changed)


def read(tmp_path: Path, data: bytes) -> Pixels:
    (tmp_path / "x").write_bytes(data)
    return read_picture("x", tmp_path / "x").planes.astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_jpeg_has_pillows_pixels(tmp_path: Path, kind: str) -> None:
    data = jpeg(kind)
    image = Image.open(io.BytesIO(data))
    expected = np.asarray(image if kind == "grey" else image.convert("RGB"))
    planes = expected[None] if kind == "grey" else expected.transpose(2, 0, 1)
    np.testing.assert_array_equal(read(tmp_path, data), planes)
    frame = read_frame(data)
    assert (frame.width, frame.height, frame.bits) == (W, H, 8)
    assert bool(frame.coefficient_bytes) == (kind == "progressive")


def test_blocks_are_counted_over_all_components() -> None:
    across, down = -(-W // 8), -(-H // 8)
    halves = -(-W // 16) * -(-H // 16)
    assert read_frame(jpeg("444")).blocks == 3 * across * down
    assert read_frame(jpeg("baseline")).blocks == across * down + 2 * halves


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.97])
def test_a_cut_jpeg_with_an_end_mark_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    data = jpeg(kind)
    cut = data[: int(len(data) * share)] + b"\xff\xd9"
    with pytest.raises(ImageError, match="x: expected a whole image, got "):
        read(tmp_path, cut)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filler", [b"\0", b"\xaa", b"\xff"])
def test_a_jpeg_with_a_hole_is_refused(tmp_path: Path, kind: str, filler: bytes) -> None:
    data = jpeg(kind)
    start, hole = len(data) // 2, 2048 if len(data) > 8000 else 512
    torn = data[:start] + filler * hole + data[start + hole :]
    with pytest.raises(ImageError, match="x: expected a whole image, got "):
        read(tmp_path, torn)


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_too_short_for_its_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, kind: str
) -> None:
    data = claiming(jpeg(kind), 16000, 16000)
    with pytest.raises(ImageError, match=r"bytes (for 16000×16000 pixels|of memory, got)"):
        read(tmp_path, data)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xda\0\2", b"\xff\xd8\xff\xc0\0\2"]
)
def test_data_without_a_frame_are_named(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"JPEG data (without a frame|that end in their header)"):
        read_frame(data)


# --- inside TIFF files -------------------------------------------------------------------------

GOOD = {
    "rgb": lambda: tiff(scene(), photometric="rgb", compression="jpeg"),
    "ycbcr": lambda: tiff(scene(), photometric="ycbcr", compression="jpeg"),
    "grey": lambda: tiff(scene()[..., 0], compression="jpeg"),
    "tiles": lambda: tiff(scene(), photometric="rgb", compression="jpeg", tile=(32, 48)),
    "pages": lambda: tiff(scene().transpose(2, 0, 1), photometric="minisblack", compression="jpeg"),
    "jpeg 2000": lambda: tiff(scene(), photometric="rgb", compression="jpeg2000"),
    "deep jpeg 2000": lambda: tiff(scene().astype("u2") * 257, compression="jpeg2000"),
    "png": lambda: tiff(scene(), photometric="rgb", compression="png"),
}


@pytest.mark.parametrize("name", GOOD)
def test_pictures_in_a_tiff_are_read(tmp_path: Path, name: str) -> None:
    data = GOOD[name]()
    planes = read(tmp_path, data)
    values = tifffile.imread(io.BytesIO(data))
    if values.ndim == 3 and values.shape[-1] == 3:
        values = values.transpose(2, 0, 1)
    expected = values if values.ndim == 3 else values[None]
    assert np.abs(planes.astype(int) - expected.astype(np.uint8)).max() <= 2  # libtiff, tifffile


LARGE = {
    "rgb jpeg": lambda: with_part(
        tiff(scene(16, 16), photometric="rgb", compression="jpeg"),
        claiming(imagecodecs.jpeg8_encode(scene(16, 16)), 16000, 16000),
    ),
    "grey jpeg": lambda: with_part(
        tiff(scene(16, 16)[..., 0], compression="jpeg"),
        claiming(imagecodecs.jpeg8_encode(scene(16, 16)[..., 0].copy()), 16000, 16000),
    ),
    "whole larger jpeg": lambda: with_part(
        tiff(scene(16, 16)[..., 0], compression="jpeg"),
        imagecodecs.jpeg8_encode(scene(640, 640)[..., 0].copy()),
    ),
    "more components": lambda: with_part(
        tiff(scene(16, 16)[..., 0], compression="jpeg"), imagecodecs.jpeg8_encode(scene(16, 16))
    ),
    "jpeg 2000": lambda: with_part(
        tiff(scene(16, 16), photometric="rgb", compression="jpeg2000"),
        imagecodecs.jpeg2k_encode(np.zeros((4000, 4000, 3), "u1"), codecformat="jp2"),
    ),
    "jpeg 2000 stream": lambda: with_part(
        tiff(scene(16, 16), photometric="rgb", compression="jpeg2000"),
        imagecodecs.jpeg2k_encode(np.zeros((4000, 4000, 3), "u1"), codecformat="j2k"),
    ),
    "png": lambda: with_part(
        tiff(scene(16, 16), photometric="rgb", compression="png"),
        imagecodecs.png_encode(np.zeros((4000, 4000, 3), "u1")),
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_picture_larger_than_its_place_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match=r"\d+×\d+×\d in a strip or tile of at most 16×16×[13]"):
        read(tmp_path, LARGE[name]())


@pytest.mark.parametrize("codec", ["webp", "jpegxr", "jpegxl"])
def test_a_codec_whose_size_cannot_be_told_is_refused(tmp_path: Path, codec: str) -> None:
    data = tiff(scene(), photometric="rgb", compression=codec)
    with pytest.raises(ImageError, match=r"own size can be told, got compression \w+; save it"):
        read(tmp_path, data)


def test_all_of_tifffiles_codecs_of_pictures_are_known() -> None:
    from dragn_cache.images.tiff_parts import PICTURE_CODECS

    assert set(tifffile.TIFF.IMAGE_COMPRESSIONS) <= PICTURE_CODECS


@pytest.mark.parametrize("name", ["rgb", "ycbcr", "grey", "tiles", "pages"])
def test_a_cut_jpeg_in_a_tiff_is_refused(tmp_path: Path, name: str) -> None:
    data = GOOD[name]()
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        start, count = page.dataoffsets[-1], page.databytecounts[-1]
    middle = start + count * 2 // 3
    torn = data[:middle] + b"\xff\xd9" + bytes(start + count - middle - 2) + data[start + count :]
    assert len(torn) == len(data)
    with pytest.raises(ImageError, match=r"expected a whole image, got .*truncated"):
        read(tmp_path, torn)


@pytest.mark.parametrize("size", ["tiff", "jpeg", "progressive"])
def test_a_small_file_takes_little_memory(tmp_path: Path, size: str) -> None:
    """In a process of its own, which may have 600 MB more than after its imports."""
    data = {
        "tiff": LARGE["rgb jpeg"],
        "jpeg": lambda: claiming(jpeg("baseline"), 16000, 16000),
        "progressive": lambda: claiming(jpeg("progressive"), 16000, 16000),
    }[size]()
    (tmp_path / "x").write_bytes(data)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from dragn_cache.images.decode import read_picture\n"
        "import tifffile, imagecodecs\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_picture('x', Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")],
        capture_output=True,
        text=True,
        check=True,
    )
    kind, kilobytes = done.stdout.split()
    assert kind == "ImageError"
    assert int(kilobytes) < 100_000


# --- samples that are called alpha -------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("extra", [[], ["unspecified"], ["unassalpha"], ["assocalpha"]])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_a_fourth_sample_that_holds_something_is_kept(
    tmp_path: Path, dtype: str, extra: list[str], planar: str
) -> None:
    array = np.random.default_rng(2).integers(0, np.iinfo(dtype).max, (4, 37, 41), dtype)
    data = tiff(
        array.transpose(1, 2, 0) if planar == "contig" else array,
        photometric="rgb",
        planarconfig=planar,
        extrasamples=extra or None,
    )
    (tmp_path / "x").write_bytes(data)
    picture = read_picture("x", tmp_path / "x")
    assert not picture.colour
    np.testing.assert_array_equal(picture.planes, array)


def test_a_second_sample_of_grey_is_kept(tmp_path: Path) -> None:
    array = np.random.default_rng(2).integers(0, 255, (37, 41, 2), "u1")
    data = tiff(array, photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read(tmp_path, data), array.transpose(2, 0, 1))
    array[..., 1] = 255
    data = tiff(array, photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read(tmp_path, data), array[None, ..., 0])


# --- PNG ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rgb", "flat", "grey16", "rgb16", "palette"])
def test_every_changed_bit_of_a_pngs_pixels_is_found(tmp_path: Path, kind: str) -> None:
    """Pillow skips the checksums of pixels, and may stop before zlib compares its own."""
    if kind in ("grey16", "rgb16"):
        deep = scene(37, 41).astype("u2") * 200
        data = imagecodecs.png_encode(deep if kind == "rgb16" else deep[..., 0].copy())
    else:
        image = Image.fromarray(scene(37, 41) // (64 if kind == "flat" else 1))
        target = io.BytesIO()
        (image.convert("P") if kind == "palette" else image).save(target, "PNG")
        data = target.getvalue()
    read(tmp_path, data)
    rng = np.random.default_rng(7)
    for at in rng.integers(8, len(data), 200).tolist():
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(ImageError, match="x: expected "):
            read(tmp_path, bytes(changed))


def test_a_deep_png_that_takes_too_much_memory_is_refused_by_its_header(tmp_path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 16000, 16000, 16, 6, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    data += struct.pack(">I", zlib.crc32(header)) + struct.pack(">I4s", 0, b"IDAT") + bytes(4)
    with pytest.raises(ImageError, match="at most 2147483648 bytes of memory, got 3072000000"):
        read(tmp_path, data)
