"""The mmdet adapters against mmdet itself."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from support.reconstructed import check_grids_move, check_sensitivities
from support.small_mmdet import NAMES, SIDE, enliven, write_config
from torch import Tensor, nn

from dfq.data.readers import open_set
from dfq.demo.scenes import write_coco
from dfq.errors import UserError
from dfq.evaluation.coco import _predict, evaluate, score
from dfq.graph.fold_batchnorm import fold
from dfq.models import Detector, Targets, load_detector, save_detector
from dfq.models.mmdet.config import plain, read_config, unplain
from dfq.models.two_stage import ellipse_masks, pixel_boxes
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.inspection import list_layers
from dfq.quantization.output_quantizers import count_adds_and_concats, output_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.traversal import quantized_layers
from dfq.runtime.plain import one_line

TWO_STAGE = ["mask-rcnn-resnet", "mask-rcnn-swin"]
SMALL = [*TWO_STAGE, "retinanet"]

# Full-size configs as mmdet ships them: those that work, and those that are refused in one line.
WORKING = [
    "faster-rcnn_r50_fpn_1x_coco",
    "retinanet_r50_fpn_1x_coco",
    "fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco",
    "atss_r50_fpn_1x_coco",
    "gfl_r50_fpn_1x_coco",
    "rtmdet_tiny_8xb32-300e_coco",
    "yolox_tiny_8xb8-300e_coco",
    "detr_r50_8xb2-150e_coco",
]
REFUSED = {
    "cascade-rcnn_r50_fpn_1x_coco": "CascadeRoIHead is not supported",
    "solo_r50_fpn_1x_coco": "no head for boxes",
    "mask2former_r50_8xb2-lsj-50e_coco": "no head for boxes",
    "rtmdet-ins_tiny_8xb32-300e_coco": "dfq cannot use this RTMDet",
    "dino-4scale_r50_8xb2-12e_coco": "dfq cannot use this DINO",
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("configs")
    return lambda name: write_config(folder, name)


@pytest.fixture(scope="module")
def detectors(configs: Callable[[str], Path]) -> dict[str, Detector]:
    return {name: enliven(load_detector(configs(name))) for name in SMALL}


def _samples(targets: Targets, batch: int) -> list[Any]:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    shape = (SIDE, SIDE)
    samples = []
    for labels, boxes in pixel_boxes(targets, batch, shape, torch.device("cpu")):
        meta = {
            "img_shape": shape,
            "ori_shape": shape,
            "pad_shape": shape,
            "batch_input_shape": shape,
            "scale_factor": (1.0, 1.0),
        }
        sample = DetDataSample(metainfo=meta)
        masks = BitmapMasks(ellipse_masks(boxes, shape).numpy().astype("uint8"), *shape)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels, masks=masks)
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
        )
        samples.append(sample)
    return samples


@pytest.mark.parametrize("name", SMALL)
def test_normalisation_is_the_data_preprocessors(
    name: str, detectors: dict[str, Detector], images: Tensor
) -> None:
    detector = detectors[name]
    # mmdet reads images as BGR bytes.
    pixels = (images * 255).round()
    given = {"inputs": [*pixels.flip(1).to(torch.uint8)], "data_samples": None}
    expected = detector.module.data_preprocessor(given)["inputs"]
    torch.testing.assert_close(detector.normalize(pixels / 255), expected, rtol=1e-4, atol=1e-4)
    # What is inside [0, 1] covers the valid range of the pipeline and nothing else.
    ends = detector.normalize(torch.stack([torch.zeros(3, 1, 1), torch.ones(3, 1, 1)]))
    mean, std = (torch.tensor(v) for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    torch.testing.assert_close(ends[0].flatten(), -mean / std)
    torch.testing.assert_close(ends[1].flatten(), (255 - mean) / std)


def test_pipelines_in_bgr(configs: Callable[[str], Path], images: Tensor) -> None:
    text = configs("retinanet").read_text()
    path = configs("retinanet").with_name("caffe.py")
    path.write_text(
        text.replace(
            "model = dict(",
            "model = dict(data_preprocessor=dict(mean=[103.5, 116.3, 123.7], std=[1.0, 1.0, 1.0], "
            "bgr_to_rgb=False),",
        )
    )
    detector = load_detector(path)
    pixels = (images * 255).round()
    given = {"inputs": [*pixels.flip(1).to(torch.uint8)], "data_samples": None}
    expected = detector.module.data_preprocessor(given)["inputs"]
    torch.testing.assert_close(detector.normalize(pixels / 255), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_losses_are_mmdets_own(
    name: str, detectors: dict[str, Detector], images: Tensor, targets: Targets
) -> None:
    detector = detectors[name]
    with torch.no_grad():
        ours = detector.task_loss(detector.raw(images), targets, (SIDE, SIDE))
        twin = detector.clone().module
        if name in TWO_STAGE:
            # Proposals as in evaluation; training takes more of them.
            twin.train_cfg.rpn_proposal = copy.deepcopy(twin.test_cfg.rpn)
        torch.manual_seed(0)
        theirs = twin.loss(detector.normalize(images), _samples(targets, 2))
    assert len(ours) == (5 if name in TWO_STAGE else 2)
    for key, value in ours.items():
        other = theirs[f"loss_{key}"]
        other = sum(other) if isinstance(other, list) else other.sum()
        assert value > 0
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_detections_are_mmdets_own(
    name: str, detectors: dict[str, Detector], images: Tensor
) -> None:
    detector = detectors[name]
    settings = detector.module.test_cfg
    settings = settings.rcnn if name in TWO_STAGE else settings
    found = detector.detect(
        images,
        score_threshold=settings.score_thr,
        iou_threshold=settings.nms.iou_threshold,
        max_detections=settings.max_per_img,
    )
    with torch.no_grad():
        expected = detector.module.predict(
            detector.normalize(images), _samples(Targets.empty(), 2), rescale=False
        )
    for one, other in zip(found, expected, strict=True):
        kept = other.pred_instances
        assert len(one) == len(kept) > 0
        torch.testing.assert_close(one.boxes, kept.bboxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one.scores, kept.scores, rtol=1e-4, atol=1e-5)
        assert torch.equal(one.labels, kept.labels)


@pytest.mark.parametrize("name", ["mask-rcnn-resnet", "retinanet"])
def test_average_precision_is_mmdets_own(
    name: str, detectors: dict[str, Detector], configs: Callable[[str], Path], tmp_path: Path
) -> None:
    from mmcv.transforms import Compose
    from mmdet.evaluation import CocoMetric
    from mmengine.registry import DefaultScope

    detector = detectors[name].clone()
    head = detector.module.roi_head if name in TWO_STAGE else detector.module.bbox_head
    settings = head.test_cfg
    settings.max_per_img = 300  # as many as dfq's evaluation takes
    thresholds = {
        "score_threshold": settings.score_thr,
        "iou_threshold": settings.nms.iou_threshold,
    }
    file = write_coco(tmp_path, 4, SIDE)
    options = {"batch_size": 2, "rect": False, "masks": True, "progress": None}
    rows = _predict(detector, open_set(file), image_size=SIDE, **options, **thresholds)
    found, segments = map(list, zip(*rows, strict=True))
    masked = detector.has_masks
    assert [len(one) for one in segments] == [len(one) * masked for one in found]
    # An untrained network is right about nothing: what it finds, shaken, becomes the truth.
    record, truth = json.loads(file.read_text()), []
    generator = torch.Generator().manual_seed(0)
    for image, one, masks in zip(record["images"], found, segments, strict=True):
        for index in range(0, min(len(one), 16), 2):
            shaken = one.boxes[index] + torch.randn(4, generator=generator)
            x1, y1, x2, y2 = shaken.clamp(0, SIDE).tolist()
            box = [x1, y1, max(x2 - x1, 1), max(y2 - y1, 1)]
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": image["id"],
                    "category_id": int(one.labels[index]) + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": _worn(masks[index], generator) if masked else [],
                }
            )
    for category, label in zip(record["categories"], detector.names, strict=True):
        category["name"] = label
    file.write_text(json.dumps({**record, "annotations": truth}))
    ours = score(open_set(file), found, detector.names)

    metric = CocoMetric(ann_file=str(file), metric=["bbox", "segm"] if masked else "bbox")
    metric.dataset_meta = {"classes": tuple(detector.names)}
    with DefaultScope.overwrite_default_scope("mmdet"):
        pipeline = Compose(read_config(configs("mask-rcnn-resnet"))["test_pipeline"])
    for image in record["images"]:
        path = str(tmp_path / "images" / image["file_name"])
        packed = pipeline({"img_path": path, "img_id": image["id"]})
        data = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
        results = detector.module.test_step(data)
        metric.process({}, [result.to_dict() for result in results])
    theirs = metric.evaluate(len(record["images"]))
    assert 0.02 < ours.AP < 0.98
    # mmdet rounds to three digits.
    assert pytest.approx(theirs["coco/bbox_mAP"], abs=6e-4) == ours.AP
    assert pytest.approx(theirs["coco/bbox_mAP_50"], abs=6e-4) == ours.AP50
    if masked:
        ours = score(open_set(file), found, detector.names, segments)
        assert 0.02 < ours.AP < 0.98
        assert pytest.approx(theirs["coco/segm_mAP"], abs=6e-4) == ours.AP
        assert pytest.approx(theirs["coco/segm_mAP_50"], abs=6e-4) == ours.AP50
        assert pytest.approx(theirs["coco/segm_mAP_s"], abs=6e-4) == ours.AP_small
    else:
        whole = evaluate(detector, file, image_size=SIDE, **thresholds)
        assert whole.masks is None


def _worn(segment: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Run lengths of a mask that has lost up to half of its pixels, as JSON holds them."""
    share = 0.5 + 0.5 * torch.rand((), generator=generator)
    pixels = torch.from_numpy(coco_mask.decode(segment))
    pixels = pixels * (torch.rand(pixels.shape, generator=generator) < share)
    again = coco_mask.encode(np.asfortranarray(pixels.numpy()))
    return {**again, "counts": again["counts"].decode()}


