"""The torchvision adapters against torchvision itself."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reconstructed import check_grids_move
from torch import Tensor, nn
from torchvision.models import detection as zoo
from torchvision.models.detection.retinanet import RetinaNet_ResNet50_FPN_Weights
from torchvision.ops import FrozenBatchNorm2d, box_iou

from dfq.errors import UserError
from dfq.graph.fold_batchnorm import fold
from dfq.models import Targets, load_detector, save_detector
from dfq.models.base import Detector
from dfq.models.torchvision.base import from_name
from dfq.models.torchvision.networks import (
    COCO_CLASSES,
    MODELS,
    coco_names,
    letterbox_side,
    released_epsilon,
)
from dfq.models.torchvision.rcnn import TorchvisionRCNN
from dfq.models.two_stage import ellipse_masks, pixel_boxes
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.inspection import list_layers
from dfq.quantization.output_quantizers import count_adds_and_concats, output_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.traversal import quantized_layers
from dfq.synthesis.inversion import Inversion
from dfq.synthesis.settings import Synthesis

# Whole networks of many kinds.
pytestmark = pytest.mark.e2e

SIDE = 64
FEW: dict[str, Any] = {
    "min_size": SIDE,
    "max_size": SIDE,
    "rpn_post_nms_top_n_test": 40,
    "rpn_post_nms_top_n_train": 40,
    "box_batch_size_per_image": 16,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "fasterrcnn_mobilenet_v2": {**FEW, "width": 0.35, "representation": 64, "anchors": (16, 32)},
    "maskrcnn_resnet50_fpn": FEW,
    "fasterrcnn_resnet50_fpn_v2": FEW,
    "retinanet_resnet50_fpn": {"min_size": SIDE, "max_size": SIDE},
}
RCNNS = ["fasterrcnn_mobilenet_v2", "maskrcnn_resnet50_fpn"]


@functools.cache
def _outspoken(name: str) -> Detector:
    """Statistics and heads as training might leave them: fresh heads score all places alike."""
    detector = from_name(name, options=OPTIONS[name])
    generator = torch.Generator().manual_seed(1)
    norms = [m for m in detector.module.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        detector.module.backbone(torch.randn(4, 3, SIDE, SIDE, generator=generator))
    for norm in norms:
        norm.eval()
    for last in detector.boundary_layers().last:
        layer = detector.module.get_submodule(last)
        spread = 0.05 if "bbox" in last else 0.3
        layer.weight.data.normal_(0, spread, generator=generator)
        layer.bias.data.normal_(0, 0.2 if "bbox" in last else 1.0, generator=generator)
    if name.startswith("retinanet"):
        # Of the background: training keeps it low, and torchvision relies on it.
        layer = detector.module.head.classification_head.cls_logits
        layer.weight.data[::COCO_CLASSES] = 0
        layer.bias.data[::COCO_CLASSES] = -50
    return detector


@pytest.mark.parametrize("name", [*RCNNS, "retinanet_resnet50_fpn"])
def test_detections_are_torchvisions_own(name: str, images: Tensor) -> None:
    detector = _outspoken(name)
    module = detector.module
    owner = module.roi_heads if name in RCNNS else module
    thresholds = owner.score_thresh, owner.nms_thresh, owner.detections_per_img
    found = detector.detect(
        images,
        score_threshold=thresholds[0],
        iou_threshold=thresholds[1],
        max_detections=thresholds[2],
        masks=True,
    )
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        # It would lay masks over the image; boxes are in its pixels already.
        patch.setattr(module.transform, "postprocess", lambda result, *_: result)
        expected = module([*images])
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other["boxes"]) > 0
        torch.testing.assert_close(one.boxes, other["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one.scores, other["scores"], rtol=1e-4, atol=1e-5)
        assert torch.equal(one.labels + 1, other["labels"])
        assert (one.masks is not None) == ("masks" in other)
        if one.masks is not None:
            torch.testing.assert_close(one.masks, other["masks"][:, 0], rtol=1e-4, atol=1e-5)
    # What was asked for once is not kept.
    assert thresholds == (owner.score_thresh, owner.nms_thresh, owner.detections_per_img)
    fewer = detector.detect(images, score_threshold=0.0, max_detections=3)
    assert [len(one) for one in fewer] == [3, 3]


@pytest.mark.parametrize("name", [*RCNNS, "retinanet_resnet50_fpn"])
def test_losses_are_torchvisions_own(name: str, images: Tensor, targets: Targets) -> None:
    detector = _outspoken(name).clone()
    ours = detector.task_loss(detector.raw(images), targets, (SIDE, SIDE))
    labelled = []
    for labels, boxes in pixel_boxes(targets, 2, (SIDE, SIDE), images.device):
        masks = ellipse_masks(boxes, (SIDE, SIDE)).to(torch.uint8)
        labelled.append({"labels": labels + 1, "boxes": boxes, "masks": masks})
    detector.module.train()
    for layer in detector.module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    # Theirs draws a size first, also where there is one only.
    detector.module.transform.torch_choice = lambda sizes: sizes[0]
    torch.manual_seed(0)
    theirs = detector.module([*images], labelled)
    names = {
        "objectness": "loss_objectness",
        "proposal": "loss_rpn_box_reg",
        "class": "loss_classifier" if name in RCNNS else "classification",
        "box": "loss_box_reg" if name in RCNNS else "bbox_regression",
        "mask": "loss_mask",
    }
    assert len(ours) == len(theirs)
    for key, value in ours.items():
        assert value > 0
        torch.testing.assert_close(value, theirs[names[key]], rtol=1e-4, atol=1e-5)


def test_losses_repeat_and_leave_the_generator_alone(images: Tensor, targets: Targets) -> None:
    detector = _outspoken("fasterrcnn_mobilenet_v2")
    raw = detector.raw(images)
    state = torch.random.get_rng_state()
    first = detector.task_loss(raw, targets, (SIDE, SIDE))
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(5)
    second = detector.task_loss(raw, targets, (SIDE, SIDE))
    assert all(torch.equal(first[key], second[key]) for key in first)
    with torch.no_grad():
        unlabelled = detector.task_loss(detector.raw(images), Targets.empty(), (SIDE, SIDE))
    assert unlabelled["box"] == 0
    assert unlabelled["class"] > 0


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_gradients_reach_the_images(name: str, images: Tensor, targets: Targets) -> None:
    detector = _outspoken(name)
    images.requires_grad_()
    losses = detector.task_loss(detector.raw(images), targets, (SIDE, SIDE))
    for key, value in losses.items():
        (gradient,) = torch.autograd.grad(value, images, retain_graph=True)
        assert float(gradient.abs().max()) > 0, key
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", RCNNS)
def test_student_and_teacher_are_compared_on_the_teachers_proposals(
    name: str, images: Tensor
) -> None:
    teacher = _outspoken(name)
    student = teacher.clone()
    assert isinstance(student, TorchvisionRCNN)
    with torch.no_grad():
        student.module.rpn.head.cls_logits.weight.mul_(-1)
        student.module.roi_heads.box_predictor.cls_score.weight.mul_(0.5)
        theirs = teacher.raw(images)
        own = student.raw(images)
    ours = student.raw(images)
    assert ours.second is None
    assert not torch.equal(own.second.proposals[0], theirs.second.proposals[0])
    pairs = {pair.name: pair for pair in student.distillation_pairs(ours, theirs)}
    assert ("mask" in pairs) == teacher.has_masks
    proposals = theirs.second.proposals
    assert torch.equal(pairs["class"].teacher, theirs.second.classes)
    with torch.no_grad():
        expected, _ = student._classify(own.features, proposals, (SIDE, SIDE))
    torch.testing.assert_close(pairs["class"].student.detach(), expected)
    # Of the offsets, the likeliest class's, counted by how likely it is an object at all.
    chance = theirs.second.classes.softmax(1)
    likeliest = chance[:, 1:].argmax(1) + 1
    rows = theirs.second.boxes.view(len(chance), -1, 4)
    assert torch.equal(pairs["box"].teacher, rows[torch.arange(len(rows)), likeliest])
    torch.testing.assert_close(pairs["box"].weight[:, 0], 1 - chance[:, 0])
    itself = teacher.distillation_pairs(theirs, theirs)
    assert all(torch.allclose(pair.student, pair.teacher, atol=1e-5) for pair in itself)


@pytest.mark.parametrize("name", RCNNS)
def test_a_student_can_follow_the_teachers_proposals(name: str, images: Tensor) -> None:
    teacher = _outspoken(name)
    student = teacher.clone()
    generator = torch.Generator().manual_seed(5)
    for parameter in student.module.parameters():
        parameter.data += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    other = images.clone()
    with torch.no_grad():
        expected, own = teacher.raw(images).second.proposals, student.raw(images).second.proposals
        assert any(
            x.shape != y.shape or not torch.equal(x, y) for x, y in zip(expected, own, strict=True)
        )
        with student.shared_proposals(teacher, [images]):
            led = student.raw(images).second
            assert all(map(torch.equal, led.proposals, expected))
            # Its own features and weights classify them.
            assert not torch.equal(led.classes, teacher.raw(images).second.classes)
            assert all(map(torch.equal, student.raw(other).second.proposals, own))
        assert all(map(torch.equal, student.raw(images).second.proposals, own))


def test_mask_targets(images: Tensor, targets: Targets) -> None:
    detector = _outspoken("maskrcnn_resnet50_fpn").clone()
    assert isinstance(detector, TorchvisionRCNN)
    raw = detector.raw(images)
    ellipse = detector.task_loss(raw, targets, (SIDE, SIDE))
    detector.mask_targets = "own"
    own = detector.task_loss(raw, targets, (SIDE, SIDE))
    detector.mask_targets = "none"
    boxes_only = detector.task_loss(raw, targets, (SIDE, SIDE))
    assert set(ellipse) - set(boxes_only) == {"mask"}
    # The network agrees better with itself than with an ellipse.
    assert own["mask"] < ellipse["mask"]
    assert all(torch.equal(ellipse[key], boxes_only[key]) for key in boxes_only)


def test_ellipses_fill_their_boxes() -> None:
    boxes = torch.tensor([[10.0, 20.0, 50.0, 40.0], [0.0, 0.0, 64.0, 64.0]])
    masks = ellipse_masks(boxes, (64, 64))
    assert masks.shape == (2, 64, 64)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        extent = torch.tensor(
            [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        ).float()
        assert float(box_iou(extent[None], box[None])) > 0.9
        area = float((box[2] - box[0]) * (box[3] - box[1]))
        assert float(mask.sum()) == pytest.approx(area * torch.pi / 4, rel=0.02)


@pytest.mark.parametrize("name", [*RCNNS, "fasterrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn"])
def test_every_layer_can_be_folded_and_quantized(name: str, images: Tensor) -> None:
    detector = _outspoken(name)
    folded = fold(detector.clone())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.module.modules())
    with torch.no_grad():
        pairs = zip(
            detector.levels(detector.raw(images)), folded.levels(folded.raw(images)), strict=True
        )
        for before, after in pairs:
            torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)
    student = insert_quantizers(folded, Policy(weight_bits=8))
    calibrate(student, [images], search="minmax")
    wanted = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in detector.module.modules())
    layers = list(quantized_layers(student.module))
    assert len(layers) == wanted
    assert all(bool(layer.input_quantizer.initialised) for _, layer in layers)
    edge = student.boundary_layers()
    assert {*edge.first, *edge.last} <= {name for name, _ in layers}
    for part in (*student.feature_layers(), *student.blocks()):
        student.module.get_submodule(part)


@pytest.mark.parametrize(
    ("name", "joins"),
    # Blocks with a residual sum (MobileNetV2's only where the widths agree), steps of the pyramid.
    [
        ("fasterrcnn_mobilenet_v2", 10),
        ("maskrcnn_resnet50_fpn", 3 + 4 + 6 + 3 + 3),
        ("retinanet_resnet50_fpn", 3 + 4 + 6 + 3 + 2),
    ],
)
def test_all_sums_are_found_and_can_be_trained(name: str, joins: int, images: Tensor) -> None:
    student = fold(_outspoken(name).clone())
    assert count_adds_and_concats(student) == (0, joins)
    insert_quantizers(student, Policy(8, 8, placement="everywhere"))
    assert count_adds_and_concats(student) == (joins, joins)
    calibrate(student, [images], search="minmax")
    added = dict(output_quantizers(student.module))
    assert all(bool(quantizer.initialised) for quantizer in added.values())
    student.module.requires_grad_(True)
    raw = student.raw(images)
    torch.stack([level.square().mean() for level in student.levels(raw)]).sum().backward()
    for part, quantizer in added.items():
        # The second stage waits for the labels.
        if not part.startswith("roi_heads"):
            assert quantizer.log_scale.grad is not None, part


def test_grids_of_activations_can_be_refined(images: Tensor) -> None:
    narrow = (("rpn.*", 5), ("roi_heads.box_head.*", 5))
    folded = fold(_outspoken("fasterrcnn_mobilenet_v2").clone())
    check_grids_move(folded, Policy(8, 8, overrides=narrow), images)


def test_proposals_count_in_the_macs() -> None:
    detector = _outspoken("fasterrcnn_mobilenet_v2")
    rows = {row.name: row for row in list_layers(detector, SIDE)}
    with torch.no_grad():
        raw = detector.raw(torch.zeros(1, 3, SIDE, SIDE))
    layer = detector.module.roi_heads.box_head.fc7
    count = len(raw.second.proposals[0])
    assert count > 1
    assert rows["roi_heads.box_head.fc7"].macs == count * layer.weight.numel()


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v2"])
def test_synthesis_repeats_bit_for_bit(name: str) -> None:
    # The second has BatchNorm in its second stage, which runs for the labels only.
    stage = {"image_size": SIDE, "iterations": 2, "updates": 1}
    settings = Synthesis(image_size=SIDE, iterations=2, label_stage=stage)
    made = [Inversion(_outspoken(name), settings).batch(2, 0, 0) for _ in range(2)]
    assert torch.equal(made[0].images, made[1].images)
    assert all(torch.equal(a, b) for a, b in zip(made[0].labels, made[1].labels, strict=True))
    fresh = (torch.rand(2, 3, SIDE, SIDE) * 255).to(torch.uint8)
    assert not torch.equal(made[0].images, fresh)


def _frozen(module: nn.Module) -> nn.Module:
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(layer.num_features, eps=layer.eps)
            frozen.load_state_dict(layer.state_dict(), strict=False)
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, frozen)
    return module


def test_checkpoints_with_frozen_batchnorm(tmp_path: Path, images: Tensor) -> None:
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    network = zoo.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=4
    )
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    network = _frozen(network).eval()
    path = tmp_path / "frozen.pth"
    names = ["cat", "dog", "owl"]
    torch.save({"model": network.state_dict(), "names": names, "epoch": 3}, path)
    detector = load_detector(f"torchvision/{name}@{path}")
    assert detector.names == names
    assert detector.image_size % 32 == 0
    with torch.no_grad():
        expected = network.rpn.head([*network.backbone(detector.normalize(images)).values()])
        found = detector.raw(images)
    for one, other in zip(found.objectness, expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    folded = fold(detector.clone())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.module.modules())
    statistics = Inversion(detector, Synthesis()).statistics
    assert statistics is not None
    count = sum(isinstance(m, FrozenBatchNorm2d) for m in network.modules())
    assert len(statistics.layers) == count > 0


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v2", "retinanet_resnet50_fpn"])
def test_a_saved_detector_is_the_same_detector(name: str, tmp_path: Path, images: Tensor) -> None:
    detector = _outspoken(name)
    path = tmp_path / "saved.safetensors"
    save_detector(detector, path)
    again = load_detector(path)
    assert (
        (again.names, again.image_size)
        == (detector.names, detector.image_size)
        == (
            coco_names(),
            SIDE,
        )
    )
    for one, other in zip(again.detect(images), detector.detect(images), strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.scores, other.scores)


def test_the_pixels_are_normalised_as_torchvision_does(images: Tensor) -> None:
    detector = _outspoken("fasterrcnn_mobilenet_v2")
    expected = detector.module.transform([*images])[0].tensors
    torch.testing.assert_close(detector.normalize(images), expected)


def test_sides() -> None:
    # 640 x 480 becomes 1067 x 800 in torchvision's hands.
    assert letterbox_side(800, 1333, 32) == 1056
    assert letterbox_side(320, 640, 32) == 416
    assert letterbox_side(800, 800, 32) == 800


def test_released_weights_have_their_constant() -> None:
    url = RetinaNet_ResNet50_FPN_Weights.COCO_V1.url
    digest = url.rpartition("-")[2].removesuffix(".pth")
    assert released_epsilon("retinanet_resnet50_fpn", digest + "0" * 56) == 0.0
    assert released_epsilon("retinanet_resnet50_fpn", "0" * 64) is None
    assert released_epsilon("fasterrcnn_mobilenet_v2", "0" * 64) is None


def test_coco_names_are_all_different() -> None:
    names = coco_names()
    assert len({*names}) == 90
    assert names[0] == "person"
    assert names[89] == "toothbrush"
    assert len(MODELS) == 9


def test_mistakes_get_one_line(tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    torch.save(
        zoo.retinanet_resnet50_fpn(weights_backbone=None, num_classes=3).state_dict(), weights
    )
    empty = tmp_path / "empty.pth"
    torch.save({"epoch": 3}, empty)
    wrong = {
        "torchvision/alexnet": "unknown; known are",
        f"torchvision/fasterrcnn_mobilenet_v2@{weights}": "no weights of torchvision's faster",
        f"torchvision/retinanet_resnet50_fpn_v2@{weights}": "does not fit the network",
        f"torchvision/retinanet_resnet50_fpn@{empty}": "holds no weights",
        f"torchvision/retinanet_resnet50_fpn@{tmp_path / 'none.pth'}": "no checkpoint",
        f"yolo11n.yaml@{weights}": "takes no separate checkpoint",
    }
    for name, reason in wrong.items():
        with pytest.raises(UserError, match=reason) as error:
            load_detector(name)
        assert "\n" not in str(error.value)
    assert len(load_detector(f"torchvision/retinanet_resnet50_fpn@{weights}").names) == 2
