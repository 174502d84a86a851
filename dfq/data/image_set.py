"""`ImageSet`: a real set of images with boxes, read from any format."""

from __future__ import annotations

import codecs
import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ..errors import UserError, shown
from ..models.coco_categories import match_names
from ..runtime.files import IMAGE_SUFFIXES, reason
from .outlines import BrokenOutline, Segment

__all__ = ["IMAGE_SUFFIXES", "BrokenOutline", "ImageSet", "Item", "Segment"]

_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Item:
    """One image and its boxes.

    Attributes:
        path: the image file.
        width, height: pixels, of the image as it is meant to be seen (EXIF orientation applied).
        boxes: float32 `(n, 4)`, x1 y1 x2 y2 in pixels, edges (a whole image is 0, 0, width,
            height).
        labels: int64 `(n,)`, indices into `ImageSet.names`.
        ignore: bool `(n,)`; true for COCO's crowd regions and VOC's difficult objects, which count
            neither as found nor as missed.
        area: float32 `(n,)`, square pixels: of the mask where the set states it, else of the box.
        image_id: unique in the set; COCO's own id where the set is COCO.
        segments: of each object its outline as COCO writes it, polygons (flat lists x1 y1 x2 y2 ...
            in pixels) or run lengths; None for an object whose outline the set does not state. A
            broken one matters where masks are measured only.
    """

    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    area: np.ndarray
    image_id: int
    segments: tuple[Segment | BrokenOutline | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.segments) not in (0, len(self.boxes)):
            raise ValueError(f"{len(self.segments)} segments of {len(self.boxes)} objects")

    @property
    def segmented(self) -> bool:
        """Whether the outline of every object is known; true where there is no object."""
        known = [segment for segment in self.segments if segment is not None]
        return len(known) == len(self.boxes)


