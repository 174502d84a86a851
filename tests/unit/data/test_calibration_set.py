"""The calibration set at rest: round trip, damage, foreign folders, two writers, the preview."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from support.forks import PATIENCE
from torch import Tensor

from dfq.data import calibration_writer
from dfq.data.calibration_set import CalibrationSet
from dfq.data.calibration_writer import CalibrationWriter
from dfq.data.preview import draw_grid, write_preview
from dfq.data.readers import open_set
from dfq.errors import UserError
from dfq.runtime.files import read_json, write_atomic

NAMES = ["cat", "dog", "bird"]
DETERMINANTS = {"checkpoint": "a" * 64, "seed": 0, "synthesis": {"images": 3}}
HEIGHT, WIDTH = 40, 56


def example() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 3, HEIGHT, WIDTH), generator=generator).to(torch.uint8)
    labels = [
        torch.tensor([[2.0, 0.5, 0.4, 0.3, 0.2], [0.0, 0.123456, 0.654321, 0.2, 0.5]]),
        torch.zeros(0, 5),
        torch.tensor([[1.0, 0.5, 0.5, 1.0, 1.0]]),
    ]
    return images, labels, [torch.tensor([0.9, 0.125]), torch.zeros(0), torch.tensor([0.0])]


def write(root: Path, *, order: tuple[int, int] = (0, 1), finish: bool = True) -> CalibrationWriter:
    """Two shards, of two images and of one."""
    images, labels, scores = example()
    writer = CalibrationWriter(root, DETERMINANTS, NAMES, 2)
    for index in order:
        part = slice(0, 2) if index == 0 else slice(2, 3)
        writer.append(index, part.start, images[part], labels[part], scores[part])
    if finish:
        writer.finish({"model": "m.pt"})
    return writer


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "set")
    return tmp_path / "set"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_round_trip(root: Path) -> None:
    images, labels, scores = example()
    found = CalibrationSet.open(root)
    assert len(found) == 3
    assert found.names == NAMES
    assert found.files == [f"images/{i:08d}.png" for i in range(3)]
    assert torch.equal(found.load([0, 1, 2]), images)
    assert torch.equal(found.load([2, 0]), images[[2, 0]])
    for got, expected in zip(found.labels, labels, strict=True):
        assert got.dtype == torch.float32
        # Boxes are stored to a ten thousandth of a pixel.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.scores, scores)
    assert found.manifest["determinants"] == DETERMINANTS
    assert found.manifest["model"] == "m.pt"
    assert found.manifest["images"] == 3
    assert found.verify() == []
    assert not (root / "shards").exists()


def test_targets_of_a_batch(root: Path) -> None:
    targets = CalibrationSet.open(root).targets([2, 1, 0])
    expected = torch.tensor(
        [
            [0, 1, 0.5, 0.5, 1, 1],
            [2, 2, 0.5, 0.4, 0.3, 0.2],
            [2, 0, 0.123456, 0.654321, 0.2, 0.5],
        ]
    )
    torch.testing.assert_close(targets.data, expected, rtol=0, atol=1e-5)


def test_shards_in_any_order_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", order=(1, 0))
    assert contents(tmp_path / "other") == contents(root)


def test_coco_tools_read_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO

    coco = COCO(str(root / "annotations.json"))
    assert sorted(coco.getImgIds()) == [0, 1, 2]
    assert [c["name"] for c in coco.loadCats(sorted(coco.getCatIds()))] == NAMES
    first = coco.loadImgs(0)[0]
    assert (first["width"], first["height"]) == (WIDTH, HEIGHT)
    image = cv2.imread(str(root / "images" / first["file_name"]))
    assert image.shape == (HEIGHT, WIDTH, 3)
    # OpenCV's order is BGR.
    assert np.array_equal(image[..., ::-1].transpose(2, 0, 1), example()[0][0].numpy())
    rows = coco.loadAnns(coco.getAnnIds(imgIds=[0]))
    assert [coco.loadCats(r["category_id"])[0]["name"] for r in rows] == ["bird", "cat"]
    box = [0.35 * WIDTH, 0.3 * HEIGHT, 0.3 * WIDTH, 0.2 * HEIGHT]
    assert rows[0]["bbox"] == pytest.approx(box, abs=1e-4)
    assert rows[0]["area"] == pytest.approx(box[2] * box[3], abs=1e-3)
    assert rows[0]["iscrowd"] == 0
    assert rows[0]["score"] == pytest.approx(0.9)
    # Without an id of its own COCO's evaluation would take a match for none.
    assert min(coco.getAnnIds()) == 1
    assert coco.getAnnIds(imgIds=[1]) == []


def test_our_own_reader_takes_it_for_a_real_set(root: Path) -> None:
    found = open_set(root)
    assert found.names == NAMES
    assert len(found) == 3
    assert np.array_equal(found.load_image(1).transpose(2, 0, 1), example()[0][1].numpy())


def change_a_pixel(root: Path) -> None:
    path = root / "images" / "00000001.png"
    image = cv2.imread(str(path))
    image[3, 4, 0] ^= 1
    cv2.imwrite(str(path), image)


def edit_annotations(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        document = json.loads((root / "annotations.json").read_text())
        change(document)
        (root / "annotations.json").write_text(json.dumps(document))

    return edit


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (change_a_pixel, "shard 0: its images are not those it was made with"),
        (lambda root: (root / "images/00000002.png").unlink(), "00000002.png: missing"),
        (truncate("images/00000002.png", 40), "00000002.png: missing or not a readable image"),
        (truncate("images/00000002.png", 0), "00000002.png: missing or not a readable image"),
        (
            edit_annotations(lambda d: d["annotations"][0].update(score=0.1)),
            "annotations.json: not what the manifest records",
        ),
        (
            edit_annotations(lambda d: d["annotations"][0]["bbox"].__setitem__(0, 50.0)),
            "images/00000000.png: a box leaves the image",
        ),
        (
            edit_annotations(lambda d: d["annotations"][2].update(category_id=4)),
            "images/00000002.png: a category is out of range",
        ),
    ],
    ids=["pixel", "missing", "truncated", "empty", "score", "box", "category"],
)
def test_verify_finds(root: Path, damage: Callable[[Path], None], problem: str) -> None:
    damage(root)
    found = CalibrationSet.open(root).verify()
    assert any(problem in line for line in found), found
    assert not any("\n" in line for line in found)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate("manifest.json", 100), r"manifest\.json: broken or truncated JSON"),
        (truncate("annotations.json", 100), r"annotations\.json: broken or truncated JSON"),
        (lambda root: (root / "annotations.json").unlink(), r"annotations\.json: there is no such"),
        (
            edit_annotations(lambda d: d.pop("categories")),
            r"annotations\.json: not as dfq wrote it",
        ),
        (
            edit_annotations(lambda d: d["annotations"][0].update(image_id=77)),
            r"annotations\.json: not as dfq wrote it",
        ),
        (
            edit_annotations(lambda d: d["annotations"][0].update(bbox=[1, 2])),
            r"annotations\.json: not as dfq wrote it",
        ),
        (
            lambda root: (root / "annotations.json").write_text("[]"),
            r"annotations\.json: not as dfq wrote it",
        ),
        (
            lambda root: (root / "manifest.json").write_text('{"kind": "of another tool"}'),
            "manifest.json is of something else",
        ),
        (lambda root: shutil.rmtree(root), r"no calibration set here"),
    ],
)
def test_a_broken_set_is_not_opened(
    root: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(root)
    with pytest.raises(UserError, match=message) as refused:
        CalibrationSet.open(root)
    assert "\n" not in str(refused.value)


def test_a_truncated_image_is_not_loaded(root: Path) -> None:
    truncate("images/00000001.png", 60)(root)
    found = CalibrationSet.open(root)
    found.load([0, 2])
    with pytest.raises(UserError, match=r"00000001\.png: missing or not a readable image"):
        found.load([0, 1])


def test_an_unfinished_set_says_how_far_it_is(tmp_path: Path) -> None:
    write(tmp_path, order=(1,), finish=False)  # type: ignore[arg-type]
    assert CalibrationSet.is_one(tmp_path)
    with pytest.raises(UserError, match=r"unfinished \(1 shards so far\).*dfq synthesize"):
        CalibrationSet.open(tmp_path)


def test_missing_shards(tmp_path: Path) -> None:
    writer = CalibrationWriter(tmp_path, DETERMINANTS, NAMES, 2)
    assert writer.missing() == [0, 1]
    write(tmp_path, order=(1,), finish=False)  # type: ignore[arg-type]
    assert writer.missing() == [0]
    record = tmp_path / "shards" / "000001.json"
    record.write_bytes(record.read_bytes()[:-20])
    assert writer.missing() == [0, 1]
    write(tmp_path)
    assert writer.missing() == []
    assert writer.complete


def test_is_one(tmp_path: Path, root: Path) -> None:
    assert CalibrationSet.is_one(root)
    assert not CalibrationSet.is_one(tmp_path)
    assert not CalibrationSet.is_one(tmp_path / "nowhere")
    # Other tools write a manifest.json too.
    shutil.copytree(root, tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").write_text('{"files": 3}')
    assert not CalibrationSet.is_one(tmp_path / "foreign")


@pytest.mark.parametrize("finished", [True, False])
def test_other_determinants_are_named(tmp_path: Path, finished: bool) -> None:
    write(tmp_path, finish=finished)
    before = contents(tmp_path)
    other = {**DETERMINANTS, "seed": 1, "family": "yolov5"}
    with pytest.raises(UserError, match="another family, seed; choose another --out"):
        CalibrationWriter(tmp_path, other, NAMES, 2)
    assert contents(tmp_path) == before


def foreign_file(root: Path) -> None:
    root.mkdir()
    (root / "thesis.txt").write_text("mine")


def foreign_images(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    (root / "images" / "holiday.png").write_text("mine")


def foreign_manifest(root: Path) -> None:
    root.mkdir()
    (root / "manifest.json").write_text('{"identity": {}}')


@pytest.mark.parametrize("fill", [foreign_file, foreign_images, foreign_manifest])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, fill: Callable[[Path], None]) -> None:
    root = tmp_path / "folder"
    fill(root)
    before = contents(root)
    with pytest.raises(UserError, match="choose another --out"):
        CalibrationWriter(root, DETERMINANTS, NAMES, 2)
    assert contents(root) == before


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("mine")
    with pytest.raises(UserError, match="a file is in the way"):
        CalibrationWriter(tmp_path / "set", DETERMINANTS, NAMES, 2)
    assert (tmp_path / "set").read_text() == "mine"


def _try_to_lock(root: Path, answers: Any) -> None:
    try:
        with CalibrationWriter(root, DETERMINANTS, NAMES, 2).lock():
            answers.put("locked")
    except UserError as error:
        answers.put(str(error))


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    # A spawned process would import torch anew; a fork suffices to hold another lock.
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def ask() -> str:
        other = context.Process(target=_try_to_lock, args=(tmp_path, answers))
        other.start()
        answer = answers.get(timeout=PATIENCE)
        other.join(PATIENCE)
        return str(answer)

    writer = CalibrationWriter(tmp_path, DETERMINANTS, NAMES, 2)
    with writer.lock():
        assert "another process is making this set" in ask()
    assert ask() == "locked"
    with pytest.raises(KeyError), writer.lock():
        raise KeyError
    assert ask() == "locked"
    assert not (tmp_path / ".lock").exists()


def test_a_set_that_is_begun_in_between_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes find the folder free; the second one is there while the first one notes what
    the set is made from."""
    plain = calibration_writer.write_json
    lines: list[str] = []

    def write_json(path: Path, value: Any) -> None:
        if not lines:
            lines.append("")
            with pytest.raises(UserError) as caught:
                CalibrationWriter(tmp_path / "set", {"seed": "another"}, NAMES, 2)
            lines[0] = str(caught.value)
        plain(path, value)

    monkeypatch.setattr(calibration_writer, "write_json", write_json)
    CalibrationWriter(tmp_path / "set", DETERMINANTS, NAMES, 2)
    assert lines == [f"{tmp_path / 'set'}: another process is making this set"]
    assert read_json(tmp_path / "set" / "shards" / "identity.json") == DETERMINANTS


