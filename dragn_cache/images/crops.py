"""Image files → uint8 crops of one size. The only place where pixels are touched.

A request names one image (one file, or one file per channel) and all boxes to cut from it, so an
image with many boxes is decoded once. `images.decode` decodes and `images.intensity` scales the
whole image; then it is cut and resized. The result of `read_crops` depends on the request and the
files' bytes alone.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dragn_cache.backbone_input import Intensity, Interpolation
from dragn_cache.errors import ImageError, InputError
from dragn_cache.images.augment import Augmentation, augmented
from dragn_cache.images.decode import Picture, read_picture
from dragn_cache.images.intensity import FULL, scale_planes
from dragn_cache.types import Box

_DIGESTED_ROWS = 16

RESAMPLING = {name: Image.Resampling[name.upper()] for name in get_args(Interpolation)}


@dataclass(frozen=True)
class Geometry:
    """The way from a crop to the backbone's input.

    Attributes:
        size: height and width of the result in pixels.
        resize_shorter: None resizes the whole crop to exactly ``size``; a number resizes its
            shorter side to that and cuts ``size`` from the centre (torchvision's evaluation
            transform for ImageNet weights).
        interpolation: all but nearest are antialiased.
    """

    size: tuple[int, int]
    resize_shorter: int | None = None
    interpolation: Interpolation = "bilinear"


@dataclass(frozen=True)
class ImageRequest:
    """All crops to read from one image.

    Attributes:
        image: the path as the manifest writes it, for messages.
        files: one file, or one per input of the backbone (repetitions allowed).
        planes: for one file, which of its planes feed the inputs; empty where it is one channel.
        boxes: x0, y0, x1, y1 in pixels of the image as displayed, half-open; None is all of it.
        intensity: the scaling of its numbers to 0 to 255.
        channels: the number of channels that the data set names; a file may have as many pages.
        augmentation: makes further views of each crop; None: no further views.
        bags: each box's bag, on which its augmentation depends; empty without any.
    """

    image: str
    files: tuple[Path, ...]
    planes: tuple[int, ...]
    boxes: tuple[Box | None, ...]
    geometry: Geometry
    intensity: Intensity = FULL
    channels: int = 0
    augmentation: Augmentation | None = None
    bags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Crops:
    """The crops of one image.

    Attributes:
        pixels: (k, P, H, W) uint8, one for each box that could be cut, followed by its augmented
            views; P inputs.
        boxes: for each requested box, the pixels' box in the image, or the reason (text) why it
            could not be cut.
        digest: sha256 of the file's bytes, or of the files' digests in order when several.
        levels: the lowest and the highest of the image's scaled numbers.
        seconds: time of reading, decoding and resizing.
        cpu_seconds: processor time of the same.
    """

    pixels: NDArray[np.uint8]
    boxes: tuple[Box | str, ...]
    digest: bytes
    levels: tuple[int, int]
    seconds: float
    cpu_seconds: float


def read_crops(request: ImageRequest) -> Crops:
    """Decode an image once, scale it, and cut, resize and stack all its crops.

    Raises:
        ImageError: a file is missing, damaged, too large or no image; it lacks channels that are
            asked for; the intensity cannot scale its numbers; or its channels' sizes differ. A box
            outside the image is no error, but a reason in the result.
    """
    started, cpu_started = time.perf_counter(), time.thread_time()
    planes, inputs, digest = _read_planes(request)
    height, width = planes[0].shape
    crops: list[NDArray[np.uint8]] = []
    boxes: list[Box | str] = []
    for number, requested in enumerate(request.boxes):
        box = requested or (0, 0, width, height)
        if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            boxes.append(f"box {box} lies outside the image of {width}×{height} pixels (w×h)")
            continue
        cut = [plane[box[1] : box[3], box[0] : box[2]] for plane in planes]
        for view in _views(cut, request, number):
            fitted = [np.asarray(_fit(Image.fromarray(plane), request.geometry)) for plane in view]
            crops.append(np.stack([fitted[k] for k in inputs]))
        boxes.append(box)
    shape = (0, len(inputs), *request.geometry.size)
    pixels = np.stack(crops) if crops else np.empty(shape, np.uint8)
    levels = int(min(p.min() for p in planes)), int(max(p.max() for p in planes))
    seconds, cpu_seconds = time.perf_counter() - started, time.thread_time() - cpu_started
    return Crops(pixels, tuple(boxes), digest, levels, seconds, cpu_seconds)


def _views(
    cut: list[NDArray[np.uint8]], request: ImageRequest, number: int
) -> Iterator[Sequence[NDArray[np.uint8]]]:
    """The planes of a crop as they are, then of each of its augmented views."""
    yield cut
    augmentation = request.augmentation
    if augmentation is not None:
        crop, box = np.stack(cut), request.boxes[number]
        for view in augmentation.view_names[1:]:
            key = (request.bags[number], request.image, box, view)
            yield list(augmented(crop, augmentation, key))


@dataclass(frozen=True)
class Examined:
    """Facts of a decoded image.

    Attributes:
        size: width and height.
        digest: 8 bytes, the same for the same pixels however they are stored; None where every
            pixel is the same, as in an empty field.
        lowest, highest: of its pixels, in the file's own numbers.
        full: the largest possible number; None for signed and floating-point pixels.
        notes: what decoders remarked, while someone is `listening`.
    """

    size: tuple[int, int]
    digest: bytes | None
    lowest: float
    highest: float
    full: float | None
    notes: tuple[str, ...] = ()


def examine_image(image: str, files: Sequence[Path], channels: int = 0) -> Examined:
    """Decode an image fully, or raise `ImageError`.

    Args:
        files: the file, or one for each channel.
        channels: how many channels the data set names.
    """
    pictures = []
    for path in files:
        pictures.append(read_picture(_where(image, path), path))
        _require_channels(_where(image, path), pictures[-1], 1 if _is_split(image) else channels)
    # Colours last, as most decoders have them: else this is a copy.
    pixels = [np.ascontiguousarray(picture.planes.transpose(1, 2, 0)) for picture in pictures]
    empty = all(_holds(plane, plane[0, 0]) for plane in pixels)
    digests = [_digest(p, picture.colour) for p, picture in zip(pixels, pictures, strict=True)]
    full = [picture.full for picture in pictures]
    return Examined(
        _one_size(image, files, [picture.size for picture in pictures]),
        None if empty else hashlib.sha256(b"".join(digests)).digest()[:8],
        min(float(plane.min()) for plane in pixels),
        max(float(plane.max()) for plane in pixels),
        max((most for most in full if most is not None), default=None),
        tuple(note for picture in pictures for note in picture.notes),
    )


def _digest(pixels: NDArray[np.generic], colour: bool) -> bytes:
    """A digest of pixels (h, w, P): a checksum of all of them, and sha256 of every 16th row.

    sha256 of all would take longer than decoding. Colours that are equal count as grey.
    """
    if colour and _holds(pixels, pixels[:, :, :1]):
        pixels = np.ascontiguousarray(pixels[:, :, :1])
    digest = hashlib.sha256(f"{pixels.shape} {pixels.dtype.str} {zlib.crc32(pixels.data)}".encode())
    digest.update(np.ascontiguousarray(pixels[::_DIGESTED_ROWS]).data)
    return digest.digest()


def _holds(pixels: NDArray[np.generic], values: NDArray[np.generic]) -> bool:
    """Whether pixels (h, w, P) equal values that broadcast to them; quick where they do not."""
    few = values[:1] if values.ndim == 3 else values
    return bool((pixels[:1] == few).all() and (pixels == values).all())


def _read_planes(
    request: ImageRequest,
) -> tuple[list[NDArray[np.uint8]], list[int], bytes]:
    """The distinct planes, for each input the position of its plane among them, and the digest."""
    image, files = request.image, list(dict.fromkeys(request.files))
    one_channel_each = len(request.files) > 1 or not request.planes
    pictures: list[Picture] = []
    for path in files:
        pictures.append(read_picture(_where(image, path), path))
        _require_channels(
            _where(image, path), pictures[-1], 1 if one_channel_each else request.channels
        )
    _one_size(image, files, [picture.size for picture in pictures])
    if one_channel_each:
        planes = [_as_one(picture) for picture in pictures]
        full = [picture.full for picture in pictures]
        inputs = [files.index(path) for path in request.files]
    else:
        numbers = [_plane(image, pictures[0], k) for k in request.planes]
        distinct = list(dict.fromkeys(numbers))
        planes = [pictures[0].planes[k] for k in distinct]
        full = [pictures[0].full] * len(planes)
        inputs = [distinct.index(k) for k in numbers]
    digest = pictures[0].digest
    if len(request.files) > 1:
        joined = b"".join(pictures[files.index(path)].digest for path in request.files)
        digest = hashlib.sha256(joined).digest()
    try:
        return scale_planes(planes, full, request.intensity), inputs, digest
    except InputError as error:
        raise ImageError(
            image, expected=error.expected, got=error.got, remedy=error.remedy
        ) from error


def _is_split(image: str) -> bool:
    return "{channel}" in image


def _where(image: str, path: Path) -> str:
    return f"{image} ({path.name})" if _is_split(image) else image


def _require_channels(where: str, picture: Picture, channels: int) -> None:
    """Raise `ImageError` unless a file has the data set's channels. One grey plane counts as red,
    green and blue."""
    count = len(picture.planes)
    if picture.colour or count == channels or (count == 1 and channels in (0, 3)):
        return
    raise ImageError(
        where,
        expected=f"{channels} channels" if channels > 1 else "one channel, or red, green and blue",
        got=f"{count} pages or samples",
        remedy="name a file's channels, in order, as channels in dataset.toml, or give one file "
        "per channel with {channel}",
    )


def _plane(image: str, picture: Picture, channel: int) -> int:
    """The plane of a picture that holds the data set's channel of a number; the one plane of a grey
    picture is red, green and blue."""
    count = len(picture.planes)
    if count == 1 and channel < 3:
        return 0
    if channel >= count:
        raise ImageError(
            image,
            expected=f"a file with channel {channel + 1}",
            got=f"{count} in the file",
            remedy="choose others with `rgb`, or give one file per channel with {channel}",
        )
    return channel


def _as_one(picture: Picture) -> NDArray[np.generic]:
    """A colour file used as one channel counts as the maximum over its planes."""
    values = picture.planes
    return values[0] if len(values) == 1 else np.asarray(values.max(axis=0))


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
    """The start of a centred cut. A cut that is longer than its side starts below 0 and is filled
    with zeros; it is rounded the other way, as torchvision's padding is."""
    return round((length - cut) / 2) if length >= cut else -((cut - length) // 2)
