"""Report of an extraction: its work, where its time went, and what limits it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dragn_cache.store import Failure
from dragn_cache.store.update import UpdateReport

Phase = Literal["decoding", "network", "writing"]


@dataclass
class ExtractReport:
    """Counts and seconds of one call.

    Attributes:
        instances_done: rows written by this call; ``instances_total`` those of the manifest.
        images_decoded: image requests decoded by this call.
        parts_written, parts_total: parts written by this call, and planned.
        decode_seconds: summed over workers; ``wait_seconds``: the network waiting for them.
        forward_seconds: the network (on a GPU: giving it work); ``device_seconds``: the writing
            thread waiting for the network's results; ``stall_seconds``: the network waiting for
            the writing thread.
        write_seconds: scratch, digests and parts, in the writing thread.
        levels: the lowest and the highest grey level of the images decoded by this call; (255, 0)
            without any.
        start_seconds: reading the weights, planning, compiling.
        compute: ``eager`` or ``compiled``; ``device``: where the network ran.
        workers, cores, batch_size: as they were.
        failures: every input not used, in the whole store.
        update: what an update found, None if none was asked for.
    """

    instances_total: int = 0
    instances_done: int = 0
    images_decoded: int = 0
    parts_total: int = 0
    parts_written: int = 0
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0
    forward_seconds: float = 0.0
    device_seconds: float = 0.0
    stall_seconds: float = 0.0
    write_seconds: float = 0.0
    start_seconds: float = 0.0
    total_seconds: float = 0.0
    levels: tuple[int, int] = (255, 0)
    bags_total: int = 0
    compute: str = "eager"
    device: str = "cpu"
    workers: int = 0
    cores: int = 1
    batch_size: int = 32
    failures: list[Failure] = field(default_factory=list)
    update: UpdateReport | None = None

    @property
    def limit(self) -> Phase:
        """The phase that the others waited for."""
        stalled = self.stall_seconds
        busy = self.device_seconds + self.write_seconds
        writing = stalled * self.write_seconds / busy if busy else 0.0
        network = self.forward_seconds + stalled - writing
        times: dict[Phase, float] = {
            "decoding": self.wait_seconds,
            "network": network,
            "writing": writing,
        }
        return max(times, key=lambda phase: times[phase])

    @property
    def advice(self) -> str:
        """A change that would make it faster, with settings in backquotes as in errors."""
        return advice_for(
            self.limit,
            device=self.device,
            workers=self.workers,
            cores=self.cores,
            decode_ms=1000 * self.decode_seconds / max(1, self.images_decoded),
            batch_size=self.batch_size,
        )

    def add(self, other: ExtractReport) -> None:
        """Add the work of another process on the same store."""
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.add_levels(other.levels)

    def add_levels(self, levels: tuple[int, int]) -> None:
        """Add the grey levels of more images."""
        self.levels = min(self.levels[0], levels[0]), max(self.levels[1], levels[1])


_SUMMED = (
    "instances_done",
    "images_decoded",
    "parts_written",
    "decode_seconds",
    "wait_seconds",
    "forward_seconds",
    "device_seconds",
    "stall_seconds",
    "write_seconds",
)


def advice_for(
    limit: Phase, *, device: str, workers: int, cores: int, decode_ms: float, batch_size: int
) -> str:
    """A change for a phase that limits an extraction; ``decode_ms`` is an image's on one core."""
    if limit == "decoding":
        if workers < cores:
            return f"raise `workers` (now {workers}, the machine has {cores} cores)"
        return (
            f"an image takes {decode_ms:.1f} ms to decode on one core and all {cores} are in use: "
            "store smaller or faster image files, or use more cores"
        )
    if limit == "writing":
        return "use a faster disk for `out`, or store less: `grid`, `taps`, `dtype=float16`"
    if device.startswith("cuda"):
        return f"raise `batch_size` (now {batch_size}) while GPU memory lasts"
    return (
        "the processor computes without a break: `device=cuda`, a lighter `backbone` or a "
        "smaller `size` would help; `workers` and `batch_size` would not"
    )
