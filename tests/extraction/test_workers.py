"""Decoding ahead: images and marks come back in the order in which they were given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import draw_image

from dragn_cache.errors import ImageError
from dragn_cache.extraction.workers import Decoder, FromDecoder, Mark, ToDecode
from dragn_cache.images.crops import Geometry, ImageRequest


@pytest.mark.parametrize("workers", [0, 2])
def test_marks_come_back_between_their_images(tmp_path: Path, workers: int) -> None:
    rng = np.random.default_rng(0)
    items: list[ToDecode[int] | Mark[str]] = [Mark("begin")]
    for k in range(23):
        path = tmp_path / f"{k}.png"
        if k != 5:
            draw_image(path, rng, 19, 11 + k)
        if k in (7, 8, 21):
            items.append(Mark(f"before {k}"))
        request = ImageRequest(path.name, (path,), (0, 1, 2), (None,), Geometry((19, 13)))
        items.append(ToDecode(k, request))
    items.append(Mark("end"))
    with Decoder(workers=workers, ahead_crops=4) as decoder:
        results = list(decoder.stream(items))
    assert [r.message if isinstance(r, Mark) else r.tag for r in results] == [
        *("begin", *range(7), "before 7", 7, "before 8", *range(8, 21), "before 21", 21, 22),
        "end",
    ]
    for result in results:
        if isinstance(result, FromDecoder) and result.tag == 5:
            assert isinstance(result.decoded, ImageError)
        elif isinstance(result, FromDecoder):
            assert not isinstance(result.decoded, ImageError)
            # The box is the image's own width: which file it was.
            assert result.decoded.boxes == ((0, 0, 11 + result.tag, 19),)
