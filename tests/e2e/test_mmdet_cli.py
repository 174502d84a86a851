"""mmdet's detectors through the command line, from a config and a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import command, has_one_error
from small_mmdet import NAMES, enliven, write_config

from dfq.demo.scenes import write_coco
from dfq.detectors import load_detector


@pytest.mark.parametrize("name", ["mask-rcnn-resnet", "mask-rcnn-swin"])
def test_the_whole_flow(place: Path, name: str) -> None:
    config = write_config(place, name)
    detector = enliven(load_detector(config))
    torch.save({"meta": {}, "state_dict": detector.module.state_dict()}, place / "w.pth")
    network = ("--model", config, "--checkpoint", "w.pth")
    made = command(
        "synthesize", *network, "--recipe", "tiny.yaml", "--out", "set",
        "--set", "synthesis.masks=own",
    )  # fmt: skip
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
    assert "roi_head.mask_head.conv_logits" in shown.output
    write_coco(place / "scenes", 2, 64)
    measured = command("eval", "--model", "run", "--data", "scenes")
    assert measured.exit_code == 0, measured.output
    assert "2 images at 64 px" in measured.output
    # Categories come from the config, so that the scenes' are matched by name.
    assert "not measured" not in measured.output
    assert len(detector.names) == len(NAMES)


def test_mistakes(place: Path) -> None:
    config = write_config(place, "retinanet")
    assert "no checkpoint none.pth" in has_one_error(
        command("inspect", "--model", config, "--checkpoint", "none.pth")
    )
    (place / "w.pth").write_bytes(b"no checkpoint")
    assert "not a PyTorch checkpoint" in has_one_error(
        command("inspect", "--model", config, "--checkpoint", "w.pth")
    )
