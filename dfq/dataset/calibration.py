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
import os
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
from ..errors import UserError
from ..lock import locked

FORMAT = 1


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: to a temporary name beside it, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON with sorted keys: equal values give equal bytes."""
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse a JSON file of ours; a broken one is a `UserError` that names it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: broken or truncated JSON ({error}); restore or delete it"
        ) from None


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
        """Open a complete set.

        Raises:
            UserError: where there is none, where it is unfinished, or a file of it is broken.
        """
        root = Path(root)
        if not (root / "manifest.json").is_file():
            if (root / "shards").is_dir():
                done = len(list((root / "shards").glob("[0-9]*.json")))
                raise UserError(
                    f"{root}: this set is unfinished ({done} shards so far); run the same "
                    f"'dfq synthesize' command again to finish it"
                )
            raise UserError(f"{root}: no calibration set here (no manifest.json)")
        manifest = read_json(root / "manifest.json")
        if not _is_set_manifest(manifest):
            raise UserError(f"{root}: no calibration set here (manifest.json is of something else)")
        document = read_json(root / "annotations.json")
        try:
            return cls._parse(root, manifest, document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{root / 'annotations.json'}: not as dfq wrote it ({type(error).__name__}: "
                f"{error}); restore it or make the set again"
            ) from None

    @classmethod
    def _parse(cls, root: Path, manifest: dict[str, Any], document: Any) -> CalibrationSet:
        categories = sorted(document["categories"], key=lambda c: c["id"])
        by_image: dict[int, list[dict[str, Any]]] = {
            image["id"]: [] for image in document["images"]
        }
        for annotation in document["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
        files, labels, scores = [], [], []
        for image in document["images"]:
            rows = by_image[image["id"]]
            boxes = torch.tensor([r["bbox"] for r in rows], dtype=torch.float64).reshape(-1, 4)
            sides = torch.tensor([image["width"], image["height"]] * 2, dtype=torch.float64)
            boxes = boxes / sides
            boxes[:, :2] += boxes[:, 2:] / 2
            category = torch.tensor([r["category_id"] - 1 for r in rows], dtype=torch.float64)
            files.append(f"images/{image['file_name']}")
            labels.append(torch.cat([category[:, None], boxes], dim=1).float())
            scores.append(torch.tensor([r["score"] for r in rows], dtype=torch.float32))
        return cls(root, [c["name"] for c in categories], files, labels, scores, manifest)

    def load(self, indices: Sequence[int]) -> Tensor:
        """Images as uint8 `(n, 3, h, w)`, RGB."""
        return torch.stack([_read_png(self.root / self.files[i]) for i in indices])

    def targets(self, indices: Sequence[int]) -> Targets:
        """Labels of those images as one batch."""
        return Targets.from_per_image([self.labels[i] for i in indices])

    def verify(self) -> list[str]:
        """Every way in which the folder differs from its manifest, one line each; [] if none."""
        problems = []
        for shard in self.manifest["shards"]:
            digest = hashlib.sha256()
            for name in shard["files"]:
                path = self.root / "images" / name
                if not path.is_file():
                    problems.append(f"{path}: missing")
                    continue
                digest.update(path.read_bytes())
                try:
                    _read_png(path)
                except UserError as error:
                    problems.append(str(error))
            if digest.hexdigest() != shard["sha256"]:
                problems.append(
                    f"shard {shard['index']}: its images are not those it was made with"
                )
        for name, label in zip(self.files, self.labels, strict=True):
            corners = torch.cat(
                [label[:, 1:3] - label[:, 3:] / 2, label[:, 1:3] + label[:, 3:] / 2]
            )
            if len(label) and (corners.min() < -1e-3 or corners.max() > 1 + 1e-3):
                problems.append(f"{name}: a box leaves the image")
            if len(label) and not 0 <= int(label[:, 0].min()) <= int(label[:, 0].max()) < len(
                self.names
            ):
                problems.append(f"{name}: a category is out of range")
        recorded = self.manifest["annotations_sha256"]
        actual = hashlib.sha256((self.root / "annotations.json").read_bytes()).hexdigest()
        if recorded != actual:
            problems.append("annotations.json: not what the manifest records")
        return problems


def _is_set_manifest(manifest: Any) -> bool:
    return isinstance(manifest, dict) and {"determinants", "shards"} <= manifest.keys()


def _read_png(path: Path) -> Tensor:
    data = np.fromfile(path, dtype=np.uint8) if path.is_file() else np.zeros(0, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if image is None:
        raise UserError(f"{path}: missing or not a readable image; make the set again")
    return torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_BGR2RGB)).permute(2, 0, 1).contiguous()


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
            if not _is_set_manifest(manifest):
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
        """Indices of the shards still to be made; a truncated record counts as missing."""
        if self.complete:
            return []
        absent = []
        for index in range(self.shards):
            try:
                json.loads(self._record(index).read_text())
            except (FileNotFoundError, ValueError):
                absent.append(index)
        return absent

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
            before(CalibrationSet._parse(self.root, manifest, document))
        write_json(self.root / "manifest.json", manifest)
        self._tidy()
        return CalibrationSet.open(self.root)
