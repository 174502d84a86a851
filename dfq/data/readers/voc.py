"""Reader for Pascal VOC sets (one XML file an image), in VOC's folders or as tools write them."""

from __future__ import annotations

import codecs
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError, shown
from ..gathered import Gathered
from ..image_set import (
    IMAGE_SUFFIXES,
    ImageSet,
    image_files,
    image_size,
    read_bytes,
    read_text,
    require_images,
    walk,
)

_SPLITS = ("val", "valid", "validation", "test", "all", "trainval", "train")

_XML = frozenset({".xml"})

# What is declared as the former is in practice the latter, which contains it.
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "ascii": "utf-8", "us-ascii": "utf-8"}


@dataclass(frozen=True)
class Layout:
    """Where a VOC set has its parts.

    Attributes:
        root: what the user named.
        annotations: folder of XML files, searched with its subfolders.
        images: folder of images, likewise.
    """

    root: Path
    annotations: Path
    images: Path

    def stem(self, annotation: Path) -> str:
        """Path of an XML file below its folder, without the ending."""
        return annotation.relative_to(self.annotations).with_suffix("").as_posix()


def is_voc(folder: Path) -> bool:
    """Whether a folder has the folders of Pascal VOC itself."""
    return (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()


def find_voc(folder: Path) -> Layout | None:
    """The layout of a VOC set in a folder: `Annotations/` and `JPEGImages/`, or `annotations/` and
    `images/`, or XML files beside the images; None where there is none."""
    if is_voc(folder):
        return Layout(folder, folder / "Annotations", folder / "JPEGImages")
    for place in (folder / "Annotations", folder / "annotations"):
        # Elsewhere this is where COCO's JSON is.
        if walk(place, _XML) and not list(place.glob("*.json")):
            image_folders = [folder / name for name in ("JPEGImages", "images", "Images")]
            return Layout(folder, place, next(filter(Path.is_dir, image_folders), folder))
    # Cameras put XML beside their pictures too.
    if any(_is_annotation(path) for path in walk(folder, _XML)[:20]):
        return Layout(folder, folder, folder)
    return None


def _is_annotation(path: Path) -> bool:
    try:
        return _root(path).tag == "annotation"
    except UserError:
        # To be read, and refused by name.
        return True


def read_voc(layout: Layout, split: str | None = None) -> ImageSet:
    """Read a Pascal VOC set.

    Categories are those that occur, sorted by name. VOC counts pixels from 1 and includes the
    last, so a box is `xmin - 1, ymin - 1, xmax, ymax`. Objects marked difficult are kept and
    ignored. An XML file and its image have one name but for the ending, and one place below their
    folders or a name that is unique there.

    Args:
        layout: where its parts are; lists in `ImageSets/Main/*.txt`, or else subfolders named like
            splits, are its splits.
        split: one of those; by default the first of val, valid, validation, test, all, trainval,
            train; without any, all annotations.

    Raises:
        UserError: broken XML, a missing list, annotation or image, or an image that could be one
            of several.
    """
    folder = layout.root
    annotations = _Index(layout.annotations, walk(layout.annotations, _XML))
    images = _Index(layout.images, image_files(layout.images))
    split, stems = _stems(layout, annotations, images, split)
    files = [_annotation(layout, annotations, stem) for stem in stems]
    candidates = [images.find(layout.stem(file)) for file in files]
    expected = [layout.images / f"{layout.stem(file)}.jpg" for file in files]
    require_images(folder, [*map(_first, candidates, expected)])
    parsed = [_parse(file) for file in files]
    paths = [*map(_image, files, candidates, parsed)]

    names = sorted({name for annotation in parsed for name, *_ in annotation.objects})
    index_of = {name: index for index, name in enumerate(names)}
    gathered = Gathered(folder)
    for image_id, (path, file, annotation) in enumerate(zip(paths, files, parsed, strict=True), 1):
        gathered.add(
            path,
            annotation.size or image_size(path),
            image_id,
            [box for _, box, _ in annotation.objects],
            [index_of[name] for name, _, _ in annotation.objects],
            [f"{shown(file)}: object {number}" for number in range(1, len(annotation.objects) + 1)],
            ignore=[difficult for _, _, difficult in annotation.objects],
        )
    return gathered.image_set(names, split=split)


class _Index:
    """Files of a folder by name without ending: the path below the folder, or the name alone."""

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self.folder = folder
        self.paths: dict[str, list[Path]] = defaultdict(list)
        self.names: dict[str, list[Path]] = defaultdict(list)
        for file in files:
            self.paths[file.relative_to(folder).with_suffix("").as_posix()].append(file)
            self.names[file.stem].append(file)

    def find(self, stem: str) -> list[Path]:
        """The files that a path or a name can mean; a path is no other folder's."""
        if stem in self.paths:
            return self.paths[stem]
        folder, _, name = stem.rpartition("/")
        return [
            file for file in self.names.get(name, []) if not folder or file.parent == self.folder
        ]


def _stems(
    layout: Layout, annotations: _Index, images: _Index, split: str | None
) -> tuple[str | None, list[str]]:
    """The split that is read, and the names of its annotations."""
    lists = {path.stem: path for path in (layout.root / "ImageSets" / "Main").glob("*.txt")}
    parts = {stem.rpartition("/")[0].partition("/")[0] for stem in annotations.paths}
    # Subfolders are splits only where all of them are.
    folders = set() if lists or not parts <= {*_SPLITS} else parts
    known = {*lists, *folders}
    if split is not None and split not in known:
        raise UserError(
            f"{layout.root}: ImageSets/Main has no list {split!r}; it has: "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    split = split or next((name for name in _SPLITS if name in known), None)
    if split is None:
        stems = sorted(annotations.paths)
    elif split in lists:
        lines = [line.strip() for line in read_text(lists[split]).splitlines()]
        stems = [_listed(line, annotations, images) for line in lines if line]
    else:
        stems = [stem for stem in sorted(annotations.paths) if stem.startswith(f"{split}/")]
    if not stems:
        raise UserError(f"{layout.root}: the set holds no images")
    return split, stems


def _listed(line: str, annotations: _Index, images: _Index) -> str:
    """What a line of a list names: the name may have spaces, and in a category's own list
    ("cat_val.txt") a second column follows it, -1, 0 or 1."""
    line = line.replace("\\", "/")
    without_flag = re.sub(r"\s+(-1|0|1)$", "", line)
    for name in (line, without_flag):
        ending = Path(name).suffix.lower()
        plain = name[: -len(ending)] if ending in IMAGE_SUFFIXES | _XML else name
        for stem in (name, plain):
            if annotations.find(stem) or images.find(stem):
                return stem
    return without_flag


def _annotation(layout: Layout, annotations: _Index, stem: str) -> Path:
    candidates = annotations.find(stem)
    if len(candidates) > 1:
        raise UserError(
            f"{layout.root}: {shown(repr(stem))} may be {shown(candidates[0])} or "
            f"{shown(candidates[1])}; write its folder too"
        )
    if not candidates:
        raise UserError(
            f"{layout.root}: there is no annotation of {shown(repr(stem))} in "
            f"{layout.annotations.name}/"
        )
    return candidates[0]


def _first(candidates: list[Path], expected: Path) -> Path:
    return candidates[0] if candidates else expected


def _image(file: Path, candidates: list[Path], annotation: _Annotation) -> Path:
    """The image of an annotation, of those that have its name."""
    if len(candidates) > 1:
        # Then the name that the annotation itself gives decides.
        candidates = [path for path in candidates if path.name == annotation.filename] or candidates
    if len(candidates) > 1:
        raise UserError(
            f"{shown(file)}: its image may be {shown(candidates[0])} or "
            f"{shown(candidates[1])}; keep one"
        )
    return candidates[0]


_Object = tuple[str, tuple[float, float, float, float], bool]


@dataclass(frozen=True)
class _Annotation:
    """One file: its objects (name, box, difficult), and size and name of the image if stated."""

    objects: list[_Object]
    size: tuple[int, int] | None
    filename: str | None


def _parse(path: Path) -> _Annotation:
    root = _root(path)
    if root.tag.lower() != "annotation" and root.find(".//object") is None:
        raise UserError(
            f"{shown(path)}: is no annotation: its XML is a {shown(repr(root.tag))}; move it away"
        )
    objects: list[_Object] = []
    for number, node in enumerate(root.iter("object"), 1):
        name = (node.findtext("name") or "").strip()
        if not name:
            raise UserError(f"{shown(path)}: object {number} has no name")
        x1, y1, x2, y2 = (
            _number(path, node, number, side) for side in ("xmin", "ymin", "xmax", "ymax")
        )
        difficult = (node.findtext("difficult") or "0").strip().casefold() in ("1", "true")
        objects.append((name, (x1 - 1, y1 - 1, x2, y2), difficult))
    filename = (root.findtext("filename") or "").strip().replace("\\", "/")
    return _Annotation(objects, _size(root), filename.rpartition("/")[2] or None)


def _root(path: Path) -> ElementTree.Element:
    text = _decoded(path)
    if "<!ENTITY" in text:
        raise UserError(f"{shown(path)}: declares entities, which no annotation needs")
    try:
        return ElementTree.fromstring(text.strip())
    except ElementTree.ParseError as error:
        raise UserError(f"{shown(path)}, line {error.position[0]}: broken XML: {error}") from None


def _decoded(path: Path) -> str:
    """The text of an XML file in whatever encoding it declares: the parser knows only some."""
    data = read_bytes(path)
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if wide or data[:4] in (b"<\0?\0", b"\0<\0?"):
        name = "utf-16" if wide else ("utf-16-le" if data[:1] == b"<" else "utf-16-be")
    else:
        declaration = re.match(
            rb"""\s*<\?xml[^>]{0,200}?\bencoding\s*=\s*["']([\w.:-]+)["']""", data
        )
        declared = declaration[1].decode("ascii").lower() if declaration else "utf-8"
        name = _WIDER.get(declared, declared)
        # It could be read as far as here: programs that write UTF-8 declare what they have inside.
        if name.startswith(("utf-16", "utf-32", "utf-8", "utf8", "ucs-2")):
            name = "utf-8-sig"
    try:
        return data.decode(name)
    except LookupError:
        raise UserError(f"{shown(path)}: is in an unknown encoding, {shown(name)}") from None
    except UnicodeError:
        raise UserError(
            f"{shown(path)}: is not a text file in {name.upper().removesuffix('-SIG')}, "
            "the encoding that it declares"
        ) from None


def _number(path: Path, node: ElementTree.Element, number: int, side: str) -> float:
    text = node.findtext(f"bndbox/{side}")
    try:
        return float(text or "")
    except ValueError:
        raise UserError(
            f"{shown(path)}: object {number} has no number for {side}: {shown(repr(text))}"
        ) from None


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    try:
        width, height = (int(root.findtext(f"size/{side}") or 0) for side in ("width", "height"))
    except ValueError:
        return None
    # Some labelling tools write 0 x 0: then the image's header decides.
    return (width, height) if width > 0 and height > 0 else None
