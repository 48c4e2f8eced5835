"""Claims: one holder at a time; dead holders lose theirs; a lost claim is not renewed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dragn_cache.store import claims as module
from dragn_cache.store.claims import (
    Claims,
    describe_holder,
    is_alive,
    living_tokens,
    read_claim,
    started,
)


def test_a_name_has_one_holder_until_it_is_released(tmp_path: Path) -> None:
    with Claims(tmp_path) as mine, Claims(tmp_path) as yours:
        assert mine.acquire("00007")
        assert not yours.acquire("00007")
        assert yours.acquire("00011")
        mine.release("00007")
        assert yours.acquire("00007")
        assert (mine.holds("00007"), yours.holds("00007")) == (False, True)
    assert list(tmp_path.iterdir()) == []


def test_a_claim_says_who_holds_it(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        claims.acquire("00003")
        claim = json.loads((tmp_path / ".00003.claim").read_text())
        assert claim["pid"] == os.getpid()
        assert claim["token"] == claims.token
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        assert claim["start"] == fields[22 - 3]  # starttime is field 22, counted from 1


@pytest.mark.parametrize("tmpfile", [True, False])
def test_a_claim_is_there_with_its_content_in_one_step_where_that_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmpfile: bool
) -> None:
    linked: list[bool] = []
    link = os.link

    def look(source: str, path: Path, **options: Any) -> None:
        assert not path.exists()
        link(source, path, **options)
        linked.append(path.read_bytes().endswith(b"}"))

    monkeypatch.setattr(os, "link", look)
    if not tmpfile:
        monkeypatch.delattr(os, "O_TMPFILE")
    with Claims(tmp_path) as claims, Claims(tmp_path) as others:
        assert claims.acquire("00003")
        assert not others.acquire("00003")
        assert (read_claim(claims.path("00003")) or {})["token"] == claims.token
    assert linked == [True] * tmpfile
    assert list(tmp_path.iterdir()) == []


def claim_by_another(folder: Path, then: str) -> None:
    program = (
        "import os, pathlib, sys; from dragn_cache.store.claims import Claims\n"
        f"Claims(pathlib.Path(sys.argv[1])).acquire('00003'); {then}"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    claim_by_another(tmp_path, "os._exit(0)")
    assert not is_alive(tmp_path / ".00003.claim")
    with Claims(tmp_path) as claims:
        assert claims.acquire("00003")


def test_a_process_number_that_came_again_is_another_process(tmp_path: Path) -> None:
    path = tmp_path / ".00003.claim"
    with Claims(tmp_path) as claims:
        claims.acquire("00003")
        record = json.loads(path.read_text())
        assert is_alive(path)
        path.write_text(json.dumps({**record, "start": "12"}))
        assert not is_alive(path)
        path.write_text(json.dumps(record))


def test_another_hosts_claim_lives_as_long_as_it_is_renewed(tmp_path: Path) -> None:
    path = tmp_path / ".00003.claim"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "5", "token": "t"}))
    now = time.time()
    os.utime(path, (now, now - 119))
    assert living_tokens(tmp_path) == {"t"}
    os.utime(path, (now, now - 121))
    assert not is_alive(path)
    assert living_tokens(tmp_path) == set()
    assert not path.exists()


def test_a_claim_that_is_being_written_counts_as_alive(tmp_path: Path) -> None:
    path = tmp_path / ".00003.claim"
    path.write_bytes(b"")
    with Claims(tmp_path) as claims:
        assert not claims.acquire("00003")
    os.utime(path, (1, 1))
    assert not is_alive(path)


def test_held_claims_are_renewed_and_lost_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.01)
    with Claims(tmp_path) as claims:
        for name in ("00002", "00005"):
            claims.acquire(name)
        lost = tmp_path / ".00005.claim"
        lost.write_text(json.dumps({"host": "elsewhere", "token": "other"}))
        for path in tmp_path.iterdir():
            os.utime(path, (1, 1))
        deadline = time.monotonic() + 20
        while (tmp_path / ".00002.claim").stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert (tmp_path / ".00002.claim").stat().st_mtime > 2
        assert lost.stat().st_mtime == 1
    assert [p.name for p in tmp_path.iterdir()] == [".00005.claim"]
    assert (read_claim(lost) or {})["token"] == "other"


def test_of_many_that_want_a_dead_ones_claim_one_gets_it(tmp_path: Path) -> None:
    for _ in range(10):
        claim_by_another(tmp_path, "os._exit(0)") if _ == 0 else dead_claim(tmp_path)
        everyone = [Claims(tmp_path) for _ in range(8)]
        won: list[bool] = []
        start = threading.Barrier(len(everyone))

        def take(claims: Claims, start: threading.Barrier, won: list[bool]) -> None:
            start.wait()
            won.append(claims.acquire("00003"))

        threads = [threading.Thread(target=take, args=(c, start, won)) for c in everyone]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == [False] * 7 + [True]
        for claims in everyone:
            claims.close()


def dead_claim(folder: Path) -> None:
    record = {**module.myself(), "pid": 2**22 + 3, "token": "dead"}
    (folder / ".00003.claim").write_text(json.dumps(record))


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 20
    while started(child.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert started(child.pid) is None
    child.wait()


def test_a_time_far_in_the_future_is_no_holders(tmp_path: Path) -> None:
    path = tmp_path / ".00003.claim"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "5", "token": "t"}))
    now = time.time()
    os.utime(path, (now, now + 119))  # the clock of another host is a little ahead
    assert is_alive(path)
    os.utime(path, (now, now + 3600))
    assert not is_alive(path)
    with Claims(tmp_path) as claims:
        assert claims.acquire("00003")


def test_clocks_are_compared_through_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".00003.claim"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "start": "5", "token": "t"}))
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 86400)  # this host's clock is wrong
    assert is_alive(path)
    assert describe_holder(path).startswith("process 7 on elsewhere, renewed ")
    assert describe_holder(tmp_path / ".00004.claim") == ""


def test_waiting_says_whom_for_since_when_and_how_to_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.0)
    path = tmp_path / ".tables.claim"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "start": "5", "token": "t"}))
    lines: list[str] = []

    def end_it(line: str) -> None:
        lines.append(line)
        path.unlink()

    with Claims(tmp_path) as claims:
        claims.wait("tables", end_it)
        assert claims.holds("tables")
    (line,) = lines
    assert line.startswith("waiting for tables: process 7 on elsewhere, renewed 0 s ago; ")
    assert line.endswith(f"if that has ended, remove {path}")


def test_a_wait_that_is_short_says_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    with Claims(tmp_path) as mine, Claims(tmp_path) as yours:
        mine.acquire("tables")
        threading.Timer(0.1, mine.release, ["tables"]).start()
        yours.wait("tables", lines.append)
    assert lines == []
