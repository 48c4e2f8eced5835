"""Image file → planes of numbers as the file has them, or an `ImageError` that says why not.

Pillow reads the kinds of files that it reads exactly. Of the rest, imagecodecs reads colour PNG of
16 bits, and tifffile reads TIFF of more than 8 bits or of several channels or pages; both are
imported when a file needs them. Decoding is strict: a file that ends before its last pixel, or a
JPEG with a hole, is an error, never a half-grey picture. The memory that a file needs is known from
its header, and from those of JPEGs and other pictures in it; a file that needs too much is refused
before it is decoded.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    EXTRASAMPLES,
    SAMPLEFORMAT,
    TiffImageFile,
)

from dragn_cache.errors import ImageError, foreign
from dragn_cache.images.jpeg import read_frame, require_whole
from dragn_cache.images.notes import noting
from dragn_cache.images.tiff_parts import PICTURE_CODECS, require_sound_parts

FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
MAX_PIXELS = 2**28  # of a plane, as 16384 × 16384; a larger image is refused before it is decoded
MAX_BYTES = 2**31  # of a file, and of all its planes decoded
STRIP_PIXELS = 2**20
Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS stands in for Pillow's own limit, which only warns

Decoded = tuple[NDArray[np.generic], float | None, bool]
"""Planes, their largest possible number, and whether they are red, green and blue."""

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GREY_MODES = ("1", "L", "LA", "I;16", "I")
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# Samples of a PNG's pixel without alpha, by its colour type.
_PNG_SAMPLES = {0: 1, 2: 3, 4: 1, 6: 3}


@dataclass(frozen=True)
class Picture:
    """A decoded file, oriented as it is displayed.

    Attributes:
        planes: (P, h, w) in the file's own numbers, without alpha; all finite.
        full: the largest possible number; None for signed and floating-point pixels.
        colour: the three planes are red, green and blue; else each is a channel of its own.
        digest: sha256 of the file's bytes.
        notes: what the decoder remarked, while someone is `listening`.
    """

    planes: NDArray[np.generic]
    full: float | None
    colour: bool
    digest: bytes
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.planes.shape[2], self.planes.shape[1]


def read_picture(where: str, path: Path) -> Picture:
    """Decode a file whole.

    Args:
        where: its name in errors.

    Raises:
        ImageError: it is missing, no regular file, no image, damaged, too large, or of a kind
            whose pixels have no certain meaning.
    """
    data = _read_bytes(where, path)
    whole = foreign(where, expected="a whole image", remedy="replace the file", kind=ImageError)
    with whole, noting() as notes:
        planes, full, colour = _decode(where, data)
    _require_finite(where, planes)
    return Picture(planes, full, colour, hashlib.sha256(data).digest(), tuple(notes))


def _read_bytes(where: str, path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
            raise ImageError(
                where,
                expected="an image file",
                got=f"{kind}, not a regular file",
                remedy="correct the path",
            )
        _require_at_most(where, status.st_size, MAX_BYTES, "bytes in the file")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(
            where, expected="an image file", got="no such file", remedy="add it or correct the path"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = error.strerror if isinstance(error, OSError) else None
        raise ImageError(
            where,
            expected="a readable file",
            got=reason or str(error),
            remedy="correct its rights or path",
        ) from error
    if not data:
        raise ImageError(where, expected="an image", got="0 bytes", remedy="replace the file")
    return data


def _decode(where: str, data: bytes) -> Decoded:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        if data.startswith(_TIFF_MAGIC):
            return _decode_tiff(where, data)
        raise ImageError(
            where,
            expected=f"a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image",
            got="another kind of file",
            remedy="replace the file",
        ) from error
    if isinstance(image, TiffImageFile) and not _is_plain(image):
        return _decode_tiff(where, data)
    _require_at_most(
        where, image.width * image.height, MAX_PIXELS, f"pixels ({image.width}×{image.height})"
    )
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise ImageError(
            where,
            expected="one picture",
            got=f"{frames} in one file (an animation?)",
            remedy="save the one that counts as a file of its own",
        )
    if image.format == "JPEG":
        _require_sound_jpeg(where, data)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(COMPRESSION) in PICTURE_CODECS:
        _require_finite_pages(where, data)
        with _import(where, "tifffile").TiffFile(io.BytesIO(data), _multifile=False) as file:
            require_sound_parts(where, data, file.pages.first)
    if image.format == "PNG":
        _require_sound_png(where, data, image.width * image.height)
    image.load()
    orientation = image.getexif().get(274, 1)
    if image.format == "PNG" and data[24] == 16 and data[25] != 0:
        deep = _decode_deep_png(where, data)
        return turn(deep, orientation), 65535.0, len(deep) == 3
    planes, full, colour = _from_pillow(where, image)
    return turn(planes, orientation), full, colour


def _require_sound_jpeg(where: str, data: bytes) -> None:
    """Raise for a JPEG that is not whole, or takes too much memory."""
    frame = read_frame(data)
    pixels = frame.width * frame.height
    # Pillow takes four bytes for a pixel of any colours; three are the planes.
    needed = pixels * (2 if frame.components == 1 else 7) + frame.coefficient_bytes
    _require_at_most(where, needed, MAX_BYTES, "bytes of memory")
    require_whole(data, frame)


def _require_sound_png(where: str, data: bytes, pixels: int) -> None:
    """Raise for a PNG whose checksums are wrong, or that takes too much memory.

    Pillow skips the checksums of the chunks that hold pixels.
    """
    if data[24] == 16:  # Pillow reads it with 8 bits first
        samples = {0: 1, 2: 3, 4: 2, 6: 4}.get(data[25], 4)
        _require_at_most(where, pixels * (4 + 2 * samples), MAX_BYTES, "bytes of memory")
    for kind, chunk in _png_chunks(data):
        if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            raise ValueError(f"other bytes than were written in its chunk {kind.decode('latin-1')}")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The chunks of a PNG to its end: the kind, and the whole chunk with length and checksum."""
    view, at, kind = memoryview(data), 8, b""
    while kind != b"IEND":
        kind = data[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            raise ValueError(f"{len(data)} bytes, less than its chunks have (truncated?)")
        yield kind, view[at:end]
        at = end


def _is_plain(image: TiffImageFile) -> bool:
    """Whether Pillow reads this TIFF exactly: one page of at most 8 unsigned bits a sample, with
    no sample but its colours."""
    tags = image.tag_v2
    if EXTRASAMPLES in tags:
        return False
    if max(tags.get(BITSPERSAMPLE, (1,))) > 8 or set(tags.get(SAMPLEFORMAT, (1,))) - {1, 4}:
        return False
    return image.n_frames == 1 and image.mode in _GREY_MODES + _COLOUR_MODES


def _from_pillow(where: str, image: Image.Image) -> Decoded:
    if image.mode in _GREY_MODES:
        if image.mode.startswith("I"):
            return _converted(image, None, np.uint16)[None], 65535.0, False
        return _converted(image, "L")[None], 255.0, False
    if image.mode not in _COLOUR_MODES:
        raise ImageError(
            where,
            expected="grey, RGB(A), palette or CMYK pixels",
            got=f"mode {image.mode}",
            remedy="convert it to grey or RGB",
        )
    through = "RGBA" if image.mode in ("P", "PA") and "transparency" in image.info else None
    return _converted(image, "RGB", through=through).transpose(2, 0, 1), 255.0, True


def _converted(
    image: Image.Image,
    mode: str | None,
    dtype: type[np.unsignedinteger[Any]] = np.uint8,
    through: str | None = None,
) -> NDArray[np.generic]:
    """Pixels in a mode, (h, w) or (h, w, 3); in strips, for Pillow makes several copies of each."""
    shape = (image.height, image.width, 3)[: 3 if mode == "RGB" else 2]
    pixels = np.empty(shape, dtype)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        for step in (through, mode):
            strip = strip if step is None else strip.convert(step)
        pixels[top : top + rows] = np.asarray(strip)
    return pixels


def _decode_deep_png(where: str, data: bytes) -> NDArray[np.generic]:
    """A 16-bit PNG with more than grey, which Pillow would narrow to 8 bits."""
    # libpng prints what it thinks of a profile, say: it gets the chunks that hold pixels.
    chunks = [chunk for kind, chunk in _png_chunks(data) if kind in _PNG_PIXELS]
    samples: NDArray[np.generic] = _import(where, "imagecodecs").png_decode(
        b"".join([data[:8], *chunks])
    )
    return samples[:, :, : _PNG_SAMPLES[data[25]]].transpose(2, 0, 1)


def _decode_tiff(where: str, data: bytes) -> Decoded:
    """A TIFF of any number of pages, channels and bits, all of one picture."""
    _require_finite_pages(where, data)
    tifffile = _import(where, "tifffile")
    # Other files that OME metadata may name are never opened.
    with tifffile.TiffFile(io.BytesIO(data), _multifile=False) as file:
        whole = [s for s in file.series if not s.keyframe.is_reduced]
        if len(whole) != 1:
            raise ImageError(
                where,
                expected="one picture, its pages of one size",
                got=f"{len(whole)} pictures in one file",
                remedy="save the one that counts as a file of its own",
            )
        series = whole[0]
        _require_readable_tiff(where, series, len(data))
        for part in series.pages:
            require_sound_parts(where, data, part)
        values = series.asarray()
        page = series.keyframe
        photometric, bits = page.photometric.name, page.bitspersample
        alphas = sum(int(extra) in (1, 2) for extra in page.extrasamples)
        tag = page.tags.get(274)
        orientation = 1 if tag is None else int(tag.value)
    planes, samples = _stack(values, series.axes)
    full: float | None = None
    if planes.dtype.kind in "ub":
        bits = bits if isinstance(bits, int) else 8 * planes.dtype.itemsize
        full = float(2**bits - 1)
        planes = planes.astype(np.uint8) if planes.dtype.kind == "b" else planes
    # Writers call a fourth channel alpha unasked: it is one only if it hides nothing.
    colours = samples - alphas
    extra = np.arange(len(planes)) % samples >= colours
    if alphas and all((plane == (full or 1)).all() for plane in planes[extra]):
        planes, samples = planes[~extra], colours
    colour = photometric in ("RGB", "YCBCR") and len(planes) == samples == 3
    if full is not None and photometric == "MINISWHITE":
        planes = np.subtract(planes.dtype.type(2**bits - 1), planes)
    return turn(planes, orientation), full, colour


def _require_readable_tiff(where: str, series: Any, length: int) -> None:
    """Raise `ImageError` for a TIFF too large, with axes other than channels, or cut short."""
    sizes = dict(zip(series.axes, series.shape, strict=True))
    height, width = sizes.get("Y", 0), sizes.get("X", 0)
    _require_at_most(where, height * width, MAX_PIXELS, f"pixels ({width}×{height})")
    itemsize = 4 if series.dtype == np.float16 else series.dtype.itemsize  # as `_stack` gives them
    _require_at_most(where, series.size * itemsize, MAX_BYTES, "bytes of pixels")
    for axis, size in sizes.items():
        if axis not in "CQISYX" and size > 1:
            name = {"Z": "depths (Z)", "T": "times (T)"}.get(axis, f"along its axis {axis}")
            raise ImageError(
                where,
                expected="one picture, of one or more channels",
                got=f"{size} {name}",
                remedy="project them, or save each as a file of its own",
            )
    page = series.keyframe
    photometric, kind = page.photometric.name, series.dtype.kind
    jpeg = photometric == "YCBCR" and page.compression == 7  # its decoder makes it RGB
    if kind not in "biuf" or not (jpeg or photometric in ("MINISBLACK", "MINISWHITE", "RGB")):
        raise ImageError(
            where,
            expected="grey or RGB pixels, of whole or floating-point numbers",
            got=f"{photometric} of {series.dtype}",
            remedy="convert it to grey or RGB",
        )
    for part in series.pages:
        parts = zip(part.dataoffsets, part.databytecounts, strict=True) if part else ((0, 0),)
        if any(count <= 0 or start + count > length for start, count in parts):
            raise ImageError(
                where,
                expected="a whole image",
                got="one of which pixels are missing (truncated?)",
                remedy="replace the file",
            )


def _stack(values: NDArray[np.generic], axes: str) -> tuple[NDArray[np.generic], int]:
    """An array of any axes as (P, h, w), and the samples of a pixel, whose axis varies fastest."""
    order = sorted(range(len(axes)), key=lambda k: "SYX".find(axes[k]))
    values = values.transpose(order)
    samples = values.shape[-3] if "S" in axes else 1
    planes = values.reshape(-1, *values.shape[-2:])
    kind = "f4" if planes.dtype == np.float16 else planes.dtype.newbyteorder("=")
    return planes.astype(kind, copy=False), samples


def _require_finite_pages(where: str, data: bytes) -> None:
    """Raise `ImageError` if a TIFF's list of pages is a cycle, which some readers never leave."""
    end = "<" if data[:1] == b"I" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    count, entry, offset = ("Q", 20, "Q") if big else ("H", 12, "I")
    n, k = struct.calcsize(count), struct.calcsize(offset)
    offsets: set[int] = set()
    (at,) = struct.unpack_from(end + offset, data, 8 if big else 4)
    while at and at + n <= len(data):
        if at in offsets:
            raise ImageError(
                where,
                expected="pages that end",
                got=f"pages in a circle, after {len(offsets)}",
                remedy="replace the file",
            )
        offsets.add(at)
        after = at + n + entry * struct.unpack_from(end + count, data, at)[0]
        if after + k > len(data):
            return
        (at,) = struct.unpack_from(end + offset, data, after)


def turn(planes: NDArray[np.generic], orientation: int) -> NDArray[np.generic]:
    """Planes (P, h, w) turned and mirrored as an EXIF or TIFF orientation of 1 to 8 says."""
    if orientation in (5, 6, 7, 8):
        planes = planes.transpose(0, 2, 1)
    if orientation in (3, 4, 7, 8):
        planes = planes[:, ::-1]
    if orientation in (2, 3, 6, 7):
        planes = planes[:, :, ::-1]
    return planes


def _import(where: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImageError(
            where,
            expected=f"the package {name}, which reads this kind of image",
            got="none",
            remedy="install it: pip install tifffile imagecodecs",
        ) from error


def _require_at_most(where: str, got: int, most: int, unit: str) -> None:
    if got > most:
        raise ImageError(
            where,
            expected=f"at most {most} {unit.split(' (')[0]}",
            got=unit.partition("(")[2].rstrip(")") or str(got),
            remedy="cut it into tiles first",
        )


def _require_finite(where: str, planes: NDArray[np.generic]) -> None:
    if planes.dtype.kind != "f":
        return
    bad = sum(int(plane.size - np.isfinite(plane).sum()) for plane in planes)
    if bad:
        raise ImageError(
            where,
            expected="finite pixels",
            got=f"{bad} that are NaN or infinite",
            remedy="replace them, or the file",
        )
