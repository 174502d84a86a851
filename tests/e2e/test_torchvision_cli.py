"""Detectors whose network and weights are apart, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.harness import command, has_one_error, whole_flow
from support.torchvision_cli_parts import write_scenes

from dfq.demo.scenes import NAMES
from dfq.models import load_detector, save_detector
from dfq.models.torchvision.base import from_name
from dfq.models.torchvision.networks import build

NETWORK = "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    module = build(NETWORK.partition("/")[2], len(NAMES) + 1, {})
    torch.save({"model": module.state_dict(), "names": list(NAMES)}, path)
    return path


def test_the_whole_flow(place: Path) -> None:
    options = {
        "width": 0.35,
        "representation": 32,
        "anchors": [16, 32],
        "min_size": 64,
        "max_size": 64,
        "rpn_post_nms_top_n_test": 20,
        "box_batch_size_per_image": 16,
    }
    save_detector(from_name("fasterrcnn_mobilenet_v2", options=options), place / "m.safetensors")
    write_scenes(place / "scenes", load_detector("m.safetensors").names)
    whole_flow(place, ("--model", "m.safetensors"), layer="roi_heads.box_predictor.cls_score")


def test_weights_apart_from_the_network(place: Path, weights: Path) -> None:
    shown = command("inspect", "--model", NETWORK, "--checkpoint", weights, "--json", "layers.json")
    assert shown.exit_code == 0, shown.output
    found = json.loads((place / "layers.json").read_text())
    assert found["model"] == f"{NETWORK}@{weights}"
    (last,) = [row for row in found["layers"] if row["name"].endswith("cls_score")]
    assert last["weight_shape"][0] == len(NAMES) + 1


def test_mistakes(place: Path, weights: Path) -> None:
    assert "whose weights" in has_one_error(
        command("qat", "--recipe", "w4a8", "--checkpoint", weights)
    )
    assert "no separate checkpoint" in has_one_error(
        command("inspect", "--model", "yolo11n.yaml", "--checkpoint", weights)
    )
    assert "unknown" in has_one_error(command("inspect", "--model", "torchvision/none"))
