"""YOLOv5 against published sizes, independent blocks, and slow references of its definitions."""

from __future__ import annotations

import copy
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from torch import Tensor, nn

from benchmarks.synthesis.ablation import Ablation
from benchmarks.synthesis.curve import Curve
from dfq.errors import UserError
from dfq.models.base import Targets
from dfq.models.checkpoint import read_checkpoint
from dfq.models.yolov5 import network as network
from dfq.models.yolov5.detector import YOLOv5
from dfq.models.yolov5.loss import yolov5_loss
from dfq.qat.losses import FeatureHooks, training_terms
from dfq.recipe import load_recipe

ANCHORS = [
    [10, 13, 16, 30, 33, 23],
    [30, 61, 62, 45, 59, 119],
    [116, 90, 156, 198, 373, 326],
]


def description(depth: float, width: float, classes: int) -> dict[str, Any]:
    """The architecture of YOLOv5 v6, for any depth and width."""
    down = [[-1, 1, "Conv", [64, 6, 2, 2]], [-1, 1, "Conv", [128, 3, 2]], [-1, 3, "C3", [128]]]
    for channels, repeats in ((256, 6), (512, 9), (1024, 3)):
        down += [[-1, 1, "Conv", [channels, 3, 2]], [-1, repeats, "C3", [channels]]]
    head: list[list[Any]] = []
    for channels, skip in ((512, 6), (256, 4)):
        head += [
            [-1, 1, "Conv", [channels, 1, 1]],
            [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
            [[-1, skip], 1, "Concat", [1]],
            [-1, 3, "C3", [channels, False]],
        ]
    for channels, skip in ((256, 14), (512, 10)):
        head += [
            [-1, 1, "Conv", [channels, 3, 2]],
            [[-1, skip], 1, "Concat", [1]],
            [-1, 3, "C3", [channels * 2, False]],
        ]
    head.append([[17, 20, 23], 1, "Detect", ["nc", "anchors"]])
    return {
        "nc": classes,
        "depth_multiple": depth,
        "width_multiple": width,
        "anchors": ANCHORS,
        "backbone": [*down, [-1, 1, "SPPF", [1024, 5]]],
        "head": head,
    }


@pytest.fixture
def tiny() -> YOLOv5:
    """A YOLOv5 of 3 categories with random weights whose detections are not all alike."""
    torch.manual_seed(0)
    detector = YOLOv5.from_yaml(description(0.33, 0.125, 3), names=["a", "b", "c"])
    for layer in detector.module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.fill_(1.5)
    return detector


def random_raw(
    classes: int = 3, side: int = 64, batch: int = 2, scale: float = 1.5
) -> list[Tensor]:
    return [
        scale * torch.randn(batch, 3, side // s, side // s, 5 + classes, dtype=torch.float32)
        for s in (8, 16, 32)
    ]


# ---- the network


def fused_parameters(module: nn.Module) -> int:
    """The published figures count networks whose BatchNorms (weight and bias) have become biases
    of the convolutions."""
    norms = sum(m.num_features for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    return sum(p.numel() for p in module.parameters()) - norms


@pytest.mark.parametrize(
    ("depth", "width", "parameters"),
    [
        (0.33, 0.25, 1_867_405),
        (0.33, 0.50, 7_225_885),
        (0.67, 0.75, 21_172_173),
        (1.00, 1.00, 46_533_693),
        (1.33, 1.25, 86_705_005),
    ],
)
def test_parameter_counts_are_the_published_ones(
    depth: float, width: float, parameters: int
) -> None:
    with torch.device("meta"):
        module = network.YOLOv5Network(description(depth, width, 80))
    assert fused_parameters(module) == parameters
    assert module.detect.strides == [8, 16, 32]


@pytest.mark.parametrize("name", ["Conv", "Focus", "Bottleneck", "C3", "SPP", "SPPF"])
def test_blocks_agree_with_an_independent_implementation(name: str) -> None:
    from ultralytics.nn import modules as reference

    torch.manual_seed(0)
    arguments: tuple[Any, ...] = (8, 16)
    if name == "Conv":
        arguments = (8, 16, 3, 2)
    if name == "C3":
        arguments = (8, 16, 2)
    if name == "Bottleneck":
        theirs = reference.Bottleneck(8, 8, True, 1, (1, 3)).eval()
        arguments = (8, 8)
    else:
        theirs = getattr(reference, name)(*arguments).eval()
    if name == "SPPF":
        theirs.cv1.act = nn.SiLU()  # later families leave it out
    ours = getattr(network, name)(*arguments, activation=nn.SiLU).eval()
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-3
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 12, 12)
    torch.testing.assert_close(ours(x), theirs(x))


def test_batchnorm_constants(tiny: YOLOv5) -> None:
    norms = [m for m in tiny.module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 57
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.03)}


def test_raw_shapes_gradients_and_levels(tiny: YOLOv5) -> None:
    images = torch.rand(2, 3, 64, 96, requires_grad=True)
    raw = tiny.raw(images)
    assert [tuple(r.shape) for r in raw] == [(2, 3, 8, 12, 8), (2, 3, 4, 6, 8), (2, 3, 2, 3, 8)]
    sum(r.square().mean() for r in raw).backward()
    assert images.grad is not None
    assert (images.grad != 0).float().mean() > 0.99
    assert all(p.grad is None for p in tiny.module.parameters())

    outputs: list[Tensor] = []
    for head in tiny.module.detect.m:
        head.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    levels = tiny.levels(tiny.raw(images))
    assert all(torch.equal(a, b) for a, b in zip(levels, outputs, strict=True))
    with pytest.raises(ValueError, match="multiples of 32"):
        tiny.raw(torch.rand(1, 3, 64, 40))


def test_layer_names(tiny: YOLOv5) -> None:
    modules = dict(tiny.module.named_modules())
    with_weights = [f"model.{i}" for i in range(25) if i not in (11, 12, 15, 16, 19, 22)]
    assert tiny.blocks() == with_weights
    assert tiny.feature_layers() == with_weights[:-1]
    boundary = tiny.boundary_layers()
    assert boundary.first == ("model.0.conv",)
    assert boundary.last == ("model.24.m.0", "model.24.m.1", "model.24.m.2")
    assert set(boundary.first + boundary.last) <= modules.keys()
    owned = {name for name, _ in tiny.module.named_parameters()}
    covered = {name for name in owned if name.startswith(tuple(f"{b}." for b in tiny.blocks()))}
    assert covered == owned


def test_twin_is_independent(tiny: YOLOv5) -> None:
    twin, images = tiny.clone(), torch.rand(1, 3, 64, 64)
    before = tiny.raw(images)[0]
    assert torch.equal(before, twin.raw(images)[0])
    next(twin.module.parameters()).data.add_(1)
    assert torch.equal(before, tiny.raw(images)[0])
    assert not torch.equal(before, twin.raw(images)[0])


def test_anchors_follow_the_device(tiny: YOLOv5) -> None:
    moved = tiny.clone().to("meta")
    raw = moved.raw(torch.rand(1, 3, 64, 64, device="meta"))
    assert moved.module.detect.anchors.device.type == "meta"
    boxes, scores = moved.outputs(raw, (64, 64)).values()
    assert boxes.device.type == scores.device.type == "meta"


def test_spec_rebuilds_the_architecture(tiny: YOLOv5) -> None:
    tiny.module.detect.anchors.mul_(1.1)
    spec = json.loads(json.dumps(tiny.spec()))
    assert spec["family"] == "yolov5"
    again = YOLOv5.from_spec(spec)
    assert torch.equal(again.module.detect.anchors, tiny.module.detect.anchors)
    again.module.load_state_dict(tiny.module.state_dict())
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(again.raw(images)[2], tiny.raw(images)[2])
    assert (again.names, again.stride, again.image_size) == (["a", "b", "c"], 32, 640)
    assert not again.module.training
    assert again.spec() == tiny.spec()


def test_four_levels() -> None:
    six = description(0.33, 0.125, 2)
    six["anchors"] = [[*row, *row] for row in ANCHORS]  # six anchors a level
    assert [r.shape[1] for r in YOLOv5.from_yaml(six).raw(torch.rand(1, 3, 64, 64))] == [6, 6, 6]
    four = description(0.33, 0.125, 2)
    four["anchors"] = [*ANCHORS, ANCHORS[0]]
    four["head"] = [
        *four["head"][:-1],
        [-1, 1, "Conv", [512, 3, 2]],
        [[17, 20, 23, 24], 1, "Detect", ["nc", "anchors"]],
    ]
    detector = YOLOv5.from_yaml(four)
    assert detector.stride == 64
    raw = detector.raw(torch.rand(1, 3, 128, 128))
    terms = detector.task_loss(raw, Targets(torch.tensor([[0, 1, 0.5, 0.5, 0.2, 0.2]])), (128, 128))
    assert all(torch.isfinite(term) for term in terms.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": [[-1, 1, "Transformer", [1]]]}, "layer 10 of this YOLOv5 is a Transformer"),
        ({"head": [[50, 1, "Conv", [8]]]}, "malformed"),
        ({"head": []}, "malformed"),
        ({"anchors": 3}, "malformed"),
        ({"backbone": None}, "malformed"),
        ({"width_multiple": "wide"}, "malformed"),
    ],
)
def test_bad_descriptions(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        YOLOv5.from_yaml({**description(0.33, 0.125, 3), **change})


# ---- the loss, against loops over its definition


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ciou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Complete IoU (arXiv 1911.08287, eq. 7 to 11) of two boxes (cx, cy, w, h)."""
    ax1, ay1, ax2, ay2 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx1, by1, bx2, by2 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    inter = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
    iou = inter / (a[2] * a[3] + b[2] * b[3] - inter)
    diagonal = (max(ax2, bx2) - min(ax1, bx1)) ** 2 + (max(ay2, by2) - min(ay1, by1)) ** 2
    distance = (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2
    v = 4 / math.pi**2 * (math.atan(b[2] / b[3]) - math.atan(a[2] / a[3])) ** 2
    alpha = v / (1 - iou + v + 1e-12)
    return iou - distance / diagonal - alpha * v


def bce(logit: float, target: float) -> float:
    return max(logit, 0) - logit * target + math.log1p(math.exp(-abs(logit)))


def slow_loss(
    raw: list[Tensor], targets: list[list[float]], anchors: Tensor, shape: tuple[int, int]
) -> dict[str, float]:
    """The definition, object by object and cell by cell."""
    box_sum = objectness_sum = class_sum = 0.0
    for level, (logits, balance) in enumerate(zip(raw, (4.0, 1.0, 0.4), strict=True)):
        n, count, height, width, outputs = logits.shape
        values = logits.double().tolist()
        wanted: dict[tuple[int, int, int, int], float] = {}
        boxes, classes = [], []
        for image, category, cx, cy, w, h in targets:
            gx, gy, gw, gh = cx * width, cy * height, w * width, h * height
            cells = [(int(gx), int(gy))]
            if gx % 1 < 0.5 and gx > 1:
                cells.append((int(gx) - 1, int(gy)))
            if gy % 1 < 0.5 and gy > 1:
                cells.append((int(gx), int(gy) - 1))
            if (width - gx) % 1 < 0.5 and width - gx > 1:
                cells.append((int(gx + 0.5), int(gy)))
            if (height - gy) % 1 < 0.5 and height - gy > 1:
                cells.append((int(gx), int(gy + 0.5)))
            for a in range(count):
                aw, ah = anchors[level, a].tolist()
                if max(gw / aw, aw / gw, gh / ah, ah / gh) >= 4:
                    continue
                for i, j in cells:
                    i, j = min(i, width - 1), min(j, height - 1)
                    p = values[int(image)][a][j][i]
                    predicted = (
                        2 * sigmoid(p[0]) - 0.5 + i,
                        2 * sigmoid(p[1]) - 0.5 + j,
                        (2 * sigmoid(p[2])) ** 2 * aw,
                        (2 * sigmoid(p[3])) ** 2 * ah,
                    )
                    overlap = ciou(predicted, (gx, gy, gw, gh))
                    boxes.append(1 - overlap)
                    key = (int(image), a, j, i)
                    wanted[key] = max(wanted.get(key, 0.0), overlap, 0.0)
                    classes += [
                        bce(p[5 + c], float(c == int(category))) for c in range(outputs - 5)
                    ]
        if boxes:
            box_sum += sum(boxes) / len(boxes)
            class_sum += sum(classes) / len(classes)
        terms = [
            bce(values[b][a][j][i][4], wanted.get((b, a, j, i), 0.0))
            for b in range(n)
            for a in range(count)
            for j in range(height)
            for i in range(width)
        ]
        objectness_sum += balance * sum(terms) / len(terms)
    categories = raw[0].shape[-1] - 5
    return {
        "box": 0.05 * box_sum,
        "objectness": objectness_sum * shape[0] * shape[1] / 640**2,
        "class": 0.5 * categories / 80 * class_sum,
    }


def stride_anchors() -> Tensor:
    return torch.tensor(ANCHORS).view(3, 3, 2) / torch.tensor([8.0, 16.0, 32.0]).view(3, 1, 1)


@pytest.mark.parametrize("seed", range(5))
def test_loss_equals_the_slow_definition(seed: int) -> None:
    torch.manual_seed(seed)
    raw = random_raw()
    m = 12
    rows = torch.rand(m, 6)
    rows[:, 0] = torch.randint(0, 2, (m,))
    rows[:, 1] = torch.randint(0, 3, (m,))
    rows[:, 4:] = rows[:, 4:] * 0.8 + 0.05
    special = torch.tensor(
        [
            [0.0, 1, 1.0, 1.0, 0.4, 0.4],  # centre on the far corner of the image
            [0.0, 2, 0.0, 0.0, 0.4, 0.4],
            [1.0, 0, 0.5, 0.5, 0.5, 0.5],  # centre on a cell's corner
            [1.0, 2, 0.5, 0.5, 0.45, 0.55],  # two objects for one prediction
            [1.0, 2, 0.3, 0.3, 0.001, 0.001],  # fits no anchor
        ]
    )
    targets = torch.cat([rows, special])
    ours = yolov5_loss(raw, targets, stride_anchors(), (64, 64))
    slow = slow_loss(raw, targets.tolist(), stride_anchors(), (64, 64))
    assert ours.keys() == slow.keys()
    for name, value in slow.items():
        assert float(ours[name]) == pytest.approx(value, rel=2e-5), name


def test_loss_of_one_object_by_hand() -> None:
    # All logits zero: each prediction is its anchor, centred in its cell. The object is 116 x 90,
    # centred in the first cell of the last level: anchor 0 there fits it exactly (CIoU 1).
    raw = [torch.zeros(1, 1, 160 // s, 160 // s, 7) for s in (8, 16, 32)]
    anchors = torch.tensor([[[1.0, 1.0]], [[1.0, 1.0]], [[116 / 32, 90 / 32]]])  # the others: no
    target = torch.tensor([[0, 1, 16.0 / 160, 16.0 / 160, 116 / 160, 90 / 160]])
    terms = yolov5_loss(raw, target, anchors, (160, 160))
    assert float(terms["box"]) == pytest.approx(0, abs=1e-6)
    # One level has objects: 0.5 (gain) * 2 / 80 (categories) * log 2.
    assert float(terms["class"]) == pytest.approx(0.5 * 2 / 80 * math.log(2), rel=1e-5)
    # Every objectness logit is zero, so each costs log 2 whatever is wanted of it.
    expected = (4.0 + 1.0 + 0.4) * math.log(2) * 160**2 / 640**2
    assert float(terms["objectness"]) == pytest.approx(expected, rel=1e-5)


def test_loss_is_a_mean_over_the_batch() -> None:
    torch.manual_seed(0)
    raw = random_raw(batch=1)
    target = torch.tensor([[0, 1, 0.4, 0.6, 0.5, 0.5]])
    twice = torch.cat([target, target + torch.tensor([1.0, 0, 0, 0, 0, 0])])
    once = yolov5_loss(raw, target, stride_anchors(), (64, 64))
    both = yolov5_loss([r.repeat(2, 1, 1, 1, 1) for r in raw], twice, stride_anchors(), (64, 64))
    for name in once:
        torch.testing.assert_close(once[name], both[name])


def test_the_papers_task_terms_are_scaled_by_its_batches(tiny: YOLOv5) -> None:
    # Its public code multiplies the mean over a batch of n images by n, and that by 0.04 in
    # training (batches of 32) and by 0.5 in synthesis (of 64, or of as many as a set has).
    recipe = load_recipe("paper-yolov5")
    torch.manual_seed(0)
    images, rows = torch.rand(32, 3, 64, 64), torch.rand(32, 6) * 0.5 + 0.25
    rows[:, 0], rows[:, 1] = torch.arange(32), torch.arange(32) % 3
    settings = recipe.distillation.model_copy(deep=True)
    settings.weights.kl = settings.weights.feature = 0.0
    teacher = tiny.clone()
    taps = [FeatureHooks(one.module, []) for one in (tiny, teacher)]
    terms = training_terms(tiny, teacher, images, Targets(rows), settings, *taps)
    raw = tiny.raw(images)
    mean = sum(slow_loss(raw, rows.tolist(), stride_anchors(), (64, 64)).values())
    assert float(terms["task"]) == pytest.approx(0.04 * 32 * mean, rel=1e-4)

    assert recipe.synthesis.batch_size == 64
    assert recipe.synthesis.weights.task == 0.5 * 64
    made = Curve(Ablation("", "", Path(), []), 320, 32).recipe("paper", 0.25, 0).synthesis
    assert (made.batch_size, made.weights.task, made.iterations) == (32, 0.5 * 32, 625)
    ours = Curve(Ablation("", "", Path(), []), 320, 16).recipe("ours", 1, 0).synthesis
    assert ours.weights.task == load_recipe("w4a8").synthesis.weights.task


def test_loss_without_targets_and_with_one_category(tiny: YOLOv5) -> None:
    raw = [r.requires_grad_() for r in random_raw()]
    terms = tiny.task_loss(raw, Targets.empty(), (64, 64))
    assert terms["box"] == 0
    assert terms["class"] == 0
    assert terms["objectness"] > 0
    sum(terms.values()).backward()
    assert all(torch.isfinite(r.grad).all() for r in raw if r.grad is not None)
    one = [r.requires_grad_() for r in random_raw(classes=1)]
    target = torch.tensor([[0, 0, 0.4, 0.6, 0.5, 0.5]])
    terms = yolov5_loss(one, target, stride_anchors(), (64, 64))
    assert terms["class"] == 0
    assert terms["box"] > 0


def test_loss_has_finite_gradients_where_sigmoids_vanish(tiny: YOLOv5) -> None:
    raw = [torch.full_like(r, -200.0).requires_grad_() for r in random_raw()]
    target = Targets(torch.tensor([[0, 1, 0.4, 0.6, 0.5, 0.5]]))
    sum(tiny.task_loss(raw, target, (64, 64)).values()).backward()
    assert all(r.grad is not None and torch.isfinite(r.grad).all() for r in raw)


def test_loss_reaches_the_images(tiny: YOLOv5) -> None:
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    target = Targets(torch.tensor([[0, 1, 0.4, 0.6, 0.5, 0.5]]))
    sum(tiny.task_loss(tiny.raw(images), target, (64, 64)).values()).backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


# ---- decoding, against loops


def iou(a: list[float], b: list[float]) -> float:
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return inter / (areas[0] + areas[1] - inter)


def slow_decode(
    raw: list[Tensor], image: int, threshold: float, overlap: float, most: int
) -> list[tuple[float, int, list[float]]]:
    found = []
    for level, stride in enumerate((8, 16, 32)):
        values = raw[level][image].double().tolist()
        for a, rows in enumerate(values):
            for j, row in enumerate(rows):
                for i, p in enumerate(row):
                    cx = (2 * sigmoid(p[0]) - 0.5 + i) * stride
                    cy = (2 * sigmoid(p[1]) - 0.5 + j) * stride
                    w = (2 * sigmoid(p[2])) ** 2 * ANCHORS[level][2 * a]
                    h = (2 * sigmoid(p[3])) ** 2 * ANCHORS[level][2 * a + 1]
                    box = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                    for c, logit in enumerate(p[5:]):
                        score = sigmoid(p[4]) * sigmoid(logit)
                        if score > threshold:
                            found.append((score, c, box))
    found.sort(key=lambda item: -item[0])
    kept: list[tuple[float, int, list[float]]] = []
    for item in found:
        if all(item[1] != k[1] or iou(item[2], k[2]) <= overlap for k in kept):
            kept.append(item)
    return kept[:most]


@pytest.mark.parametrize(("threshold", "overlap", "most"), [(0.001, 0.6, 300), (0.3, 0.4, 20)])
def test_decode_equals_the_slow_definition(
    tiny: YOLOv5, threshold: float, overlap: float, most: int
) -> None:
    torch.manual_seed(3)
    raw = random_raw()
    found = tiny.decode(
        raw, (64, 64), score_threshold=threshold, iou_threshold=overlap, max_detections=most
    )
    assert len(found) == 2
    for image, detections in enumerate(found):
        slow = slow_decode(raw, image, threshold, overlap, most)
        assert len(detections) == len(slow) > 10
        torch.testing.assert_close(detections.scores, torch.tensor([s for s, _, _ in slow]))
        assert detections.labels.tolist() == [c for _, c, _ in slow]
        boxes = torch.tensor([box for _, _, box in slow])
        torch.testing.assert_close(detections.boxes, boxes, rtol=1e-4, atol=1e-3)


def test_decode_of_nothing(tiny: YOLOv5) -> None:
    raw = [torch.full_like(r, -20.0) for r in random_raw()]
    assert [len(d) for d in tiny.decode(raw, (64, 64))] == [0, 0]


def test_distillation_pairs(tiny: YOLOv5) -> None:
    torch.manual_seed(0)
    student, teacher = random_raw(), random_raw()
    pairs = tiny.distillation_pairs(student, teacher)
    assert [(p.name, p.kind) for p in pairs] == 3 * [
        ("class", "bernoulli"),
        ("objectness", "bernoulli"),
        ("box", "value"),
    ]
    for level in range(3):
        classes, objectness, box = pairs[3 * level : 3 * level + 3]
        assert torch.equal(classes.student, student[level][..., 5:])
        assert torch.equal(objectness.teacher, teacher[level][..., 4:5])
        torch.testing.assert_close(box.teacher, 1 / (1 + torch.exp(-teacher[level][..., :4])))
        torch.testing.assert_close(box.student, 1 / (1 + torch.exp(-student[level][..., :4])))
        assert classes.weight is not None
        expected = 1 / (1 + torch.exp(-teacher[level][..., 4:5]))
        torch.testing.assert_close(classes.weight, expected)
        assert (classes.weight * classes.student).shape == classes.student.shape


# ---- checkpoints


@pytest.fixture
def write(tmp_path: Path, tiny: YOLOv5, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write `tiny` as the original repository would, under its module names."""
    common, yolo = types.ModuleType("models.common"), types.ModuleType("models.yolo")
    places = {"Detect": yolo, "YOLOv5Network": yolo}
    for name in ("Conv", "Bottleneck", "C3", "SPPF", "Concat", "Detect", "YOLOv5Network"):
        place = places.get(name, common)
        kind = getattr(network, name)
        setattr(place, name, kind)
        monkeypatch.setattr(kind, "__module__", place.__name__)
    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.common", common)
    monkeypatch.setitem(sys.modules, "models.yolo", yolo)

    def write_checkpoint(change: Any = None, **extra: Any) -> Path:
        model: Any = copy.deepcopy(tiny.module)
        model.yaml = description(0.33, 0.125, 3)
        model.names = {0: "a", 1: "b", 2: "c"}
        model.detect.stride = torch.tensor([8.0, 16.0, 32.0])
        model.detect.register_buffer("anchor_grid", torch.zeros(3, 1, 3, 1, 1, 2))
        if change:
            change(model)
        path = tmp_path / "x.pt"
        torch.save({"ema": None, "model": model.half(), **extra}, path)
        return path

    return write_checkpoint


@pytest.mark.parametrize("trust", [False, True])
def test_checkpoint_round_trip(write: Any, tiny: YOLOv5, trust: bool) -> None:
    def autoanchor(model: Any) -> None:
        model.detect.anchors.mul_(1.5)
        model.model[0].bn.eps = 2e-3

    checkpoint = read_checkpoint(write(autoanchor, opt={"imgsz": 416}), trust=trust)
    assert YOLOv5.matches(checkpoint)
    read = YOLOv5.from_checkpoint(checkpoint)
    assert (read.names, read.stride, read.image_size) == (["a", "b", "c"], 32, 416)
    assert read.fingerprint == checkpoint.sha256
    expected = tiny.module.state_dict()
    for name, tensor in read.module.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        if name.endswith("anchors"):
            torch.testing.assert_close(tensor, 1.5 * expected[name], rtol=1e-3, atol=0)
        else:
            torch.testing.assert_close(tensor, expected[name].half().to(tensor.dtype))
    assert read.module.get_submodule("model.0.bn").eps == 2e-3
    assert not any(p.requires_grad for p in read.module.parameters())
    json.dumps(read.spec())


def test_activation_is_the_checkpoints(write: Any) -> None:
    def relu(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "act"):
                module.act = nn.ReLU()

    read = YOLOv5.from_checkpoint(read_checkpoint(write(relu)))
    assert isinstance(read.module.get_submodule("model.0.act"), nn.ReLU)
    again = YOLOv5.from_spec(read.spec())
    assert isinstance(again.module.get_submodule("model.0.act"), nn.ReLU)


def test_an_activation_without_arguments_has_the_originals(tiny: YOLOv5) -> None:
    """As descriptions were written before they held arguments."""
    spec = {**tiny.spec(), "activation": "LeakyReLU"}
    act = YOLOv5.from_spec(spec).module.get_submodule("model.0.act")
    assert isinstance(act, nn.LeakyReLU)
    assert act.negative_slope == 0.1
    hard = YOLOv5.from_yaml(description(0.33, 0.125, 3), activation="Hardswish")
    assert isinstance(hard.module.get_submodule("model.0.act"), nn.Hardswish)


def test_checkpoints_that_are_refused(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "bn"):
                del module.bn

    def other_width(model: Any) -> None:
        model.yaml["width_multiple"] = 0.25

    def other_activation(model: Any) -> None:
        model.model[0].act = nn.Tanh()

    def no_yaml(model: Any) -> None:
        del model.yaml

    def no_names(model: Any) -> None:
        model.names = None

    for change, message in (
        (fused, "fused"),
        (other_width, r"do not fit .*model\.0\.conv\.weight"),
        (other_activation, "activations SiLU, Tanh"),
        (no_yaml, "architecture"),
        (no_names, "category names"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            YOLOv5.from_checkpoint(read_checkpoint(write(change)))
        assert "\n" not in str(caught.value)
        assert "x.pt" in str(caught.value)

    for kind, message in (("Segment", "segmentation"), ("Classify", "classification")):
        head = type(kind, (nn.Module,), {"__module__": "models.yolo"})
        monkeypatch.setattr(sys.modules["models.yolo"], kind, head, raising=False)

        def replace(model: Any, head: Any = head) -> None:
            model.model[-1] = head()
            model.model[-1].detect = network.Detect.forward  # as the original's Segment does

        def prepared(model: Any, replace: Any = replace) -> None:
            replace(model)

        monkeypatch.setattr(network.YOLOv5Network, "detect", property(lambda self: self.model[-1]))
        with pytest.raises(UserError, match=message):
            YOLOv5.from_checkpoint(read_checkpoint(write(prepared)))


def test_the_real_network_finds_what_is_in_a_photograph(kit: Path, yolov5n: Path) -> None:
    checkpoint = read_checkpoint(yolov5n)
    detector = YOLOv5.from_checkpoint(checkpoint)
    assert detector.num_classes == 80
    assert detector.names[0] == "person"
    assert fused_parameters(detector.module) == 1_867_405
    annotations = json.loads((kit / "coco-val" / "annotations.json").read_text())
    names = {c["id"]: c["name"] for c in annotations["categories"]}
    large = found = 0
    for info in sorted(annotations["images"], key=lambda i: i["id"])[:16]:
        pixels = cv2.imread(str(kit / "coco-val" / "images" / info["file_name"]))
        height, width = pixels.shape[:2]
        image = torch.full((1, 3, 640, 640), 114 / 255)
        rgb = torch.from_numpy(pixels[:, :, ::-1].copy()).permute(2, 0, 1) / 255
        image[0, :, :height, :width] = rgb
        (detections,) = detector.detect(image, score_threshold=0.25)
        for a in annotations["annotations"]:
            if a["image_id"] != info["id"] or a["iscrowd"] or min(a["bbox"][2:]) < 96:
                continue
            x, y, w, h = a["bbox"]
            large += 1
            found += any(
                detector.names[int(label)] == names[a["category_id"]]
                and iou(box.tolist(), [x, y, x + w, y + h]) > 0.5
                for box, label in zip(detections.boxes, detections.labels, strict=True)
            )
    assert large >= 10
    assert found / large > 0.5
