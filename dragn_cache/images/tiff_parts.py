"""Strips and tiles of a TIFF that are pictures of their own, with sizes of their own.

Their decoders make an array of the size that the inner picture names, whatever the TIFF's own
tags say. Other codecs are told how much they may fill.
"""

from __future__ import annotations

import struct
from typing import Any

from dragn_cache.errors import ImageError
from dragn_cache.images.jpeg import read_frame, require_whole

JPEG = frozenset({7, 33007})
JPEG_2000 = frozenset({33003, 33004, 33005, 34712})
PNG = 34933
# All of tifffile's codecs that return an array of a size of its own choice.
PICTURE_CODECS = (
    JPEG
    | JPEG_2000
    | {PNG, 6, 22610, 34892, 34934, 48124, 50001, 50002, 52546, 65000, 65001, 65002}
)
_SLACK = 16  # rows and columns: some writers fill the last block


def require_sound_parts(where: str, data: bytes, image: Any) -> None:
    """Raise for a strip or tile of a tifffile page that is larger than its place, or not whole.

    Raises:
        ImageError: the codec's sizes cannot be told.
        ValueError: a picture is too large or damaged.
    """
    page = image.keyframe  # a page after the first is known by what differs from it
    codec = int(page.compression)
    if codec not in PICTURE_CODECS:
        return
    if codec not in (*JPEG, *JPEG_2000, PNG):
        raise ImageError(
            where,
            expected="strips or tiles whose own size can be told",
            got=f"compression {page.compression.name}",
            remedy="save it with LZW, Deflate, Zstandard, JPEG or JPEG 2000",
        )
    width = (page.tilewidth or page.imagewidth) + _SLACK
    height = (page.tilelength or min(page.rowsperstrip, page.imagelength)) + _SLACK
    tables = image.jpegtables or b""
    for start, count in zip(image.dataoffsets, image.databytecounts, strict=True):
        part = data[start : start + count]
        if codec in JPEG:
            whole = tables[:-2] + part[2:] if tables else part
            frame = read_frame(whole)
            size = frame.width, frame.height, frame.components
        elif codec in JPEG_2000:
            size = _jpeg_2000_size(part)
        else:
            size = _png_size(part)
        if size[0] > width or size[1] > height or size[2] > page.samplesperpixel:
            raise ValueError(
                f"{size[0]}×{size[1]}×{size[2]} in a strip or tile of at most "
                f"{width - _SLACK}×{height - _SLACK}×{page.samplesperpixel}"
            )
        if codec in JPEG:
            require_whole(whole, frame)


def _jpeg_2000_size(data: bytes) -> tuple[int, int, int]:
    """Width, height and components of a JPEG 2000 code stream, bare or in its boxes."""
    at = 0
    if not data.startswith(b"\xff\x4f"):
        while True:
            length, kind = struct.unpack_from(">I4s", data, at)
            head = 8
            if length == 1:
                (length,) = struct.unpack_from(">Q", data, at + 8)
                head = 16
            if kind == b"jp2c":
                at += head
                break
            if length < head:
                raise ValueError("a JPEG 2000 box without an end")
            at += length
    start, marker, _, _, right, bottom, left, top = struct.unpack_from(">HHHHIIII", data, at)
    if (start, marker) != (0xFF4F, 0xFF51):
        raise ValueError("JPEG 2000 data without their size")
    (components,) = struct.unpack_from(">H", data, at + 40)
    return right - left, bottom - top, components


def _png_size(data: bytes) -> tuple[int, int, int]:
    """Width, height and samples of a PNG."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise ValueError("PNG data without their size")
    width, height, _, colours = struct.unpack_from(">IIBB", data, 16)
    return width, height, {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}.get(colours, 4)
