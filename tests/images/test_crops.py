"""Images: exact pixels from every kind of file, torchvision's geometry, and errors in one line."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from dragn_cache.errors import DragnCacheError, ImageError, InputError, UnknownNameError
from dragn_cache.images.channels import plan_channels
from dragn_cache.images.crops import (
    RESAMPLING,
    Crops,
    Geometry,
    ImageRequest,
    examine_image,
    read_crops,
)
from dragn_cache.types import Box

H, W = 23, 31
NATIVE = Geometry((H, W))
Pixels = NDArray[np.uint8]


def pixels(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path: Path, array: Pixels, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def read(
    *files: Path,
    boxes: Sequence[Box | None] = (None,),
    planes: tuple[int, int, int] = (0, 1, 2),
    geometry: Geometry = NATIVE,
    image: str = "img/x.png",
) -> Crops:
    return read_crops(ImageRequest(image, files, planes, tuple(boxes), geometry))


def chw(array: Pixels) -> Pixels:
    return array.transpose(2, 0, 1)


# --- one file ----------------------------------------------------------------------------------


def test_grey_feeds_all_three_inputs(tmp_path: Path) -> None:
    grey = pixels(H, W)
    crops = read(save(tmp_path / "x.png", grey))
    assert crops.pixels.shape == (1, 3, H, W)
    assert crops.pixels.dtype == np.uint8
    np.testing.assert_array_equal(crops.pixels[0], [grey] * 3)
    assert crops.boxes == ((0, 0, W, H),)
    assert crops.seconds > 0


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_colour_is_read_exactly(tmp_path: Path, suffix: str) -> None:
    colour = pixels(H, W, 3)
    (got,) = read(save(tmp_path / f"x.{suffix}", colour)).pixels
    np.testing.assert_array_equal(got, chw(colour))


def test_alpha_is_dropped_and_what_lies_under_it_kept(tmp_path: Path) -> None:
    rgba = pixels(H, W, 4)
    (got,) = read(save(tmp_path / "x.png", rgba)).pixels
    np.testing.assert_array_equal(got, chw(rgba[:, :, :3]))
    grey_alpha = pixels(H, W, 2)
    (got,) = read(save(tmp_path / "la.png", grey_alpha, "LA")).pixels
    np.testing.assert_array_equal(got, [grey_alpha[:, :, 0]] * 3)


@pytest.mark.parametrize("transparency", [None, 5, bytes(range(7))])
def test_a_palette_becomes_its_colours(tmp_path: Path, transparency: int | bytes | None) -> None:
    index = pixels(H, W) % 7
    palette = pixels(7, 3, seed=1)
    image = Image.fromarray(index).convert("P")
    image.putdata(index.ravel().tolist())
    image.putpalette(palette.ravel().tolist())
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "x.png", **options)
    (got,) = read(tmp_path / "x.png").pixels
    np.testing.assert_array_equal(got, chw(palette[index]))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    bits = pixels(H, W) > 127
    Image.fromarray(bits).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "1"
    for files in (1, 3):
        (got,) = read(*[tmp_path / "x.png"] * files).pixels
        np.testing.assert_array_equal(got, [bits * np.uint8(255)] * 3)


@pytest.mark.parametrize(("array", "mode"), [((H, W, 3), "RGB"), ((H, W), "L")])
def test_a_jpeg_is_what_its_decoder_says(tmp_path: Path, array: tuple[int, ...], mode: str) -> None:
    path = save(tmp_path / "x.jpg", pixels(*array), quality=90)
    with Image.open(path) as image:
        assert image.mode == mode
        decoded = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read(path).pixels[0], chw(decoded))


@pytest.mark.parametrize("planes", [(1, 1, 1), (2, 0, 1)])
def test_planes_of_a_colour_file_feed_the_inputs_asked_for(
    tmp_path: Path, planes: tuple[int, int, int]
) -> None:
    colour = pixels(H, W, 3)
    (got,) = read(save(tmp_path / "x.png", colour), planes=planes).pixels
    np.testing.assert_array_equal(got, [colour[:, :, k] for k in planes])


# --- one file per channel ----------------------------------------------------------------------


def test_a_file_for_each_channel_and_a_colour_file_counts_as_its_maximum(tmp_path: Path) -> None:
    grey, colour, alpha = pixels(H, W), pixels(H, W, 3, seed=1), pixels(H, W, 4, seed=2)
    files = [
        save(tmp_path / name, array)
        for name, array in (("r.png", grey), ("g.png", colour), ("b.png", alpha))
    ]
    (got,) = read(*files).pixels
    np.testing.assert_array_equal(got, [grey, colour.max(2), alpha[:, :, :3].max(2)])


def test_a_channel_may_be_asked_for_repeatedly(tmp_path: Path) -> None:
    a, b = pixels(H, W), pixels(H, W, seed=1)
    files = [save(tmp_path / "a.png", a), save(tmp_path / "b.png", b)]
    (got,) = read(files[1], files[0], files[1]).pixels
    np.testing.assert_array_equal(got, [b, a, b])


def test_channels_of_other_sizes_are_refused(tmp_path: Path) -> None:
    files = [save(tmp_path / "r.png", pixels(H, W)), save(tmp_path / "g.png", pixels(H, W - 2))]
    message = rf"^x_\{{channel\}}\.png \(g\.png\): expected {W}×{H} pixels as in r\.png, got 29×23"
    with pytest.raises(ImageError, match=message):
        read(*files, files[0], image="x_{channel}.png")
    with pytest.raises(ImageError, match=message):
        examine_image("x_{channel}.png", files)


# --- which channels ----------------------------------------------------------------------------

CHANNELS = ("blue", "red", "green", "yellow")


@pytest.mark.parametrize(
    ("image", "channels", "rgb", "names", "planes"),
    [
        ("x.png", (), None, None, (0, 1, 2)),
        ("x.png", CHANNELS, None, None, (0, 1, 2)),
        ("x.png", (), ("green",), None, (1, 1, 1)),
        ("x.png", (), ("blue", "red", "blue"), None, (2, 0, 2)),
        ("x.png", CHANNELS, ("green", "blue", "red"), None, (2, 0, 1)),
        ("x.png", ("protein",), ("protein",), None, (0, 1, 2)),
        ("x.tif", CHANNELS, ("yellow", "red", "red"), None, (3, 1, 1)),
        ("x.tif", ("a", "b"), ("a", "b", "b"), None, (0, 1, 1)),
        ("{channel}.png", CHANNELS, None, ("red", "green", "blue"), (0, 1, 2)),
        ("{channel}.png", CHANNELS, ("yellow",), ("yellow",) * 3, (0, 1, 2)),
        ("{channel}.png", CHANNELS, ("yellow", "red", "red"), ("yellow", "red", "red"), (0, 1, 2)),
        ("{channel}.png", ("c", "a", "b", "d"), None, ("c", "a", "b"), (0, 1, 2)),
        ("{channel}.png", ("dapi",), None, ("dapi",) * 3, (0, 1, 2)),
    ],
)
def test_the_inputs_are_planned(
    image: str,
    channels: tuple[str, ...],
    rgb: tuple[str, ...] | None,
    names: tuple[str, ...] | None,
    planes: tuple[int, int, int],
) -> None:
    assert plan_channels(image, channels, rgb) == (names, planes)


@pytest.mark.parametrize("mode", ["average", "each"])
@pytest.mark.parametrize(
    ("image", "channels", "rgb", "names", "planes"),
    [
        ("x.tif", (), None, None, (0, 1, 2)),
        ("x.tif", CHANNELS, None, None, (0, 1, 2, 3)),
        ("x.tif", CHANNELS, ("yellow", "blue"), None, (3, 0)),
        ("x.tif", ("protein",), None, None, ()),
        ("{channel}.tif", CHANNELS, None, CHANNELS, ()),
        ("{channel}.tif", CHANNELS, ("yellow",), ("yellow",), ()),
    ],
)
def test_any_number_of_inputs_is_planned(
    image: str,
    channels: tuple[str, ...],
    rgb: tuple[str, ...] | None,
    names: tuple[str, ...] | None,
    planes: tuple[int, ...],
    mode: str,
) -> None:
    assert plan_channels(image, channels, rgb, mode) == (names, planes)
    with pytest.raises(UnknownNameError, match="did you mean green"):
        plan_channels(image, ("green", *channels), ("grean",), mode)


@pytest.mark.parametrize(
    ("image", "channels", "rgb", "error", "message"),
    [
        ("x.png", (), ("grean",), UnknownNameError, "channel: .* did you mean green"),
        ("{channel}", CHANNELS, ("grean",), UnknownNameError, "channel: .* did you mean green"),
        (
            "{channel}",
            CHANNELS,
            ("red", "blue"),
            InputError,
            "one or three channels, got red, blue",
        ),
        ("{channel}", ("a", "b"), None, InputError, "one or three channels, got a, b"),
    ],
)
def test_inputs_that_there_are_not(
    image: str,
    channels: tuple[str, ...],
    rgb: tuple[str, ...] | None,
    error: type[DragnCacheError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        plan_channels(image, channels, rgb)


# --- boxes -------------------------------------------------------------------------------------


def test_boxes_are_half_open_and_cut_exactly(tmp_path: Path) -> None:
    colour = pixels(H, W, 3)
    path = save(tmp_path / "x.png", colour)
    boxes = [(3, 5, 16, 16), (0, 0, 13, 11), (W - 13, H - 11, W, H), (3, 5, 16, 16)]
    crops = read(path, boxes=boxes, geometry=Geometry((11, 13)))
    expected = [chw(colour[y0:y1, x0:x1]) for x0, y0, x1, y1 in boxes]
    np.testing.assert_array_equal(crops.pixels, expected)
    assert crops.boxes == tuple(boxes)


def test_a_box_is_cut_before_it_is_resized(tmp_path: Path) -> None:
    """Pixels outside the box have no influence on the crop."""
    image = np.full((H, W, 3), 255, np.uint8)
    image[5:16, 3:16] = 7
    (got,) = read(
        save(tmp_path / "x.png", image), boxes=[(3, 5, 16, 16)], geometry=Geometry((41, 37))
    ).pixels
    assert (got == 7).all()


@pytest.mark.parametrize("box", [(0, 0, W + 1, H), (0, 0, W, H + 1), (-1, 0, 5, 5), (4, 4, 4, 9)])
def test_a_box_outside_the_image_is_a_reason_and_the_others_are_cut(
    tmp_path: Path, box: Box
) -> None:
    colour = pixels(H, W, 3)
    path = save(tmp_path / "x.png", colour)
    crops = read(path, boxes=[box, (0, 0, W, H), box])
    np.testing.assert_array_equal(crops.pixels, [chw(colour)])
    reason = f"box {box} lies outside the image of 31×23 pixels (w×h)"
    assert crops.boxes == (reason, (0, 0, W, H), reason)
    assert read(path, boxes=[box]).pixels.shape == (0, 3, H, W)


# --- geometry ----------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", list(RESAMPLING))
@pytest.mark.parametrize("size", [(17, 13), (41, 59), (H, 7)])
def test_plain_resize_is_pillows(tmp_path: Path, interpolation: str, size: tuple[int, int]) -> None:
    colour = pixels(H, W, 3)
    (got,) = read(
        save(tmp_path / "x.png", colour), geometry=Geometry(size, interpolation=interpolation)
    ).pixels
    resampling = Image.Resampling[interpolation.upper()]
    resized = Image.fromarray(colour).resize((size[1], size[0]), resampling)
    np.testing.assert_array_equal(got, chw(np.asarray(resized)))


def test_halving_with_bilinear_is_antialiased(tmp_path: Path) -> None:
    """By hand: a triangle of width 2 over pixels 0 0 255 255 gives 1/8 and 7/8 of 255."""
    step = np.repeat(np.array([[0, 0, 255, 255]], np.uint8), 3, axis=0)
    (got,) = read(save(tmp_path / "x.png", step), geometry=Geometry((3, 2))).pixels
    np.testing.assert_array_equal(got[0], [[36, 219]] * 3)


def torchvision_evaluation(array: Pixels, resize: int, crop: int, interpolation: str) -> Pixels:
    transform = ImageClassification(
        crop_size=crop,
        resize_size=resize,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        interpolation=InterpolationMode(interpolation),
    )
    return (transform(Image.fromarray(array)) * 255).round().numpy().astype(np.uint8)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(23, 31), (31, 23), (29, 29), (17, 101), (53, 7), (64, 48)])
@pytest.mark.parametrize(("resize", "crop"), [(37, 31), (36, 31), (23, 23), (19, 32), (16, 37)])
def test_resize_shorter_is_torchvisions_evaluation_transform(
    tmp_path: Path, shape: tuple[int, int], resize: int, crop: int, interpolation: str
) -> None:
    colour = pixels(*shape, 3)
    geometry = Geometry((crop, crop), resize_shorter=resize, interpolation=interpolation)
    (got,) = read(save(tmp_path / "x.png", colour), geometry=geometry).pixels
    expected = torchvision_evaluation(colour, resize, crop, interpolation)
    np.testing.assert_array_equal(got, expected)


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    resize=st.integers(1, 40),
    crop=st.integers(1, 40),
)
@settings(deadline=None)
def test_every_size_is_torchvisions(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, resize: int, crop: int
) -> None:
    colour = pixels(height, width, 3)
    path = save(tmp_path_factory.getbasetemp() / "size.png", colour)
    (got,) = read(path, geometry=Geometry((crop, crop), resize_shorter=resize)).pixels
    np.testing.assert_array_equal(got, torchvision_evaluation(colour, resize, crop, "bilinear"))


# --- digests -----------------------------------------------------------------------------------


def test_digests_are_of_the_files_bytes(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{k}.png", pixels(H, W, seed=k)) for k in range(3)]
    single = [hashlib.sha256(path.read_bytes()).digest() for path in files]
    assert read(files[0]).digest == single[0]
    assert read(*files).digest == hashlib.sha256(b"".join(single)).digest()
    repeated = [1, 0, 1]
    joined = b"".join(single[k] for k in repeated)
    assert read(*(files[k] for k in repeated)).digest == hashlib.sha256(joined).digest()


# --- errors ------------------------------------------------------------------------------------


def encoded(format: str, mode: str = "RGB") -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels(67, 71, 3)).convert(mode).save(target, format)
    return target.getvalue()


UNUSABLE: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, r"expected an image file, got no such file; add it or correct the path"),
    "empty": (b"", r"expected an image, got 0 bytes; replace the file"),
    "text": (b"bag_id,labels\n1,a\n", r"expected a PNG, JPEG, BMP or TIFF image, got another kind"),
    "gif": (encoded("GIF"), r"expected a PNG, JPEG, BMP or TIFF image, got another kind of file"),
    "head": (encoded("PNG")[:20], r"expected a whole image, got Truncated File Read"),
    "truncated png": (encoded("PNG")[:-500], r"expected a whole image, got .*truncated"),
    "truncated jpeg": (encoded("JPEG")[:-50], r"expected a whole image, got .*truncated"),
    "truncated bmp": (encoded("BMP")[:-50], r"expected a whole image, got .*truncated"),
    "truncated tiff": (encoded("TIFF")[:-50], r"image, got "),
    "damaged png": (
        encoded("PNG").replace(b"IDAT", b"IDAT\xff", 1),
        r"expected a whole image, got",
    ),
}


@pytest.mark.parametrize("name", list(UNUSABLE))
@pytest.mark.parametrize("look", [read, lambda path: examine_image("img/x.png", [path])])
def test_what_cannot_be_used_is_refused_in_one_line_without_the_machines_path(
    tmp_path: Path, name: str, look: Callable[[Path], object]
) -> None:
    data, message = UNUSABLE[name]
    path = tmp_path / "x.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ImageError, match=r"^img/x\.png: .*" + message) as error:
        look(path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_a_folder_is_not_readable(tmp_path: Path) -> None:
    with pytest.raises(
        ImageError, match=r"^img/x\.png: expected an image file, got a folder, not a regular file"
    ):
        read(tmp_path)


def test_a_channel_that_is_missing_is_named(tmp_path: Path) -> None:
    there = save(tmp_path / "x_red.png", pixels(H, W))
    with pytest.raises(ImageError, match=r"^x_\{channel\}\.png \(x_blue\.png\): .* no such file"):
        read(there, there, tmp_path / "x_blue.png", image="x_{channel}.png")


def test_an_image_too_large_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    data = bytearray(encoded("BMP"))
    data[18:26] = struct.pack("<ii", 40_000, 40_000)
    (tmp_path / "x.bmp").write_bytes(data)
    with pytest.raises(ImageError, match=r"expected at most 268435456 pixels, got 40000×40000"):
        read(tmp_path / "x.bmp")


def test_checking_an_image_gives_its_width_and_height(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{k}.png", pixels(H, W)) for k in range(2)]
    assert examine_image("x", files).size == (W, H)


@given(data=st.data(), format=st.sampled_from(["PNG", "JPEG", "BMP", "TIFF"]))
@settings(deadline=None, max_examples=150)
def test_damage_gives_pixels_or_an_image_error_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, format: str
) -> None:
    damaged = bytearray(encoded(format))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of unusual metadata
        try:
            shape = read(path).pixels.shape
        except ImageError:
            return
    assert shape == (1, 3, H, W)
