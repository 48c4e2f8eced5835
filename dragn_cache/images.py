"""Image files → uint8 crops of one size. The only place where pixels are touched.

A request names one image (one file, or one file per channel) and all boxes wanted from it, so an
image with many boxes is decoded once. Decoding is strict: a file that ends before its last pixel is
an error, never a half-grey picture. The result of `read_crops` depends on the request and the
files' bytes alone.
"""

from __future__ import annotations

import hashlib
import io
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from dragn_cache.errors import ImageError, InputError, UnknownNameError

Box = tuple[int, int, int, int]

FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
MAX_PIXELS = 2**30  # a larger image is refused before it is decoded
Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS stands in for Pillow's own limit, which only warns

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Geometry:
    """How a crop becomes the backbone's input.

    Attributes:
        size: height and width of the result in pixels.
        resize_shorter: None resizes the whole crop to exactly ``size``; a number resizes its
            shorter side to that and cuts ``size`` from the centre (torchvision's evaluation
            transform for ImageNet weights).
        interpolation: a key of `RESAMPLING`; all but nearest are antialiased.
    """

    size: tuple[int, int]
    resize_shorter: int | None = None
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class ImageRequest:
    """All crops wanted from one image.

    Attributes:
        image: the path as the manifest writes it, for messages.
        files: one file, or three (one per input of the backbone, repetitions allowed).
        planes: for one file, which of its three colour planes feed the inputs.
        boxes: x0, y0, x1, y1 in pixels, half-open; None is the whole image.
    """

    image: str
    files: tuple[Path, ...]
    planes: tuple[int, int, int]
    boxes: tuple[Box | None, ...]
    geometry: Geometry


@dataclass(frozen=True)
class Crops:
    """What one image gave.

    Attributes:
        pixels: (k, 3, H, W) uint8, one for each box that could be cut.
        boxes: for each requested box, the pixels' box in the image, or the reason (text) why it
            could not be cut.
        digest: sha256 of the file's bytes, or of the files' digests in order when several.
        seconds: time spent in reading, decoding and resizing.
    """

    pixels: NDArray[np.uint8]
    boxes: tuple[Box | str, ...]
    digest: bytes
    seconds: float


def plan_channels(
    image: str, channels: Sequence[str], rgb: Sequence[str] | None
) -> tuple[tuple[str, ...] | None, tuple[int, int, int]]:
    """Decide which files or planes of an image feed the backbone's three inputs.

    Args:
        image: the manifest's path, with or without ``{channel}``.
        channels: the data set's channels in order.
        rgb: one or three of their names; by default red, green, blue if the data set has all
            three, else its first three, or its only one.

    Returns:
        the three channel names to put into the path (None when the path has no ``{channel}``),
        and the planes to take from a colour file.
    """
    if "{channel}" not in image:
        names = tuple(channels) or ("red", "green", "blue")
        chosen = _three(rgb, names, names[:3]) if rgb else names[:3]
        if rgb is None or len(names) < 3:
            return None, (0, 1, 2)
        if max(names.index(c) for c in chosen) > 2:
            raise InputError(
                "--rgb",
                expected=f"planes of a colour file, among {', '.join(names[:3])}",
                got=",".join(chosen),
                remedy="choose among these, or give one file per channel with {channel}",
            )
        r, g, b = (names.index(c) for c in chosen)
        return None, (r, g, b)
    colours = ("red", "green", "blue")
    default = colours if set(colours) <= set(channels) else tuple(channels[:3])
    return _three(rgb, channels, default), (0, 1, 2)


def _three(
    rgb: Sequence[str] | None, channels: Sequence[str], default: Sequence[str]
) -> tuple[str, ...]:
    chosen = tuple(rgb or default)
    for name in chosen:
        if name not in channels:
            raise UnknownNameError("channel", name, channels)
    if len(chosen) == 1:
        return chosen * 3
    if len(chosen) != 3:
        raise InputError(
            "--rgb",
            expected="one or three channels",
            got=", ".join(chosen),
            remedy=f"name the channels for the three inputs, among: {', '.join(channels)}",
        )
    return chosen


def read_crops(request: ImageRequest) -> Crops:
    """Decode an image once and cut, resize and stack all crops wanted from it.

    Raises:
        ImageError: the image is missing, empty, truncated, not 8-bit, or no image at all; or
            its channels' sizes differ. A box outside the image is a reason in the result.
    """
    started = time.perf_counter()
    image, digest = _read_rgb(request)
    crops: list[NDArray[np.uint8]] = []
    boxes: list[Box | str] = []
    for wanted in request.boxes:
        box = wanted or (0, 0, image.width, image.height)
        if not (0 <= box[0] < box[2] <= image.width and 0 <= box[1] < box[3] <= image.height):
            boxes.append(
                f"box {box} lies outside the image of {image.width}×{image.height} pixels (w×h)"
            )
            continue
        crop = image if wanted is None else image.crop(box)
        crops.append(np.asarray(_fit(crop, request.geometry)).transpose(2, 0, 1))
        boxes.append(box)
    h, w = request.geometry.size
    pixels = np.stack(crops) if crops else np.empty((0, 3, h, w), np.uint8)
    return Crops(pixels, tuple(boxes), digest, time.perf_counter() - started)


