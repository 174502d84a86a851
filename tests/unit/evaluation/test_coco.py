"""None"""

# ruff: noqa: SIM300 - `metrics.AP` is a measured value, not the constant its capitals suggest
from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.coco_parts import NAMES, FakeDetector, found, image_set

from dfq.data.readers import ImageSet
from dfq.errors import UserError
from dfq.evaluation.bootstrap import _average_precision, _tables, bootstrap_difference
from dfq.evaluation.coco import Metrics, bootstrap_ap, evaluate, predict, score
from dfq.evaluation.coco_matching import match
from dfq.models import load_detector
from dfq.models.base import Detections


def perfect(imageset: ImageSet) -> list[Detections]:
    return [
        found(
            *((box.tolist(), 0.9, int(label)) for box, label in zip(i.boxes, i.labels, strict=True))
        )
        for i in imageset.items
    ]


LARGE, MEDIUM, SMALL = (
    [0.0, 0.0, 100.0, 100.0],
    [110.0, 0.0, 150.0, 40.0],
    [160.0, 0.0, 170.0, 10.0],
)


THREE = image_set([(LARGE, 0, False), (MEDIUM, 1, False)], [(SMALL, 1, False)], [])


def test_perfect_detections_score_one():
    metrics = score(THREE, perfect(THREE), NAMES)
    for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100"):
        assert getattr(metrics, name) == pytest.approx(1, abs=1e-12), name
    assert metrics.images == 3
    assert metrics.per_category["cat"] == pytest.approx(1)
    assert metrics.per_category["dog"] == pytest.approx(1)
    assert math.isnan(metrics.per_category["bird"])


def test_no_detections_score_zero():
    metrics = score(THREE, [found()] * 3, NAMES)
    assert (metrics.AP, metrics.AR100) == (0, 0)


def test_a_case_computed_by_hand():
    # Right, wrong, right: precision 1 up to recall 1/2 (51 of COCO's 101 recalls), then 2/3 (50).
    data = image_set([(LARGE, 0, False), (MEDIUM, 0, False)])
    rows = (LARGE, 0.9, 0), ([150.0, 50.0, 200.0, 100.0], 0.8, 0), (MEDIUM, 0.7, 0)
    metrics = score(data, [found(*rows)], NAMES)
    assert metrics.AP == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert metrics.AR100 == pytest.approx(1)


def test_overlap_decides_at_which_thresholds_a_detection_counts():
    # 100 x 72 of 100 x 100: overlap 0.72, right at 0.50, 0.55, ..., 0.70: five of ten.
    data = image_set([(LARGE, 0, False)])
    metrics = score(data, [found(([0.0, 0.0, 100.0, 72.0], 0.9, 0))], NAMES)
    assert metrics.AP == pytest.approx(0.5)
    assert metrics.AP50 == pytest.approx(1)
    assert metrics.AP75 == 0


def test_ignored_objects_count_neither_way():
    data = image_set([(LARGE, 0, False), (MEDIUM, 0, True)])
    both = found((LARGE, 0.5, 0), (MEDIUM, 0.9, 0))
    assert score(data, [both], NAMES).AP == pytest.approx(1)
    assert score(data, [found((LARGE, 0.5, 0))], NAMES).AP == pytest.approx(1)


def test_categories_meet_by_name():
    # The set's "aeroplane" is 1, the model's "airplane" 2; "yeti" is the set's alone, "dog" the
    # model's.
    data = image_set([(LARGE, 1, False), (MEDIUM, 0, False)], names=["yeti", "aeroplane"])
    answer = found((LARGE, 0.5, 2), (MEDIUM, 0.9, 1), (MEDIUM, 0.9, 0))
    metrics = score(data, [answer], ["cat", "dog", "airplane"])
    assert metrics.AP == pytest.approx(1)
    assert metrics.per_category == {"airplane": pytest.approx(1)}
    assert metrics.missing_categories == ("yeti",)


def test_categories_of_one_name_are_measured_apart():
    here, there = [0.0, 0.0, 40.0, 40.0], [50.0, 0.0, 90.0, 40.0]
    images = replace(image_set([(here, 0, False), (there, 1, False)]), names=["cat", "cat", "dog"])
    metrics = score(images, [found((here, 0.9, 0), (there, 0.8, 2))], images.names)
    assert math.isnan(metrics.per_category.pop("dog"))
    assert metrics.per_category == {"cat (0)": pytest.approx(1), "cat (1)": 0}
    assert metrics.AP == pytest.approx(0.5)


def test_detections_that_are_not_finite_are_no_detections():
    nan = float("nan")
    answer = found((LARGE, 0.5, 0), ([nan, 0.0, 5.0, 5.0], 0.9, 0))
    data = image_set([(LARGE, 0, False)])
    assert score(data, [answer], NAMES).AP == pytest.approx(1)


