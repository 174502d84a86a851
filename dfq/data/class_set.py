"""Sets of real images whose labels are the folders that they lie in, also within a ZIP file."""

from __future__ import annotations

import functools
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from ..errors import UserError, shown
from ..runtime.files import IMAGE_SUFFIXES, reason, user_path
from ..runtime.limits import MOST_CLASSES, MOST_IMAGES
from .calibration_set import CalibrationSet
from .image_set import decoded_image, image_files, image_size, is_file, read_image

LARGEST_MEMBER = 1 << 28
"""Bytes of an image in a ZIP file, unpacked."""

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass(frozen=True)
class ClassSet:
    """Images, each of one category or of none that is known.

    Attributes:
        source: what the user named: a folder or a ZIP file.
        names: category names, sorted; none where the images have no labels.
        files: by image its path below the source, and its index into `names` (-1: no label).
        packed: whether the source is a ZIP file.
        passed_over: files that are no images, by their endings.
    """

    source: Path
    names: list[str]
    files: list[tuple[str, int]]
    packed: bool
    passed_over: int = 0

    def __len__(self) -> int:
        return len(self.files)

    @functools.cached_property
    def _archive(self) -> zipfile.ZipFile:
        return _opened(self.source)

    def load_image(self, index: int) -> np.ndarray:
        """Read image `index`: uint8 `(height, width, 3)`, RGB, EXIF orientation applied. May be
        called from several threads.

        Raises:
            UserError: it is no readable image.
        """
        name = self.files[index][0]
        if not self.packed:
            return read_image(self.source / name)
        where = f"{shown(self.source)}: {shown(name)}"
        try:
            data = self._archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
            raise UserError(f"{where}: cannot be unpacked ({shown(error)})") from None
        except RuntimeError:
            raise UserError(f"{where}: is encrypted; give a ZIP file without a password") from None
        return decoded_image(data, where)

    def image_size(self, index: int) -> tuple[int, int]:
        """Width and height of image `index`, EXIF orientation applied.

        Raises:
            UserError: it is no readable image.
        """
        name = self.files[index][0]
        if not self.packed:
            return image_size(self.source / name)
        height, width = self.load_image(index).shape[:2]
        return width, height

    def only(self, indices: Sequence[int]) -> ClassSet:
        """These images alone, at least one."""
        return replace(self, files=[self.files[index] for index in indices])

    def remark(self) -> str | None:
        """What was left out, in a line; None for nothing."""
        if not self.passed_over:
            return None
        return f"{self.passed_over} files left out, whose names do not end as images' do"


def open_class_set(source: str | Path) -> ClassSet:
    """Open a set with a folder for each category: a folder, or a ZIP file, that holds
    `CLASS/*.jpg`, if need be below others that all images are in.

    Raises:
        UserError: there is no such set, images lie outside of the folders, a category has none, or
            the ZIP file is broken or has names that no archive of images needs.
    """
    path = user_path(source)
    where = shown(path)
    names, folders, packed, passed_over = _listed(path)
    parts = [PurePosixPath(name).parts for name in names]
    depth = _common(parts)
    loose = next(
        (
            name
            for name, path_parts in zip(names, parts, strict=True)
            if len(path_parts) < depth + 2
        ),
        "",
    )
    if loose:
        raise UserError(
            f"{where}: the image {shown(loose)} lies in no category's folder; each image goes in "
            "a folder with the name of its category"
        )
    categories = sorted({path_parts[depth] for path_parts in parts})
    if len(categories) > 1 and all(name.casefold() in _SPLITS for name in categories):
        raise UserError(
            f"{where}: holds the splits {', '.join(map(shown, categories))}; name one of them"
        )
    if len(categories) > MOST_CLASSES:
        raise UserError(f"{where}: has {len(categories)} categories, over {MOST_CLASSES}")
    above = parts[0][:depth]
    beside = {
        path_parts[depth]
        for path_parts in map(_parts, folders)
        if len(path_parts) > depth and path_parts[:depth] == above
    }
    empty = sorted(beside - set(categories))
    if empty:
        raise UserError(
            f"{where}: the category {shown(empty[0])} has no images; add some, or delete its folder"
        )
    places = {name: index for index, name in enumerate(categories)}
    files = [
        (name, places[path_parts[depth]]) for name, path_parts in zip(names, parts, strict=True)
    ]
    return ClassSet(path, categories, files, packed, passed_over)


def open_photo_set(source: str | Path) -> ClassSet:
    """Open the images of a folder or a ZIP file, wherever they lie in it, without labels.

    Raises:
        UserError: there are none, or the ZIP file is broken.
    """
    path = user_path(source)
    names, _, packed, passed_over = _listed(path)
    return ClassSet(path, [], [(name, -1) for name in names], packed, passed_over)


