"""The calibration set: synthetic images and labels at rest, in a folder any COCO tool opens.

    images/00000000.png ...    lossless, 8 bit
    annotations.json           COCO detection format; each box with the teacher's score
    manifest.json              what made it, and one line a shard with its sha256

A set grows by shards (one optimised batch each). A shard's images are renamed into place first and
its record in `shards/` last, so the record is the commit: a killed run loses at most the shard in
flight and resumes to the same bytes. When the last shard is in, the records are merged into
`annotations.json` and `manifest.json` is written; only then is the set complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from ..detectors.base import Targets
from ..errors import UserError, shown
from ..files import read_json, read_regular, write_atomic, write_json
from ..lock import locked
from .integrity import (
    FORMAT,
    changed_shard,
    checked_manifest,
    is_readable,
    label_problems,
    parse_annotations,
    require_own_files,
    require_own_folders,
    shard_digest,
)


@dataclass(frozen=True)
class CalibrationSet:
    """A complete calibration set, opened for reading.

    Attributes:
        root: its folder.
        names: category names by index.
        files: image files relative to `root`, in order.
        labels: per image float32 `(n, 5)`: category, cx, cy, w, h in [0, 1].
        scores: per image float32 `(n,)`: how sure the teacher is of each label on that image.
        manifest: what made it.
    """

    root: Path
    names: list[str]
    files: list[str]
    labels: list[Tensor]
    scores: list[Tensor]
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.files)

    @classmethod
    def is_one(cls, root: Path) -> bool:
        """Whether the folder was written by this tool (complete or not)."""
        if (root / "shards" / "identity.json").is_file():
            return True
        manifest = root / "manifest.json"
        return manifest.is_file() and _is_set_manifest(read_json(manifest))

    @classmethod
    def open(cls, root: str | Path) -> CalibrationSet:
        """Open a complete set. Nothing out of its folder is read, whatever its files say.

        Raises:
            UserError: where there is none, where it is unfinished, or a file of it is broken, a
                link, or names something elsewhere.
        """
        root = Path(root)
        manifest_file, annotations = root / "manifest.json", root / "annotations.json"
        if not manifest_file.is_file():
            if (root / "shards").is_dir():
                done = len(list((root / "shards").glob("[0-9]*.json")))
                raise UserError(
                    f"{root}: this set is unfinished ({done} shards so far); run the same "
                    f"'dfq synthesize' command again to finish it"
                )
            raise UserError(f"{shown(root)}: no calibration set here (no manifest.json)")
        require_own_files(root, [manifest_file.name, annotations.name])
        manifest = read_json(manifest_file)
        if not _is_set_manifest(manifest):
            raise UserError(f"{root}: no calibration set here (manifest.json is of something else)")
        manifest = checked_manifest(manifest_file, manifest)
        found = cls(root, *parse_annotations(annotations, read_json(annotations)), manifest)
        require_own_files(root, found.files)
        return found

    def require_intact(self) -> CalibrationSet:
        """This set, where it is what it was made as; asked by all that use it. Images are hashed at
        the first time, and again where their sizes or times changed.

        Raises:
            UserError: where it is not; the first thing that is wrong.
        """
        if not self.files:
            raise UserError(f"{self.root}: the set holds no images")
        missing = [name for name in self.files if not (self.root / name).is_file()]
        if missing:
            raise UserError(
                f"{self.root}: {len(missing)} of {len(self)} images are missing, the first is "
                f"{missing[0]}; make the set again"
            )
        problems = self._label_problems()
        if problems:
            raise UserError(f"{self.root}: {problems[0]}; restore it or make the set again")
        require_own_files(self.root, self.files)
        changed = changed_shard(self.root, self.manifest)
        if changed is not None:
            for name in changed["files"]:
                if not is_readable(self.root / "images" / name):
                    raise _unreadable(self.root / "images" / name)
            first, last = changed["files"][0], changed["files"][-1]
            raise UserError(
                f"{self.root}: shard {changed['index']} (images/{first} to {last}): its images are "
                "not those it was made with; restore them, or delete the set and make it again"
            )
        return self

    def _label_problems(self) -> list[str]:
        """What is wrong but for the images' pixels, one line each."""
        problems = label_problems(self.files, self.labels, self.scores, len(self.names))
        made = [f"images/{name}" for shard in self.manifest["shards"] for name in shard["files"]]
        if sorted(made) != sorted(self.files):
            problems.append("annotations.json: its images are not those that the manifest records")
        digest = hashlib.sha256(read_regular(self.root / "annotations.json")).hexdigest()
        if digest != self.manifest["annotations_sha256"]:
            problems.append("annotations.json: not what the manifest records")
        return problems

    def load(self, indices: Sequence[int]) -> Tensor:
        """Images as uint8 `(n, 3, h, w)`, RGB."""
        images = [_read_png(self.root / self.files[i]) for i in indices]
        if len({image.shape for image in images}) > 1:
            raise UserError(f"{self.root}: its images are not all of one size; make the set again")
        return torch.stack(images)

    def targets(self, indices: Sequence[int]) -> Targets:
        """Labels of those images as one batch."""
        return Targets.from_per_image([self.labels[i] for i in indices])

    def verify(self) -> list[str]:
        """Every way in which the folder differs from its manifest, one line each; [] if none."""
        problems = []
        for shard in self.manifest["shards"]:
            for name in shard["files"]:
                path = self.root / "images" / name
                if not path.is_file():
                    problems.append(f"{path}: missing")
                    continue
                if not is_readable(path):
                    problems.append(str(_unreadable(path)))
            if not _is_as_made(self.root, shard):
                problems.append(
                    f"shard {shard['index']}: its images are not those it was made with"
                )
        return problems + self._label_problems()