def test_nothing_is_printed(capsys):
    score(THREE, perfect(THREE), NAMES)
    assert capsys.readouterr().out == ""


def test_to_dict_is_json():
    plain = score(THREE, perfect(THREE), NAMES).to_dict()
    json.loads(json.dumps(plain, allow_nan=False))
    assert plain["per_category"]["bird"] is None
    assert plain["missing_categories"] == []
    assert plain["AP"] == pytest.approx(1)
    nowhere = Metrics(*[math.nan] * 7, images=1).to_dict()
    assert nowhere["AP"] is None


@pytest.fixture
def on_disk(tmp_path: Path) -> ImageSet:
    """200 x 100 images: at 64 px, 0.32 of the size, 16 px below the canvas's top edge."""
    items = []
    for item in THREE.items:
        path = tmp_path / item.path.name
        Image.new("RGB", (200, 100)).save(path)
        items.append(replace(item, path=path))
    return replace(THREE, source=tmp_path, items=items)


def on_canvas(imageset: ImageSet) -> list[Detections]:
    offset = torch.tensor([0.0, 16.0, 0.0, 16.0])
    return [
        Detections(one.boxes * 0.32 + offset, one.scores, one.labels) for one in perfect(imageset)
    ]


def test_evaluate_end_to_end(on_disk):
    detector = FakeDetector(on_canvas(on_disk))
    seen = []
    metrics = evaluate(
        detector,
        on_disk,
        batch_size=2,
        score_threshold=0.01,
        progress=lambda done, of: seen.append((done, of)),
    )
    assert metrics.AP == pytest.approx(1)
    assert metrics.image_size == 64
    assert metrics.images_per_second == pytest.approx(3 / metrics.seconds)
    assert detector.shapes == [(2, 3, 64, 64), (1, 3, 64, 64)]
    assert detector.thresholds == {"score_threshold": 0.01, "iou_threshold": 0.6}
    assert seen == [(2, 3), (3, 3)]


def test_limit_takes_the_first_images(on_disk):
    assert evaluate(FakeDetector(on_canvas(on_disk)), on_disk, limit=2).images == 2


def readers() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("read", "decode"))]


@pytest.mark.parametrize("pure", [False, True])
def test_an_unreadable_image_is_told_in_its_turn_and_no_thread_is_left(on_disk, pure):
    on_disk.items[1].path.write_bytes(b"no image")
    on_disk.items[2].path.unlink()
    detector, done = FakeDetector(on_canvas(on_disk)), []
    detector.decode_is_pure = pure
    with pytest.raises(UserError) as raised:
        predict(detector, on_disk, batch_size=1, progress=lambda count, _: done.append(count))
    # While the error, and with it the frames that it went through, is still held.
    assert readers() == []
    assert str(raised.value) == f"{on_disk.items[1].path}: is not an image that can be read"
    assert done == [1]


def test_a_batch_is_decoded_while_the_network_works_on_the_next(on_disk):
    begun = [threading.Event() for _ in on_disk.items]

    class Watched(FakeDetector):
        decode_is_pure = True

        def raw(self, images):
            begun[len(self.shapes)].set()
            return super().raw(images)

        def decode(self, raw, image_shape, **thresholds):
            decoded = super().decode(raw, image_shape, **thresholds)
            assert not torch.is_grad_enabled()
            # The next one's prediction begins without waiting for this one.
            assert begun[min(len(on_disk) - len(self.answers), 2)].wait(30)
            return decoded

    seen = []
    detections = predict(
        Watched(on_canvas(on_disk)),
        on_disk,
        batch_size=1,
        progress=lambda count, _: seen.append(count),
    )
    assert seen == [1, 2, 3]
    for one, item in zip(detections, on_disk.items, strict=True):
        np.testing.assert_allclose(one.boxes.numpy(), item.boxes, atol=1e-4)
    assert readers() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_no_thread_is_left_when_evaluation_is_stopped(on_disk, error):
    def stop(done, of):
        raise error

    for pure in (False, True):
        detector = FakeDetector(on_canvas(on_disk))
        detector.decode_is_pure = pure
        with pytest.raises(error):
            predict(detector, on_disk, batch_size=1, progress=stop)
        assert readers() == []


def test_predict_gives_original_pixels(on_disk):
    detections = predict(FakeDetector(on_canvas(on_disk)), on_disk)
    for one, item in zip(detections, on_disk.items, strict=True):
        np.testing.assert_allclose(one.boxes.numpy(), item.boxes, atol=1e-4)


def test_rectangular_canvases(on_disk):
    detector = FakeDetector([found()] * 3)
    predict(detector, on_disk, rect=True)
    assert detector.shapes == [(3, 3, 32, 64)]


def test_modes_are_restored(on_disk):
    detector = FakeDetector([found()] * 3)
    detector.module.train()
    detector.module[1].eval()
    predict(detector, on_disk)
    assert [part.training for part in detector.module.modules()] == [True, True, False]


