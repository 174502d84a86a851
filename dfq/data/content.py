"""What a real set holds, so that another one in its place is not taken for it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import UserError, shown
from ..runtime.ahead import read_all
from ..runtime.files import reason
from .class_set import ClassSet
from .image_set import ImageSet


def content_digest(images: ImageSet | ClassSet) -> str:
    """SHA-256 (hex) of the images' bytes, in their order, and of their labels; neither of names of
    files nor of where they lie.

    Raises:
        UserError: a file cannot be read.
    """
    whole = hashlib.sha256(repr(images.names).encode())
    if isinstance(images, ClassSet):
        whole.update(repr([category for _, category in images.files]).encode())
        paths = [images.source / name for name, _ in images.files]
        if images.packed:
            # Which of its images they are, their paths in it say.
            whole.update(repr([name for name, _ in images.files]).encode())
            paths = [images.source]
    else:
        paths = [item.path for item in images.items]
        for item in images.items:
            for values in (item.boxes, item.labels, item.ignore, item.area):
                whole.update(repr((values.shape, values.dtype.str)).encode() + values.tobytes())
    for digest in read_all(_digest, paths):
        whole.update(digest)
    return whole.hexdigest()


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read: {reason(error)}") from None
