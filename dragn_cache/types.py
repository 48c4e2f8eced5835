"""Types and constants that every part of the library shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Task = Literal["multilabel", "multiclass"]
SPLITS = ("train", "validation", "test")

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels of the original image, half-open."""

CLEAN_VIEW = "0"
"""Name of the view without augmentation."""

Progress = Callable[[int, int], None]
"""Called with the units of work that are done (those of earlier calls included) and their total."""

Warn = Callable[[str], None]
"""Called with one line for each thing that a user should know."""

Say = Callable[[str], None]
"""Called with a line for people about something that takes a while."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Pixels = NDArray[np.uint8]
"""Crops (..., P, h, w) of values 0..255."""
