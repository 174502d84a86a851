"""Reader for Pascal VOC folders (one XML file an image)."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from ..errors import UserError
from .image_set import (
    IMAGE_SUFFIXES,
    ImageSet,
    Item,
    image_size,
    make_item,
    read_text,
    require_images,
)

_SPLITS = ("val", "test", "all", "trainval", "train")


def read_voc(folder: Path, split: str | None = None) -> ImageSet:
    """Read a Pascal VOC folder.

    Categories are those that occur, sorted by name. VOC counts pixels from 1 and includes the
    last, so a box is `xmin - 1, ymin - 1, xmax, ymax`. Objects marked difficult are kept and
    ignored.

    Args:
        folder: holds `Annotations/*.xml`, `JPEGImages/` and, unless every annotation is meant,
            `ImageSets/Main/*.txt`.
        split: a list of `ImageSets/Main`; by default the first of val, test, all, trainval, train.

    Raises:
        UserError: broken XML, a missing list, annotation or image.
    """
    stems = _stems(folder, split)
    images = {
        path.stem: path
        for path in (folder / "JPEGImages").iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
    }
    paths = [images.get(stem, folder / "JPEGImages" / f"{stem}.jpg") for stem in stems]
    require_images(folder, paths)

    parsed = [_parse(folder / "Annotations" / f"{stem}.xml") for stem in stems]
    names = sorted({name for objects, _ in parsed for name, *_ in objects})
    index_of = {name: index for index, name in enumerate(names)}
    items: list[Item] = []
    dropped = 0
    for image_id, (path, (objects, size)) in enumerate(zip(paths, parsed, strict=True), 1):
        item, lost = make_item(
            path,
            size or image_size(path),
            image_id,
            [box for _, box, _ in objects],
            [index_of[name] for name, _, _ in objects],
            [difficult for _, _, difficult in objects],
        )
        items.append(item)
        dropped += lost
    return ImageSet(folder, names, items, dropped=dropped)


def _stems(folder: Path, split: str | None) -> list[str]:
    lists = {path.stem: path for path in (folder / "ImageSets" / "Main").glob("*.txt")}
    if split is not None and split not in lists:
        known = ", ".join(sorted(lists)) or "none"
        raise UserError(f"{folder}: ImageSets/Main has no list {split!r}; it has: {known}")
    chosen = split or next((name for name in _SPLITS if name in lists), None)
    if chosen is None:
        stems = sorted(path.stem for path in (folder / "Annotations").glob("*.xml"))
    else:
        # A category's own list ("cat_val.txt") has a second column: -1, 0 or 1.
        lines = read_text(lists[chosen]).splitlines()
        stems = [line.split()[0] for line in lines if line.strip()]
    if not stems:
        raise UserError(f"{folder}: the set holds no images")
    return stems


_Object = tuple[str, tuple[float, float, float, float], bool]


def _parse(path: Path) -> tuple[list[_Object], tuple[int, int] | None]:
    """The objects (name, box, difficult) of one file, and the image's size if stated."""
    try:
        root = ElementTree.fromstring(read_text(path).strip())
    except ElementTree.ParseError as error:
        raise UserError(f"{path}, line {error.position[0]}: broken XML: {error}") from None
    objects: list[_Object] = []
    for number, node in enumerate(root.iter("object"), 1):
        name = (node.findtext("name") or "").strip()
        if not name:
            raise UserError(f"{path}: object {number} has no name")
        x1, y1, x2, y2 = (
            _number(path, node, number, side) for side in ("xmin", "ymin", "xmax", "ymax")
        )
        difficult = (node.findtext("difficult") or "0").strip() == "1"
        objects.append((name, (x1 - 1, y1 - 1, x2, y2), difficult))
    return objects, _size(root)


def _number(path: Path, node: ElementTree.Element, number: int, side: str) -> float:
    text = node.findtext(f"bndbox/{side}")
    try:
        return float(text or "")
    except ValueError:
        raise UserError(f"{path}: object {number} has no number for {side}: {text!r}") from None


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    try:
        width, height = (int(root.findtext(f"size/{side}") or 0) for side in ("width", "height"))
    except ValueError:
        return None
    # Some labelling tools write 0 x 0: then the image's header decides.
    return (width, height) if width > 0 and height > 0 else None
