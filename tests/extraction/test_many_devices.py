"""Several device processes: their joint progress, and what the parent makes of their messages."""

from __future__ import annotations

from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from dragn_cache.errors import DragnCacheError, StoreError
from dragn_cache.extraction.many_devices import (
    Advanced,
    Finished,
    Message,
    Said,
    Stopped,
    _follow,
    joint_progress,
)
from dragn_cache.extraction.report import ExtractReport


@pytest.mark.parametrize(
    ("counts", "done"),
    [
        ([(0, 0)], 0),
        ([(10, 25)], 25),
        # Both began with 10 in the store; one has done 15, the other 8.
        ([(10, 25), (10, 18)], 33),
        # The second began later and found 30, of which 20 are the first one's: not counted twice.
        ([(10, 35), (30, 34)], 39),
        ([(30, 34), (10, 35)], 39),
        # Parts that a process found ready when it looked again count for both; never beyond all.
        ([(0, 97), (0, 90), (40, 41)], 101),
    ],
)
def test_progress_over_several_processes(counts: list[tuple[int, int]], done: int) -> None:
    advances = [(Advanced(first, 101), Advanced(latest, 101)) for first, latest in counts]
    assert joint_progress(advances) == done


def sent(*messages: Message) -> Connection:
    """The parent's end of a process that has sent these and has ended."""
    receiver, sender = Pipe(duplex=False)
    for message in messages:
        sender.send(message)
    sender.close()
    return receiver


def test_the_parent_relays_progress_lines_and_reports() -> None:
    seen: list[tuple[int, int]] = []
    lines: list[str] = []
    reports = _follow(
        [
            sent(
                Said("compiling"),
                Advanced(2, 11),
                Advanced(5, 11),
                Finished(ExtractReport(instances_done=3)),
            ),
            sent(Said("compiling"), Said("slow disk"), Finished(ExtractReport(instances_done=7))),
            sent(Advanced(2, 11), Advanced(3, 11)),  # died: the others do its parts
        ],
        lambda done, total: seen.append((done, total)),
        lines.append,
    )
    assert sorted(report.instances_done for report in reports) == [3, 7]
    assert sorted(lines) == ["compiling", "slow disk"]
    assert seen[-1] == (2 + 3 + 1, 11)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_error_of_one_process_ends_all() -> None:
    error = StoreError("s", expected="room", got="none", remedy="free some")
    with pytest.raises(StoreError, match="s: expected room, got none; free some"):
        _follow([sent(Advanced(0, 5), Stopped(error))], None, lambda line: None)


def test_when_all_processes_die_it_is_said() -> None:
    with pytest.raises(DragnCacheError, match="got none that lived to the end"):
        _follow([sent(Advanced(0, 5)), sent()], None, lambda line: None)
