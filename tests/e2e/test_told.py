"""What commands tell on the way: how long it takes, and that the slower path is taken."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

import pytest
from support.harness import command, contents

import dfq
from dfq.api import shorter
from dfq.data.calibration_writer import CalibrationWriter
from dfq.ptq import rates
from dfq.runtime import progress
from dfq.runtime.progress import Live
from dfq.synthesis import pace

SLOW = 1000.0
"""Seconds that each look at the clock takes: any work is long."""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += SLOW
        return self.now

    perf_counter = monotonic


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(rates, "time", clock)
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
def test_quantization_says_at_its_start_how_long_all_of_it_takes(
    place: Path, model: Path, made: Path
) -> None:
    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out", "run")
    words = (*words, "--set", "distillation.epochs=5", "--set", f"evaluation.data={made}")
    result = command(*words, "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    # First of all, before anything is calibrated; and once.
    assert re.fullmatch(
        r"quantize: about [\d:]+: calibration [\d:]+, training [\d:]+, evaluation [\d:]+", lines[0]
    ), lines[0]
    assert lines[1] == (
        "quantize: shorter with a smaller set, fewer distillation.epochs, dfq ptq, which does not "
        "train or a GPU"
    )
    after = [line for line in lines[2:] if "about" in line]
    assert [line.partition(" left: ")[2].split()[::2] for line in after] == [
        ["training", "evaluation"], ["evaluation"], ["evaluation"],
    ]  # fmt: skip
    # Each phase took the name that it was told by.
    ends = [line for line in lines if re.match(r"[a-z ()]+: (\d+)/\1 ", line)]
    assert [line.partition(":")[0] for line in ends] == [
        "calibration", "training", "evaluation (float)", "evaluation (quantized)",
    ]  # fmt: skip


@pytest.mark.usefixtures("slow")
def test_a_set_that_is_made_first_is_told_with_the_rest(place: Path, model: Path) -> None:
    words = ("ptq", "--recipe", "tiny.yaml", "--model", model, "--out", "run", "--device", "cpu")
    result = command(*words)
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert re.fullmatch(
        r"quantize: about [\d:]+: synthesis [\d:]+, calibration [\d:]+", lines[0]
    ), lines[0]
    assert lines[1].startswith("quantize: shorter with ")
    # Asked again, nothing is left to do, nor to tell; a set that is there takes no time.
    assert "about" not in command(*words).stderr
    again = command(*words[:-3], "run2", "--device", "cpu", "--set", "quantization.weight_bits=8")
    assert re.fullmatch(r"quantize: about [\d:]+: calibration [\d:]+", again.stderr.splitlines()[0])


def test_what_is_told_changes_nothing(place: Path, model: Path, made: Path) -> None:
    for method in ("ptq", "qat"):
        ways = {"told": Live(), "silent": None}
        for out, progress_of_it in ways.items():
            dfq.quantize(
                "tiny.yaml", model=model, data=made, out=f"{method}-{out}", device="cpu",
                overrides={"method": method, "quantization.reconstruction": "gptq"},
                progress=progress_of_it,
            )  # fmt: skip
        told, silent = (contents(Path(f"{method}-{out}")) for out in ways)
        assert told.keys() == silent.keys()
        assert [name for name in told if told[name] != silent[name]] == []


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
