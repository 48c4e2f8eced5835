"""Warnings of libraries stay off the screen; those that concern the user become lines."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import dragn_cache_cli
import imagecodecs
import numpy as np
import pytest
import tifffile
from dragn_cache_cli import quiet
from PIL import Image

import dragn_cache
from dragn_cache.extraction.workers import Decoder, FromDecoder, Mark, ToDecode
from dragn_cache.images.crops import Crops, Geometry, ImageRequest

PROGRAM = [sys.executable, "-P", "-c", "from dragn_cache_cli.app import main; main()"]


def program(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [*PROGRAM, *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Images that Pillow, tifffile and libpng remark on, each in its own way."""
    pixels = np.random.default_rng(0).integers(0, 256, (41, 53, 3), np.uint8)
    exif = Image.Exif()
    exif[305] = "x" * 40
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif.tobytes()[:20])
    described = "ImageJ=1.5\nimages=7\nslices=7\n"
    deep = pixels[:, :, 0].astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "b.tif", deep, description=described, metadata=None)
    png = imagecodecs.png_encode(pixels.astype(np.uint16) * 257)
    profile = b"iCCP" + b"x\0\0" + zlib.compress(b"none")
    chunk = len(profile[4:]).to_bytes(4, "big") + profile + zlib.crc32(profile).to_bytes(4, "big")
    (tmp_path / "c.png").write_bytes(png[:33] + chunk + png[33:])
    (tmp_path / "t.csv").write_text("bag_id,labels,image\n1,x;y,a.jpg\n2,x,b.tif\n3,y,c.png\n")
    return tmp_path


def test_workers_print_nothing_of_their_libraries(
    odd: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    items: list[ToDecode[str] | Mark[str]] = [
        ToDecode(name, ImageRequest(name, (odd / name,), (0,), (None,), Geometry((19, 13))))
        for name in ("a.jpg", "b.tif", "c.png")
    ]
    with Decoder(workers=1, ahead_crops=4) as decoder:
        for result in decoder.stream(items):
            assert isinstance(result, FromDecoder)
            assert isinstance(result.decoded, Crops), result
    assert capfd.readouterr() == ("", "")


def test_check_tells_which_image_a_decoder_remarks_on(odd: Path) -> None:
    done = program("check", "t.csv", cwd=odd)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, _ = done.stdout.splitlines()
    assert [line.split(", got ")[0] for line in lines] == [
        f"warning: t.csv:{k}: decoder-remark: expected no remark of its decoder" for k in (2, 3)
    ]
    assert "Corrupt EXIF data" in lines[0]
    assert "ImageJ series metadata invalid" in lines[1]


def test_a_warning_of_the_users_own_code_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import warnings\n"
        "from dragn_cache.aggregators.mean import Mean\n"
        "warnings.warn('take\\x1b[31m care')\n"
    )
    done = program("aggregators", "own:Mean", cwd=tmp_path)
    assert done.stderr == "warning: own.py:3: take\\x1b[31m care\n"


def test_numbers_of_this_package_are_a_line_and_other_remarks_are_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (cli,) = dragn_cache_cli.__path__
    places = [str(Path(dragn_cache.__file__).with_name("x.py")), f"{cli}/y.py", np.__file__]
    for category in (RuntimeWarning, UserWarning, DeprecationWarning):
        for line, place in enumerate(places):
            quiet._show("overflow\nin cast", category, place, line)
    assert capsys.readouterr().err == (
        "warning: x.py:0: overflow in cast\nwarning: y.py:1: overflow in cast\n"
    )
