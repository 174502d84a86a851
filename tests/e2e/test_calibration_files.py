"""`dfq data export SET --for TOOL`: the files, and how they come to be whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from support.calibration_sets_made import BRIGHTEST, COUNT, SIDE, make_set, photos, real_set
from support.harness import command, contents, has_one_error

from dfq.data.readers import open_set
from dfq.export import calibration_files
from dfq.export.calibration_files import SNIPPETS, TOOLS, export_for
from dfq.export.calibration_images import CalibrationImages

ARRAYS = ["onnxruntime", "openvino", "nncf", "ai-edge-quantizer", "mct", "modelopt"]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make_set(tmp_path / "set").root


def script(folder: Path) -> ModuleType:
    """`calibrate.py` of a folder, as somebody's own program imports it."""
    spec = importlib.util.spec_from_file_location("calibrate", folder / "calibrate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_files_for_every_tool(made: Path, tmp_path: Path) -> None:
    before = contents(made)
    for tool in TOOLS:
        out = tmp_path / f"for {tool}"
        result = command("data", "export", made, "--for", tool, "--out", out)
        assert result.exit_code == 0, result.output
        first, second = result.stdout.splitlines()
        assert first == f"{COUNT} images: {out / TOOLS[tool].result}"
        assert (out / TOOLS[tool].result).is_file()
        # With the folder in quotes: a shell takes the line as it stands.
        assert second.startswith("next: ")
        assert f"'{out}'" in second
    assert contents(made) == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("tool", ARRAYS)
def test_arrays_hold_the_images(made: Path, tmp_path: Path, tool: str) -> None:
    export_for(tool, made, tmp_path / "out")
    found = np.load(tmp_path / "out/images.npy")
    images = CalibrationImages.open(made, values="uint8")
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.concatenate(list(images)))


def test_every_snippet_belongs_to_a_tool_and_is_a_screen_without_dfq(tmp_path: Path) -> None:
    made = make_set(tmp_path / "set").root
    used = set()
    for tool in TOOLS:
        export_for(tool, made, tmp_path / tool)
        if (tmp_path / tool / "calibrate.py").exists():
            used.add((tmp_path / tool / "calibrate.py").read_text())
    assert used == {path.read_text() for path in SNIPPETS.glob("*.py")}
    for text in used:
        assert "dfq" not in text
        assert len(text.splitlines()) <= 32


def test_mct(made: Path, tmp_path: Path) -> None:
    export_for("mct", made, tmp_path / "out")
    expected = list(CalibrationImages.open(made))
    generator = script(tmp_path / "out").representative_data_gen
    for _ in range(2):
        found = [image for (image,) in generator()]
        assert found[0].dtype == np.float32
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_modelopt(made: Path, tmp_path: Path) -> None:
    export_for("modelopt", made, tmp_path / "out")
    expected = list(CalibrationImages.open(made))
    found: list[np.ndarray] = []

    class Network(torch.nn.Conv2d):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            found.append(image.numpy())
            return super().forward(image)

    script(tmp_path / "out").forward_loop(Network(3, 1, 1))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    subprocess.run([sys.executable, tmp_path / "out/calibrate.py"], check=True)
    array = np.load(tmp_path / "out/calibration.npy")
    assert array.dtype == np.float32
    assert np.array_equal(array, np.concatenate(expected))


FAKE_RKNN = """
import json, os, sys
calls = []
class RKNN:
    def __getattr__(self, name):
        def call(*args, **kwargs):
            assert not args or name == "export_rknn"
            calls.append([name, list(args), kwargs])
            if name == "build":
                lines = open(kwargs["dataset"]).read().splitlines()
                assert all(os.path.isfile(line) for line in lines)
            if name == "export_rknn":
                json.dump(calls, open(args[0], "w"))
            return 0
        return call
"""