@pytest.mark.parametrize(
    ("name", "joins"),
    # Two sums for each of five Swin blocks, one for each of eight of a ResNet-18; the pyramid's.
    [("mask-rcnn-swin", 2 * 5 + 3), ("mask-rcnn-resnet", 8 + 3), ("retinanet", 8 + 2)],
)
def test_all_sums_are_found(
    name: str, joins: int, detectors: dict[str, Detector], images: Tensor
) -> None:
    student = fold(detectors[name].clone())
    assert count_adds_and_concats(student) == (0, joins)
    insert_quantizers(student, Policy(8, 8, placement="everywhere"))
    assert count_adds_and_concats(student) == (joins, joins)
    calibrate(student, [images], search="minmax")
    assert all(bool(quantizer.initialised) for _, quantizer in output_quantizers(student.module))
    raw = student.raw(images)
    assert all(level.isfinite().all() for level in student.levels(raw))


@pytest.mark.parametrize("name", SMALL)
def test_every_layer_can_be_folded_and_quantized(
    name: str, detectors: dict[str, Detector], images: Tensor
) -> None:
    detector = detectors[name]
    folded = fold(detector.clone())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.module.modules())
    student = insert_quantizers(folded.clone(), Policy(weight_bits=8))
    calibrate(student, [images], search="minmax")
    wanted = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in detector.module.modules())
    layers = list(quantized_layers(student.module))
    rows = list_layers(student, SIDE)
    assert len(layers) == wanted == sum(row.kind != "matmul" for row in rows)
    assert all(row.quantized for row in rows)
    assert all(bool(layer.input_quantizer.initialised) for _, layer in layers)
    edge = student.boundary_layers()
    assert {*edge.first, *edge.last} <= {layer for layer, _ in layers}
    assert edge.first[0].startswith("backbone.")
    with torch.no_grad():
        theirs = folded.raw(images)
    for pair in student.distillation_pairs(student.raw(images), theirs):
        assert pair.student.shape == pair.teacher.shape
        assert pair.student.requires_grad
    for part in (*student.feature_layers(), *student.blocks()):
        student.module.get_submodule(part)


