"""NMS within a file, against the family's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_detector import blobs, tiny_detector

import dfq
from dfq import export
from dfq.errors import UserError
from dfq.export.opened import open_exported

# Files of the runtimes, which take their time.
pytestmark = pytest.mark.e2e

LEAST = 0.2


@pytest.mark.parametrize(("suffix", "batch"), [(".onnx", 1), (".xml", 4), (".onnx", None)])
def test_nms_within_the_file_gives_what_the_family_gives(
    suffix: str, batch: int | None, tmp_path: Path
) -> None:
    detector, images = tiny_detector(), blobs(6)
    path = export(detector, tmp_path / f"x{suffix}", batch=batch, nms=LEAST)
    opened = open_exported(path)
    assert list(opened.info.outputs) == ["boxes", "scores", "labels", "images_of"]
    found = opened.detect(images)
    wanted = detector.detect(images, score_threshold=LEAST)
    assert sum(map(len, wanted)) > len(images)
    for got, want in zip(found, wanted, strict=True):
        assert len(got) == len(want)
        assert got.labels.tolist() == want.labels.tolist()
        assert torch.allclose(got.scores, want.scores, atol=1e-5)
        assert torch.allclose(got.boxes, want.boxes, atol=1e-2)
    # A higher bound than the file's counts, a lower one cannot.
    half = opened.detect(images, score_threshold=0.5, max_detections=2)
    assert all((one.scores > 0.5).all() and len(one) <= 2 for one in half)
    assert sum(map(len, opened.detect(images, score_threshold=0.001))) == sum(map(len, found))


def test_an_image_without_anything(tmp_path: Path) -> None:
    path = export(tiny_detector(), tmp_path / "x.xml", nms=0.999)
    (found,) = open_exported(path).detect(blobs(1))
    assert (len(found), found.boxes.shape) == (0, (0, 4))


def test_nms_where_it_cannot_be(tmp_path: Path) -> None:
    for suffix, nms, word in ((".tflite", 0.3, "litert"), (".onnx", 1.5, "0 to below 1")):
        with pytest.raises(UserError, match=word):
            export(tiny_detector(), tmp_path / f"x{suffix}", nms=nms)
    path = export(tiny_detector(), tmp_path / "x.onnx", nms=0.3)
    with pytest.raises(UserError, match="without --nms"):
        dfq.verify(path, tiny_detector())
