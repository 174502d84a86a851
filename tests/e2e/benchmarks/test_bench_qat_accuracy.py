"""The bench makes each thing once, goes on where it was, and prints a table."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from support.cli_parts import real_set, stamps

from benchmarks.accuracy import qat


def test_a_table_and_nothing_made_twice(place: Path, model: Path) -> None:
    real_set(place / "train", count=3)
    real_set(place / "val", count=4)
    settings = [
        "distillation.epochs=1", "distillation.batch_size=2", "quantization.calibration_images=2",
        "quantization.ranges=minmax", "quantization.reconstruction=none",
        "synthesis.iterations=2", "synthesis.batch_size=2",
        "synthesis.label_stage.iterations=2", "synthesis.label_stage.updates=1",
        "synthesis.label_stage.image_size=64",
    ]  # fmt: skip
    words = [
        "--model", str(model), "--train", "train", "--val", "val", "--out", "out",
        "--size", "64", "--images", "4", "--rows", "w4a8",
        "--columns", "ptq-synthetic,lsq-real,ours-same",
        "--ablations", "task-agnostic", "--ablation-rows", "w4a8",
        *(word for text in settings for word in ("--set", text)),
    ]  # fmt: skip
    first = CliRunner().invoke(qat.main, words, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    lines = [line for line in first.stdout.splitlines() if line.startswith("|")]
    assert lines[0] == "| bits | PTQ, MSE ranges, synthetic | LSQ, 3 real | ours, 3 synthetic |"
    assert [line.split("|")[1].strip() for line in lines] == [
        "bits", "---", "W4A8", "", "---", "ours, 4 synthetic", "task-agnostic images",
    ]  # fmt: skip
    assert all(line.count("|") == 5 for line in lines[:3])
    runs = {path.name for path in (place / "out" / "runs").iterdir()}
    assert runs == {
        f"w4a8-{name}"
        for name in ("ptq-synthetic", "lsq-real", "ours-same", "ours", "task-agnostic")
    }
    # Of 4 images, of 3, and of 4 without labels.
    assert len(list((place / "out" / "sets").iterdir())) == 3
    recipe = json.loads((place / "out" / "runs" / "w4a8-lsq-real" / "manifest.json").read_text())
    weights = recipe["identity"]["recipe"]["distillation"]["weights"]
    assert weights == {"kl": 0, "feature": 0, "task": 1}

    before = stamps(place / "out")
    again = CliRunner().invoke(qat.main, words, catch_exceptions=False)
    assert again.stdout == first.stdout
    assert stamps(place / "out") == before


def test_an_unknown_column(place: Path, model: Path) -> None:
    words = ["--model", str(model), "--train", "t", "--val", "v", "--out", "o"]
    result = CliRunner().invoke(qat.main, [*words, "--columns", "ours,theirs"])
    assert result.exit_code == 2
    assert "--columns theirs: choose from ptq-noise" in result.output
