"""The Ultralytics adapter against Ultralytics itself."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import ClassificationModel, DetectionModel, PoseModel, SegmentationModel
from ultralytics.utils.nms import non_max_suppression

from dfq.errors import UserError
from dfq.models import Targets, load_detector
from dfq.models.checkpoint import read_checkpoint
from dfq.models.ultralytics.detector import UltralyticsDetector
from dfq.models.ultralytics.resolve import build, checked_yaml, other_task, read_yaml

# Whole networks of many kinds.
pytestmark = pytest.mark.e2e

YAMLS = ["yolo11n", "yolov8n", "yolov9t", "yolov10n", "yolo12n", "yolo26n", "yolov5nu"]
TWO_BRANCHES = {"yolov10n", "yolo26n"}


@functools.cache
def _outspoken(name: str) -> UltralyticsDetector:
    detector = UltralyticsDetector.from_yaml(f"{name}.yaml")
    generator = torch.Generator().manual_seed(1)
    for layer in detector.module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    # A fresh head scores everything near zero and every place alike: nothing for NMS to choose.
    images = torch.rand(2, 3, 64, 96, generator=generator)
    for last in detector.boundary_layers().last:
        conv = detector.module.get_submodule(last)
        conv.bias.zero_()
        output = _outputs_of(detector, [last], images)[last]
        mean, std = output.mean((0, 2, 3)), output.std((0, 2, 3))
        conv.weight.data /= std.view(-1, 1, 1, 1)
        conv.bias.normal_(0, 1, generator=generator).sub_(mean / std)
    return detector


@pytest.fixture(params=YAMLS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def detector(name: str) -> UltralyticsDetector:
    return copy.deepcopy(_outspoken(name))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))


def _same_rows(found: Any, rows: Tensor) -> None:
    assert len(found) == len(rows) > 0
    torch.testing.assert_close(found.boxes, rows[:, :4], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.scores, rows[:, 4], rtol=1e-5, atol=1e-6)
    assert torch.equal(found.labels, rows[:, 5].long())


def test_raw_is_what_the_head_gives_in_training(
    name: str, detector: UltralyticsDetector, images: Tensor
) -> None:
    raw = detector.raw(images)
    head = detector.module.model[-1]
    head.training = True  # the head alone: BatchNorm inside it stays in eval mode
    expected = detector.module(images)
    assert (raw.one2one is not None) == (name in TWO_BRANCHES)
    pairs = [(raw.one2many, expected.get("one2many", expected))]
    if raw.one2one is not None:
        pairs.append((raw.one2one, expected["one2one"]))
    for branch, own in pairs:
        torch.testing.assert_close(branch.boxes, own["boxes"])
        torch.testing.assert_close(branch.scores, own["scores"])
        assert list(branch.shapes) == [tuple(feature.shape[2:]) for feature in own["feats"]]


@pytest.mark.parametrize("multi_label", [True, False])
def test_detect_equals_ultralytics_with_nms(
    detector: UltralyticsDetector, images: Tensor, multi_label: bool
) -> None:
    found = detector.detect(
        images,
        score_threshold=0.3,
        iou_threshold=0.5,
        max_detections=50,
        multi_label=multi_label,
    )
    with torch.no_grad():
        own = non_max_suppression(
            detector.module(images)[0], 0.3, 0.5, multi_label=multi_label, max_det=50
        )
    for mine, rows in zip(found, own, strict=True):
        _same_rows(mine, rows)
        assert torch.equal(mine.scores, mine.scores.sort(descending=True).values)


@pytest.mark.parametrize("name", sorted(TWO_BRANCHES))
def test_detect_equals_ultralytics_without_nms(
    detector: UltralyticsDetector, images: Tensor
) -> None:
    detector.nms_free = True
    found = detector.detect(images, score_threshold=0.2, max_detections=40)
    detector.module.end2end = True
    detector.module.model[-1].max_det = 40
    with torch.no_grad():
        own = non_max_suppression(detector.module(images)[0], 0.2, end2end=True)
    for mine, rows in zip(found, own, strict=True):
        _same_rows(mine, rows)


@pytest.mark.parametrize("name", ["yolo11n"])
def test_nms_free_needs_the_branch(detector: UltralyticsDetector) -> None:
    with pytest.raises(UserError, match="no one-to-one branch"):
        detector.nms_free = True


def test_task_loss_is_ultralytics_loss_over_the_batch(
    detector: UltralyticsDetector, images: Tensor, targets: Targets
) -> None:
    terms = detector.task_loss(detector.raw(images), targets, (64, 96))
    data = targets.data
    batch = {"batch_idx": data[:, 0], "cls": data[:, 1:2], "bboxes": data[:, 2:]}
    own, _ = detector.module.loss({**batch, "img": images})
    torch.testing.assert_close(torch.stack(list(terms.values())), own / len(images))
    assert list(terms) == ["box", "class", "dfl"]
    assert all(term > 0 for term in terms.values())


def test_task_loss_does_not_mind_the_order_of_targets(
    detector: UltralyticsDetector, images: Tensor, targets: Targets
) -> None:
    raw = detector.raw(images)
    ordered = detector.task_loss(raw, targets, (64, 96))
    mixed = detector.task_loss(raw, Targets(targets.data[[2, 0, 1]]), (64, 96))
    for term in ordered:
        torch.testing.assert_close(mixed[term], ordered[term])


def test_task_loss_without_objects(detector: UltralyticsDetector, images: Tensor) -> None:
    images.requires_grad_()
    terms = detector.task_loss(detector.raw(images), Targets.empty(), (64, 96))
    assert terms["box"] == 0
    assert terms["dfl"] == 0
    assert terms["class"] > 0
    sum(terms.values()).backward()
    assert torch.isfinite(images.grad).all()


def test_gradient_reaches_images_and_nothing_else_changes(
    detector: UltralyticsDetector, images: Tensor, targets: Targets
) -> None:
    before = {key: value.clone() for key, value in detector.module.state_dict().items()}
    images.requires_grad_()
    sum(detector.task_loss(detector.raw(images), targets, (64, 96)).values()).backward()
    assert images.grad is not None
    assert (images.grad.flatten(1).abs().amax(1) > 0).all()
    assert all(parameter.grad is None for parameter in detector.module.parameters())
    after = detector.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", sorted(TWO_BRANCHES))
def test_both_branches_teach_the_backbone(detector: UltralyticsDetector, images: Tensor) -> None:
    images.requires_grad_()
    detector.raw(images).one2one.scores.sum().backward()
    assert images.grad.abs().sum() > 0


def test_twin_is_independent(detector: UltralyticsDetector, images: Tensor) -> None:
    with torch.no_grad():
        before = detector.raw(images)
        twin = detector.clone()
        for parameter in twin.module.parameters():
            parameter.mul_(1.1)
        after, other = detector.raw(images), twin.raw(images)
    assert torch.equal(before.one2many.scores, after.one2many.scores)
    assert not torch.allclose(before.one2many.scores, other.one2many.scores)


def test_levels_hold_every_prediction_in_its_place(
    name: str, detector: UltralyticsDetector, images: Tensor
) -> None:
    raw = detector.raw(images)
    levels = detector.levels(raw)
    assert len(levels) == (6 if name in TWO_BRANCHES else 3)
    assert [tuple(level.shape[2:]) for level in levels[:3]] == [(8, 12), (4, 6), (2, 3)]
    channels = raw.one2many.boxes.shape[1]
    # Level 1 starts after the 8 x 12 points of level 0; its row 2, column 5 is 2 * 6 + 5 further.
    place = 8 * 12 + 2 * 6 + 5
    assert torch.equal(levels[1][:, :channels, 2, 5], raw.one2many.boxes[:, :, place])
    assert torch.equal(levels[1][:, channels:, 2, 5], raw.one2many.scores[:, :, place])


def test_distillation_pairs_are_distributions(
    name: str, detector: UltralyticsDetector, images: Tensor
) -> None:
    student, teacher = detector.raw(images), detector.raw(images.flip(3))
    pairs = detector.distillation_pairs(student, teacher)
    assert len(pairs) == (4 if name in TWO_BRANCHES else 2)
    best = teacher.one2many.scores.sigmoid().amax(1)
    assert pairs[0].kind == "bernoulli"
    assert torch.equal(pairs[0].student, student.one2many.scores)
    assert torch.equal(pairs[0].teacher, teacher.one2many.scores)
    box = pairs[1]
    assert box.student.shape == box.teacher.shape
    assert torch.equal(box.weight.squeeze(), best)
    if name == "yolo26n":
        assert box.kind == "value"
        assert torch.equal(box.student, student.one2many.boxes)
        return
    assert box.kind == "categorical"
    assert box.student.shape == (2, 4, 16, 8 * 12 + 4 * 6 + 2 * 3)
    # The mean over the bins is the distance Ultralytics' own DFL layer decodes.
    bins = torch.arange(16.0).view(1, 1, 16, 1)
    mean = (box.student.softmax(box.dim) * bins).sum(box.dim)
    own = detector.module.model[-1].dfl(student.one2many.boxes)
    torch.testing.assert_close(mean, own, rtol=1e-4, atol=1e-4)


def test_feature_layers_give_one_tensor(detector: UltralyticsDetector, images: Tensor) -> None:
    outputs = _outputs_of(detector, detector.feature_layers(), images)
    assert len(outputs) > 10
    assert all(isinstance(output, Tensor) and output.ndim == 4 for output in outputs.values())


def test_blocks_run_in_order_and_hold_every_weight(
    detector: UltralyticsDetector, images: Tensor
) -> None:
    blocks = detector.blocks()
    outputs = _outputs_of(detector, blocks, images)
    assert all(isinstance(output, Tensor) and output.ndim == 4 for output in outputs.values())
    body = [block for block in blocks if block.count(".") == 1]
    assert [block for block in outputs if block in body] == body
    named = {
        id(parameter)
        for block in blocks
        for parameter in detector.module.get_submodule(block).parameters()
    }
    left = {key for key, value in detector.module.named_parameters() if id(value) not in named}
    assert all(key.endswith("dfl.conv.weight") for key in left)


def _outputs_of(detector: UltralyticsDetector, names: list[str], images: Tensor) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    hooks = [
        detector.module.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: outputs.setdefault(name, output)
        )
        for name in names
    ]
    with torch.no_grad():
        detector.raw(images)
    for hook in hooks:
        hook.remove()
    assert outputs.keys() == set(names)
    return outputs


def test_boundary_layers(name: str, detector: UltralyticsDetector) -> None:
    boundary = detector.boundary_layers()
    assert boundary.first == ("model.0.conv",)
    assert detector.module.get_submodule(boundary.first[0]).in_channels == 3
    raw = detector.raw(torch.zeros(1, 3, 64, 64))
    widths = [detector.module.get_submodule(last).out_channels for last in boundary.last]
    sizes = [raw.one2many.boxes.shape[1]] * 3 + [80] * 3
    assert widths == sizes * (2 if name in TWO_BRANCHES else 1)
    head = f"model.{len(detector.module.model) - 1}"
    assert boundary.last[:4] == (*(f"{head}.cv2.{i}.2" for i in range(3)), f"{head}.cv3.0.2")


def test_image_seen_twice() -> None:
    """yolov9e starts with a layer that hands the image on to two stems."""
    detector = UltralyticsDetector.from_yaml("yolov9e.yaml")
    assert detector.boundary_layers().first == ("model.1.conv", "model.15.conv")
    images = torch.rand(1, 3, 64, 64)
    outputs = _outputs_of(detector, detector.blocks(), images)
    assert all(isinstance(output, Tensor) for output in outputs.values())
    assert "model.10.conv" in detector.blocks()
    assert "model.10" not in detector.feature_layers()
    with torch.no_grad():
        torch.testing.assert_close(
            detector.raw(images).one2many.scores, detector.module(images)[1]["scores"]
        )


class _Counting(nn.Conv2d):
    """A convolution in the place of another, as a quantizer would put it."""

    calls = 0

    @classmethod
    def of(cls, conv: nn.Conv2d) -> _Counting:
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
        )
        new.load_state_dict(conv.state_dict())
        return new

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(images)


def test_layers_may_be_replaced(detector: UltralyticsDetector, images: Tensor) -> None:
    with torch.no_grad():
        before = detector.raw(images)
        student = detector.clone()
        for parent in list(student.module.modules()):
            for key, child in list(parent.named_children()):
                if type(child) is nn.Conv2d:
                    setattr(parent, key, _Counting.of(child))
        after = copy.deepcopy(student).raw(images)
        student.raw(images)
    torch.testing.assert_close(after.one2many.boxes, before.one2many.boxes)
    calls = {
        key: layer.calls
        for key, layer in student.module.named_modules()
        if isinstance(layer, _Counting)
    }
    assert {key for key, count in calls.items() if count == 0} <= {
        f"model.{len(student.module.model) - 1}.dfl.conv"
    }


def test_sides_must_be_multiples_of_the_stride() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        _outspoken("yolo11n").raw(torch.zeros(1, 3, 64, 72))


# Checkpoints.


def test_real_checkpoint_equals_the_network_in_it(kit: Path) -> None:
    path = kit / "weights" / "yolov9t-ball" / "yolov9t.pt"
    detector = load_detector(path)
    assert isinstance(detector, UltralyticsDetector)
    assert detector.names == ["ball"]
    assert (detector.image_size, detector.stride) == (640, 32)
    assert detector.fingerprint.startswith("9d5338b01338b1d8")
    assert not any(parameter.requires_grad for parameter in detector.module.parameters())
    assert not any(layer.training for layer in detector.module.modules())
    real = torch.load(path, map_location="cpu", weights_only=False)["model"].float().eval()
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        own = real(images)[0]
        for mine, rows in zip(
            detector.detect(images, score_threshold=1e-6),
            non_max_suppression(own, 1e-6, 0.6, multi_label=True),
            strict=True,
        ):
            _same_rows(mine, rows)


def _save(model: nn.Module, path: Path, **more: Any) -> Path:
    torch.save({"model": model, **more}, path)
    return path


def test_own_checkpoint(tmp_path: Path) -> None:
    model = DetectionModel("yolo26n.yaml", nc=2, verbose=False)
    model.names = {1: "cat", 0: "dog"}
    model.args = {"imgsz": 320}
    detector = load_detector(_save(model, tmp_path / "own.pt"))
    assert detector.names == ["dog", "cat"]
    assert detector.image_size == 320
    state = detector.module.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_trusted_checkpoint_is_the_same(tmp_path: Path) -> None:
    path = _save(DetectionModel("yolo11n.yaml", nc=2, verbose=False), tmp_path / "own.pt")
    plain, trusted = load_detector(path), load_detector(path, trust=True)
    assert trusted.spec() == plain.spec()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            plain.module.state_dict().values(), trusted.module.state_dict().values(), strict=True
        )
    )


@pytest.mark.parametrize(
    ("build_model", "what"),
    [
        (lambda: SegmentationModel("yolo11n-seg.yaml", verbose=False), "instance segmentation"),
        (lambda: PoseModel("yolo11n-pose.yaml", verbose=False), "pose estimation"),
        (lambda: ClassificationModel("yolo11n-cls.yaml", verbose=False), "classification"),
    ],
)
def test_other_tasks_are_refused(tmp_path: Path, build_model: Any, what: str) -> None:
    path = _save(build_model(), tmp_path / "other.pt")
    with pytest.raises(UserError, match=what):
        load_detector(path)


def test_fused_checkpoint_is_refused(tmp_path: Path) -> None:
    model = DetectionModel("yolo11n.yaml", nc=2, verbose=False).eval().fuse(verbose=False)
    model.model[0].__dict__.pop("forward", None)
    for layer in model.modules():
        layer.__dict__.pop("forward", None)  # a bound method, which no file should hold
    with pytest.raises(UserError, match="is fused"):
        load_detector(_save(model, tmp_path / "fused.pt"))


def test_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    model = DetectionModel("yolo11n.yaml", nc=2, verbose=False)
    model.model[3].conv = nn.Conv2d(32, 64, 5, bias=False)
    path = _save(model, tmp_path / "old.pt", version="8.0.1")
    with pytest.raises(UserError, match=r"Ultralytics 8\.0\.1.*model\.3\.conv\.weight") as caught:
        load_detector(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "as_built"), [("yolov8n", True), ("yolo11n", False)])
def test_head_of_another_age(name: str, as_built: bool, tmp_path: Path) -> None:
    """Ultralytics 8.3.0 gave YOLOv8 the head that later versions give only YOLO11."""
    yaml = checked_yaml(read_yaml(f"{name}.yaml"), name)
    model = build(yaml, name, legacy_head=not as_built)
    usual = build(yaml, name)
    assert usual.model[-1].legacy == as_built
    assert model.state_dict().keys() != usual.state_dict().keys()
    detector = load_detector(_save(model, tmp_path / "old.pt"))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(detector.raw(images).one2many.scores, model(images)[1]["scores"])
    rebuilt = UltralyticsDetector.from_spec(detector.spec())
    rebuilt.module.load_state_dict(model.state_dict())
    norms = [layer for layer in rebuilt.module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert {layer.eps for layer in norms} == {1e-3}


def test_other_norm_constants_are_refused(tmp_path: Path) -> None:
    model = DetectionModel("yolo11n.yaml", nc=2, verbose=False)
    model.model[1].bn.eps = 1e-5
    with pytest.raises(UserError, match=r"1e-05 in model\.1\.bn"):
        load_detector(_save(model, tmp_path / "other.pt"))


# YAMLs.


def test_random_weights_are_always_the_same() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one = UltralyticsDetector.from_yaml("yolo11n.yaml")
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    other = UltralyticsDetector.from_yaml("yolo11n.yaml")
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != UltralyticsDetector.from_yaml("yolov8n.yaml").fingerprint


def test_size_comes_from_the_name() -> None:
    small, nano = (UltralyticsDetector.from_yaml(f"yolo11{size}.yaml") for size in "sn")
    count = [sum(p.numel() for p in each.module.parameters()) for each in (small, nano)]
    assert count[0] > 3 * count[1]


def test_activations_do_not_work_in_place() -> None:
    inplace = [m for m in _outspoken("yolov8n").module.model.modules() if isinstance(m, nn.SiLU)]
    assert inplace
    assert not any(layer.inplace for layer in inplace)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "__import__('os').system('true')"}, "activation"),
        ({"activation": "torch.nn.SiLU(__import__('os'))"}, "activation"),
        ({"activation": "torch.nn.init"}, "activation"),
        (
            {"head": [[-1, 1, "torch_safe_load", ["x.pt"]], [[15], 1, "Detect", ["nc"]]]},
            "the layer",
        ),
        ({"head": [[-1, 1, "nn.init", []], [[15], 1, "Detect", ["nc"]]]}, "the layer nn.init"),
        ({"head": [[-1, 1, "NewBlock", []], [[15], 1, "Detect", ["nc"]]]}, "the layer NewBlock"),
        ({"head": [[-1, 1, "Classify", ["nc"]]]}, "classification"),
        ({"head": None}, "no Ultralytics model description"),
        ({"nc": "many"}, "no Ultralytics model description"),
        ({"channels": 1}, "1 channels"),
    ],
)
def test_a_yaml_names_layers_only(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked_yaml({**read_yaml("yolo11n.yaml"), **change}, "the file")


def test_a_yaml_that_cannot_be_built() -> None:
    yaml = checked_yaml({**read_yaml("yolo11n.yaml"), "scale": "q"}, "the file")
    with pytest.raises(UserError, match="cannot build the file"):
        build(yaml, "the file")


def test_plain_activation_is_used() -> None:
    yaml = checked_yaml({**read_yaml("yolo11n.yaml"), "activation": "nn.ReLU6()"}, "the file")
    yaml["activation"] = "torch.nn.ReLU6()"
    kinds = {type(layer) for layer in build(yaml, "the file").modules()}
    assert nn.ReLU6 in kinds
    assert nn.SiLU not in kinds


def test_activation_of_a_failed_build_is_forgotten() -> None:
    yaml = checked_yaml({**read_yaml("yolo11n.yaml"), "activation": "torch.nn.ReLU6()"}, "the file")
    yaml["backbone"][1][3] = ["no", "numbers"]
    with pytest.raises(UserError, match="cannot build"):
        build(yaml, "the file")
    kinds = {type(layer) for layer in build(read_yaml("yolo11n.yaml"), "the file").modules()}
    assert nn.ReLU6 not in kinds


@pytest.mark.parametrize("word", ["DetectionModel", "Detect", "v10Detect", "yolo11n", "yolov5nu"])
def test_detectors_are_no_other_task(word: str) -> None:
    assert other_task(word) is None


@pytest.mark.parametrize("nms_free", [True, False])
def test_spec_rebuilds_the_architecture(tmp_path: Path, nms_free: bool) -> None:
    detector = _outspoken("yolov10n").clone()
    assert isinstance(detector, UltralyticsDetector)
    detector.nms_free = nms_free
    rebuilt = UltralyticsDetector.from_spec(detector.spec())
    assert rebuilt.spec() == detector.spec()
    rebuilt.module.load_state_dict(detector.module.state_dict())
    images = torch.rand(1, 3, 64, 64)
    one, other = detector.detect(images)[0], rebuilt.detect(images)[0]
    assert torch.equal(one.boxes, other.boxes)


def test_matches_ultralytics_only(kit: Path) -> None:
    weights = kit / "weights"
    ours = read_checkpoint(weights / "yolov9t-ball" / "yolov9t.pt")
    theirs = read_checkpoint(weights / "yolov5n-coco" / "yolov5n.pt")
    assert UltralyticsDetector.matches(ours)
    assert not UltralyticsDetector.matches(theirs)
