"""Dynamic ranges and free starts, from the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from support.harness import command

from dfq.quantization.dynamic import is_dynamic
from dfq.runs.loading import load_model


def test_a_run_with_dynamic_ranges(place: Path, model: Path, made: Path) -> None:
    words = ("quantize", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out", "run")
    dynamic = ("--set", "quantization.activation_ranges=dynamic")
    refused = command(*words, *dynamic, "--set", "method=auto")
    assert refused.exit_code == 2
    assert "set method: ptq" in refused.stderr
    assert not (place / "run").exists()
    result = command(*words, *dynamic, "--set", "method=ptq")
    assert result.exit_code == 0, result.output
    assert is_dynamic(load_model("run").module)
    assert "Ranges of activations are dynamic" in (place / "run" / "report.html").read_text()
    export = command("export", "--model", "run", "--format", "onnx", "--out", "run.onnx")
    assert export.exit_code == 2
    assert "its activations have dynamic ranges" in export.stderr
    assert len(export.stderr.strip().splitlines()) == 1
    assert not (place / "run.onnx").exists()


def test_it_is_said_where_there_is_nothing_to_equalise(
    place: Path, model: Path, made: Path
) -> None:
    """SiLU is everywhere in this network; biases are corrected all the same."""
    found = {}
    for start in ("none", "cle+bias-correction"):
        result = command(
            *("quantize", "--recipe", "tiny.yaml", "--model", model, "--data", made),
            *("--out", start, "--set", "method=ptq", "--set", "quantization.reconstruction=none"),
            *("--set", f"quantization.start={start}"),
        )
        assert result.exit_code == 0, result.output
        assert ("equalization: no two layers" in result.output) == (start != "none")
        found[start] = load_model(start).module.state_dict()
    one, other = found.values()
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed
    assert all(name.endswith(".bias") for name in changed)
