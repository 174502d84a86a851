"""A tiny detector, a set and a run of it, and a folder of one's own to work in."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.harness import RECIPE, command
from support.tiny_detector import tiny_detector

from dfq.models import save_detector


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a detector of three categories, 64 px, strides 8 and 16."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_detector(tiny_detector(), path)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; it holds `tiny.yaml`, and the cache is `home` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DFQ_HOME", str(tmp_path / "home"))
    # Tables are as wide as the terminal; what the tests read must not depend on it.
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture(scope="session")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished set of `model`; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.yaml").write_text(RECIPE)
    result = command(
        "synthesize", "--model", model, "--recipe", folder / "tiny.yaml", "--out", folder / "set"
    )
    assert result.exit_code == 0, result.output
    return folder / "set"


@pytest.fixture(scope="session")
def run(model: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `model` on `made`; not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(RECIPE)
    result = command(
        "qat", "--recipe", folder / "tiny.yaml", "--model", model, "--data", made,
        "--out", folder / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder / "run"
