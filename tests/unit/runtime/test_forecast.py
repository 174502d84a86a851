"""How long work of several phases takes: told as one sum, and anew as phases end."""

from __future__ import annotations

import pytest
from support.clock import Clock

from dfq.runtime.forecast import Forecast, Phase
from dfq.runtime.progress import Live, Silent, forecast

PHASES: list[Phase] = [
    ("calibration", [20.0]),
    ("rounding", [60.0, 20.0, 10.0]),
    ("training", [110.0, 110.0]),
    ("evaluation", [1.0] * 10),
    ("evaluation", [2.0] * 10),
]


def test_the_whole_is_told_at_its_start_and_what_is_left_as_phases_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    live = Live()
    with forecast(live, "quantize", lambda: PHASES, "shorter with a GPU"):
        with live.task("calibration", 1, "steps") as task:
            assert capsys.readouterr().err == "", "nothing has begun"
            task.update(0, 1)
            # 20 + 90 + 220 + 30 seconds.
            assert capsys.readouterr().err.splitlines() == [
                "quantize: about 6:00: "
                "calibration 0:20, rounding 1:30, training 3:40, evaluation 0:30",
                "quantize: shorter with a GPU",
            ]
            clock.now += 10
            task.update(1, 1)
        assert capsys.readouterr().err.splitlines()[-1] == (
            "quantize: about 5:40 left: rounding 1:30, training 3:40, evaluation 0:30"
        )
        with live.task("rounding", 1, "layers") as task:
            task.update(0, 3)
            clock.now += 120
            task.update(1, 3)
            # Twice as slow as expected: the other layers take 60 s, a mean one of the three too,
            # and what follows 250.
            line = capsys.readouterr().err
            assert line.endswith("  1.0 layers/min, 1:00 left, 5:10 in all\n"), line
            task.update(3, 3)
        with live.task("training", 2, "epochs") as task:
            task.update(0, 2)
            task.update(2, 2)
        # What is left is short.
        assert "left:" not in capsys.readouterr().err.splitlines()[-1]
    with live.task("training", 2, "epochs") as task:
        task.update(0, 2)
        clock.now += 70
        task.within(0.5)
        clock.now += 70
    assert "in all" not in capsys.readouterr().err, "it is over"


def test_what_a_run_that_goes_on_has_behind_it_is_not_counted(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    live = Live(advises=False)
    with (
        forecast(live, "quantize", lambda: PHASES, "shorter with a GPU"),
        live.task("training", 2, "epochs") as task,
    ):
        task.update(1, 2)
    line = "quantize: about 2:20: training 1:50, evaluation 0:30\n"
    assert capsys.readouterr().err == line


def test_a_phase_that_only_its_own_start_tells_is_waited_for(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    live, phases = Live(), [("synthesis", None), ("calibration", [30.0])]
    with forecast(live, "quantize", lambda: phases), live.task("synthesis", 8, "images") as task:
        task.update(0, 8)
        clock.now += 1
        task.detail("labels", 1, 80, {})
        assert capsys.readouterr().err == ""
        task.left(3570)
        line = "quantize: about 1:00:00: synthesis 59:30, calibration 0:30\n"
        assert capsys.readouterr().err == line
    # Of one that is still to come, nothing can be said in all.
    later: list[Phase] = [("calibration", [90.0]), ("sensitivity", None)]
    with forecast(live, "quantize", lambda: later), live.task("calibration", 1, "steps") as task:
        task.update(0, 1)
    assert capsys.readouterr().err == ""


def test_layers_of_different_cost_are_no_equals(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last layer takes nine tenths of the time: after the others nearly all of it is left."""
    live, costs = Live(), [1.0] * 10 + [90.0]
    shown = []
    with (
        forecast(live, "quantize", lambda: [("rounding", costs)]),
        live.task("rounding", 1, "layers") as task,
    ):
        task.update(0, 11)
        for done in range(1, 11):
            clock.now += 2
            task.update(done, 11)
            shown.append(task._seconds_left())  # type: ignore[attr-defined]
    assert capsys.readouterr().err.startswith("quantize: about 1:40: rounding 1:40\n")
    # What was expected until the pace is sure, and then at the pace of half of it.
    assert shown[0] == pytest.approx(99)
    assert shown[-1] == pytest.approx(180)


def test_short_work_and_what_is_told_to_nobody(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    def never() -> list[Phase]:
        pytest.fail("timed for nobody")

    with forecast(Silent(), "quantize", never):
        pass
    live = Live()
    short = [("calibration", [20.0]), ("rounding", [39.0])]
    with forecast(live, "quantize", lambda: short), live.task("calibration", 1, "steps") as task:
        # They are phases of that work already.
        with forecast(live, "other", never):
            task.update(0, 1)
        clock.now += 500
    assert capsys.readouterr().err == ""


def test_what_cannot_be_timed_is_done_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> list[Phase]:
        raise ValueError("of noise this network makes nothing")

    with forecast(Live(), "quantize", broken):
        print("done")
    assert capsys.readouterr() == ("done\n", "")


def test_what_failed_says_nothing_of_what_is_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    live = Live()

    def failing() -> None:
        with live.task("calibration", 1, "steps") as task:
            task.update(0, 1)
            capsys.readouterr()
            raise RuntimeError

    with forecast(live, "quantize", lambda: PHASES), pytest.raises(RuntimeError):
        failing()
    assert capsys.readouterr().err == ""
    assert live.forecast is None


def test_tasks_that_are_no_phases_are_left_alone() -> None:
    foreseen = Forecast("deploy", [("export", [1.0]), ("detection", [2.0]), ("detection", [3.0])])
    assert not foreseen.begin("preview")
    assert foreseen.ahead() == 6
    assert foreseen.begin("detection (file)")
    assert foreseen.units == [2.0]
    assert foreseen.begin("detection (PyTorch)")
    assert not foreseen.begin("detection (PyTorch)")
