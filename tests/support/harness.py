"""Calling `dfq` in this process, what its answers have in common, and its whole flow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner, Result

from dfq.cli.main import cli
from dfq.recipe import load_recipe

RECIPE = """
synthesis:
  images: 4
  image_size: 64
  iterations: 3
  batch_size: 2
  label_stage: {image_size: 64, iterations: 4, updates: 2}
method: qat
quantization: {calibration_images: 4, ranges: minmax, reconstruction: none}
distillation: {epochs: 2, batch_size: 2, checkpoint_minutes: 0}
"""


SIZES: dict[str, Any] = {
    "synthesis": {
        "images": 4, "image_size": 64, "iterations": 3, "batch_size": 2,
        "label_stage": {"image_size": 64, "iterations": 4, "updates": 2},
    },
    "quantization": {"mixed": {"images": 2}, "reconstruction_iterations": 2},
    "distillation": {"epochs": 2, "batch_size": 2},
}  # fmt: skip
"""How much work there is: nothing that decides what is done."""


def as_shipped(name: str) -> str:
    """A shipped recipe as YAML, as it is but for the size of the work."""
    values = load_recipe(name).model_dump(mode="json")

    def resize(section: dict[str, Any], sizes: dict[str, Any]) -> None:
        for key, value in sizes.items():
            if isinstance(value, dict):
                resize(section[key], value)
            else:
                section[key] = value

    resize(values, SIZES)
    return yaml.safe_dump(values)


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


def has_one_error_after_output(result: Result) -> str:
    """As `has_one_error`, where results and progress may have been shown before."""
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.output
    return errors[0]


def whole_flow(place: Path, network: Sequence[str | Path], *options: str, layer: str) -> str:
    """Synthesis, training on its set, and a look at the run, which is measured on two images.

    Args:
        place: the folder to work in, with `tiny.yaml`, and `scenes` of the network's categories.
        network: the words that name it.
        options: more words for `synthesize`.
        layer: the run has one of this name.

    Returns:
        What `eval` said.
    """
    made = command("synthesize", *network, "--recipe", "tiny.yaml", "--out", "set", *options)
    assert made.exit_code == 0, made.output
    trained = command(
        "qat", *network, "--recipe", "tiny.yaml", "--data", "set", "--out", "run",
        "--set", "distillation.weights.task=0.1",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    assert metrics["quantized_share_of_macs"] == 1.0
    assert {"kl", "feature", "task"} <= set(metrics["history"][0])
    shown = command("inspect", "--model", "run")
    assert shown.exit_code == 0, shown.output
    assert layer in shown.output
    measured = command("eval", "--model", "run", "--data", "scenes")
    assert measured.exit_code == 0, measured.output
    assert "2 images at 64 px" in measured.output
    return measured.output
