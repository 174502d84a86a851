"""Files of detectors with proposals, and of others that give raw predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfq import export
from dfq.api.export import describe_export
from dfq.errors import UserError
from dfq.export.opened import open_exported
from dfq.export.program import build
from dfq.export.writers import write
from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Detections, Detector
from dfq.models.torchvision.base import from_name
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy

# Files of the runtimes, which take their time.
pytestmark = pytest.mark.e2e

SIDE = 64
FEW: dict[str, Any] = {"min_size": SIDE, "max_size": SIDE, "rpn_post_nms_top_n_test": 20}
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "litert": ".tflite"}


def detector_of(name: str) -> Detector:
    """With heads that are sure of something, and statistics of what they see."""
    options = dict(FEW) if "rcnn" in name else {"min_size": SIDE, "max_size": SIDE}
    if "mobilenet_v2" in name:
        options |= {"width": 0.35, "representation": 64, "anchors": (16, 32)}
    detector = from_name(name, options=options)
    generator = torch.Generator().manual_seed(1)
    norms = [m for m in detector.module.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        detector.module.backbone(detector.normalize(images(4)))
    detector.module.eval()
    for last in detector.boundary_layers().last:
        layer = detector.module.get_submodule(last)
        layer.weight.data.normal_(0, 0.05 if "bbox" in last else 0.3, generator=generator)
    return detector


def images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")


def same(one: list[Detections], other: list[Detections], *, pixels: float) -> None:
    for ours, theirs in zip(one, other, strict=True):
        assert len(ours) == len(theirs) > 0
        assert torch.equal(ours.labels[:5], theirs.labels[:5])
        assert (ours.boxes[:5] - theirs.boxes[:5]).abs().max() < pixels
        assert (ours.scores - theirs.scores).abs().max() < pixels / 10


def clear_threshold(detector: Any, batch: torch.Tensor) -> float:
    """A score near 0.02 in the widest gap there, where the last bits of no detection decide."""
    found = detector.detect(batch, score_threshold=0.015)
    scores = torch.cat([one.scores for one in found]).sort().values
    near = scores[scores < 0.04]
    if len(near) < 2:
        return 0.02
    widest = int(near.diff().argmax())
    return float(near[widest : widest + 2].mean())


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("maskrcnn_resnet50_fpn", "onnx"),
        ("fasterrcnn_mobilenet_v2", "onnx"),
        ("fasterrcnn_mobilenet_v2", "openvino"),
        ("retinanet_resnet50_fpn", "onnx"),
    ],
)
def test_a_float_file_detects_what_the_network_does(name: str, format: str, tmp_path: Path) -> None:
    detector = detector_of(name)
    path = export(detector, tmp_path / f"x{SUFFIXES[format]}", image_size=SIDE)
    opened = open_exported(path)
    batch = images(2)
    given = {"score_threshold": clear_threshold(detector, batch)}
    same(opened.detect(batch, **given), detector.detect(batch, **given), pixels=0.05)
    expected = {"maskrcnn_resnet50_fpn": {"heads", "masks"}, "fasterrcnn_mobilenet_v2": {"heads"}}
    parts = expected.get(name, set())
    assert set(opened.info.parts) == parts
    assert all((tmp_path / f"x.{part}{SUFFIXES[format]}").is_file() for part in parts)
    assert opened.has_masks == ("masks" in parts)
    if opened.has_masks:
        (found, _), (wanted, _) = (
            one.detect(batch, masks=True, **given) for one in (opened, detector)
        )
        assert found.masks is not None
        assert wanted.masks is not None
        # Two scores that are nearly equal may change places.
        others = wanted.labels[:, None] != found.labels
        order = (torch.cdist(wanted.boxes, found.boxes) + 1e3 * others).argmin(1)
        assert len(order.unique()) == len(found)
        assert (found.masks[order] - wanted.masks).abs().max() < 0.01


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "litert"])
def test_heads_are_computed_in_integers_as_well(runtime: str, tmp_path: Path) -> None:
    """Per part: what the file gives equals what the program gives, and layers are integers."""
    from support.counting import layers

    format = {"onnxruntime": "onnx"}.get(runtime, runtime)
    detector = fold(detector_of("fasterrcnn_mobilenet_v2"))
    policy = Policy(8, 8, 8, placement="qdq", runtime=runtime)
    student = insert_quantizers(detector.clone(), policy)
    calibrate(student, [images(2)], search="minmax")
    program = build(student, runtime, image_size=SIDE)
    heads = build(student, runtime, image_size=SIDE, dynamic=runtime != "litert", part="heads")
    info = describe_export(student, policy, format, runtime, SIDE, 1, None)
    path = write(program, info, tmp_path / f"x{SUFFIXES[format]}", parts={"heads": heads})[0]
    opened = open_exported(path, threads=1)
    assert layers(tmp_path / f"x.heads{SUFFIXES[format]}")[1] == 0
    generator = torch.Generator().manual_seed(0)
    pooled = torch.rand(3, *heads.shape, generator=generator)
    found = opened.parts["heads"].run(pooled.numpy())  # type: ignore[attr-defined]
    for name, value in found.items():
        single = [heads.module()(row[None]) for row in pooled] if runtime == "litert" else None
        index = list(heads.outputs).index(name)
        wanted = (
            torch.cat([one[index] for one in single]) if single else heads.module()(pooled)[index]
        )
        assert (torch.from_numpy(value) - wanted).abs().max() < 0.05 * wanted.std()
        assert len(wanted.unique()) > 100
    assert len(opened.detect(images(1), score_threshold=0.001)) == 1


def test_files_that_belong_together_are_missed(tmp_path: Path) -> None:
    path = export(detector_of("fasterrcnn_mobilenet_v2"), tmp_path / "x.onnx", image_size=SIDE)
    beside = tmp_path / "x.heads.onnx"
    with pytest.raises(UserError, match="is the part 'heads'"):
        open_exported(beside)
    other = beside.read_bytes()
    beside.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="is no part of"):
        open_exported(path)
    beside.unlink()
    with pytest.raises(UserError, match=r"belongs with .*x.heads.onnx"):
        open_exported(path)
    beside.write_bytes(other)
    assert open_exported(path).info.parts == ["heads"]
