"""Whether there are compiled functions, and what is said and done where there are none."""

from __future__ import annotations

import functools
import pickle
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_detector import tiny_detector

from dfq.data.calibration_set import CalibrationSet
from dfq.errors import UserError
from dfq.kernels import loader as compiled
from dfq.models.base import Detector
from dfq.synthesis import worker_process as worker
from dfq.synthesis.pipeline import determinants, set_name, synthesize_set
from dfq.synthesis.settings import LabelStage, Synthesis
from dfq.synthesis.shards import Plan

HAS_COMPILER = shutil.which("cc") is not None


def compile_anew(patch: pytest.MonkeyPatch) -> None:
    """As a process that starts now would; after the test, what was compiled before counts again."""
    patch.setattr(compiled, "_library", functools.cache(compiled._library.__wrapped__))


@pytest.fixture
def detector() -> Detector:
    detector = tiny_detector()
    detector.module.requires_grad_(False)
    detector.fingerprint, detector.source = "f" * 64, "weights/tiny.pt"
    return detector


def settings(**changes: Any) -> Synthesis:
    stage = LabelStage(image_size=64, iterations=3, updates=2)
    chosen = {"images": 2, "image_size": 64, "iterations": 1, "batch_size": 2}
    return Synthesis(**{"label_stage": stage, **chosen, **changes})


def program(place: Path, name: str, text: str) -> str:
    path = place / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# What leaves a process without them; some of it only shows when they are compiled or loaded.
WITHOUT: dict[str, Callable[[pytest.MonkeyPatch, Path], None]] = {
    "no compiler in PATH": lambda patch, place: patch.setenv("PATH", str(place)),
    "CC that fails": lambda patch, place: patch.setenv("CC", "false"),
    "CC that is not there": lambda patch, place: patch.setenv("CC", str(place / "absent")),
    "CC that is no command": lambda patch, place: patch.setenv("CC", '"cc'),
    "CC that writes nothing": lambda patch, place: patch.setenv("CC", "true"),
    "CC that writes nonsense": lambda patch, place: patch.setenv(
        "CC", program(place, "nonsense", 'for last; do :; done; echo nonsense > "$last"')
    ),
    "CC that writes too little": lambda patch, place: patch.setenv(
        "CC",
        program(
            place, "little",
            'for last; do :; done; echo "int x;" | cc -shared -fPIC -x c - -o "$last"',
        ),
    ),
    "nowhere to write": lambda patch, place: patch.setattr(
        tempfile, "tempdir", str(place / "absent")
    ),
    "switched off": lambda patch, place: patch.setenv(compiled.SWITCH, "0"),
}  # fmt: skip


def test_a_compiler_is_made_use_of() -> None:
    assert (compiled._library() is not None) == HAS_COMPILER
    assert (compiled.why_none() is None) == HAS_COMPILER


@pytest.mark.parametrize("words", ["cc -m64", "cc   -g  ", "", "env cc"])
def test_a_compiler_with_arguments(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setenv("CC", words)
    compile_anew(monkeypatch)
    assert (compiled.why_none() is None) == HAS_COMPILER


@pytest.mark.parametrize("how", WITHOUT)
def test_without_compiled_functions(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The images differ in their last bits: the set has another name, and one line says that it
    takes longer."""
    notes: list[str] = []
    plain = set_name(detector, settings(), 0)
    synthesize_set(detector, settings(), 0, tmp_path / "plain", note=notes.append)
    noise = settings(iterations=0, labels="none")
    of_noise = determinants(detector, noise, 0)
    assert (notes == []) == HAS_COMPILER
    notes.clear()
    WITHOUT[how](monkeypatch, tmp_path)
    compile_anew(monkeypatch)
    assert compiled._library() is None
    assert "\n" not in (compiled.why_none() or "\n")
    assert (set_name(detector, settings(), 0) != plain) == HAS_COMPILER
    # Noise is not computed with them.
    assert determinants(detector, noise, 0) == of_noise
    made = synthesize_set(detector, settings(), 0, tmp_path / "slow", note=notes.append)
    assert made.manifest["determinants"]["kernels"] == "pytorch"
    (line,) = notes
    assert "takes longer" in line
    assert "\n" not in line
    # What is there already is said nothing about, and nothing of the other kind is mixed in.
    synthesize_set(detector, settings(), 0, tmp_path / "slow", note=notes.append)
    assert len(notes) == 1
    if "kernels" not in determinants_of(tmp_path / "plain"):
        with pytest.raises(UserError, match="holds a set made with another kernels"):
            synthesize_set(detector, settings(), 0, tmp_path / "plain")


def determinants_of(folder: Path) -> dict[str, Any]:
    return dict(CalibrationSet.open(folder).manifest["determinants"])


def test_a_set_on_another_device_has_no_say_of_them(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_library", lambda: None)
    chosen = settings(precision="float32")
    assert "kernels" in determinants(detector, chosen, 0)
    detector.module.to("meta")
    assert "kernels" not in determinants(detector, chosen, 0)


def test_a_worker_that_cannot_compile_makes_nothing(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that started it could: its images would differ from the others' of the set."""
    known = determinants(detector, settings(), 0)
    known.pop("kernels", None)
    monkeypatch.setattr(compiled, "_library", lambda: None)
    job = pickle.dumps((detector, "cpu", settings(), Plan(0, 2, 2), tmp_path / "set", known, 1))
    with pytest.raises(UserError, match="the images would differ"):
        worker._work(None, job)  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()