@pytest.mark.parametrize("name", SMALL)
def test_grids_of_activations_can_be_refined(
    name: str, detectors: dict[str, Detector], images: Tensor
) -> None:
    check_grids_move(fold(detectors[name].clone()), Policy(activation_bits=5), images)


@pytest.mark.parametrize("name", SMALL)
def test_each_layer_can_be_measured(
    name: str, detectors: dict[str, Detector], images: Tensor
) -> None:
    check_sensitivities(fold(detectors[name].clone()), images)


def test_the_blocks_of_a_swin_are_distilled(detectors: dict[str, Detector]) -> None:
    names = detectors["mask-rcnn-swin"].feature_layers()
    assert [name for name in names if "stages.1" in name] == [
        "backbone.stages.1.blocks.0",
        "backbone.stages.1.blocks.1",
    ]


@pytest.mark.parametrize("name", TWO_STAGE)
def test_masks_in_the_task_loss(
    name: str, detectors: dict[str, Detector], images: Tensor, targets: Targets
) -> None:
    detector: Any = detectors[name].clone()
    raw = detector.raw(images)
    ellipse = detector.task_loss(raw, targets, (SIDE, SIDE))
    detector.mask_targets = "own"
    own = detector.task_loss(raw, targets, (SIDE, SIDE))
    detector.mask_targets = "none"
    boxes_only = detector.task_loss(raw, targets, (SIDE, SIDE))
    assert set(ellipse) - set(boxes_only) == {"mask"}
    assert own["mask"] < ellipse["mask"]
    assert all(torch.equal(ellipse[key], boxes_only[key]) for key in boxes_only)
    assert torch.isfinite(
        torch.stack([*detector.task_loss(raw, Targets.empty(), (SIDE, SIDE)).values()])
    ).all()