def match_classes(
    set_names: Sequence[str], model_names: Sequence[str], where: str
) -> tuple[list[int | None], bool]:
    """For each category of a set, the index of the model's of exactly that name.

    Only where no name is shared do positions count, of sorted names, or of numbers from 0 on; there
    have to be as many categories as the model has.

    Returns:
        One model index, or None where the model has no such category, for each of `set_names`; and
        whether they were found by position.

    Raises:
        UserError: no name is shared, and the numbers of categories differ.
    """
    known = {name: index for index, name in reversed(list(enumerate(model_names)))}
    indices = [known.get(name) for name in set_names]
    if any(index is not None for index in indices):
        return indices, False
    count = len(model_names)
    if len(set_names) != count:
        raise UserError(
            f"{where}: none of its {len(set_names)} categories ({_some(set_names)}) has the name "
            f"of one of the model's {count} ({_some(model_names)}), and their numbers differ; name "
            "the folders as the model's categories are"
        )
    if {name for name in set_names if name.isdecimal()} == set(map(str, range(count))):
        return [int(name) for name in set_names], True
    return list(range(count)), True


def _some(names: Sequence[str], count: int = 3) -> str:
    listed = ", ".join(shown(name, limit=40) for name in names[:count])
    return f"{listed}, ..." if len(names) > count else listed


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts


def _common(parts: Sequence[tuple[str, ...]]) -> int:
    """How many folders all images are in, without that of a category."""
    depth = 0
    while (
        all(len(path_parts) > depth + 2 for path_parts in parts)
        and len({path_parts[depth] for path_parts in parts}) == 1
    ):
        depth += 1
    return depth


def _listed(path: Path) -> tuple[list[str], list[str], bool, int]:
    """Names of images, names of folders, whether they are packed, and how many files are none."""
    where = shown(path)
    if is_file(path):
        return _of_archive(path)
    try:
        is_folder = path.is_dir()
    except OSError:
        is_folder = False
    if not is_folder:
        raise UserError(f"{where}: no such file or folder")
    if CalibrationSet.is_one(path):
        raise UserError(
            f"{where}: is a calibration set; give real images, in a folder for each category"
        )
    images = image_files(path)
    if not images:
        raise UserError(f"{where}: holds no images (files that end in {_endings()})")
    if len(images) > MOST_IMAGES:
        raise UserError(f"{where}: holds more than {MOST_IMAGES} images")
    names = [file.relative_to(path).as_posix() for file in images]
    inside = [entry for entry in path.rglob("*") if not _hidden(entry.relative_to(path).as_posix())]
    folders = [entry.relative_to(path).as_posix() for entry in inside if entry.is_dir()]
    file_count = sum(is_file(entry) for entry in inside)
    return names, folders, False, max(0, file_count - len(names))


def _of_archive(path: Path) -> tuple[list[str], list[str], bool, int]:
    where = shown(path)
    with _opened(path) as archive:
        members = archive.infolist()
    if len(members) > 4 * MOST_IMAGES:
        raise UserError(f"{where}: holds more than {4 * MOST_IMAGES} files")
    names, folders, passed_over = [], [], 0
    for member in members:
        name = member.filename
        if name.startswith("/") or "\\" in name or ".." in _parts(name) or name[1:2] == ":":
            raise UserError(
                f"{where}: holds {shown(name)}, a name that leads out of the archive; pack the "
                "folder again"
            )
        if _hidden(name):
            continue
        if member.is_dir():
            folders.append(name)
        elif PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES:
            passed_over += 1
        elif member.file_size > LARGEST_MEMBER:
            raise UserError(f"{where}: {shown(name)} has more than {LARGEST_MEMBER >> 20} MiB")
        else:
            names.append(name)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}: holds {shown(twice[0])} twice; pack the folder again")
    if not names:
        raise UserError(f"{where}: holds no images (files that end in {_endings()})")
    if len(names) > MOST_IMAGES:
        raise UserError(f"{where}: holds more than {MOST_IMAGES} images")
    return sorted(names), folders, True, passed_over


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise UserError(
            f"{shown(path)}: is no ZIP file, or a broken one; give a folder or a ZIP file with a "
            "folder of images for each category"
        ) from None
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read: {reason(error)}") from None
    except (ValueError, NotImplementedError, UnicodeDecodeError) as error:
        raise UserError(f"{shown(path)}: is a broken ZIP file ({shown(error)})") from None


def _hidden(name: str) -> bool:
    """What systems and tools put beside the files that are meant."""
    return any(part.startswith(".") or part == "__MACOSX" for part in _parts(name))


def _endings() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