@dataclass(frozen=True)
class ImageSet:
    """Images with boxes, in the order of the file that lists them.

    Attributes:
        source: what the user named, for messages.
        names: category names, in the set's own order.
        items: the images.
        labelled: false for a bare folder of images.
        dropped: boxes left out because a side was not positive or a number not finite, or
            because a YOLO label file holds them twice.
        first_dropped: file and row of the first of these; None where there is none.
        numbered: the set has no category names, and `names` are just numbers.
        split: which one of the set's splits or lists this is; None where it has none.
    """

    source: Path
    names: list[str]
    items: list[Item]
    labelled: bool = True
    dropped: int = 0
    first_dropped: str | None = None
    numbered: bool = False
    split: str | None = None

    def __post_init__(self) -> None:
        if not self.items:
            raise UserError(f"{self.source}: the set holds no images")

    def __len__(self) -> int:
        return len(self.items)

    def load_image(self, index: int) -> np.ndarray:
        """Read image `index`: uint8 `(height, width, 3)`, RGB, as large as its `Item` says.

        The EXIF orientation is applied, as `cv2.imread` does, unless only the stored pixels have
        the size that the annotations state (then the boxes were drawn on those).

        Raises:
            UserError: the file is no readable image, or has another size than its annotation says.
        """
        item = self.items[index]
        image = _decode(item.path, cv2.IMREAD_COLOR)
        if image.shape[:2] != (item.height, item.width):
            stored = _decode(item.path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
            if stored.shape[:2] != (item.height, item.width):
                raise UserError(
                    f"{item.path}: the image is {image.shape[1]} x {image.shape[0]} pixels, its "
                    f"annotation says {item.width} x {item.height}; use the images the "
                    "annotations were made for"
                )
            image = stored
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def require_boxes(self) -> None:
        """Refuse a set that has boxes, of which not one is usable.

        Raises:
            UserError: it is one; the first is named.
        """
        if self.dropped and not any(len(item.boxes) for item in self.items):
            raise UserError(
                f"{shown(self.source)}: none of its {self.dropped} boxes is usable, as none has a "
                f"positive, finite size; the first: {self.first_dropped}"
            )

    def remark(self) -> str | None:
        """What the reader left out, in a line; None for nothing."""
        if not self.dropped:
            return None
        return (
            f"{self.dropped} boxes left out (no positive size, not finite, or there twice); the "
            f"first: {self.first_dropped}"
        )

    def segmented(self) -> ImageSet | None:
        """The images whose objects' outlines are all known; None where no object has one.

        Raises:
            UserError: an outline is broken; the first one is named.
        """
        for item in self.items:
            for segment in item.segments:
                if isinstance(segment, BrokenOutline):
                    raise UserError(segment.problem)
        if not any(item.segmented and len(item.boxes) for item in self.items):
            return None
        return replace(self, items=[item for item in self.items if item.segmented])

    def only(self, indices: Sequence[int]) -> ImageSet:
        """These images alone, at least one."""
        return replace(self, items=[self.items[index] for index in indices])

    def head(self, n: int) -> ImageSet:
        """The first `n` images (all if there are fewer)."""
        return replace(self, items=self.items[: _at_least_one(n)])

    def subset(self, n: int, seed: int = 0) -> ImageSet:
        """`n` images drawn without replacement (all if there are fewer), in the set's order."""
        count = min(_at_least_one(n), len(self.items))
        indices = sorted(random.Random(seed).sample(range(len(self.items)), count))
        return replace(self, items=[self.items[index] for index in indices])

    def category_mapping(self, model_names: Sequence[str]) -> list[int | None]:
        """For each of `names`, the index of the model's category of that name, or None.

        Matched by name, never by position alone: see `coco_categories.match_names`.

        Raises:
            UserError: not one name is shared.
        """
        return match_names(self.names, model_names, shown(self.source), by_position=self.numbered)


def _at_least_one(n: int) -> int:
    if n < 1:
        raise UserError(f"the number of images must be at least 1, got {n}")
    return n


class _Quiet:
    """Within this context, in whichever threads, OpenCV writes nothing to standard error: what is
    wrong with a broken file is said in a line of ours."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._level = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._level = cv2.utils.logging.getLogLevel()
                cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                cv2.utils.logging.setLogLevel(self._level)


_QUIET = _Quiet()


def read_image(path: Path) -> np.ndarray:
    """An image file as it is meant to be seen: uint8 `(height, width, 3)`, RGB, EXIF orientation
    applied.

    Raises:
        UserError: it is no readable image.
    """
    return cv2.cvtColor(_decode(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def decoded_image(data: bytes, where: str) -> np.ndarray:
    """The same of a file's content; `where` it comes from is said in messages."""
    return cv2.cvtColor(
        _decoded(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR, where), cv2.COLOR_BGR2RGB
    )


def _decode(path: Path, flags: int) -> np.ndarray:
    try:
        # Not cv2.imread: it cannot open non-ASCII paths on Windows.
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
    return _decoded(data, flags, str(path))


def _decoded(data: np.ndarray, flags: int, where: str) -> np.ndarray:
    try:
        with _QUIET:
            image = cv2.imdecode(data, flags) if data.size else None
    except cv2.error:
        image = None
    if image is None:
        raise UserError(f"{where}: is not an image that can be read")
    return image


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, EXIF orientation applied, from the file's header alone.

    Raises:
        UserError: the file is missing or no image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    # ImportError: Ultralytics replaces Image.open by one that looks for a plug-in package.
    except (OSError, ValueError, SyntaxError, ImportError, Image.DecompressionBombError):
        raise UserError(f"{path}: is not an image that can be read") from None
    # Orientations 5 to 8 are the ones that turn the image on its side.
    return (height, width) if orientation >= 5 else (width, height)


def image_files(folder: Path) -> list[Path]:
    """All image files under `folder`, by their endings, sorted by path; folders that links lead to
    are searched too, each once."""
    return walk(folder, IMAGE_SUFFIXES)


def walk(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """All files under `folder` whose names end so (lower case), sorted by path; hidden ones are
    left out, and folders that links lead to are searched too, each once."""
    files, visited = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        # A link to a folder above leads here for ever.
        visited.add(os.path.realpath(place))
        folders[:] = [
            name
            for name in sorted(folders)
            if os.path.realpath(os.path.join(place, name)) not in visited
        ]
        files += [
            Path(place, name)
            for name in names
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".")
        ]
    return sorted(path for path in files if is_file(path))


def is_file(path: Path) -> bool:
    """Whether there is a regular file, or a link to one; false also for names that cannot be."""
    try:
        return path.is_file()
    except OSError:
        return False


def usable(boxes: np.ndarray) -> np.ndarray:
    """Which of the boxes `(n, 4)`, x1 y1 x2 y2, are finite and have positive sides: bool `(n,)`."""
    with np.errstate(over="ignore", invalid="ignore"):
        corners = boxes.astype(np.float32)
        sides = corners[:, 2:] - corners[:, :2]
    # Not `sides <= 0`: the comparison with NaN must drop the box.
    return np.asarray(np.isfinite(corners).all(axis=1) & (sides > 0).all(axis=1))


def make_item(
    path: Path,
    size: tuple[int, int],
    image_id: int,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    ignore: Sequence[bool] | None = None,
    area: Sequence[float | None] | None = None,
    segments: Sequence[Segment | BrokenOutline | None] | None = None,
) -> tuple[Item, int]:
    """An `Item` of the usable boxes, and how many boxes were not.

    Args:
        path: the image file.
        size: its width and height, pixels.
        image_id: unique in the set.
        boxes: x1 y1 x2 y2 in pixels. Boxes with a number that is not finite or a side that is not
            positive are left out.
        labels, ignore, area, segments: one a box; without `ignore` none is ignored; an area of
            None is the box's.
    """
    keep = usable(np.asarray(boxes, dtype=np.float64).reshape(-1, 4))
    with np.errstate(over="ignore", invalid="ignore"):
        corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4).astype(np.float32)
        sides = corners[:, 2:] - corners[:, :2]
        stated = np.array(
            [np.nan if value is None else value for value in area or [None] * len(corners)],
            np.float64,
        ).astype(np.float32)
        areas = np.where(np.isfinite(stated), stated, sides.prod(axis=1)).astype(np.float32)
    flags = np.zeros(len(corners), bool) if ignore is None else np.asarray(ignore, bool)
    item = Item(
        path=path,
        width=size[0],
        height=size[1],
        boxes=corners[keep],
        labels=np.asarray(labels, np.int64).reshape(-1)[keep],
        ignore=flags.reshape(-1)[keep],
        area=areas[keep],
        image_id=image_id,
        segments=tuple(segments[row] for row in np.flatnonzero(keep).tolist()) if segments else (),
    )
    return item, int((~keep).sum())


def require_images(where: Path, paths: Sequence[Path]) -> None:
    """Raise a `UserError` that names the first of `paths` that is no file, and how many are not."""
    missing = [path for path in paths if not is_file(path)]
    if missing:
        raise UserError(
            f"{shown(where)}: {len(missing)} of {len(paths)} images are missing, the first is "
            f"{shown(missing[0])}"
        )


def read_bytes(path: Path) -> bytes:
    """A file's content; nothing that is no regular file is waited for.

    Raises:
        UserError: it is missing or cannot be read.
    """
    try:
        if not path.exists():
            raise UserError(f"{shown(path)}: no such file")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise UserError(f"{shown(path)}: cannot be read: it is {kind}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read: {reason(error)}") from None


def read_text(path: Path) -> str:
    """A text file's content: UTF-8, or UTF-16 where a byte-order mark says so.

    Raises:
        UserError: it is missing or no such text.
    """
    data = read_bytes(path)
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{shown(path)}: is not a text file in UTF-8") from None
