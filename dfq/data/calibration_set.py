"""The calibration set: synthetic images and labels at rest, in a folder any COCO tool opens.

images/00000000.png ...    lossless, 8 bit
annotations.json           COCO detection format; each box with the teacher's score
manifest.json              what made it, and one line a shard with its sha256
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, shown
from ..models.base import Targets
from ..runtime.ahead import read_all
from ..runtime.files import read_json, read_regular
from .integrity import (
    changed_shard,
    checked_manifest,
    is_as_made,
    is_readable,
    is_set_manifest,
    label_problems,
    parse_annotations,
    require_own_files,
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
        return manifest.is_file() and is_set_manifest(read_json(manifest))

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
        if not is_set_manifest(manifest):
            raise UserError(f"{root}: no calibration set here (manifest.json is of something else)")
        manifest = checked_manifest(manifest_file, manifest)
        calibration_set = cls(
            root, *parse_annotations(annotations, read_json(annotations)), manifest
        )
        require_own_files(root, calibration_set.files)
        return calibration_set

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
        recorded = [
            f"images/{name}" for shard in self.manifest["shards"] for name in shard["files"]
        ]
        if sorted(recorded) != sorted(self.files):
            problems.append("annotations.json: its images are not those that the manifest records")
        digest = hashlib.sha256(read_regular(self.root / "annotations.json")).hexdigest()
        if digest != self.manifest["annotations_sha256"]:
            problems.append("annotations.json: not what the manifest records")
        return problems

    def load(self, indices: Sequence[int]) -> Tensor:
        """Images as uint8 `(n, 3, h, w)`, RGB."""
        images = read_all(lambda index: _read_png(self.root / self.files[index]), indices)
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
            if not is_as_made(self.root, shard):
                problems.append(
                    f"shard {shard['index']}: its images are not those it was made with"
                )
        return problems + self._label_problems()


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
