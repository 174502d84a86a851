"""Progress lines: what they say, how often, and where they go."""

from __future__ import annotations

import itertools
import re

import pytest
from support.clock import Clock

from dfq.runtime import progress
from dfq.runtime.progress import Live, Silent, advise


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


def test_long_work_says_at_its_start_how_long_it_takes(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Live().task("training", 6, "epochs") as task:
        task.update(0, 6)
        for step in range(1, 200):
            clock.now += 1
            task.within(step / 600)
            if step < 4:
                assert capsys.readouterr().err == "", "the first steps are none to judge by"
            elif step == 4:
                # Long before the first epoch is through.
                assert capsys.readouterr().err == "training: about 59:56 for 6 epochs\n"
            elif step == 16:
                line = capsys.readouterr().err
                assert line == "training: 0/6 epochs  0.1 epochs/min, 59:44 left\n"


def test_long_work_says_what_would_make_it_shorter(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    live = Live()
    advise(live, "synthesis", "shorter with fewer images")
    advise(Silent(), "synthesis", "told to nobody")
    with live.task("synthesis", 512, "images") as task:
        # Gone on with: what is done already is not counted.
        task.update(128, 512)
        clock.now += 10
        task.left(59)
        assert capsys.readouterr().err == "", "under a minute"
    with live.task("synthesis", 512, "images") as task:
        task.update(128, 512)
        task.left(61)
        assert capsys.readouterr().err.splitlines() == [
            "synthesis: about 1:01 for 384 images",
            "synthesis: shorter with fewer images",
        ]
        task.left(3600)
        assert capsys.readouterr().err == "", "once"
    quiet = Live(advises=False)
    advise(quiet, "synthesis", "shorter with fewer images")
    with quiet.task("synthesis", 512, "images") as task:
        task.update(0, 512)
        task.left(3600)
        assert capsys.readouterr().err == "synthesis: about 1:00:00 for 512 images\n"


def test_short_work_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    live = Live()
    advise(live, "rounding", "shorter with fewer images")
    with live.task("rounding", 1, "layers") as task:
        for done in range(14):
            clock.now += 1
            task.update(done, 14)
    assert capsys.readouterr().err == ""


def test_what_the_work_itself_knows_counts(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Live().task("synthesis", 512, "images") as task:
        task.update(0, 512)
        clock.now += 2
        task.left(11400)
        assert capsys.readouterr().err == "synthesis: about 3:10:00 for 512 images\n"
        clock.now += 14
        task.detail("labels", 9, 80, {"bn": 1.0})
        # No time is left out that has passed since it was told.
        assert "synthesis: 0/512 images  3:09:46 left  labels 9/80" in capsys.readouterr().err
        clock.now += 20
        task.update(512, 512)
        assert "0:00 left" in capsys.readouterr().err


def test_estimates_follow_a_change_of_pace_without_jumps(clock: Clock) -> None:
    rate = progress._Rate()
    rate.reach(0)
    shown = []
    for done in range(1, 1000):
        # Four times as slow from the middle on.
        clock.now += 1 if done <= 500 else 4
        rate.reach(done)
        shown.append(rate.left(1000))
    assert shown[0] == pytest.approx(999)
    assert shown[498] == pytest.approx(500, rel=0.01)
    # It takes a while to believe it, and in the end it is right.
    steps = [after - before for before, after in itertools.pairwise(shown)]
    assert max(steps) < 30
    assert shown[-10] == pytest.approx(10 * 4, rel=0.2)


def test_notes_are_lines_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    live = Live()
    live.note("model: [bold]m[/bold]")
    Silent().note("nothing")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "model: [bold]m[/bold]\n")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with live.task("synthesis", 4, "images") as task:
        live.note("model: [bold]m[/bold]")
        task.update(1, 4)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "model: [bold]m[/bold]\n" in text
    assert "1/4" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (36001, "10:00:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Silent().task("x", 3, "images") as task:
        task.update(1, 3)
        task.within(0.5)
        task.left(3.0)
        task.detail("a", 1, 2, {"b": 0.5})
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""
