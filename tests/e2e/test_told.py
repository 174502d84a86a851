"""What commands tell on the way: how long it takes, and that the slower path is taken."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.harness import command

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
    place: Path, model: Path, workers: str
) -> None:
    words = ("synthesize", "--model", model, "--recipe", "tiny.yaml", "--workers", workers)
    result = command(*words, "--out", "set")
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if "about" in line]
    assert len(told) == 1
    assert told[0].startswith("synthesis: about ")
    assert told[0].endswith(" for 4 images")
    assert result.stderr.splitlines()[0] == told[0]


@pytest.mark.usefixtures("slow")
def test_training_says_at_its_start_how_long_it_takes(place: Path, model: Path, made: Path) -> None:
    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out", "run")
    result = command(*words, "--set", "distillation.epochs=5")
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if line.startswith("training: about")]
    assert len(told) == 1
    # Before the first epoch is through.
    assert told[0].endswith(" for 5 epochs")


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
