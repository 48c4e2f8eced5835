"""Bags, instances and the manifest that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dragn_cache.types import Box, Task

BOX_COLUMNS = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class Instance:
    """One crop of one image (the whole image when ``box`` is None).

    ``file`` and ``line`` are its place in a table. Comparisons ignore them, here and in `Bag`.

    Attributes:
        image: path relative to the image root; ``{channel}`` stands for each channel.
        order: position within the bag.
        box: x0, y0, x1, y1 in pixels of the original image, half-open.
    """

    bag_id: str
    image: str
    order: int
    box: Box | None = None
    file: str = field(default="", compare=False)
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Bag:
    """One labelled sample. ``labels`` is None when the table has no label column."""

    bag_id: str
    labels: tuple[str, ...] | None = None
    split: str = ""
    group: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    file: str = field(default="", compare=False)
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Manifest:
    """A data set: its description, its bags in table order, and each bag's instances in order."""

    name: str
    task: Task
    labels: tuple[str, ...]
    bags: tuple[Bag, ...]
    instances: Mapping[str, tuple[Instance, ...]]
    image_root: Path
    channels: tuple[str, ...] = ()
    title: str = ""
    source: str = ""
    licence: str = ""
    citation: str = ""
    extract: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_instances(self) -> int:
        return sum(len(rows) for rows in self.instances.values())