def _is_set_manifest(manifest: Any) -> bool:
    return isinstance(manifest, dict) and {"determinants", "shards"} <= manifest.keys()


def _is_as_made(root: Path, shard: Any) -> bool:
    """Whether the images of a shard are those of its record, which may be broken too."""
    try:
        return shard_digest(root, shard["files"]) == shard["sha256"]
    except (UserError, KeyError, TypeError):
        return False


def _unreadable(path: Path) -> UserError:
    return UserError(f"{path}: missing or not a readable image; make the set again")


def _read_png(path: Path) -> Tensor:
    try:
        data = np.frombuffer(read_regular(path), np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except (UserError, cv2.error):
        image = None
    if image is None:
        raise _unreadable(path)
    return torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_BGR2RGB)).permute(2, 0, 1).contiguous()


def _is_bare(root: Path) -> bool:
    """Whether a folder holds nothing, or only what a writer killed at its very start leaves."""
    own = {".lock", ".identity.json.tmp"}
    return all(
        path.name in own or (path.is_dir() and path.name in ("images", "shards"))
        for path in root.rglob("*")
    )


class CalibrationWriter:
    """Appends shards to a set, each atomically, in any order.

    Args:
        root: the folder; made if missing.
        determinants: JSON-able values that fix the content (checkpoint sha256, settings, seed...).
            An unfinished set with other determinants is refused.
        names: category names.
        shards: how many there will be.

    Raises:
        UserError: where the folder holds something else, or a set made from other determinants.
    """

    def __init__(
        self, root: Path, determinants: dict[str, Any], names: Sequence[str], shards: int
    ) -> None:
        require_own_folders(root)
        self.root, self.determinants, self.names, self.shards = root, determinants, names, shards
        identity = root / "shards" / "identity.json"
        if root.exists() and not root.is_dir():
            raise UserError(
                f"{root}: a file is in the way of the set's folder; choose another --out"
            )
        if self.complete:
            manifest = read_json(root / "manifest.json")
            if not _is_set_manifest(manifest):
                raise UserError(f"{root}: holds something else; choose another --out")
            self._check(manifest["determinants"])
            self._tidy()
        elif identity.exists():
            self._check(read_json(identity))
        elif root.exists() and not _is_bare(root):
            raise UserError(f"{root}: not empty and no calibration set; choose another --out")
        if not self.complete:
            (root / "images").mkdir(parents=True, exist_ok=True)
            (root / "shards").mkdir(exist_ok=True)
            # Left alone where it is: other processes of the same run may be reading it.
            if not identity.exists():
                write_json(identity, determinants)

    def _check(self, found: dict[str, Any]) -> None:
        if found == self.determinants:
            return
        if not isinstance(found, dict):
            raise UserError(f"{self.root}: damaged (what determines the set is lost); delete it")
        keys = sorted(
            k for k in {*found, *self.determinants} if found.get(k) != self.determinants.get(k)
        )
        raise UserError(
            f"{self.root}: holds a set made with another {', '.join(keys)}; "
            f"choose another --out or delete it"
        )

    @property
    def complete(self) -> bool:
        """Whether the set is finished: nothing is left to do."""
        return (self.root / "manifest.json").is_file()

    def _tidy(self) -> None:
        # Also what a process killed right after writing the manifest left behind.
        shutil.rmtree(self.root / "shards", ignore_errors=True)
        (self.root / ".lock").unlink(missing_ok=True)

    def _record(self, index: int) -> Path:
        return self.root / "shards" / f"{index:06d}.json"

    def missing(self) -> list[int]:
        """Indices of the shards still to be made; one whose record is truncated, or whose images
        are not those it was made with, counts as missing."""
        if self.complete:
            return []
        return [index for index in range(self.shards) if not self._is_made(index)]

    def _is_made(self, index: int) -> bool:
        try:
            record = json.loads(self._record(index).read_text())
            files = record["shard"]["files"]
            parse_annotations(self._record(index), {**record, "categories": []})
        except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError):
            return False
        named = [image["file_name"] for image in record["images"]]
        return files == named and _is_as_made(self.root, record["shard"])

    def recorded(self, index: int) -> bool:
        """Whether shard `index` is committed, by whichever process; quick to ask."""
        return self._record(index).is_file()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process from writing the same set at the same time."""
        with locked(self.root, f"{self.root}: another process is making this set"):
            yield

    def append(
        self,
        index: int,
        first_image: int,
        images: Tensor,
        labels: Sequence[Tensor],
        scores: Sequence[Tensor],
    ) -> None:
        """Commit shard `index`.

        Args:
            index: 0 .. shards - 1.
            first_image: number of its first image within the set.
            images: uint8 `(n, 3, h, w)`, RGB.
            labels, scores: per image, as in `CalibrationSet`.
        """
        height, width = images.shape[2:]
        digest = hashlib.sha256()
        entries, annotations = [], []
        for offset, (image, label, score) in enumerate(zip(images, labels, scores, strict=True)):
            number = first_image + offset
            name = f"{number:08d}.png"
            # By NumPy alone, in one thread: torch may be busy in another one of this process.
            pixels = np.ascontiguousarray(image.numpy().transpose(1, 2, 0)[:, :, ::-1])
            encoded = cv2.imencode(".png", pixels)[1].tobytes()
            digest.update(encoded)
            write_atomic(self.root / "images" / name, encoded)
            entries.append({"id": number, "file_name": name, "width": width, "height": height})
            for row, confidence in zip(label.tolist(), score.tolist(), strict=True):
                category, cx, cy, w, h = row
                annotations.append(
                    {
                        "image_id": number,
                        "category_id": int(category) + 1,
                        "bbox": [
                            round((cx - w / 2) * width, 4),
                            round((cy - h / 2) * height, 4),
                            round(w * width, 4),
                            round(h * height, 4),
                        ],
                        "area": round(w * width * h * height, 4),
                        "iscrowd": 0,
                        "score": round(confidence, 5),
                    }
                )
        record = {
            "index": index,
            "files": [e["file_name"] for e in entries],
            "sha256": digest.hexdigest(),
        }
        write_json(
            self._record(index), {"shard": record, "images": entries, "annotations": annotations}
        )

    def finish(
        self, extra: dict[str, Any], before: Callable[[CalibrationSet], None] | None = None
    ) -> CalibrationSet:
        """Merge the shards' records and mark the set complete.

        Args:
            extra: joins the manifest.
            before: called with the merged set before it counts as complete, to add what belongs to
                it; again if the process dies meanwhile.
        """
        if self.complete:
            return CalibrationSet.open(self.root)
        records = [read_json(self._record(index)) for index in range(self.shards)]
        annotations = [a for record in records for a in record["annotations"]]
        document = {
            "info": {"description": "synthetic calibration set made by dfq"},
            "images": [image for record in records for image in record["images"]],
            "annotations": [{"id": i + 1, **a} for i, a in enumerate(annotations)],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(self.names)],
        }
        write_json(self.root / "annotations.json", document)
        digest = hashlib.sha256((self.root / "annotations.json").read_bytes()).hexdigest()
        manifest = {
            **extra,
            "format": FORMAT,
            "determinants": self.determinants,
            "images": len(document["images"]),
            "annotations_sha256": digest,
            "shards": [record["shard"] for record in records],
        }
        if before is not None:
            annotations_file = self.root / "annotations.json"
            before(
                CalibrationSet(self.root, *parse_annotations(annotations_file, document), manifest)
            )
        write_json(self.root / "manifest.json", manifest)
        self._tidy()
        return CalibrationSet.open(self.root)
