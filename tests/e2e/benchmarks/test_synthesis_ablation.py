"""The ablation makes each cell once, goes on where it was, and prints a table."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from support.cli_parts import real_set, stamps

from benchmarks.synthesis import ablation


def test_a_table_and_nothing_made_twice(place: Path, model: Path) -> None:
    real_set(place / "real", count=3)
    words = [
        "--model", str(model), "--real", "real", "--out", "out", "--seeds", "0,1", "--size", "64",
        "--images", "2", "--iterations", "2", "--epochs", "1",
        "--variants", "baseline,swing",
        "--set", "synthesis.label_stage.iterations=2", "--set", "synthesis.label_stage.updates=1",
        "--set", "synthesis.label_stage.image_size=64",
    ]  # fmt: skip
    first = CliRunner().invoke(ablation.main, words, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    lines = [line for line in first.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == [
        "variant", "---", "the default", "swing convolutions",
    ]  # fmt: skip
    assert lines[2].split("|")[3].strip() == "0.00 ± 0.00"
    cells = {path.stem for path in (place / "out" / "cells").iterdir()}
    variants = ("baseline", "swing")
    assert cells == {f"{name}-{seed}" for name in variants for seed in (0, 1)}
    # The baseline's images and those of a variant have the same labels, up to their order.
    labels = [
        sorted(
            tuple(one["bbox"])
            for one in json.loads(
                (place / "out" / f"{name}-0" / "set" / "annotations.json").read_text()
            )["annotations"]
        )
        for name in ("baseline", "swing")
    ]
    assert labels[0] == labels[1] != []

    before = stamps(place / "out")
    again = CliRunner().invoke(ablation.main, words, catch_exceptions=False)
    assert again.stdout == first.stdout
    assert stamps(place / "out") == before


def test_an_unknown_variant(place: Path, model: Path) -> None:
    words = ["--model", str(model), "--real", "r", "--out", "o", "--variants", "baseline,fog"]
    result = CliRunner().invoke(ablation.main, words)
    assert result.exit_code == 2
    assert "fog" in result.output


def test_a_mistake_is_one_line(place: Path, model: Path) -> None:
    words = ["--model", str(model), "--real", "nowhere", "--out", "o", "--size", "60"]
    result = CliRunner().invoke(ablation.main, words)
    assert result.exit_code == 2
    assert "synthesis.image_size: 60 is no multiple" in result.output
