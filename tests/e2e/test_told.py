"""What commands tell on the way: how long it takes, and that the slower path is taken."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from support.harness import command

from dfq.api import shorter
from dfq.data.calibration_writer import CalibrationWriter
from dfq.runtime import progress
from dfq.synthesis import pace

SLOW = 1000.0
"""Seconds that each look at the clock takes: any work is long."""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += SLOW
        return self.now


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    monkeypatch.setattr(progress, "time", clock)
    # Nothing is shown but what is told once.
    monkeypatch.setattr(progress, "PLAIN_SECONDS", float("inf"))


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_synthesis_says_at_its_start_how_long_it_takes(
    place: Path, model: Path, workers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shorter.os, "cpu_count", lambda: 2)
    words = ("synthesize", "--model", model, "--recipe", "tiny.yaml", "--workers", workers)
    result = command(*words, "--out", "set", "--device", "cpu")
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if "about" in line]
    assert len(told) == 1
    assert told[0].startswith("synthesis: about ")
    assert told[0].endswith(" for 4 images")
    lines = result.stderr.splitlines()
    assert lines[0] == told[0]
    # Its images, size and iterations are fewer than --quick has.
    more = "more workers or " if workers == "1" else ""
    assert lines[1] == f"synthesis: shorter with {more}a GPU"


@pytest.mark.usefixtures("slow")
def test_going_on_counts_what_is_left(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("synthesize", "--model", model, "--recipe", "tiny.yaml", "--workers", "1")
    words = (*words, "--images", "4", "--batch-size", "1", "--out", "set")
    append = CalibrationWriter.append

    def full_from_the_second_on(self: CalibrationWriter, index: int, *more: object) -> None:
        if index > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, index, *more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationWriter, "append", full_from_the_second_on)
        assert command(*words).exit_code == 2
    result = command(*words)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[0].endswith(" for 3 images")


def test_short_work_tells_no_estimate(place: Path, model: Path) -> None:
    words = ("synthesize", "--model", model, "--recipe", "tiny.yaml", "--workers", "1")
    still = Clock()
    still.monotonic = lambda: 0.0  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "time", still)
        patch.setattr(progress, "time", still)
        result = command(*words, "--out", "set")
    assert result.exit_code == 0, result.output
    assert "about" not in result.stderr
    assert "shorter" not in result.stderr


@pytest.mark.usefixtures("slow")
def test_training_says_at_its_start_how_long_it_takes(place: Path, model: Path, made: Path) -> None:
    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out", "run")
    result = command(*words, "--set", "distillation.epochs=5", "--device", "cpu")
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if line.startswith("training: about")]
    assert len(told) == 1
    # Before the first epoch is through.
    assert told[0].endswith(" for 5 epochs")
    lines = result.stderr.splitlines()
    assert lines[lines.index(told[0]) + 1] == (
        "training: shorter with a smaller set, fewer distillation.epochs, dfq ptq, which does not "
        "train or a GPU"
    )


def test_without_a_compiler_it_says_that_it_takes_longer(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfq.kernels import loader as compiled

    words = ("synthesize", "--model", model, "--recipe", "tiny.yaml")
    assert "takes longer" not in command(*words).stderr or shutil.which("cc") is None
    monkeypatch.setattr(compiled, "_library", lambda: None)
    monkeypatch.setenv("CC", "false")
    result = command(*words)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if "takes longer" in line]
    assert "C compiler (false" in line
    # Two sets, each under its name; found again without another word.
    assert len(list((place / "home").iterdir())) == (2 if shutil.which("cc") else 1)
    again = command(*words)
    assert again.stdout == result.stdout
    assert "takes longer" not in again.stderr
