"""What `dfq verify` is made of: distances, layouts, thresholds, fits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dfq.export.counting import IntegerShare, Operation
from dfq.export.faults import of_integers, of_ranges, of_scores
from dfq.export.layouts import Candidates, candidates, choose
from dfq.export.movement import Group, Moved, moved, same_number
from dfq.export.parity import distance, parity
from dfq.export.ranges import GridObserver
from dfq.export.verify import DetectionAccuracy, Verification
from dfq.models.base import Detections

# Files of the runtimes, which take their time.
pytestmark = pytest.mark.e2e

GENERATOR = np.random.default_rng(0)


def test_values_that_are_zero_in_both_do_not_hide_others() -> None:
    """Of scores, one in a thousand says something."""
    wanted = np.zeros((1, 1000, 100), np.float32)
    wanted[0, :50, 0] = np.linspace(0.3, 1, 50)
    found = np.zeros_like(wanted)
    found[0, :50, 0] = wanted[0, ::-1][-50:, 0]
    assert (np.abs(found - wanted) <= 1 / 255).mean() > 0.999
    assert distance(wanted, found).share_within_one < 0.1
    assert parity({"scores": wanted}, {"scores": found}, None).held == {"scores": None}


def test_what_is_as_far_as_rounding_alone_holds() -> None:
    wanted = GENERATOR.random((1, 500, 4)).astype(np.float32)
    noise = GENERATOR.normal(size=wanted.shape) * 3 / 255
    found = {"boxes": (wanted + noise).astype(np.float32)}
    otherwise = {"boxes": (wanted - noise).astype(np.float32)}
    assert parity({"boxes": wanted}, found, otherwise).held == {"boxes": "rounding floor"}
    nearer = {"boxes": (wanted - noise / 2).astype(np.float32)}
    assert parity({"boxes": wanted}, found, nearer).held == {"boxes": None}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_never_holds(value: float) -> None:
    wanted = np.linspace(0, 1, 100, dtype=np.float32)
    found = wanted.copy()
    found[0] = value
    result = parity({"a": wanted}, {"a": found}, {"a": wanted})
    assert not result.holds
    assert result.to_dict()["outputs"]["a"]["max_steps"] is None
    assert not parity({"a": wanted}, {"b": wanted}, {"a": wanted}).holds


def _scene(classes: int, anchors: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Corners and scores of two objects, 100 and 50 px, of categories 0 and `classes - 1`."""
    boxes = np.tile(np.array([5.0, 5, 9, 9], np.float32), (1, anchors, 1))
    scores = np.full((1, anchors, classes), 0.0001, np.float32)
    boxes[0, 7], scores[0, 7, 0] = (10, 20, 110, 120), 0.9
    boxes[0, 9], scores[0, 9, classes - 1] = (200, 210, 250, 260), 0.6
    return boxes, scores


def _centred(boxes: np.ndarray) -> np.ndarray:
    size = boxes[..., 2:] - boxes[..., :2]
    return np.concatenate([boxes[..., :2] + size / 2, size], axis=-1)


@pytest.mark.parametrize("classes", [1, 2, 3, 80])
@pytest.mark.parametrize(
    "layout", ["ultralytics", "ultralytics, shares", "yolov5", "apart", "apart, turned", "chosen"]
)
def test_layouts_give_the_same_detections(layout: str, classes: int) -> None:
    boxes, scores = _scene(classes)
    rows = np.concatenate([_centred(boxes), scores], axis=2)
    if layout == "ultralytics":
        outputs = {"output0": rows.transpose(0, 2, 1)}
    elif layout == "ultralytics, shares":
        rows[..., :4] /= 320
        outputs = {"output0": rows.transpose(0, 2, 1)}
    elif layout == "yolov5":
        objectness = scores.max(axis=2, keepdims=True)
        rows = np.concatenate([_centred(boxes), objectness, scores / objectness], axis=2)
        outputs = {"output": rows}
    elif layout == "apart":
        outputs = {"boxes": boxes, "scores": scores}
    elif layout == "apart, turned":
        outputs = {"a": scores.transpose(0, 2, 1), "b": _centred(boxes).transpose(0, 2, 1)}
    else:
        table = np.zeros((1, 300, 6), np.float32)
        table[0, 0] = [*boxes[0, 7], 0.9, 0]
        table[0, 1] = [*boxes[0, 9], 0.6, classes - 1]
        outputs = {"output0": table}
    found = candidates(outputs, classes, 320)
    assert found is not None
    one = choose(found, score_threshold=0.1)[0]
    assert one.labels.tolist() == [0, classes - 1]
    assert one.scores.tolist() == pytest.approx([0.9, 0.6], abs=1e-4)
    wanted = [[10, 20, 110, 120], [200, 210, 250, 260]]
    assert torch.allclose(one.boxes, torch.tensor(wanted, dtype=torch.float32), atol=0.05)