def test_rknn(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "a folder"
    export_for("rknn", made, out)
    names = (out / "dataset.txt").read_text().splitlines()
    # A blank parts two inputs of a network.
    assert not any(" " in name for name in names)
    images = CalibrationImages.open(made, values="uint8")
    read = [cv2.imread(str(out / name))[..., ::-1] for name in names]
    assert np.array_equal(np.stack(read), np.stack([images.pixels(i) for i in range(COUNT)]))
    # The toolkit is not to be had here: what it is told, and from where.
    (tmp_path / "fake/rknn").mkdir(parents=True)
    (tmp_path / "fake/rknn/api.py").write_text(FAKE_RKNN)
    (tmp_path / "fake/m.onnx").touch()
    subprocess.run(
        [sys.executable, out / "calibrate.py", "m.onnx", "m.rknn", "rk3588"],
        cwd=tmp_path / "fake",
        env={"PYTHONPATH": str(tmp_path / "fake")},
        check=True,
    )
    calls = {name: given for name, _, given in json.loads((tmp_path / "fake/m.rknn").read_text())}
    assert calls["config"]["std_values"] == [[255, 255, 255]]
    assert calls["load_onnx"] == {"model": str(tmp_path / "fake/m.onnx")}
    assert calls["build"] == {"do_quantization": True, "dataset": "dataset.txt"}


def test_hailo(made: Path, tmp_path: Path) -> None:
    export_for("hailo", made, tmp_path / "out")
    found = np.load(tmp_path / "out/calibration.npy")
    assert found.dtype == np.float32
    images = CalibrationImages.open(made, layout="nhwc", values="uint8")
    assert np.array_equal(found, np.concatenate(list(images)))
    assert found.shape == (COUNT, SIDE, SIDE, 3)
    assert found.max(axis=(1, 2, 3)).tolist() == list(BRIGHTEST)
    lines = (tmp_path / "out/model.alls").read_text().splitlines()
    # Without it only 64 images are looked at.
    assert any(f"calibset_size={COUNT})" in line for line in lines)
    assert any("[255.0, 255.0, 255.0]" in line for line in lines)


def test_ultralytics_from_real_images(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command_line = ("data", "export", real_set(tmp_path / "real"), "--for", "ultralytics")
    result = command(*command_line, "--image-size", "64", "--out", out)
    assert result.exit_code == 0, result.output
    for split in ("train", "val"):
        found = open_set(out, split)
        assert found.names == ["cat", "dog"]
        assert [item.labels.tolist() for item in found.items] == [[1], [1]]
        assert found.items[0].boxes[0].tolist() == pytest.approx([16, 16, 48, 32], abs=1e-3)
    images = CalibrationImages.open(tmp_path / "real", 64)
    assert np.array_equal(found.load_image(1), images.pixels(1))


def test_an_unknown_tool_is_one_line_with_all_there_are(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = has_one_error(command("data", "export", made, "--for", "tflite\n", "--out", out))
    assert r"--for tflite\n: no such tool; there are" in line
    assert all(tool in line for tool in TOOLS)
    assert not out.exists()


def test_what_contradicts(made: Path, tmp_path: Path) -> None:
    words = ("data", "export", made, "--out", tmp_path / "out")
    line = has_one_error(command(*words, "--for", "rknn", "--format", "yolo"))
    assert "--format and --for contradict" in line
    assert "--image-size: is for --for" in has_one_error(command(*words, "--image-size", "64"))
    line = has_one_error(command(*words, "--image-size", "32", "--for", "nncf"))
    assert "--image-size 32: the images of" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_is_left_where_a_photo_is_broken(tmp_path: Path, tool: str) -> None:
    folder = photos(tmp_path / "photos")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 3])
    words = ("data", "export", folder, "--for", tool, "--image-size", "64")
    line = has_one_error(command(*words, "--out", tmp_path / "new/out"))
    assert "1.png: is not an image that can be read" in line
    assert list((tmp_path / "new").glob("*")) == []


@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_is_left_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    folder = photos(tmp_path / "photos")
    pixels, calls = CalibrationImages.pixels, []

    def full(images: CalibrationImages, index: int) -> np.ndarray:
        calls.append(index)
        if index == 2:
            raise OSError(28, "No space left on device")
        return pixels(images, index)

    monkeypatch.setattr(calibration_files.CalibrationImages, "pixels", full)
    words = ("data", "export", folder, "--for", tool, "--image-size", "64")
    line = has_one_error(command(*words, "--out", tmp_path / "new/out"))
    assert "the disk is full" in line
    assert calls == [0, 1, 2]
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_there_stays(made: Path, tmp_path: Path, tool: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    words = ("data", "export", made, "--for", tool, "--out", tmp_path / "out")
    assert "not empty" in has_one_error(command(*words))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_export_is_not_written_among_the_photos(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    words = ("data", "export", folder, "--for", "rknn", "--image-size", "64")
    line = has_one_error(command(*words, "--out", folder / "out"))
    assert "would be among the photos in" in line
    assert len(open_set(folder)) == 3
    assert not (folder / "out").exists()


def test_an_export_stands_alone(made: Path, tmp_path: Path) -> None:
    for tool in TOOLS:
        export_for(tool, made, tmp_path / tool)
        assert all(
            path.stat().st_nlink == 1 and not path.is_symlink()
            for path in (tmp_path / tool).rglob("*")
            if path.is_file()
        )
        for path in (tmp_path / tool).rglob("*"):
            if path.suffix in {".txt", ".yaml", ".py", ".alls"}:
                assert str(tmp_path) not in path.read_text()
