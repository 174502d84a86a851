"""`dfq verify` on INT8 files that LiteRT's and OpenVINO's own quantizers made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.harness import command
from support.tiny_detector import SIDE, blobs, tiny_detector
from torch import Tensor, nn

import dfq
from dfq.models import save_detector

# Files of the runtimes, which take their time.
pytestmark = pytest.mark.e2e


class Together(nn.Module):
    """A detector's outputs as one, `(n, 4 + classes, A)` with centres and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.detector = tiny_detector()
        self.module = self.detector.module

    def forward(self, images: Tensor) -> Tensor:
        found = self.detector.outputs(self.detector.exportable(images), (SIDE, SIDE))
        boxes, scores = found["boxes"], found["scores"]
        corner, other = boxes[..., :2], boxes[..., 2:]
        return torch.cat([(corner + other) / 2, other - corner, scores], -1).transpose(1, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "tiny.safetensors"
    save_detector(tiny_detector(), path)
    return path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, an empty cache, and a set of a few images in `images`."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DFQ_HOME", str(tmp_path / "home"))
    (tmp_path / "images").mkdir()
    for index, image in enumerate(blobs(8, seed=1)):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    return tmp_path


def test_litert_with_one_output_loses_its_scores(place: Path, model: Path) -> None:
    """Full integers by its own quantizer, calibrated on the very images."""
    litert_torch = pytest.importorskip("litert_torch")
    quantizer = pytest.importorskip("ai_edge_quantizer.quantizer")
    recipe = pytest.importorskip("ai_edge_quantizer.recipe")
    litert_torch.convert(Together().eval(), (blobs(1),)).export("float.tflite")
    tool = quantizer.Quantizer("float.tflite", recipe.static_wi8_ai8())
    inputs = [{"args_0": image[None].numpy()} for image in blobs(8, seed=1)]
    tool.quantize(tool.calibrate({"serving_default": inputs})).export_model("int8.tflite")
    options = ("--against", model, "--data", "images", "--json", "a.json")
    result = command("verify", "int8.tflite", *options)
    assert result.exit_code == 1, result.output
    assert "FAULT: one scale for boxes and scores: " in result.stdout
    found = json.loads((place / "a.json").read_text())
    assert (found["format"], found["runtime"], found["precision"]) == ("litert", "litert", "INT8")
    assert found["integers"]["share_of_macs"] > 0.9
    assert found["parity"] is None


def test_openvino_by_nncf(place: Path, model: Path) -> None:
    nncf, openvino = pytest.importorskip("nncf"), pytest.importorskip("openvino")
    floating = openvino.convert_model(
        Together().eval(), example_input=blobs(1), input=[1, 3, SIDE, SIDE]
    )
    images = nncf.Dataset([image[None].numpy() for image in blobs(8, seed=1)])
    openvino.save_model(nncf.quantize(floating, images, subset_size=8), "int8.xml")
    found = dfq.verify("int8.xml", model, data="images")
    assert found.faults == []
    assert (found.format, found.runtime, found.precision) == ("openvino", "openvino", "INT8")
    assert found.integers.share_of_macs > 0.9
    assert found.moved is not None
    assert found.moved.all.detections > 10
    assert found.moved.all.share > 0.8