@pytest.mark.parametrize("name", SMALL)
def test_a_saved_detector_is_the_same_detector(
    name: str, detectors: dict[str, Detector], tmp_path: Path, images: Tensor
) -> None:
    detector = detectors[name]
    path = tmp_path / "saved.safetensors"
    save_detector(detector, path)
    for again in (load_detector(path), pickle.loads(pickle.dumps(detector))):
        assert (again.names, again.image_size) == (detector.names, detector.image_size)
        for one, other in zip(again.detect(images), detector.detect(images), strict=True):
            assert torch.equal(one.boxes, other.boxes)


def test_checkpoints(
    configs: Callable[[str], Path], detectors: dict[str, Detector], tmp_path: Path, images: Tensor
) -> None:
    from mmengine.logging import MessageHub

    detector, path = detectors["retinanet"], tmp_path / "w.pth"
    hub = MessageHub.get_instance("dfq-test")
    hub.update_scalar("train/loss", 0.5)
    names = [f"thing {index}" for index in range(len(NAMES))]
    # As mmengine's checkpoint hook writes them.
    torch.save(
        {
            "meta": {"dataset_meta": {"classes": tuple(names)}, "epoch": 1, "cfg": "model = 1"},
            "state_dict": detector.module.state_dict(),
            "message_hub": hub.state_dict(),
        },
        path,
    )
    loaded = load_detector(f"{configs('retinanet')}@{path}")
    assert loaded.names == names
    for one, other in zip(loaded.detect(images), detector.detect(images), strict=True):
        assert torch.equal(one.boxes, other.boxes)
    torch.save({"state_dict": {}, "meta": {}}, path)
    with pytest.raises(UserError, match="no weights"):
        load_detector(f"{configs('retinanet')}@{path}")
    torch.save({"meta": {"classes": ["one"]}, "state_dict": detector.module.state_dict()}, path)
    with pytest.raises(UserError, match="names 1 categories, and the network has 10"):
        load_detector(f"{configs('retinanet')}@{path}")
    with pytest.raises(UserError, match="does not fit"):
        load_detector(f"{configs('mask-rcnn-resnet')}@{path}")


@pytest.mark.parametrize("name", WORKING)
def test_shipped_configs(name: str) -> None:
    # Loading runs raw, losses and their gradient, distillation pairs and the decoder once.
    detector = load_detector(name)
    assert detector.num_classes == 80
    assert detector.names[0] == "person"
    assert detector.image_size == {"rtmdet": 640, "yolox_": 416}.get(name[:6], 1056)
    assert len(detector.boundary_layers().last) >= 2
    modules = dict(detector.module.named_modules())
    assert {*detector.feature_layers(), *detector.blocks()} <= modules.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=REFUSED[name]) as error:
        load_detector(name)
    assert "\n" not in str(error.value)


def test_mistakes_get_one_line(tmp_path: Path) -> None:
    texts = {
        "broken.py": ("model = dict(", "cannot be read as a config"),
        "none.py": ("x = 1", "has no `model`"),
        "unknown.py": ("model = dict(type='NoSuchDetector')", "mmdet cannot build it"),
    }
    for file, (text, reason) in texts.items():
        (tmp_path / file).write_text(text)
        with pytest.raises(UserError, match=reason) as error:
            load_detector(tmp_path / file)
        assert "\n" not in str(error.value)


def test_names_come_from_the_config(
    detectors: dict[str, Detector], configs: Callable[[str], Path], tmp_path: Path
) -> None:
    assert detectors["mask-rcnn-swin"].names == list(NAMES)
    assert detectors["retinanet"].names == [f"class{index}" for index in range(10)]
    # As users write it: at the data set, which the class of the set does not know.
    text = configs("retinanet").read_text()
    things = [f"thing {index}" for index in range(10)]
    path = tmp_path / "own.py"
    path.write_text(
        f"{text}\ntest_dataloader = dict(dataset=dict(metainfo=dict(classes={things})))\n"
    )
    assert load_detector(path).names == things


def test_without_mmdet_it_says_how_to_get_it(
    configs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = configs("retinanet")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "mmdet" else find(name, *a)
    )
    with pytest.raises(UserError, match=r"need mmdet: pip install 'dfq\[mmdet\]'") as error:
        load_detector(path)
    assert "\n" not in str(error.value)


def test_configs_survive_json() -> None:
    part = {"a": (1, [2.5, None], {"b": ()}), "c": True, "d": int}
    stored = json.loads(json.dumps(plain(part)))
    assert unplain(stored) == {"a": (1, [2.5, None], {"b": ()}), "c": True, "d": "builtins.int"}
    with pytest.raises(UserError, match="cannot be saved"):
        plain({"a": object()})
    assert one_line(KeyError("a\nb"), kind=True) == "KeyError: 'a\\nb'"