def test_other_outputs_are_in_no_layout() -> None:
    features = {"a": np.zeros((1, 255, 40, 40)), "b": np.zeros((1, 255, 20, 20))}
    assert candidates(features, 80, 320) is None
    assert candidates({"output0": np.zeros((1, 84, 400), np.float32)}, 20, 320) is None


def _detections(scores: np.ndarray, side: float = 20.0) -> Detections:
    """Boxes side by side."""
    corner = torch.arange(len(scores)).float()[:, None] * 500 * torch.tensor([1.0, 0])
    boxes = torch.cat([corner, corner + side], dim=1)
    labels = torch.zeros(len(scores), dtype=torch.int64)
    return Detections(boxes, torch.from_numpy(scores.astype(np.float32)), labels)


def test_the_advised_threshold_gives_as_many_detections() -> None:
    for squeeze in (lambda s: s * 0.4, lambda s: s**2, lambda s: np.round(s * 60) / 64):
        scores = np.sort(GENERATOR.random(4000))[::-1]
        found = _detections(squeeze(scores))
        advised = same_number([_detections(scores)], [found])
        assert advised is not None
        wanted, given = int((scores >= 0.25).sum()), int((found.scores >= advised).sum())
        assert abs(given - wanted) <= 0.03 * wanted


def test_a_file_with_as_many_detections_keeps_the_threshold() -> None:
    """Whatever other scores would do as well: between the last one above and the next."""
    scores = np.array([0.9, 0.57, 0.2, 0.1])
    assert same_number([_detections(scores)], [_detections(scores)]) == 0.25
    assert same_number([_detections(scores)], [_detections(scores + 0.02)]) == 0.25
    assert same_number([_detections(scores[:2])], [_detections(scores[:2])]) == 0.25
    moved = same_number([_detections(scores)], [_detections(np.array([0.8, 0.2, 0.1]))])
    assert moved is not None
    assert 0.1 < moved <= 0.2


def test_there_is_no_threshold_where_too_little_is_left() -> None:
    scores = np.full(10, 0.9)
    assert same_number([_detections(scores)], [_detections(scores[:3])]) is None
    assert same_number([_detections(scores * 0.1)], [_detections(scores)]) is None


def test_moved_detections_by_size_and_category() -> None:
    wanted = [_detections(np.full(6, 0.8), side=side) for side in (20.0, 50.0, 200.0)]
    found = [
        Detections(one.boxes[:3], one.scores[:3] - 0.1, one.labels[:3]) if side == 20.0 else one
        for one, side in zip(wanted, (20.0, 50.0, 200.0), strict=True)
    ]
    result = moved(wanted, found, ["ball"], "float model")
    assert (result.all.detections, result.all.kept) == (18, 15)
    assert {name: group.kept for name, group in result.sizes.items()} == {
        "small": 3, "medium": 6, "large": 6,
    }  # fmt: skip
    assert result.sizes["small"].score_shift == pytest.approx(-0.1)
    assert result.worst["ball"].share == pytest.approx(15 / 18)
    assert result.side_ratio == pytest.approx(1)


