"""mmdet's detectors through the command line, from a config and a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.harness import command, has_one_error, whole_flow
from support.small_mmdet import NAMES, enliven, write_config

from dfq.demo.scenes import write_coco
from dfq.models import load_detector


@pytest.mark.parametrize("name", ["mask-rcnn-resnet", "mask-rcnn-swin"])
def test_the_whole_flow(place: Path, name: str) -> None:
    config = write_config(place, name)
    detector = enliven(load_detector(config))
    torch.save({"meta": {}, "state_dict": detector.module.state_dict()}, place / "w.pth")
    write_coco(place / "scenes", 2, 64)
    network = ("--model", config, "--checkpoint", "w.pth")
    measured = whole_flow(
        place, network, "--set", "synthesis.masks=own", layer="roi_head.mask_head.conv_logits"
    )
    # Categories come from the config, so that the scenes' are matched by name.
    assert "not measured" not in measured
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
