"""The command line on a tiny detector, in this process, with a cache and a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from click.testing import CliRunner, Result
from tiny_detector import tiny_detector

from dfq.cli import cli
from dfq.detectors import save_detector

RECIPE = """
synthesis:
  images: 4
  image_size: 64
  iterations: 3
  batch_size: 2
  label_stage: {image_size: 64, iterations: 4, updates: 2}
quantization: {calibration_images: 4}
distillation: {epochs: 2, batch_size: 2, checkpoint_minutes: 0}
"""

Dfq: TypeAlias = Callable[..., Result]


def command(*words: str | Path) -> Result:
    """Run `dfq WORDS...`; anything but a clean exit of the command line is raised."""
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path, but for logs, which hold times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "log.txt"
    }


def has_one_error(result: Result) -> str:
    """The one line on standard error; fails where there is more, or the exit code is not 2."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return lines[0]


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