def check_image(image: str, files: Sequence[Path]) -> tuple[int, int]:
    """Decode an image fully and return its width and height, or raise `ImageError`."""
    sizes = [_decode(image, path)[0].size for path in files]
    return _one_size(image, files, sizes)


def _read_rgb(request: ImageRequest) -> tuple[Image.Image, bytes]:
    if len(request.files) == 1:
        decoded, digest = _decode(request.image, request.files[0])
        colour = _to_colour(decoded)
        if request.planes != (0, 1, 2):
            planes = colour.split()
            colour = Image.merge("RGB", [planes[k] for k in request.planes])
        return colour, digest
    read = {path: _decode(request.image, path) for path in dict.fromkeys(request.files)}
    _one_size(request.image, list(read), [image.size for image, _ in read.values()])
    grey = {path: _to_grey(image) for path, (image, _) in read.items()}
    digest = hashlib.sha256(b"".join(read[path][1] for path in request.files)).digest()
    return Image.merge("RGB", [grey[path] for path in request.files]), digest


def _decode(image: str, path: Path) -> tuple[Image.Image, bytes]:
    where = image if "{channel}" not in image else f"{image} ({path.name})"
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(
            where, expected="an image file", got="no such file", remedy="add it or correct the path"
        ) from error
    except OSError as error:
        raise ImageError(
            where,
            expected="a readable file",
            got=error.strerror or str(error),
            remedy="correct its rights or path",
        ) from error
    if not data:
        raise ImageError(where, expected="an image", got="0 bytes", remedy="replace the file")
    try:
        decoded = Image.open(io.BytesIO(data), formats=FORMATS)
        _refuse_unusual(where, decoded, data)
        decoded.load()
    except UnidentifiedImageError as error:
        raise ImageError(
            where,
            expected=f"a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image",
            got="another kind of file",
            remedy="replace the file",
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ImageError(
            where, expected="a whole image", got=str(error), remedy="replace the file"
        ) from error
    return decoded, hashlib.sha256(data).digest()


def _refuse_unusual(where: str, image: Image.Image, data: bytes) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            where,
            expected=f"at most {MAX_PIXELS} pixels",
            got=f"{image.width}×{image.height}",
            remedy="cut it into tiles first",
        )
    bits = _bits(image, data)
    if bits > 8 or image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise ImageError(
            where,
            expected="8-bit grey, RGB, RGBA or palette pixels",
            got=f"{bits} bits" if bits > 8 else f"mode {image.mode}",
            remedy="convert it to 8-bit grey or RGB",
        )


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits of a sample in the file: Pillow silently narrows 16-bit colour to 8 bits."""
    if image.format == "PNG":
        return data[24]
    if isinstance(image, TiffImageFile):
        return int(max(image.tag_v2.get(BITSPERSAMPLE, (1,))))
    return 8


def _one_size(
    image: str, files: Sequence[Path], sizes: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    for path, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise ImageError(
                f"{image} ({path.name})",
                expected=f"{sizes[0][0]}×{sizes[0][1]} pixels as in {files[0].name}",
                got=f"{size[0]}×{size[1]}",
                remedy="make the channels' sizes equal",
            )
    return sizes[0]


def _to_colour(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """A colour file used as one channel counts as the maximum over its planes."""
    if image.mode in ("L", "1"):
        return image.convert("L")
    return Image.fromarray(np.asarray(_to_colour(image)).max(axis=2))


def _fit(crop: Image.Image, geometry: Geometry) -> Image.Image:
    h, w = geometry.size
    resampling = RESAMPLING[geometry.interpolation]
    if geometry.resize_shorter is None:
        return crop if crop.size == (w, h) else crop.resize((w, h), resampling)
    short, long = sorted(crop.size)
    scaled = (geometry.resize_shorter, int(geometry.resize_shorter * long / short))
    target = scaled if crop.width <= crop.height else scaled[::-1]
    if crop.size != target:
        crop = crop.resize(target, resampling)
    top, left = _centre(crop.height, h), _centre(crop.width, w)
    return crop.crop((left, top, left + w, top + h))


def _centre(length: int, cut: int) -> int:
    """Where a centred cut starts. One that is longer than its side starts before it, and the rest
    is zeros: torchvision pads there and rounds the other way."""
    return round((length - cut) / 2) if length >= cut else -((cut - length) // 2)
