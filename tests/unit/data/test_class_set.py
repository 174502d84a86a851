"""Images in class folders, also packed: opened, matched by name, and refused in one line."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.small_classifiers import CLASSES, packed, write_classes

from dfq.data.class_set import match_classes, open_class_set
from dfq.data.cropped_images import cropped
from dfq.errors import UserError
from dfq.models.classifying import Preprocessing


@pytest.mark.parametrize("below", ["", "test/", "a/b/"])
def test_a_folder_and_its_zip_hold_the_same(below: str, tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "set")
    (folder / "cat" / "notes.txt").write_text("no image")
    file = packed(folder, tmp_path / "set.zip", below=below)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"__MACOSX/{below}cat/._0.png", b"")
        archive.writestr(f"{below}cat/", b"")
    plain, zipped = open_class_set(folder), open_class_set(file)
    assert plain.names == zipped.names == list(CLASSES)
    assert [label for _, label in zipped.files] == [0, 0, 1, 1, 2, 2]
    assert (plain.passed_over, zipped.passed_over) == (1, 0)
    for index in range(6):
        assert np.array_equal(plain.load_image(index), zipped.load_image(index))


def zipped(**members: bytes) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        file = packed(write_classes(place / "set"), place / "set.zip")
        with zipfile.ZipFile(file, "a") as archive:
            for name, data in members.items():
                archive.writestr(name.replace("__", "/"), data)
        return file

    return make


def _file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / name).write_bytes(content)
        return place / name

    return make


def _folder(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        folder = write_classes(place / "set")
        change(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (zipped(**{"../out.png": b""}), "leads out of the archive"),
        (zipped(**{"/etc/x.png": b""}), "leads out of the archive"),
        (zipped(**{"c:/x.png": b""}), "leads out of the archive"),
        (zipped(**{"x.png": b""}), "lies in no category's folder"),
        (zipped(**{"fox/": b""}), "the category fox has no images"),
        (zipped(**{"fox/notes.txt": b"", "fox/": b""}), "the category fox has no images"),
        (_file("set.zip", b"no archive"), "is no ZIP file, or a broken one"),
        (_file("set.zip", b""), "is no ZIP file, or a broken one"),
        (_folder(lambda f: (f / "fox").mkdir()), "the category fox has no images"),
        (_folder(lambda f: (f / "cat/0.png").rename(f / "0.png")), "lies in no category's folder"),
        (lambda place: place / "missing", "no such file or folder"),
        (lambda place: place, "holds no images"),
        (lambda p: write_classes(p / "s", names=("train", "val")), "holds the splits train, val"),
    ],
)
def test_odd_sets(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_class_set(make(tmp_path))
    assert "\n" not in str(error.value)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "set")
    (folder / "cat" / "0.png").write_bytes(b"broken")
    for source in (folder, packed(folder, tmp_path / "set.zip")):
        with pytest.raises(UserError, match=r"cat/0\.png: is not an image that can be read"):
            open_class_set(source).load_image(0)


def test_a_packed_image_that_was_damaged_is_named(tmp_path: Path) -> None:
    file = packed(write_classes(tmp_path / "set"), tmp_path / "set.zip")
    data = bytearray(file.read_bytes())
    data[200:220] = bytes(20)
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"cat/0\.png: cannot be unpacked"):
        open_class_set(file).load_image(0)


def test_names_before_positions() -> None:
    assert match_classes(["dog", "cat"], ["cat", "dog"], "x") == ([1, 0], False)
    assert match_classes(["cow", "dog"], ["cat", "dog"], "x") == ([None, 1], False)
    assert match_classes(["Cat", "Dog"], ["cat", "dog"], "x") == ([0, 1], True)
    numbers = [str(n) for n in range(11)]
    assert match_classes(sorted(numbers), [f"class{n}" for n in range(11)], "x")[0][2] == 10
    with pytest.raises(UserError, match="their numbers differ"):
        match_classes(["Cat"], ["cat", "dog"], "x")


@pytest.mark.parametrize("sides", [(40, 64), (64, 40), (32, 32), (7, 90)])
@pytest.mark.parametrize("crop", [1.0, 0.875])
def test_cropping_is_torchvisions(sides: tuple[int, int], crop: float) -> None:
    from PIL import Image
    from torchvision.transforms import CenterCrop, Compose, Resize

    image = np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8)
    wanted = Compose([Resize(round(32 / crop)), CenterCrop(32)])(Image.fromarray(image))
    assert np.array_equal(cropped(image, Preprocessing(32, crop=crop), 32), np.asarray(wanted))