def test_scores_on_a_grid_for_boxes_are_named() -> None:
    boxes, scores = _scene(3)
    coarse = Candidates(boxes, np.round(scores / 2.5) * 2.5)
    assert "all its scores are zero" in of_scores(coarse, 0.9)[0]
    assert "levels" in of_scores(Candidates(boxes, np.round(scores)), 0.9)[0]
    # Few values are none the worse where they are on a fine grid, or there is nothing to find.
    assert not of_scores(Candidates(boxes, np.round(scores * 255) / 255), 0.0)
    fine = np.full_like(scores, 1 / 255)
    fine[0, 0, 0], fine[0, 1, 0] = 2 / 255, 0.9
    assert not of_scores(Candidates(boxes, fine), 0.9)


def test_clipped_tensors_are_named_by_branch() -> None:
    def fit(high: float, branch: str | None) -> GridObserver:
        seen = GridObserver("conv", -1.0, high, (high + 1) / 255, branch)
        seen.add(np.linspace(-1, 8, 1000))
        return seen

    assert not of_ranges([fit(8.0, None).fit(), fit(7.9, "boxes").fit()], None)
    assert "box branch (DFL)" in of_ranges([fit(1.0, "boxes").fit()], None)[0]
    assert "calibrated on noise" in of_ranges([fit(1.0, None).fit()], None)[0]
    assert fit(1.0, None).fit().clipped == pytest.approx(7 / 9, abs=0.01)
    assert fit(8.0, None).fit().sqnr > 40  # type: ignore[operator]


def test_one_clipped_tensor_without_consequences_is_no_fault() -> None:
    seen = GridObserver("conv", -1.0, 1.0, 2 / 255, None)
    seen.add(np.linspace(-1, 8, 1000))
    good = GridObserver("other", -1.0, 8.0, 9 / 255, None)
    good.add(np.linspace(-1, 8, 1000))
    rows = [seen.fit(), *[good.fit()] * 99]
    wanted = [_detections(np.full(50, 0.8))]
    same = moved(wanted, wanted, ["ball"], "float model")
    assert not of_ranges(rows, same)
    lower = moved(wanted, [_detections(np.full(50, 0.6))], ["ball"], "float model")
    assert of_ranges(rows, lower)
    assert of_ranges(rows[:5], same)


def test_a_share_of_nothing_is_none() -> None:
    assert IntegerShare((), "nowhere").share_of_macs == 0
    rows = (Operation("a", "QLinearConv", 90, True), Operation("b", "Conv", 10, False, "why"))
    found = IntegerShare(rows, "a graph")
    assert found.share_of_macs == 0.9
    assert found.to_dict()["float_operations"] == [
        {"name": "b", "type": "Conv", "macs": 10, "reason": "why"}
    ]
    assert of_integers(None, found) == []


def _of_all(kept: int, detections: int) -> Moved:
    group = Group(detections, kept, 0.9 if kept else None, 0.0 if kept else None)
    return Moved(group, {}, {}, None, 4, "float model")


def test_a_file_that_finds_something_else_is_at_fault() -> None:
    assert "3 of the float model's 20 are kept" in (_of_all(3, 20).lost() or "")
    assert _of_all(10, 20).lost() is None
    # Too few to say.
    assert _of_all(0, 7).lost() is None


def test_a_file_that_nothing_was_compared_of_is_not_called_good() -> None:
    parts = {"format": "onnx", "runtime": "onnxruntime", "size_bytes": 1, "precision": "INT8"}
    integers = IntegerShare([], "its nodes")

    def summary(**more: Any) -> str:
        return Verification(
            "a.onnx", **parts, against="b", images="c", integers=integers, command="d", **more
        ).summary()

    assert "good" not in summary(moved=_of_all(0, 0))
    assert "--data" in summary(moved=_of_all(0, 0))
    assert "good" in summary(moved=_of_all(3, 3))
    assert "good" in summary(accuracy=DetectionAccuracy("set", 2, AP=0.5))
