"""JPEG data whose decoder is not to be believed: their size, and whether they are whole.

libjpeg reads on where data are cut, torn or full of holes, fills in grey or shifted blocks, and
gives a warning that Pillow and imagecodecs drop. Here the data are decoded once more, at an eighth
of the size, by a reader that takes warnings for errors.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import simplejpeg

# Start of frame: Huffman- or arithmetic-coded; C4, C8 and CC are other markers.
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = (0xC2, 0xCA)
_DCT_8_BITS = (0xC0, 0xC1, *_PROGRESSIVE, 0xC9)
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length


@dataclass(frozen=True)
class Frame:
    """The header of a JPEG.

    Attributes:
        marker: of the frame: the kind of coding.
        bits: of a sample.
        blocks: of 8 × 8 samples, over all components.
    """

    marker: int
    bits: int
    width: int
    height: int
    components: int
    blocks: int

    @property
    def coefficient_bytes(self) -> int:
        """Bytes that a decoder holds at once besides the pixels."""
        return 128 * self.blocks if self.marker in _PROGRESSIVE else 0


def read_frame(data: bytes) -> Frame:
    """The first frame of a JPEG.

    Raises:
        ValueError: there is none.
    """
    at = 2
    while data[:2] == b"\xff\xd8" and at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in _ALONE:
            at += 2
        elif marker in _FRAMES:
            return _parse_frame(marker, data[at + 4 :])
        elif marker in (0xD9, 0xDA):  # the end, or pixels
            break
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    raise ValueError("JPEG data without a frame")


def _parse_frame(marker: int, body: bytes) -> Frame:
    if len(body) < 6 or len(body) < 6 + 3 * body[5]:
        raise ValueError("JPEG data that end in their header")
    bits, height, width, components = struct.unpack_from(">BHHB", body)
    factors = [divmod(body[7 + 3 * k], 16) for k in range(components)]
    if not (width and height and factors and all(h and v for h, v in factors)):
        raise ValueError(f"JPEG data of {width}×{height} pixels and {components} components")
    most_h, most_v = max(h for h, _ in factors), max(v for _, v in factors)
    blocks = sum(-(-width * h // (8 * most_h)) * -(-height * v // (8 * most_v)) for h, v in factors)
    return Frame(marker, bits, width, height, components, blocks)


def require_whole(data: bytes, frame: Frame) -> None:
    """Raise ValueError for JPEG data that a decoder can only guess to the end.

    Lossless data, and those of 12 bits, are not decoded here.
    """
    if frame.blocks > 8 * len(data):  # each block takes a bit at least
        raise ValueError(f"{len(data)} bytes for {frame.width}×{frame.height} pixels (truncated?)")
    if frame.bits != 8 or frame.marker not in _DCT_8_BITS:
        return
    try:
        _, _, colours, _ = simplejpeg.decode_jpeg_header(data)
        target = {"CMYK": "CMYK", "YCCK": "CMYK", "RGB": "RGB"}.get(colours, "GRAY")
        simplejpeg.decode_jpeg(
            data, target, fastdct=True, fastupsample=True, min_height=1, min_width=1, strict=True
        )
    except ValueError as error:
        raise ValueError(f"{error} (truncated?)") from error
