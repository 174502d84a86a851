"""Block reconstruction from the command line: on two-stage networks, interrupted, and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.harness import command, contents, has_one_error
from support.two_stage import write_mmdet, write_torchvision

from dfq.cli.main import cli
from dfq.ptq import pipeline
from dfq.ptq.objectives import METHODS
from dfq.quantization.traversal import quantized_layers
from dfq.runs.folder import load_run

QUICK = (
    "--set", "quantization.reconstruction_iterations=2", "--set", "quantization.ranges=minmax",
    "--set", "quantization.weight_bits=3", "--set", "quantization.activation_bits=5",
    "--set", "quantization.refine_images=0",
)  # fmt: skip


def on_grids(folder: Path) -> bool:
    return all(
        torch.allclose(layer.weight_quantizer(layer.weight), layer.weight, atol=1e-6)
        for _, layer in quantized_layers(load_run(folder).module)
    )


@pytest.mark.parametrize("network", ["torchvision", "mask-rcnn-swin"])
def test_two_stage_networks_go_through_every_method(place: Path, network: str) -> None:
    words = write_torchvision(place) if network == "torchvision" else write_mmdet(place, network)
    sizes = ("--set", "synthesis.label_stage.iterations=2", "--image-size", "64")
    made = command(
        "synthesize", *words, "--recipe", "w4a4", "--images", "2", "--iterations", "2", *sizes,
        "--out", "set",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    for method in METHODS:
        result = command(
            "ptq", "--recipe", "w4a4", *words, "--data", "set", "--out", method, *QUICK,
            "--set", f"quantization.reconstruction={method}",
        )  # fmt: skip
        assert result.exit_code == 0, (method, result.output)
        metrics = json.loads(Path(method, "metrics.json").read_text())
        assert metrics["method"] == "ptq"
        assert on_grids(Path(method))


def test_what_was_interrupted_ends_in_the_same_bytes(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("ptq", "--recipe", "ptq-w4a4", "--model", model, "--data", made, *QUICK)
    assert command(*words, "--out", "whole").exit_code == 0
    save = pipeline._save
    blocks = []

    def stop(student: Any, checkpoint: Path, done: int, begun: Any) -> None:
        save(student, checkpoint, done, begun)
        blocks.append(done)
        if len(blocks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_save", stop)
    assert CliRunner().invoke(cli, [str(w) for w in (*words, "--out", "part")]).exit_code != 0
    assert blocks == [1, 2, 3]
    assert (place / "part" / "reconstruction.pt").is_file()
    again = command(*words, "--out", "part")
    assert again.exit_code == 0, again.output
    assert blocks[3] == 4
    assert not (place / "part" / "reconstruction.pt").exists()
    assert contents(place / "part") == contents(place / "whole")


def test_a_damaged_file_to_go_on_from_is_one_line(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("ptq", "--recipe", "ptq-w4a4", "--model", model, "--data", made, *QUICK)

    def stop(student: Any, checkpoint: Path, done: int, begun: Any) -> None:
        checkpoint.write_bytes(b"no checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_save", stop)
    CliRunner().invoke(cli, [str(w) for w in (*words, "--out", "run")])
    has_one_error(result := command(*words, "--out", "run"))
    assert "reconstruction.pt: cannot be read" in result.stderr
    assert "delete it" in result.stderr


def test_auto_keeps_what_is_closest_on_held_out_images(place: Path, model: Path) -> None:
    made = command(
        "synthesize", "--model", model, "--recipe", "tiny.yaml", "--images", "8", "--out", "set"
    )
    assert made.exit_code == 0, made.output
    result = command(
        "quantize", "--recipe", "w4a4", "--model", model, "--data", "set", "--out", "run", *QUICK,
        "--set", "quantization.reconstruction=best", "--set", "distillation.epochs=1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    # Each is finite, and none is another's.
    candidates = metrics["candidates"]
    assert set(candidates) == {"gptq", "best", "qat"}
    # Of equals the simplest: where reconstruction came no closer, it is the start.
    closest = min(("gptq", "best", "qat"), key=candidates.__getitem__)
    assert f"kept: {closest}" in result.output
    assert metrics["selected"].startswith("qat") == (closest == "qat")


def test_labels_are_asked_for_where_a_method_needs_them(
    place: Path, model: Path, made: Path
) -> None:
    result = command(
        "ptq", "--recipe", "w4a4", "--model", model, "--data", made, "--photos", made, "--out",
        "run", *QUICK, "--set", "quantization.reconstruction=task",
    )  # fmt: skip
    has_one_error(result)
    assert "needs the labels of the set" in result.stderr


def test_the_old_name_of_the_key_is_read_with_a_warning(
    place: Path, model: Path, made: Path
) -> None:
    words = ("ptq", "--recipe", "w4a4", "--model", model, "--data", made)
    old = command(*words, "--set", "quantization.rounding=nearest", "--out", "old")
    new = command(*words, "--set", "quantization.reconstruction=none", "--out", "new")
    assert (old.exit_code, new.exit_code) == (0, 0)
    warning = [line for line in old.stderr.splitlines() if line.startswith("warning")]
    assert len(warning) == 1
    assert "quantization.reconstruction now" in warning[0]
    assert contents(place / "old") == contents(place / "new")
