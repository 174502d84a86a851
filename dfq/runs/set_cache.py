"""The sets in the cache: where each goes, and what the newest one there was made from."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.calibration_set import CalibrationSet
from ..data.integrity import require_own_files
from ..errors import UserError
from ..models import load_model
from ..models.base import Model
from ..models.checkpoint import sha256_of
from ..runtime.files import read_json, user_path
from ..runtime.surroundings import cache_folder
from ..synthesis.pipeline import set_name
from ..synthesis.settings import Synthesis

_WEIGHTS = (".pt", ".pth", ".safetensors")
"""Files whose sha256 is the fingerprint of the detector in them."""


def cached_folder(detector: Model, settings: Synthesis, seed: int) -> Path:
    """The folder in the cache of the set that these determine, whether it is there yet or not."""
    cache, name = cache_folder(), set_name(detector, settings, seed)
    if (cache / name).exists():
        return cache / name
    # The end of the name says what is in the set; the beginning, what its model was called then.
    others = sorted(cache.glob(f"*-{name.rpartition('-')[2]}")) if cache.is_dir() else []
    return others[0] if others else cache / name


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a calibration set that is made."""
    return (folder / "manifest.json").is_file()


@dataclass(frozen=True)
class Origin:
    """What a calibration set was made from.

    Attributes:
        set: its folder.
        model: what names the model, from wherever it is asked.
        fingerprint: of the model.
    """

    set: Path
    model: str
    fingerprint: str

    def load(self, *, trust: bool, device: str) -> Model:
        """The very model.

        Raises:
            UserError: where it is gone, cannot be read or has changed, or reading it would run a
                program.
        """
        network, _, weights = self.model.rpartition("@")
        whole = not network or Path(self.model).is_file()
        for path in map(Path, (self.model,) if whole else (network, weights)):
            if path.is_absolute() and not path.is_file():
                raise UserError(f"{self._said}, which is not there any more; give --model")
            if path.suffix.lower() == ".py" and not trust:
                # The set's manifest is data, and data run nothing.
                raise UserError(f"{self._said}, a config, which is a program; give --model")
            # Of a described classifier, what is told counts too; it is checked below.
            described = not whole and Path(network).suffix.lower() in (".yaml", ".yml")
            if path.is_absolute() and path.suffix in _WEIGHTS and not described:
                self._check(sha256_of(path))
        try:
            detector = load_model(self.model, trust=trust, device=device)
        except UserError as error:
            raise UserError(f"{self._said}, and {error}; or give --model") from None
        self._check(detector.fingerprint)
        return detector

    @property
    def _said(self) -> str:
        return f"{self.set}: was made from {self.model}"

    def _check(self, fingerprint: str) -> None:
        if fingerprint != self.fingerprint:
            raise UserError(
                f"{self._said}, which has changed since (sha256 {fingerprint[:12]}..., then "
                f"{self.fingerprint[:12]}...); give --model"
            )


def origin_of(folder: Path) -> Origin:
    """What the complete calibration set in a folder was made from.

    Raises:
        UserError: where it is unfinished, or its manifest is broken or does not say.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        CalibrationSet.open(folder)
    require_own_files(folder, [path.name])
    manifest = read_json(path)
    try:
        # Sets of earlier versions have the name alone.
        model = manifest.get("model_path") or manifest["model"]
        fingerprint = manifest["determinants"]["checkpoint"]
    except (KeyError, TypeError, AttributeError):
        model = fingerprint = None
    if not (isinstance(model, str) and model and isinstance(fingerprint, str)):
        raise UserError(f"{path}: does not say what the set was made from; give --model")
    return Origin(folder, model, fingerprint)


def origin_for(data: str | Path | None) -> Origin | None:
    """What a set to train on was made from, if it is a calibration set, else what the newest one
    in the cache was; None where there is none.

    Raises:
        UserError: where that one is unfinished or damaged.
    """
    if data is not None and CalibrationSet.is_one(user_path(data)):
        return origin_of(user_path(data))
    return newest_origin()


def newest_origin() -> Origin | None:
    """What the newest complete set in the cache was made from; None where there is no set.

    Raises:
        UserError: where the newest one is damaged.
    """
    cache = cache_folder()
    dated_folders = []
    for path in cache.glob("*/manifest.json") if cache.is_dir() else ():
        # Another process may be clearing the cache.
        with contextlib.suppress(FileNotFoundError):
            dated_folders.append((path.stat().st_mtime_ns, path.parent))
    for _, folder in sorted(dated_folders, reverse=True):
        if CalibrationSet.is_one(folder):
            return origin_of(folder)
    return None


def sets_of_run(manifest: dict[str, Any]) -> list[Path]:
    """What images there are for a run: the set it was made on, where that was named and is still
    there, and those of its network in the cache; see `sets_of`."""
    named = manifest.get("data_path")
    cached = sets_of(manifest["identity"]["checkpoint"])
    if not isinstance(named, str) or not Path(named).exists():
        return cached
    return [Path(named), *(folder for folder in cached if folder != Path(named))]


def sets_of(fingerprint: str) -> list[Path]:
    """Folders of the complete sets in the cache that were made from a model, newest first; those
    that are damaged are passed over."""
    cache = cache_folder()
    dated_folders = []
    for path in cache.glob("*/manifest.json") if cache.is_dir() else ():
        with contextlib.suppress(FileNotFoundError, UserError):
            if (
                CalibrationSet.is_one(path.parent)
                and origin_of(path.parent).fingerprint == fingerprint
            ):
                dated_folders.append((path.stat().st_mtime_ns, path.parent))
    return [folder for _, folder in sorted(dated_folders, reverse=True)]
