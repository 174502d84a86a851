"""Images that files and folders hold, as they are named one by one: what `dfq predict` reads."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError, shown
from ..runtime.files import user_path
from .image_set import image_files, is_file, read_bytes, read_image

_OPENCV = frozenset({"BMP", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"})
"""Formats that are read as sets are: with OpenCV, so that pixels are those of evaluation."""

_SIXTEEN = frozenset({"PNG", "PPM"})
"""Formats of 16 bits at most, which Pillow may open as 32 all the same."""


def list_photos(sources: Sequence[str | Path], without: Path | None = None) -> list[Path]:
    """Image files in the order in which they are named, each once.

    Args:
        sources: files of any name, and folders, which are searched with their subfolders for files
            whose names end as images' do.
        without: a folder that is not searched.

    Raises:
        UserError: one is not there or is neither, or there is no image in any of them.
    """
    files: dict[Path, None] = {}
    for source in sources:
        path = user_path(source)
        try:
            is_folder = path.is_dir()
        except (OSError, ValueError):
            is_folder = False
        if is_folder:
            inside = image_files(path)
            if without is not None and without.is_dir():
                place = os.path.realpath(without)
                inside = [file for file in inside if not _is_under(file, place)]
            files.update(dict.fromkeys(inside))
        elif _is_file(path):
            files[path] = None
        else:
            exists = os.path.lexists(path) if "\0" not in str(path) else False
            problem = "is no regular file and no folder" if exists else "no such file or folder"
            raise UserError(f"{shown(path)}: {problem}; name images, or folders of them")
    if not files:
        where = ", ".join(shown(source) for source in sources[:3])
        raise UserError(f"{where}: no images there; files of folders count by their endings")
    return list(files)


def read_photo(path: Path) -> np.ndarray:
    """An image of any format that Pillow reads, as it is meant to be seen.

    Transparency is dropped, palettes are looked up, 16 bits become 8; of several frames or pages,
    the first counts.

    Returns:
        uint8 `(height, width, 3)`, RGB, EXIF orientation applied.

    Raises:
        UserError: it is no image that can be read, or has pixels of 32 bits.
    """
    data = read_bytes(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            wide = image.mode == "F" or (image.mode == "I" and image.format not in _SIXTEEN)
            if wide:
                raise UserError(
                    f"{shown(path)}: has pixels of 32 bits, whose range is not known; give an "
                    "image of 8 or 16 bits"
                )
            if image.format not in _OPENCV:
                return _eight_bit(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{shown(path)}: has more pixels than can be read") from None
    except Exception as error:
        # Whatever a plug-in of Pillow stumbles over in a broken file.
        if isinstance(error, MemoryError):
            raise
        raise UserError(f"{shown(path)}: is not an image that can be read") from None
    return read_image(path)


def _eight_bit(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    # Pillow warns of palettes whose transparency is not a colour unless alpha is asked for first.
    mode = "RGBA" if "transparency" in image.info else "RGB"
    return np.ascontiguousarray(np.asarray(image.convert(mode))[:, :, :3])


def _is_file(path: Path) -> bool:
    try:
        return is_file(path)
    except ValueError:
        return False


def _is_under(file: Path, folder: str) -> bool:
    place = os.path.realpath(file)
    return os.path.commonpath([place, folder]) == folder
