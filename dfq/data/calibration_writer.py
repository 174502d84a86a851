"""Writing a calibration set, so that a killed run goes on where it was.

A set grows by shards (one optimised batch each). A shard's images are renamed into place first and
its record in `shards/` last, so the record is the commit: a killed run loses at most the shard in
flight and resumes to the same bytes. When the last shard is in, the records are merged into
`annotations.json` and `manifest.json` is written; only then is the set complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from ..errors import UserError
from ..runtime.files import read_json, write_atomic, write_json
from ..runtime.lock import locked
from .calibration_set import CalibrationSet
from .integrity import FORMAT, is_as_made, is_set_manifest, parse_annotations, require_own_folders


def _is_bare(root: Path) -> bool:
    """Whether a folder holds nothing, or only what a writer killed at its very start leaves."""
    # Not rglob, which stumbles over what another process is just clearing away.
    return all(
        set(folders) <= {"images", "shards"} and set(files) <= {".lock", ".identity.json.tmp"}
        for _, folders, files in os.walk(root)
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
        UserError: where the folder holds something else, or a set made from other determinants, or
            another process is about to make one in it.
    """

    def __init__(
        self, root: Path, determinants: dict[str, Any], names: Sequence[str], shards: int
    ) -> None:
        require_own_folders(root)
        self.root, self.determinants, self.names, self.shards = root, determinants, names, shards
        if root.exists() and not root.is_dir():
            raise UserError(
                f"{root}: a file is in the way of the set's folder; choose another --out"
            )
        if not self._is_ours():
            root.mkdir(parents=True, exist_ok=True)
            # Of two that begin at once, one is told here that it is the second.
            with self.lock():
                if not self._is_ours():
                    (root / "shards").mkdir(exist_ok=True)
                    write_json(self._identity, determinants)
        if not self.complete:
            (root / "images").mkdir(exist_ok=True)

    @property
    def _identity(self) -> Path:
        return self.root / "shards" / "identity.json"

    def _is_ours(self) -> bool:
        """Whether the folder holds this very set, finished or begun; nothing is written where it
        is: other processes of the same run may be reading it. What else it may hold is refused."""
        if self.complete:
            manifest = read_json(self.root / "manifest.json")
            if not is_set_manifest(manifest):
                raise UserError(f"{self.root}: holds something else; choose another --out")
            self._check(manifest["determinants"])
            self._tidy()
            return True
        if self._identity.exists():
            self._check(read_json(self._identity))
            return True
        if not self.root.exists() or _is_bare(self.root):
            return False
        # Another process may have begun or finished the set since the first look.
        if self.complete or self._identity.exists():
            return self._is_ours()
        raise UserError(f"{self.root}: not empty and no calibration set; choose another --out")

    def _check(self, recorded: dict[str, Any]) -> None:
        if recorded == self.determinants:
            return
        if not isinstance(recorded, dict):
            raise UserError(f"{self.root}: damaged (what determines the set is lost); delete it")
        keys = sorted(
            k
            for k in {*recorded, *self.determinants}
            if recorded.get(k) != self.determinants.get(k)
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
            record = read_json(self._record(index))
            files = record["shard"]["files"]
            parse_annotations(self._record(index), {**record, "categories": []})
        except (OSError, KeyError, TypeError, UserError):
            return False
        annotated = [image["file_name"] for image in record["images"]]
        return files == annotated and is_as_made(self.root, record["shard"])

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
        self,
        extra: dict[str, Any],
        before: Callable[[CalibrationSet], dict[str, Any]] | None = None,
    ) -> CalibrationSet:
        """Merge the shards' records and mark the set complete.

        Args:
            extra: joins the manifest.
            before: called with the merged set before it counts as complete, to add what belongs to
                it; again if the process dies meanwhile. What it returns joins the manifest.
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
            merged = CalibrationSet(
                self.root, *parse_annotations(annotations_file, document), manifest
            )
            manifest = {**before(merged), **manifest}
        write_json(self.root / "manifest.json", manifest)
        self._tidy()
        return CalibrationSet.open(self.root)
