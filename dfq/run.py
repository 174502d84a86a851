"""A run folder: what was asked, what came out, and enough in between to go on after a kill.

    recipe.yaml         the resolved recipe, every value
    model.safetensors   the quantized network
    metrics.json        bits, share of MACs, agreement with the teacher, accuracy where measured
    manifest.json       what made it: checkpoint sha256, set, policy, versions
    log.txt             what happened when

The manifest is written last: a folder without one is an unfinished run, and the same command goes
on with it. Only `log.txt` holds times, so an interrupted run ends in the same files as an unbroken
one.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from .dataset.calibration import read_json, write_atomic, write_json
from .detectors import from_spec
from .detectors.base import Detector
from .errors import UserError
from .files import append_line
from .lock import locked
from .quantization.convert import Policy, fold, insert_quantizers
from .recipe import Recipe

KIND = "dfq quantized detector"
FORMAT = 1


class Run:
    """One run folder, opened for writing.

    Args:
        folder: made if missing; may hold an unfinished run of the same identity.
        identity: JSON-able values that fix the result.

    Raises:
        UserError: where the folder holds something else.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        if folder.exists():
            if not folder.is_dir():
                raise UserError(f"{folder}: a file is in the way of the run folder")
            # A process killed at its very start leaves the temporary state.
            if any(path.name != ".state.json.tmp" for path in folder.iterdir()):
                self._check()
        folder.mkdir(parents=True, exist_ok=True)
        if self.finished:
            self._tidy()
        elif not self._state.exists():
            write_json(self._state, identity)

    @property
    def _state(self) -> Path:
        return self.folder / "state.json"

    def _check(self) -> None:
        found = identity_of(self.folder)
        if found is None:
            raise UserError(f"{self.folder}: not empty and no run; choose another --out")
        found = _with_new_keys(found)
        if found != self.identity:
            keys = sorted(
                key for key in {*found, *self.identity} if found.get(key) != self.identity.get(key)
            )
            raise UserError(
                f"{self.folder}: holds a run with another {', '.join(keys)}; choose another --out"
            )

    @property
    def finished(self) -> bool:
        """Whether the run is complete: nothing is left to do."""
        return (self.folder / "manifest.json").is_file()

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Keep a second process from working in the same folder at the same time.

        Raises:
            UserError: where one does.
        """
        return locked(self.folder, f"{self.folder}: another process is working on this run")

    def log(self, text: str) -> None:
        """Append a line to `log.txt`, with the time."""
        append_line(self.folder / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")

    def finish(
        self, detector: Detector, policy: Policy, metrics: dict[str, Any], extra: dict[str, Any]
    ) -> None:
        """Write the model, the metrics and, last, the manifest; drop the training checkpoint."""
        tensors = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in detector.module.state_dict().items()
        }
        data = save(tensors, metadata={"kind": KIND})
        write_atomic(self.folder / "model.safetensors", data)
        write_json(self.folder / "metrics.json", metrics)
        manifest = {
            **extra,
            "kind": KIND,
            "format": FORMAT,
            "identity": self.identity,
            "spec": detector.spec(),
            "policy": policy.to_dict(),
            "model_sha256": hashlib.sha256(data).hexdigest(),
        }
        write_json(self.folder / "manifest.json", manifest)
        self._tidy()

    def _tidy(self) -> None:
        # Also what a process killed right after writing the manifest left behind.
        for name in ("state.json", "checkpoint.pt", ".checkpoint.pt.tmp"):
            (self.folder / name).unlink(missing_ok=True)


def identity_of(folder: Path) -> dict[str, Any] | None:
    """The identity of the run in a folder, finished or not; None where there is no run."""
    if (folder / "manifest.json").is_file():
        manifest = read_json(folder / "manifest.json")
        ours = isinstance(manifest, dict) and manifest.get("kind") == KIND
        return manifest.get("identity") if ours else None
    if (folder / "state.json").is_file():
        return read_json(folder / "state.json")
    return None


def _with_new_keys(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity as this version would write it: keys that the recipe did not have yet when the
    run was made have their defaults, which leave everything as it was."""
    try:
        recipe = Recipe.model_validate(identity["recipe"])
    except (KeyError, ValidationError):
        return identity
    return {**identity, "recipe": identity_of_recipe(recipe)}


def identity_of_recipe(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe fixes a run's result."""
    return recipe.model_dump(mode="json", exclude={"evaluation", "model"})


def next_folder(parent: Path, stem: str, identity: dict[str, Any]) -> Path:
    """`parent/stem-<n>`: an unfinished run of this identity if there is one, else a new number."""
    number = 1
    while (folder := parent / f"{stem}-{number}").exists():
        unfinished = not (folder / "manifest.json").is_file()
        found = identity_of(folder)
        ours = found is not None and _with_new_keys(found) == identity
        if unfinished and (ours or not any(folder.iterdir())):
            return folder
        number += 1
    return folder


def is_run(path: Path) -> bool:
    """Whether a path is a run folder, finished or not."""
    return path.is_dir() and any(
        (path / name).is_file() for name in ("manifest.json", "state.json", "recipe.yaml")
    )


def load_run(folder: str | Path, *, device: str = "cpu") -> Detector:
    """The quantized detector of a finished run; its outputs are bit-equal to those it was saved
    with.

    Raises:
        UserError: where the run is unfinished, or its files are damaged.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise UserError(
            f"{folder}: this run is unfinished; run the same command again to finish it"
        )
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise UserError(f"{folder}: holds no quantized model (manifest.json is of something else)")
    weights = folder / "model.safetensors"
    try:
        state = load_file(weights)
        detector = from_spec(manifest["spec"])
        insert_quantizers(fold(detector), Policy.from_dict(manifest["policy"]))
        detector.module.load_state_dict(state)
    except FileNotFoundError:
        raise UserError(f"{weights}: missing; run the command that made {folder} again") from None
    except (SafetensorError, RuntimeError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{weights}: damaged or does not fit its manifest ({reason})") from None
    detector.source = str(folder)
    return detector.to(device)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    from . import __version__

    return {"dfq": __version__, "torch": torch.__version__}
