"""Progress lines: what they say, how often, and where they go."""

from __future__ import annotations

import re

import pytest

from dfq import progress
from dfq.progress import Live, Silent


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    return clock


def test_plain_lines_go_to_standard_error(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Live().task("synthesis", 100, "images") as task:
        task.update(20, 100)  # there already: a resumed set
        assert capsys.readouterr().err == ""
        clock.now += 20
        task.update(60, 100)
        # 40 new images in 20 s are 2 a second; the other 40 take 20 s.
        line = capsys.readouterr()
        assert line.out == ""
        assert line.err == "synthesis: 60/100 images  2.0 images/s, 0:20 left\n"
        clock.now += 1
        task.update(62, 100)
        assert capsys.readouterr().err == "", "a line at most every 15 s"
        clock.now += 19
        task.update(100, 100)
        assert "100/100 images  2.0 images/s, 0:00 left" in capsys.readouterr().err


def test_slow_work_is_counted_by_the_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Live().task("training", 10, "epochs") as task:
        task.update(0, 10)
        clock.now += 120
        task.update(1, 10)
    assert capsys.readouterr().err == "training: 1/10 epochs  0.5 epochs/min, 18:00 left\n"


def test_details_show_where_a_long_unit_is(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Live().task("synthesis", 8, "images") as task:
        task.update(0, 8)
        task.detail("full", 10, 200, {"bn": 1.23456, "tv": 0.5})
        assert capsys.readouterr().err == ""
        clock.now += 16
        task.detail("full", 20, 200, {"bn": 1.23456, "tv": 0.5})
    assert capsys.readouterr().err == "synthesis: 0/8 images  full 20/200 bn 1.23 tv 0.5\n"


def test_the_last_unit_is_always_reported(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Live().task("evaluation", 4, "images") as task:
        task.update(4, 4)
    assert capsys.readouterr().err == "evaluation: 4/4 images\n"


def test_on_a_terminal_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with Live().task("synthesis", 4, "images") as task:
        task.update(0, 4)
        task.detail("full", 3, 9, {"bn": 2.0})
        task.update(2, 5)
    shown = capsys.readouterr()
    assert shown.out == ""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.err)
    assert "synthesis" in text
    assert "2/5" in text
    assert "full 3/9 bn 2" in text


def test_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Silent().task("x", 3, "images") as task:
        task.update(1, 3)
        task.detail("a", 1, 2, {"b": 0.5})
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""
