"""Calibration images are the set's: each once, in order, in the range and layout asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from support.calibration_sets_made import COUNT, SIDE, make_set, photos, real_set

from dfq.data.calibration_set import CalibrationSet
from dfq.data.letterbox import load_letterboxed
from dfq.data.readers import open_set
from dfq.errors import UserError
from dfq.export import calibration_plugins as plugins
from dfq.export.calibration_images import CalibrationImages


def expected_of(made: CalibrationSet) -> np.ndarray:
    """Pixels `(n, 3, s, s)`, as another library reads the set's files."""
    read = [cv2.imread(str(made.root / name))[..., ::-1] for name in made.files]
    return np.stack(read).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("values", ["float32", "uint8"])
def test_each_image_once_in_order_with_its_pixels(tmp_path: Path, layout: str, values: str) -> None:
    made = make_set(tmp_path / "set")
    images = CalibrationImages.open(made.root, layout=layout, values=values)
    expected = expected_of(made)
    assert len({image.tobytes() for image in expected}) == COUNT
    if layout == "nhwc":
        expected = expected.transpose(0, 2, 3, 1)
    if values == "float32":
        expected = (expected / 255).astype(np.float32)
    assert len(images) == COUNT
    # Twice: tools go over the data as often as they like.
    for _ in range(2):
        seen = list(images)
        assert all(image.shape == (1, *expected.shape[1:]) for image in seen)
        assert all(image.dtype == values and image.flags.c_contiguous for image in seen)
        np.testing.assert_allclose(np.concatenate(seen), expected, rtol=0, atol=1e-7)


def test_an_open_set_and_its_folder_are_the_same(tmp_path: Path) -> None:
    made = make_set(tmp_path / "set")
    by_path = CalibrationImages.open(str(made.root))
    for source in (made, made.root / "annotations.json"):
        found = CalibrationImages.open(source)
        assert all(np.array_equal(a, b) for a, b in zip(found, by_path, strict=True))


def test_photos_are_letterboxed_as_in_evaluation(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    images = CalibrationImages.open(folder, 96)
    expected, _, _ = load_letterboxed(open_set(folder), range(len(images)), 96, 32)
    assert torch.equal(torch.from_numpy(np.concatenate(list(images))), expected)
    # The border of the first, which is wide, is the grey that YOLO networks know.
    assert (images.pixels(0)[0] == 114).all()
    assert images.label(0).shape == (0, 5)


def test_labels_of_real_images_are_those_of_the_letterboxed_ones(tmp_path: Path) -> None:
    images = CalibrationImages.open(real_set(tmp_path / "real"), 64)
    # 40 x 20 pixels become 64 x 32 below a border of 16.
    assert images.label(0).tolist() == [pytest.approx([1, 0.5, 0.375, 0.5, 0.25])]


def test_labels_never_leave_the_image(tmp_path: Path) -> None:
    # An image with a box that does is one that Ultralytics leaves out.
    folder = real_set(tmp_path / "real")
    document = json.loads((folder / "annotations.json").read_text())
    document["annotations"][0]["bbox"] = [-10, -30, 60, 90]
    document["annotations"][1]["bbox"] = [45, 5, 10, 10]
    (folder / "annotations.json").write_text(json.dumps(document))
    images = CalibrationImages.open(folder, 64)
    assert images.label(0).tolist() == [pytest.approx([1, 0.5, 0.5, 1, 1])]
    assert images.label(1).tolist() == []


@pytest.mark.parametrize("size", [0, -32, 1_000_000])
def test_a_size_that_cannot_be(tmp_path: Path, size: int) -> None:
    with pytest.raises(UserError, match=f"--image-size {size}: must be from 1 to"):
        CalibrationImages.open(photos(tmp_path / "photos"), size)


def test_another_size_than_the_set_was_made_at(tmp_path: Path) -> None:
    made = make_set(tmp_path / "set")
    assert CalibrationImages.open(made, SIDE).side == SIDE
    with pytest.raises(UserError, match=f"are {SIDE} x {SIDE}; leave it out, or make another"):
        CalibrationImages.open(made, 2 * SIDE)


def test_a_plugin_names_arguments_and_no_flags(tmp_path: Path) -> None:
    made = make_set(tmp_path / "set")
    for plugin in (
        lambda: plugins.onnxruntime_reader(made, "images", 32),
        lambda: plugins.nncf_dataset(made, 32),
        lambda: plugins.ai_edge_quantizer_data(made, image_size=32),
        lambda: plugins.mct_representative_data_gen(made, 32),
        lambda: plugins.modelopt_forward_loop(made, 32),
    ):
        with pytest.raises(UserError, match=r"^'image_size' 32: the images of"):
            plugin()


def test_photos_without_a_size(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="photos: its images are no squares of one size; give the"):
        CalibrationImages.open(photos(tmp_path / "photos"))


def test_a_damaged_set_is_refused(tmp_path: Path) -> None:
    made = make_set(tmp_path / "set")
    (made.root / made.files[1]).write_bytes((made.root / made.files[0]).read_bytes())
    for source in (made, made.root, made.root / "annotations.json"):
        with pytest.raises(UserError, match="its images are not those it was made with"):
            CalibrationImages.open(source)


# Imports every tool.
@pytest.mark.e2e
def test_every_plugin_gives_the_same_images(tmp_path: Path) -> None:
    made = make_set(tmp_path / "set")
    expected = [image[None].astype(np.float32) / np.float32(255) for image in expected_of(made)]
    seen: list[np.ndarray] = []

    class Network(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> None:
            assert not torch.is_grad_enabled()
            seen.append(image.numpy())

    plugins.modelopt_forward_loop(made)(Network())
    reader = plugins.onnxruntime_reader(made, "images")
    assert len(reader) == COUNT
    fed = iter(reader.get_next, None)
    ai_edge = plugins.ai_edge_quantizer_data(made, "args_0")
    assert list(ai_edge) == ["serving_default"]
    generator = plugins.mct_representative_data_gen(made)
    found = {
        "modelopt": seen,
        "onnxruntime": [feed["images"] for feed in fed],
        "nncf": list(plugins.nncf_dataset(made).get_inference_data()),
        "nncf, ONNX": [
            feed["x"] for feed in plugins.nncf_dataset(made, input_name="x").get_inference_data()
        ],
        "nncf, PyTorch": [
            image.numpy() for image in plugins.nncf_dataset(made, tensors=True).get_inference_data()
        ],
        "ai-edge-quantizer": [feed["args_0"] for feed in ai_edge["serving_default"]],
        "mct": [image for (image,) in generator()],
        "mct, again": [image for (image,) in generator()],
    }
    for tool, images in found.items():
        assert len(images) == COUNT, tool
        assert all(np.array_equal(a, b) for a, b in zip(images, expected, strict=True)), tool
    # A part, as percentile calibration goes about it, and all anew.
    reader.set_range(1, 3)
    parts = [feed["images"] for feed in iter(reader.get_next, None)]
    assert [part.tobytes() for part in parts] == [image.tobytes() for image in expected[1:3]]
    reader.set_range(COUNT - 1, COUNT + 5)
    assert len(list(reader)) == 1


def test_a_tool_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_set(tmp_path / "set")
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(UserError, match="nncf is not installed; pip install nncf"):
        plugins.nncf_dataset(made)
