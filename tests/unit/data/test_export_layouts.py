"""The set in Ultralytics' layout, read back by Ultralytics itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dfq.data import export_layouts as export
from dfq.data.calibration_set import CalibrationSet
from dfq.data.calibration_writer import CalibrationWriter
from dfq.data.export_layouts import export_yolo
from dfq.data.readers import open_set
from dfq.errors import UserError

# Names that YAML could take for something else.
NAMES = ["cat", "no", "7", "fußball: rot"]
SIDE = 64


@pytest.fixture
def data(tmp_path: Path) -> CalibrationSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 3, SIDE, SIDE), generator=generator).to(torch.uint8)
    labels = [
        torch.tensor([[3.0, 0.5, 0.4, 0.3, 0.2], [0.0, 0.123456, 0.654321, 0.2, 0.5]]),
        torch.zeros(0, 5),
        torch.tensor([[1.0, 0.5, 0.5, 1.0, 1.0]]),
    ]
    writer = CalibrationWriter(tmp_path / "set", {"seed": 0}, NAMES, 1)
    writer.append(0, 0, images, labels, [torch.ones(len(label)) for label in labels])
    return writer.finish({})


def sorted_rows(rows: Tensor) -> Tensor:
    return torch.from_numpy(np.array(sorted(rows.tolist())).reshape(-1, 5))


def test_ultralytics_reads_it(
    data: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ultralytics replaces it for the whole process; other tests are to see Pillow's own.
    monkeypatch.setattr(Image, "open", Image.open)
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    written = export_yolo(data, tmp_path / "out")
    # It may be moved, and read from anywhere.
    moved = shutil.move(tmp_path / "out", tmp_path / "moved") / written.name
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    description = check_det_dataset(str(moved), autodownload=False)
    assert description["names"] == dict(enumerate(NAMES))
    assert description["train"] == description["val"]
    dataset = YOLODataset(
        description["val"], data=description, task="detect", augment=False, imgsz=SIDE
    )
    assert [Path(f).name for f in dataset.im_files] == [Path(f).name for f in data.files]
    for label, expected in zip(dataset.labels, data.labels, strict=True):
        rows = torch.from_numpy(np.concatenate([label["cls"], label["bboxes"]], axis=1))
        torch.testing.assert_close(
            sorted_rows(rows), sorted_rows(expected), atol=2e-6, rtol=0, check_dtype=False
        )
    pixels = dataset.load_image(2)[0]
    assert np.array_equal(pixels[:, :, ::-1].transpose(2, 0, 1), data.load([2])[0].numpy())


def test_our_own_reader_reads_it(data: CalibrationSet, tmp_path: Path) -> None:
    found = open_set(export_yolo(data, tmp_path / "out"))
    assert found.names == NAMES
    assert [item.labels.tolist() for item in found.items] == [[3, 0], [], [1]]
    assert found.items[0].boxes[0] == pytest.approx(
        [SIDE * 0.35, SIDE * 0.3, SIDE * 0.65, SIDE * 0.5], abs=1e-3
    )


def test_images_are_copies(data: CalibrationSet, tmp_path: Path) -> None:
    # What another tool does to its copy must not reach the set.
    export_yolo(data, tmp_path / "out")
    copy, source = tmp_path / "out/images/val/00000000.png", data.root / data.files[0]
    assert copy.stat().st_nlink == 1
    assert not copy.samefile(source)
    assert copy.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_half_an_export(
    data: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    read, calls = export.read_regular, []

    def fails_at_the_second(source: Path) -> bytes:
        calls.append(source)
        if len(calls) == 2:
            raise error
        return read(source)

    monkeypatch.setattr(export, "read_regular", fails_at_the_second)
    with pytest.raises(type(error)):
        export_yolo(data, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def file_in_the_way(out: Path) -> None:
    out.write_text("mine")


def folder_with_a_file(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")


@pytest.mark.parametrize(
    ("fill", "message"),
    [(file_in_the_way, "file is in the way"), (folder_with_a_file, "not empty")],
)
def test_what_is_there_stays(
    data: CalibrationSet, tmp_path: Path, fill: Callable[[Path], None], message: str
) -> None:
    fill(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        export_yolo(data, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_taken(
    data: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert len(open_set(export_yolo(data, Path("../out/deeper/still")))) == 3
    (tmp_path / "empty").mkdir()
    assert len(open_set(export_yolo(data, tmp_path / "empty"))) == 3


def test_a_damaged_set_is_refused(data: CalibrationSet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="category has no name"):
        export_yolo(replace(data, names=NAMES[:2]), tmp_path / "out")
    (data.root / data.files[1]).unlink()
    with pytest.raises(UserError, match=r"1 of 3 images are missing.*00000001\.png"):
        export_yolo(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
