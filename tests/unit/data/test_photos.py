"""Photos that are named one by one: any format, the right way up, as evaluation reads them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dfq.data.photos import list_photos, read_photo
from dfq.data.readers import open_set
from dfq.errors import UserError

RED, GREY = (220, 30, 40), 128


def corner(width: int = 60, height: int = 40) -> Image.Image:
    """Grey, with a red upper left corner."""
    image = Image.new("RGB", (width, height), (GREY, GREY, GREY))
    image.paste(RED, (0, 0, 20, 10))
    return image


def near(pixel: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixel.astype(int) - colour).max() < 12)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_a_turned_photo_is_read_upright(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    for orientation, shape, place in ((3, (40, 60), (-1, -1)), (6, (60, 40), (0, -1))):
        exif[0x0112] = orientation
        corner().save(path, exif=exif)
        found = read_photo(path)
        assert found.shape == (*shape, 3)
        assert near(found[place], RED)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_any_kind_of_pixels_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        deep = np.full((40, 60), GREY * 257, np.uint16)
        deep[:10, :20] = 65535
        Image.fromarray(deep).save(path)
    else:
        corner().convert(mode, palette=Image.Palette.ADAPTIVE).save(path)
    found = read_photo(path)
    assert (found.shape, found.dtype) == ((40, 60, 3), np.uint8)
    expected = {"L": 88, "LA": 88, "I;16": 255}.get(mode)
    if expected is not None:
        assert np.abs(found[0, 0].astype(int) - expected).max() <= 2
        assert np.abs(found[-1, -1].astype(int) - GREY).max() <= 1
    elif mode != "1":
        assert near(found[0, 0], RED)


@pytest.mark.parametrize("suffix", ["gif", "tga", "pcx", "ico", "avif"])
def test_formats_that_only_pillow_reads(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    corner(64, 64).save(path)
    found = read_photo(path)
    assert found.shape[2] == 3
    assert near(found[2, 2], RED)
    assert near(found[-1, -1], (GREY, GREY, GREY))


def test_16_bits_of_a_pgm_are_scaled(tmp_path: Path) -> None:
    path = tmp_path / "deep.pgm"
    path.write_bytes(b"P5 4 2 65535\n" + np.full(8, 0x8000, ">u2").tobytes())
    assert (read_photo(path) == 128).all()


def test_pixels_are_those_of_evaluation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png", "webp", "bmp", "tif"):
        noise = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{suffix}.{suffix}")
    images = open_set(tmp_path)
    for index, item in enumerate(images.items):
        np.testing.assert_array_equal(read_photo(item.path), images.load_image(index))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp"])
def test_a_photo_that_is_cut_short_is_refused_by_name(
    tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"cut\.{suffix}: is not an image that can be read"):
        read_photo(path)
    # The one line is all that there is to read.
    assert "OpenCV" not in capfd.readouterr().err


def test_opencv_may_speak_again_after_reading_in_threads(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    level = cv2.utils.logging.getLogLevel()
    with ThreadPoolExecutor(4) as readers:
        assert len(list(readers.map(read_photo, [tmp_path / "noise.png"] * 64))) == 64
    assert cv2.utils.logging.getLogLevel() == level != cv2.utils.logging.LOG_LEVEL_SILENT


def test_pixels_without_a_known_range_are_refused(tmp_path: Path) -> None:
    for name, kind in (("float.tif", np.float32), ("whole.tif", np.int32)):
        Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: has pixels of 32 bits"):
            read_photo(tmp_path / name)


def test_what_is_no_photo_is_refused(tmp_path: Path) -> None:
    for name, content in (("empty.png", b""), ("text.jpg", b"no photo")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="is not an image that can be read"):
            read_photo(tmp_path / name)


def test_files_and_folders_are_listed_once_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for name in ("b/2.PNG", "b/deep/1.jpg", "b/notes.txt", "b/.hidden.png", "a.gif"):
        (tmp_path / name).write_bytes(b"-")
    named = [tmp_path / "b" / "deep" / "1.jpg", tmp_path / "b", tmp_path / "a.gif"]
    assert [str(path.relative_to(tmp_path)) for path in list_photos(named)] == [
        "b/deep/1.jpg", "b/2.PNG", "a.gif",
    ]  # fmt: skip
    found = list_photos([tmp_path], without=tmp_path / "b" / "deep")
    assert [path.name for path in found] == ["2.PNG"]


def test_what_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty").mkdir()
    for name, problem in (
        ("absent.png", "no such file or folder"),
        ("pipe.png", "is no regular file and no folder"),
        ("empty", "no images there"),
        ("a\0b", "no such file or folder"),
        ("x" * 300, "no such file or folder"),
    ):
        with pytest.raises(UserError, match=problem):
            list_photos([tmp_path / name])