def test_a_set_that_is_finished_in_between_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes it between two looks of ours at its folder."""
    root = tmp_path / "set"
    plain = calibration_writer._is_bare
    made: list[Path] = []

    def is_bare(folder: Path) -> bool:
        if not made:
            made.append(folder)
            write(root)
        return plain(folder)

    root.mkdir()
    monkeypatch.setattr(calibration_writer, "_is_bare", is_bare)
    assert CalibrationWriter(root, DETERMINANTS, NAMES, 2).complete
    assert made == [root]


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, b"1")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"2")
    assert contents(tmp_path) == {"file.json": b"1"}


def test_read_json_names_a_binary_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\x00\x80")
    with pytest.raises(UserError, match=r"a\.json: broken"):
        read_json(tmp_path / "a.json")


def test_annotations_digest(root: Path) -> None:
    digest = hashlib.sha256((root / "annotations.json").read_bytes()).hexdigest()
    assert json.loads((root / "manifest.json").read_text())["annotations_sha256"] == digest


def test_preview(root: Path, tmp_path: Path) -> None:
    found = CalibrationSet.open(root)
    write_preview(found, tmp_path / "grid.png", count=2)
    grid = cv2.imread(str(tmp_path / "grid.png"))
    # 40 px high images are enlarged eight times; four pixels of border around each.
    assert grid.shape == (HEIGHT * 8 + 8, 2 * (WIDTH * 8 + 4) + 4, 3)
    # The second image has no labels: it is there as it is, eight times as large.
    inside = grid[4 : 4 + HEIGHT * 8, WIDTH * 8 + 8 : -4][::8, ::8, ::-1]
    assert np.array_equal(inside.transpose(2, 0, 1), example()[0][1].numpy())


def test_boxes_are_drawn() -> None:
    images = torch.zeros(2, 3, 320, 320, dtype=torch.uint8)
    labels = [torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.25]]), torch.zeros(0, 5)]
    grid = draw_grid(images, labels, NAMES)
    assert not grid[:, 4:324, 328:648].any()
    drawn = grid[:, 4:324, 4:324].amax(0) > 0
    rows, columns = drawn.any(1).nonzero().flatten(), drawn.any(0).nonzero().flatten()
    assert int(columns.min()) == pytest.approx(80, abs=2)
    assert int(columns.max()) == pytest.approx(240, abs=2)
    assert int(rows.max()) == pytest.approx(200, abs=2)
    assert not drawn[150:190, 100:230].any()
