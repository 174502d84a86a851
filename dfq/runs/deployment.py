"""The folder of a deployment: the request, and, once it is finished, all results.

    <model>-int8.onnx    the file for the target; the float one beside it, -float.onnx
    run/                 the run that it was exported from
    report.html          the page of it, for people
    deploy.json          what was asked; in the end all figures, with the commands that repeat them

`deploy.json` says that it is finished when it is written for the second time, last of all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, shown
from ..models.checkpoint import sha256_of
from ..runtime.files import plain_name, read_json, write_json
from ..runtime.lock import LOCK, locked, sweep_lock
from ..runtime.plain import brief
from .identity import differing, in_todays_keys

KIND = "dfq deployment"
FORMAT = 1

NAME = "deploy.json"
_MAKING = ".making"
"""Where files are written before they get their names."""

_LEFT_BEHIND = {LOCK, f".{NAME}.tmp", _MAKING}


@dataclass(frozen=True)
class Deployment:
    """What `dfq deploy` made.

    Attributes:
        folder: where it is.
        model, reference: the files for the target and of the float network; the former None where
            the target's own compiler makes it.
        faults: what is wrong with the file, a line each; empty: nothing was found.
        said: what there is to know, a line each.
        next: commands to go on with.
        figures: what `deploy.json` holds.
        new: whether anything was done; a finished one is left as it is.
    """

    folder: Path
    model: Path | None
    reference: Path
    faults: list[str]
    said: list[str]
    next: list[str]
    figures: dict[str, Any] = field(repr=False)
    new: bool = True

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        return self.figures


class DeploymentFolder:
    """The folder of one deployment, opened for writing.

    Args:
        folder: made if missing; may hold an unfinished or finished one of the same identity.
        identity: JSON-able values that fix the result.

    Raises:
        UserError: it holds something else.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        recorded = identity_of(folder)
        if recorded is None:
            if not is_bare(folder):
                raise UserError(f"{folder}: not empty and no deployment; choose another --out")
            folder.mkdir(parents=True, exist_ok=True)
        elif keys := differing(recorded, identity):
            raise UserError(
                f"{folder}: holds a deployment of another {', '.join(keys)}; choose another --out"
            )

    @contextlib.contextmanager
    def lock(self) -> Any:
        """Keep a second process from working here, and sweep away what a killed one left."""
        with locked(self.folder, f"{self.folder}: another process is working on this deployment"):
            shutil.rmtree(self.folder / _MAKING, ignore_errors=True)
            if identity_of(self.folder) is None:
                self.write({"finished": False})
            yield

    def write(self, content: dict[str, Any]) -> None:
        """Write `deploy.json`."""
        head = {"kind": KIND, "format": FORMAT, "identity": self.identity}
        write_json(self.folder / NAME, {**content, **head})

    @contextlib.contextmanager
    def making(self) -> Any:
        """A folder whose files get their places in this one when the block ends, those with a
        suffix of their own last: where one is, all are."""
        place = self.folder / _MAKING
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            yield place
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        # Weights of a format that keeps them apart come before the file that refers to them.
        for file in sorted(place.iterdir(), key=lambda path: (path.suffix != ".bin", path.name)):
            os.replace(file, self.folder / file.name)
        place.rmdir()

    def finished(self) -> dict[str, Any] | None:
        """What `deploy.json` says of a finished one whose files are all there; None: there is work
        to do.

        Raises:
            UserError: a file is not what it was.
        """
        path = self.folder / NAME
        content = read_json(path) if path.is_file() else {}
        if content.get("finished") is not True:
            return None
        files = content.get("files")
        if not isinstance(files, dict) or not all(map(plain_name, files)):
            raise UserError(f"{path}: not as dfq wrote it; restore it, or delete {self.folder}")
        for name, about in files.items():
            file = self.folder / name
            if not file.is_file():
                return None
            if not isinstance(about, dict) or sha256_of(file) != about.get("sha256"):
                raise UserError(
                    f"{file}: altered, as its sha256 is not the one in {NAME}; restore it, or "
                    "delete it and run the same command again"
                )
        sweep_lock(self.folder)
        return dict(content)


def is_bare(folder: Path) -> bool:
    """Whether a folder is not there, or holds no more than a process killed at its very start
    leaves."""
    return not folder.exists() or {path.name for path in folder.iterdir()} <= _LEFT_BEHIND


def identity_of(folder: Path) -> dict[str, Any] | None:
    """The identity of the deployment in a folder, finished or not; None where there is none.

    Raises:
        UserError: the file that says so is broken, or of another version.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserError(f"{path}: is of something else; choose another --out")
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path}: of format {brief(content.get('format'))}, and this dfq reads {FORMAT}; "
            "choose another --out"
        )
    identity = content.get("identity")
    if not isinstance(identity, dict):
        raise UserError(f"{path}: damaged (it does not say what it is of); restore or delete it")
    return in_todays_keys(identity)


def folder_for(parent: Path, stem: str, identity: dict[str, Any]) -> Path:
    """`parent/stem-<n>`: the one of this identity, finished or not, else a new number."""
    number = 1
    while not is_bare(folder := parent / f"{stem}-{number}"):
        try:
            recorded = identity_of(folder)
            if recorded is not None and not differing(recorded, identity):
                break
        except UserError:
            # Somebody else's, or broken: not this one.
            pass
        number += 1
    return folder


def described(files: Iterable[tuple[Path, str]]) -> dict[str, dict[str, Any]]:
    """Of each file its sha256, size in bytes, and what it is."""
    return {
        shown(path.name): {
            "sha256": sha256_of(path),
            "bytes": path.stat().st_size,
            "what": description,
        }
        for path, description in files
    }
