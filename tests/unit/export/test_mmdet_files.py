"""Files of mmdet's two-stage detectors against the reference programs, part by part."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from support.counting import layers
from support.small_mmdet import SIDE, enliven, write_config
from torch import Tensor, nn

from dfq.api.export import describe_export
from dfq.export.opened import OpenedDetector, open_exported
from dfq.export.parity import WITHIN_ONE, distance
from dfq.export.program import Program, build
from dfq.export.reference import reference_outputs
from dfq.export.writers import path_of_part, write
from dfq.graph.fold_batchnorm import fold
from dfq.models import load_detector
from dfq.models.base import Detector
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy

# Files of the runtimes, which take their time.
pytestmark = [pytest.mark.e2e, pytest.mark.mmdet]

SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml", "litert": ".tflite"}
FORMATS = {"onnxruntime": "onnx", "openvino": "openvino", "litert": "litert"}
PARTS = ("heads", "masks")


class Made(NamedTuple):
    """A file and what it is to compute.

    Attributes:
        student: quantized.
        first: program of backbone, neck and proposals.
        parts: programs of the heads, by name.
        path: of the first stage's file.
    """

    student: Detector
    first: Program
    parts: dict[str, Program]
    path: Path


def scenes(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")


@pytest.fixture(scope="module", params=list(SUFFIXES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    runtime, folder = request.param, tmp_path_factory.mktemp("mmdet")
    detector = fold(enliven(load_detector(write_config(folder, "mask-rcnn-resnet"))))
    policy = Policy(8, 8, 8, placement="qdq", runtime=runtime)
    student = insert_quantizers(detector, policy)
    calibrate(student, [scenes(4)], search="minmax")
    first = build(student, runtime, image_size=SIDE)
    parts = {
        part: build(student, runtime, image_size=SIDE, dynamic=runtime != "litert", part=part)
        for part in PARTS
    }
    info = describe_export(student, policy, FORMATS[runtime], runtime, SIDE, 1, None)
    path = write(first, info, folder / f"x{SUFFIXES[runtime]}", parts=parts)[0]
    return Made(student, first, parts, path)


def test_backbone_neck_and_heads_are_what_the_programs_are(made: Made) -> None:
    opened = open_exported(made.path, threads=1)
    assert isinstance(opened, OpenedDetector)
    runtime, images = opened.info.runtime, scenes(4)[:2]
    found = opened.run(images.numpy())
    wanted = reference_outputs(made.first, images, runtime)
    # Features, objectness and offsets of each of five levels.
    assert len(wanted) == 15
    kinds = {name.rstrip("0123456789") for name in wanted}
    assert kinds == {"features", "objectness", "deltas"}
    for name, values in wanted.items():
        assert distance(values, found[name]).share_within_one >= WITHIN_ONE
        assert np.ptp(values) > 0
    generator = torch.Generator().manual_seed(0)
    reach = float(np.abs(wanted["features0"]).max())
    for part, program in made.parts.items():
        pooled = reach * torch.rand(3, *program.shape, generator=generator)
        given = opened.parts[part].run(pooled.numpy())
        expected = [
            reference_outputs(program, one, runtime)
            for one in pooled.split(1 if runtime == "litert" else 3)
        ]
        for name in program.outputs:
            values = np.concatenate([outputs[name] for outputs in expected])
            assert distance(values, given[name]).share_within_one >= WITHIN_ONE
            assert np.ptp(values) > 0


def test_all_layers_are_computed_in_integers(made: Made) -> None:
    for path in (made.path, *(path_of_part(made.path, part) for part in PARTS)):
        whole, floating = layers(path)
        assert whole > 0
        assert floating == 0


def test_masks_and_boxes_are_those_of_the_network(made: Made) -> None:
    opened = open_exported(made.path, threads=1)
    (found,) = opened.detect(scenes(1), masks=True, score_threshold=0.05)
    (wanted,) = made.student.detect(scenes(1), masks=True, score_threshold=0.05)
    assert found.masks is not None
    assert wanted.masks is not None
    assert found.masks.shape[1:] == wanted.masks.shape[1:]
    assert abs(len(found) - len(wanted)) <= max(2, 0.1 * len(wanted))
    assert len(wanted) > 0
