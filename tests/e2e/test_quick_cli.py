"""`--quick` of the commands: said in a line, recorded as values, and weaker than other options."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from support.harness import command

from dfq.recipe.quick import QUICK

FEW = ("--images", "4", "--set", "synthesis.label_stage.image_size=32")
STEPS = ("--set", "synthesis.label_stage.iterations=2", "--iterations", "2")


def test_a_quick_set_says_and_records_what_it_is(place: Path, model: Path) -> None:
    words = ("synthesize", "--model", model, "--out", "set", "--quick", *FEW, *STEPS)
    result = command(*words)
    assert result.exit_code == 0, result.output
    # The size that nobody named is the model's own, which is below 320.
    line = "quick: 4 images of 64 px, 2 iterations in batches of 16"
    assert result.stderr.splitlines()[0] == line
    values = json.loads((place / "set" / "manifest.json").read_text())["determinants"]["synthesis"]
    assert [values[name] for name in ("images", "image_size", "iterations", "batch_size")] == [
        4, 64, 2, 16,
    ]  # fmt: skip
    # It is the set of these values, however they were named.
    same = ("--batch-size", "16", "--image-size", "64")
    again = command("synthesize", "--model", model, "--out", "set", *FEW, *STEPS, *same)
    assert again.exit_code == 0, again.output
    assert again.stdout == result.stdout


def test_a_quick_run_says_and_records_what_it_is(place: Path, model: Path, made: Path) -> None:
    words = ("ptq", "--recipe", "w8a8", "--model", model, "--data", made, "--out", "run", "--quick")
    result = command(*words, "--set", "distillation.epochs=9")
    assert result.exit_code == 0, result.output
    assert "quick: rounding on 64 images at most" in result.stderr.splitlines()
    recipe = yaml.safe_load((place / "run" / "recipe.yaml").read_text())
    assert recipe["distillation"]["epochs"] == 9
    assert recipe["synthesis"]["images"] == QUICK["synthesis.images"]
    assert recipe["synthesis"]["image_size"] == 64
    assert recipe["quantization"]["rounding_images"] == QUICK["quantization.rounding_images"]
