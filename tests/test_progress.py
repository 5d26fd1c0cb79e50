"""Progress is a bar in a terminal and plain lines elsewhere."""

import sys

import pytest

from fewstep import progress
from fewstep.progress import track


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test turns."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys):
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def test_a_log_gets_a_plain_line_every_ten_seconds_and_a_last_one(capsys, clock):
    bar = track(range(25), "train", 25)
    for i in bar:
        clock[0] += 1
        bar.note = f"loss {i}"
    shown = lines(capsys)
    assert "\r" not in shown
    assert shown.splitlines() == [
        "train: 10/25, 1/s, 00:15 left, loss 9",
        "train: 20/25, 1/s, 00:05 left, loss 19",
        "train: 25/25, 1/s, in 00:25, loss 24",
    ]


def test_samples_are_counted_and_earlier_work_is_not_timed(capsys, clock):
    seen = []
    for start in track(range(40, 100, 32), "drawing", 100, start=40, each=32):
        seen.append(start)
        clock[0] += 10
    assert seen == [40, 72]
    assert lines(capsys).splitlines() == ["drawing: 72/100, 3.2/s, 00:08 left", "drawing: 100/100, 3/s, in 00:20"]


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = track(range(0, 10, 4), "train", 10, each=4)
    for _ in bar:
        bar.note = "loss 1"
    shown = lines(capsys)
    assert "\r" in shown and "train: 100%" in shown and "10/10" in shown


def test_nothing_is_said_where_there_is_nothing_to_do(capsys):
    assert list(track([], "train", 5, start=5)) == []
    assert lines(capsys) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_only_the_first_process_speaks(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("RANK", "1")
    assert list(track(range(3), "train", 3)) == [0, 1, 2]
    assert lines(capsys) == ""
    monkeypatch.setenv("RANK", "0")
    assert list(track(range(3), "train", 3, active=False)) == [0, 1, 2]
    assert lines(capsys) == ""


def test_a_bar_is_closed_when_the_loop_is_left(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    walk = iter(track(range(3), "train", 3))
    next(walk)
    walk.close()
    assert lines(capsys).endswith("\n")
