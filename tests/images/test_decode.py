"""Files as microscopes write them: exact numbers of every kind; all sizes different primes."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from dragn_cache.backbone_input import Intensity
from dragn_cache.errors import ImageError
from dragn_cache.images import decode
from dragn_cache.images.crops import Crops, Geometry, ImageRequest, examine_image, read_crops
from dragn_cache.images.decode import read_picture

H, W = 23, 31
Array = NDArray[Any]


def numbers(*shape: int, dtype: str = "u2", seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def tiff(path: Path, array: Array, **options: Any) -> Path:
    tifffile.imwrite(path, array, **options)
    return path


def read(
    *files: Path,
    planes: Sequence[int] = (0, 1, 2),
    channels: int = 0,
    intensity: str = "full",
    image: str = "x",
) -> Crops:
    setting = Intensity.parse(intensity)
    return read_crops(
        ImageRequest(image, files, tuple(planes), (None,), Geometry((H, W)), setting, channels)
    )


def reduced(array: Array) -> Array:
    """16 bits to 8, in whole numbers."""
    return (array.astype(int) + 128) // 257


# --- kinds of pixels ---------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_deep_png(tmp_path: Path, samples: int) -> None:
    array = numbers(H, W, samples)
    data = imagecodecs.png_encode(array[:, :, 0] if samples == 1 else array)
    (tmp_path / "x.png").write_bytes(data)
    picture = read_picture("x", tmp_path / "x.png")
    kept = 1 if samples < 3 else 3
    assert (picture.full, picture.colour, picture.size) == (65535, kept == 3, (W, H))
    np.testing.assert_array_equal(picture.planes, array[:, :, :kept].transpose(2, 0, 1))
    expected = np.broadcast_to(reduced(picture.planes), (3, H, W))
    np.testing.assert_array_equal(read(tmp_path / "x.png").pixels[0], expected)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_grey_tiff(tmp_path: Path, dtype: str, compression: str | None, order: str) -> None:
    array = numbers(H, W, dtype=dtype)
    picture = read_picture(
        "x", tiff(tmp_path / "x", array, compression=compression, byteorder=order)
    )
    np.testing.assert_array_equal(picture.planes, [array])
    assert picture.planes.dtype == ("f4" if dtype == "f2" else dtype)
    assert picture.full == (np.iinfo(dtype).max if dtype[0] == "u" else None)
    assert not picture.colour


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("alpha", [[], ["unassalpha"]])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_colour_tiff(tmp_path: Path, planar: str, alpha: list[str], dtype: str) -> None:
    array = numbers(3 + len(alpha), H, W, dtype=dtype)
    array[3:] = 1 if dtype == "f4" else np.iinfo(dtype).max  # opaque everywhere
    path = tiff(
        tmp_path / "x",
        array if planar == "separate" else array.transpose(1, 2, 0),
        photometric="rgb",
        planarconfig=planar,
        extrasamples=alpha,
    )
    picture = read_picture("x", path)
    assert picture.colour
    np.testing.assert_array_equal(picture.planes, array[:3])


def test_predictors_tiles_and_large_tiff(tmp_path: Path) -> None:
    array = numbers(67, 71, 3)
    path = tiff(
        tmp_path / "x",
        array,
        photometric="rgb",
        compression="lzw",
        predictor=True,
        tile=(16, 32),
        bigtiff=True,
    )
    np.testing.assert_array_equal(read_picture("x", path).planes, array.transpose(2, 0, 1))


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_white_may_be_zero(tmp_path: Path, dtype: str) -> None:
    array = numbers(H, W, dtype=dtype)
    picture = read_picture("x", tiff(tmp_path / "x", array, photometric="miniswhite"))
    np.testing.assert_array_equal(picture.planes, [np.iinfo(dtype).max - array])


def test_twelve_bits_have_a_range_of_their_own(tmp_path: Path) -> None:
    array = numbers(H, 26) % 4096
    data = imagecodecs.packints_encode(array, 12)  # whole bytes a row
    tags = [
        (256, 4, 26), (257, 4, H), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8),
        (277, 3, 1), (278, 4, H), (279, 4, len(data)),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    (tmp_path / "x").write_bytes(head + data + struct.pack("<H", len(tags)) + directory + bytes(4))
    picture = read_picture("x", tmp_path / "x")
    assert picture.full == 4095
    np.testing.assert_array_equal(picture.planes, [array])


def test_cmyk_becomes_colour(tmp_path: Path) -> None:
    array = numbers(H, W, 4, dtype="u1")
    image = Image.frombytes("CMYK", (W, H), array)
    image.save(tmp_path / "x.tif")
    image.save(tmp_path / "x.jpg", quality=95)
    wide = array.astype(int)
    (got,) = read(tmp_path / "x.tif").pixels
    # Ink over black ink: (255 − c) · (255 − k) / 255, rounded.
    by_hand = np.rint((255 - wide[:, :, :3]) * (255 - wide[:, :, 3:]) / 255)
    np.testing.assert_allclose(got, by_hand.transpose(2, 0, 1), atol=1)
    assert read_picture("x", tmp_path / "x.jpg").colour


# --- orientation -------------------------------------------------------------------------------

STORED = np.array([[1, 2, 3], [4, 5, 6]], np.uint8) * 40
DISPLAYED = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("orientation", list(DISPLAYED))
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "deep.png", "deep.tif"])
def test_a_picture_is_taken_as_it_is_displayed(tmp_path: Path, orientation: int, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    deep = STORED.astype("u2") * 257
    exif = Image.Exif()
    exif[274] = orientation
    if kind == "deep.tif":
        tiff(path, deep, extratags=[(274, 3, 1, orientation, True)])
    elif kind == "deep.png":
        colour = imagecodecs.png_encode(np.dstack([deep] * 3))
        body = b"eXIf" + exif.tobytes()[6:]
        chunk = struct.pack(">I", len(body) - 4) + body
        chunk += struct.pack(">I", zlib.crc32(body))
        path.write_bytes(colour[:33] + chunk + colour[33:])
    elif kind == "tif":
        Image.fromarray(STORED).save(path, tiffinfo={274: orientation})
    else:
        # A JPEG of 8 × 8 blocks of one grey each keeps them but for rounding.
        Image.fromarray(np.kron(STORED, np.ones((8, 8), "u1")) if kind == "jpg" else STORED).save(
            path, exif=exif, **({"quality": 100} if kind == "jpg" else {})
        )
    values = read_picture("x", path).planes[0].astype(float)
    if kind == "jpg":
        values = values[4::8, 4::8]
    scale = 257 if kind.startswith("deep") else 1
    np.testing.assert_allclose(values / 40 / scale, DISPLAYED[orientation], atol=0.03)
    size = examine_image("x", [path]).size
    side = 8 if kind == "jpg" else 1
    height, width = np.shape(DISPLAYED[orientation])
    assert size == (width * side, height * side)


# --- pages and channels ------------------------------------------------------------------------

PAGES: dict[str, dict[str, Any]] = {
    "plain": {"photometric": "minisblack"},
    "lzw": {"photometric": "minisblack", "compression": "lzw"},
    "ome": {"ome": True, "metadata": {"axes": "CYX"}, "photometric": "minisblack"},
    "imagej": {"imagej": True, "metadata": {"axes": "CYX"}},
}


@pytest.mark.parametrize("kind", list(PAGES))
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_pages_are_the_data_sets_channels(tmp_path: Path, kind: str, dtype: str) -> None:
    array = numbers(5, H, W, dtype=dtype)
    path = tiff(tmp_path / ("x.ome.tif" if kind == "ome" else "x.tif"), array, **PAGES[kind])
    np.testing.assert_array_equal(read_picture("x", path).planes, array)
    assert examine_image("x", [path], 5).size == (W, H)
    intensity = "full" if dtype == "u1" else "channel-percentile:0:100"
    crops = read(path, planes=(4, 0, 4, 2, 1, 3, 3), channels=5, intensity=intensity)
    assert crops.pixels.shape == (1, 7, H, W)
    if dtype == "u1":
        np.testing.assert_array_equal(crops.pixels[0], array[[4, 0, 4, 2, 1, 3, 3]])
    else:
        assert (crops.pixels.min((2, 3)) == 0).all()
        assert (crops.pixels.max((2, 3)) == 255).all()
    for channels in (0, 3, 4):
        with pytest.raises(ImageError, match=r"^x: expected .*, got 5 pages or samples; name"):
            read(path, channels=channels, intensity=intensity)
        with pytest.raises(ImageError, match=r"^x: expected .*, got 5 pages or samples; name"):
            examine_image("x", [path], channels)


def test_samples_of_a_pixel_are_channels(tmp_path: Path) -> None:
    array = numbers(H, W, 7)
    path = tiff(tmp_path / "x", array, photometric="minisblack", planarconfig="contig")
    np.testing.assert_array_equal(read_picture("x", path).planes, array.transpose(2, 0, 1))


@pytest.mark.parametrize(("axes", "message"), [("ZYX", r"5 depths \(Z\)"), ("TYX", "5 times")])
def test_stacks_are_refused(tmp_path: Path, axes: str, message: str) -> None:
    array = numbers(5, H, W)
    path = tiff(tmp_path / "x.ome.tif", array, ome=True, metadata={"axes": axes})
    with pytest.raises(ImageError, match=rf"expected one picture, .* got {message}.*; project"):
        examine_image("x", [path], 5)


def test_pages_of_several_sizes_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "x") as file:
        file.write(numbers(H, W))
        file.write(numbers(H, W - 2))
    with pytest.raises(ImageError, match="its pages of one size, got 2 pictures"):
        examine_image("x", [tmp_path / "x"])


def test_an_overview_beside_the_picture_is_none(tmp_path: Path) -> None:
    array = numbers(H, W)
    with tifffile.TiffWriter(tmp_path / "x") as file:
        file.write(array)
        file.write(array[::2, ::2], subfiletype=1)
    np.testing.assert_array_equal(read_picture("x", tmp_path / "x").planes, [array])


def test_files_that_metadata_names_are_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiff(tmp_path / "other.tif", numbers(H, W, seed=1))
    data = "".join(
        f'<TiffData FirstC="{k}" IFD="0" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{k}</UUID>'
        "</TiffData>"
        for k, name in enumerate(("x.ome.tif", "other.tif"))
    )
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" '
        f'SizeX="{W}" SizeY="{H}" SizeC="2" SizeZ="1" SizeT="1">{data}</Pixels></Image></OME>'
    )
    array = numbers(H, W)
    path = tiff(tmp_path / "x.ome.tif", array, description=xml, metadata=None)
    np.testing.assert_array_equal(read_picture("x", path).planes, [array])
    with pytest.raises(ImageError, match=r"^x: expected 2 channels, got 1 pages or samples; name"):
        examine_image("x", [path], 2)


def test_a_grey_file_is_red_green_and_blue_but_no_fourth_channel(tmp_path: Path) -> None:
    array = numbers(H, W, dtype="u1")
    path = tiff(tmp_path / "x", array)
    np.testing.assert_array_equal(read(path, planes=(2, 0)).pixels[0], [array] * 2)
    with pytest.raises(ImageError, match=r"^x: expected 4 channels, got 1 pages or samples"):
        read(path, channels=4)
    colour = tmp_path / "x.png"
    Image.fromarray(numbers(H, W, 3, dtype="u1")).save(colour)
    with pytest.raises(ImageError, match=r"^x: expected a file with channel 4, got 3 in the file"):
        read(colour, planes=(3, 3, 3), channels=4)


def test_a_file_for_each_of_any_number_of_channels(tmp_path: Path) -> None:
    arrays = [numbers(H, W, seed=k) for k in range(5)]
    files = [tiff(tmp_path / f"{k}.tif", array) for k, array in enumerate(arrays)]
    (got,) = read(*files, planes=(), channels=5, image="{channel}.tif").pixels
    np.testing.assert_array_equal(got, reduced(np.array(arrays)))
    (one,) = read(files[2], planes=(), channels=5, image="{channel}.tif").pixels
    np.testing.assert_array_equal(one, reduced(arrays[2])[None])
    pages = tiff(tmp_path / "pages.tif", np.array(arrays), photometric="minisblack")
    with pytest.raises(ImageError, match=r"\(pages.tif\): expected one channel, or red.* got 5 pa"):
        read(*files[:2], pages, planes=(), channels=5, image="{channel}.tif")


def test_a_colour_file_that_is_one_channel_is_its_maximum(tmp_path: Path) -> None:
    array = numbers(H, W, 3, dtype="u1")
    Image.fromarray(array).save(tmp_path / "x.png")
    (got,) = read(tmp_path / "x.png", planes=(), channels=1).pixels
    np.testing.assert_array_equal(got, [array.max(2)])


# --- intensities -------------------------------------------------------------------------------


def test_ranges_are_of_the_whole_image_so_that_crops_agree(tmp_path: Path) -> None:
    array = numbers(H, W, dtype="f4")
    path = tiff(tmp_path / "x", array)
    setting = Intensity.parse("percentile:1:99")
    box = (3, 5, 16, 16)
    geometry = Geometry((11, 13))
    (part,) = read_crops(ImageRequest("x", (path,), (0, 1, 2), (box,), geometry, setting)).pixels
    (whole,) = read(path, intensity="percentile:1:99").pixels
    np.testing.assert_array_equal(part, whole[:, 5:16, 3:16])


def test_percentiles_are_of_the_channels_that_are_used(tmp_path: Path) -> None:
    array = np.zeros((H, W, 3), np.uint8)
    array[0, 0] = (51, 102, 204)
    Image.fromarray(array).save(tmp_path / "x.png")
    (got,) = read(tmp_path / "x.png", planes=(0, 1, 1), intensity="percentile:0:100").pixels
    assert got[:, 0, 0].tolist() == [128, 255, 255]  # 127.5


def test_floating_point_pixels_need_a_range(tmp_path: Path) -> None:
    path = tiff(tmp_path / "x", numbers(H, W, dtype="f4"))
    with pytest.raises(ImageError, match=r"^x: expected a range, .* got full, for float32 pixels"):
        read(path)


def test_pixels_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    array = numbers(H, W, dtype="f4")
    array[3, :5], array[7, 11] = np.nan, -np.inf
    path = tiff(tmp_path / "x", array)
    with pytest.raises(ImageError, match=r"expected finite pixels, got 6 that are NaN or infinite"):
        read(path, intensity="0:1")


# --- limits ------------------------------------------------------------------------------------


def test_what_would_fill_the_memory_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiff(tmp_path / "x", numbers(5, H, W), photometric="minisblack")
    monkeypatch.setattr(decode, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(ImageError, match=r"expected at most \d+ bytes in the file, got \d+; cut"):
        examine_image("x", [path], 5)
    tiff(path, np.zeros((5, H, W), "u2"), photometric="minisblack", compression="zlib")
    monkeypatch.setattr(decode, "MAX_BYTES", 10 * H * W - 1)
    with pytest.raises(ImageError, match=r"expected at most 7129 bytes of pixels, got 7130; cut"):
        examine_image("x", [path], 5)
    monkeypatch.setattr(decode, "MAX_PIXELS", H * W - 1)
    with pytest.raises(ImageError, match=r"expected at most 712 pixels, got 31×23; cut"):
        examine_image("x", [path], 5)


def test_without_tifffile_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiff(tmp_path / "x", numbers(H, W))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImageError, match=r"got none; install it: pip install tifffile imagecodecs"):
        examine_image("x", [path])


def test_plain_files_need_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tifffile", "imagecodecs"):
        monkeypatch.setitem(sys.modules, name, None)
    array = numbers(H, W, 3, dtype="u1")
    for suffix in ("png", "tif", "bmp"):
        Image.fromarray(array).save(tmp_path / f"x.{suffix}")
        (got,) = read(tmp_path / f"x.{suffix}").pixels
        np.testing.assert_array_equal(got, array.transpose(2, 0, 1))
