"""Import paths of earlier versions."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import dfq
from dfq._moved import MOVED

FACE = {
    "dfq.verbs": ["synthesize", "quantize", "sensitivity", "evaluate", "inspect", "load_model"],
    "dfq.detectors": ["load_detector", "save_detector", "Detector", "Targets"],
    "dfq.detectors.base": ["Detections", "Boundary"],
    "dfq.run": ["load_run", "Run"],
    "dfq.comparison": ["compare"],
    "dfq.dataset.calibration": ["CalibrationSet"],
    "dfq.dataset.readers": ["open_set"],
    "dfq.exporting": ["export"],
    "dfq.predicting": ["predict"],
    "dfq.verifying": ["verify"],
    "dfq.deploying": ["deploy"],
    "dfq.quantization.convert": ["Policy", "insert_quantizers", "fold", "calibrate"],
}


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MOVED:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in FACE.items() for n in names])
def test_an_old_path_gives_what_the_new_one_does(module: str, name: str) -> None:
    old = importlib.import_module(module)
    with pytest.warns(FutureWarning, match=rf"{module} has moved: from dfq[\w.]* import {name};"):
        found = getattr(old, name)
    assert found in [getattr(importlib.import_module(home), name, None) for home in MOVED[module]]


def test_it_is_said_once() -> None:
    old = importlib.import_module("dfq.run")
    with pytest.warns(FutureWarning) as told:
        assert old.load_run is not old.Run
    assert len(told) == 1


def test_what_never_was_there_is_not() -> None:
    with pytest.raises(ImportError, match=r"cannot import name 'nothing' from 'dfq\.run'"):
        from dfq.run import nothing  # noqa: F401


def test_the_face_needs_no_old_path() -> None:
    code = (
        "import warnings; warnings.simplefilter('error'); import dfq; "
        "[getattr(dfq, name) for name in dfq.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not MOVED.keys() & set(dfq._HOMES.values())