@pytest.mark.parametrize(
    ("size", "advice"), [(100, "96 or 128"), (20, "try 32$"), (0, "try 32$"), (-64, "try 32$")]
)
def test_image_size_must_fit_the_stride(on_disk, size, advice):
    with pytest.raises(UserError, match=advice):
        evaluate(FakeDetector([]), on_disk, image_size=size)


def test_mistakes_are_found_before_detection(on_disk):
    detector = FakeDetector([])
    with pytest.raises(UserError, match="no labels"):
        evaluate(detector, replace(on_disk, labelled=False))
    with pytest.raises(UserError, match="no category name is shared"):
        evaluate(FakeDetector([], names=["saw"]), on_disk)
    with pytest.raises(UserError, match="batch size"):
        evaluate(detector, on_disk, batch_size=0)
    with pytest.raises(UserError, match="no such file or folder"):
        evaluate(detector, on_disk.source / "nowhere")
    assert detector.shapes == []


def random_case(images: int, seed: int) -> tuple[ImageSet, list[Detections]]:
    """Objects on a grid; detections shifted, missed, invented, with scores that may tie."""
    generator = np.random.default_rng(seed)
    truths, answers = [], []
    for _ in range(images):
        truth, rows = [], []
        for cell in range(generator.integers(0, 6)):
            box = np.array([cell * 30, 0, cell * 30 + 25, 25], float)
            label = int(generator.integers(3))
            truth.append((box.tolist(), label, bool(generator.random() < 0.1)))
            if generator.random() < 0.8:
                moved = box + generator.normal(0, 2, 4)
                rows.append((moved.tolist(), round(float(generator.random()), 3), label))
            if generator.random() < 0.4:
                rows.append(
                    ((box + np.array([0, 50, 0, 50])).tolist(), float(generator.random()), label)
                )
        truths.append(truth)
        answers.append(found(*rows))
    return image_set(*truths), answers


def table_ap(data: ImageSet, answers: list[Detections], counts: np.ndarray) -> float:
    evaluator, _ = match(data, answers, NAMES, areas=("all",))
    return _average_precision(_tables(evaluator), counts, evaluator.params.recThrs)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bootstrap_accumulates_as_pycocotools_does(seed):
    data, answers = random_case(12, seed)
    expected = score(data, answers, NAMES).AP
    assert 0.05 < expected < 0.95
    assert table_ap(data, answers, np.ones(12, int)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_resampled_set_scores_as_if_its_images_were_there_so_often(seed):
    data, answers = random_case(8, seed)
    counts = np.array([0, 3, 1, 2, 0, 1, 1, 0])
    rows = [index for index, count in enumerate(counts) for _ in range(count)]
    real = replace(
        data, items=[replace(data.items[row], image_id=new) for new, row in enumerate(rows)]
    )
    expected = score(real, [answers[row] for row in rows], NAMES).AP
    assert table_ap(data, answers, counts) == pytest.approx(expected, abs=1e-12)


def test_bootstrap_interval():
    data, answers = random_case(30, 0)
    low, high = bootstrap_ap(data, answers, NAMES, samples=100)
    assert 0 < low < score(data, answers, NAMES).AP < high < 1
    assert (low, high) == bootstrap_ap(data, answers, NAMES, samples=100)
    one = image_set([(LARGE, 0, False)])
    assert bootstrap_ap(one, perfect(one), NAMES, samples=5) == (pytest.approx(1),) * 2


def test_bootstrap_of_a_difference_is_paired():
    data, answers = random_case(30, 0)
    others = random_case(30, 1)[1]
    empty = [found()] * 30
    assert bootstrap_difference(data, answers, answers, NAMES) == (0, 0)
    # Against nothing it is the interval of AP itself.
    alone = bootstrap_ap(data, answers, NAMES)
    assert bootstrap_difference(data, answers, empty, NAMES) == pytest.approx(alone, abs=1e-12)
    low, high = bootstrap_difference(data, answers, others, NAMES)
    assert low < score(data, answers, NAMES).AP - score(data, others, NAMES).AP < high
    assert bootstrap_difference(data, others, answers, NAMES) == pytest.approx((-high, -low))
    # One image more that is missed: the draws differ much more than the two networks do.
    missed = [answers[0], found(), *answers[2:]]
    low, high = bootstrap_difference(data, missed, answers, NAMES)
    assert high - low < (alone[1] - alone[0]) / 2


def test_yolov5n_reaches_its_reference(kit, yolov5n):
    """The float network's reference figures at 320 px: AP 0.241, AP50 0.384."""
    metrics = evaluate(load_detector(yolov5n), kit / "coco-val", image_size=320)
    assert metrics.images == 134
    assert metrics.AP == pytest.approx(0.241, abs=0.005)
    assert metrics.AP50 == pytest.approx(0.384, abs=0.005)
