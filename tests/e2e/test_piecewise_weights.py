"""Weights on piecewise grids, from the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from support.harness import command, has_one_error

from dfq.quantization.piecewise import PiecewiseQuantizer
from dfq.quantization.traversal import quantized_layers
from dfq.runs.loading import load_model


def test_a_run_with_piecewise_weights(place: Path, model: Path, made: Path) -> None:
    words = ("ptq", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out", "run")
    piecewise = ("--set", "quantization.weight_grid=piecewise")
    gptq = ("--set", "quantization.reconstruction=gptq")
    has_one_error(refused := command(*words, *piecewise, *gptq))
    assert "reconstruction: none" in refused.stderr
    assert not (place / "run").exists()
    result = command(*words, *piecewise, "--set", "quantization.reconstruction=none")
    assert result.exit_code == 0, result.output
    assert "quantization.weight_grid: piecewise" in (place / "run" / "report.html").read_text()
    layers = list(quantized_layers(load_model("run").module))
    assert layers
    for name, layer in layers:
        assert isinstance(layer.weight_quantizer, PiecewiseQuantizer), name
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight), name
    has_one_error(export := command("export", "--model", "run", "--format", "onnx", "--out", "a"))
    assert "its weights are on piecewise grids" in export.stderr
    assert not (place / "a").exists()
