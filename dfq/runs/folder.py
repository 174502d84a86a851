"""A run folder: settings, results, and checkpoints to resume from after a kill.

    recipe.yaml         the resolved recipe, every value
    model.safetensors   the quantized network, with all it takes to load it; its quantized weights
                        as integers (`quantization.storage`)
    metrics.json        bits, share of MACs, agreement with the teacher, accuracy where measured
    manifest.json       what made it: checkpoint sha256, set, policy, versions; sha256 of the above
    report.html         the page of the run, for people
    log.txt             what happened when

The manifest is written last: a folder without one, or without its model, is an unfinished run, and
the same command goes on with it. Only `log.txt` holds times, so an interrupted run ends in the same
files as an unbroken one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ..errors import UserError, naming
from ..graph.fold_batchnorm import fold
from ..models import from_spec
from ..models.base import Model
from ..models.bounded import bounded, most_for
from ..models.checkpoint import sha256_of
from ..models.storage import KIND, quantized_description
from ..models.tensors import read_metadata, read_safetensors, require_intact, sound, with_digest
from ..quantization.insertion import insert_quantizers
from ..quantization.policy import Policy
from ..quantization.storage import WEIGHTS_PER_BYTE, restore_state, stored_state
from ..recipe.removed import removed_that_matter
from ..runtime.files import append_line, read_json, write_atomic, write_json
from ..runtime.lock import LOCK, locked, sweep_lock
from ..runtime.plain import ODD, brief, one_line
from .identity import differing, in_todays_keys

FORMAT = 3
"""3: quantized weights are integers, and the model says its format; 2: they are floats, and the
model says by itself what it is; 1: the manifest alone does."""

RECONSTRUCTION = "reconstruction.pt"
"""What an interrupted reconstruction of blocks goes on from."""

_DESCRIBED = ("identity", "spec", "policy")
"""What the manifest and the model have to say alike."""


class AnotherRunError(UserError):
    """The folder holds a run of another identity."""


class Run:
    """One run folder, opened for writing.

    Args:
        folder: made if missing; may hold an unfinished run of the same identity.
        identity: JSON-able values that fix the result.

    Raises:
        AnotherRunError: where the folder holds another run.
        UserError: where it holds something else, or another process is about to begin a run in it.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: a file is in the way of the run folder")
        if not self._has_begun():
            folder.mkdir(parents=True, exist_ok=True)
            # Of two that begin at once, one is told here that it is the second.
            with self.lock():
                if not self._has_begun():
                    write_json(self._state, identity)
                    # Of a run that has lost its model.
                    (folder / "manifest.json").unlink(missing_ok=True)
        if self.finished:
            self._tidy()
            sweep_lock(folder)

    @property
    def _state(self) -> Path:
        return self.folder / "state.json"

    def _has_begun(self) -> bool:
        """Whether this very run was begun in the folder; what else it may hold is refused."""
        if _is_bare(self.folder):
            return False
        recorded = identity_of(self.folder)
        if recorded is None:
            raise UserError(f"{self.folder}: not empty and no run; choose another --out")
        recorded = in_todays_keys(recorded)
        if keys := differing(recorded, self.identity):
            gone = removed_that_matter(recorded.get("recipe"))
            if gone:
                raise AnotherRunError(
                    f"{self.folder}: holds a run with {', '.join(gone)}, which this version does "
                    "not have; use the version that began it, or choose another --out"
                )
            raise AnotherRunError(
                f"{self.folder}: holds a run with another {', '.join(keys)}; choose another --out"
            )
        return self.finished or not (self.folder / "manifest.json").is_file()

    @property
    def finished(self) -> bool:
        """Whether the run is complete: nothing is left to do."""
        return _is_finished(self.folder)

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
        self,
        detector: Model,
        policy: Policy,
        metrics: dict[str, Any],
        extra: dict[str, Any],
        before: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Write the model, the metrics and, last, the manifest; drop the training checkpoint.

        Args:
            detector, policy, metrics: of the run.
            extra: what else the manifest is to say.
            before: given the manifest before it is written: what else there is to be in the folder
                once the run is finished.
        """
        described = {"kind": KIND, "format": FORMAT, "identity": self.identity}
        described |= {"spec": detector.spec(), "policy": policy.to_dict()}
        tensors = stored_state(detector.module)
        # One entry: the file format keeps several in no order of its own.
        text = json.dumps(with_digest(described, tensors), sort_keys=True)
        data = save(tensors, metadata={"dfq": text})
        write_atomic(self.folder / "model.safetensors", data)
        write_json(self.folder / "metrics.json", metrics)
        manifest = {
            **extra,
            **described,
            "model_sha256": hashlib.sha256(data).hexdigest(),
            "metrics_sha256": sha256_of(self.folder / "metrics.json"),
        }
        if before is not None:
            before(manifest)
        write_json(self.folder / "manifest.json", manifest)
        self._tidy()

    def _tidy(self) -> None:
        # Also what a process killed right after writing the manifest left behind.
        for name in (
            "state.json",
            "checkpoint.pt",
            ".checkpoint.pt.tmp",
            RECONSTRUCTION,
            f".{RECONSTRUCTION}.tmp",
        ):
            (self.folder / name).unlink(missing_ok=True)


def _is_finished(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("manifest.json", "model.safetensors"))


def _is_bare(folder: Path) -> bool:
    """Whether a folder is not there, or holds no more than a process killed at its very start
    leaves."""
    if not folder.exists():
        return True
    return {path.name for path in folder.iterdir()} <= {LOCK, ".state.json.tmp"}


def identity_of(folder: Path) -> dict[str, Any] | None:
    """The identity of the run in a folder, finished or not; None where there is no run.

    Raises:
        UserError: where the file that says so is broken.
    """
    if (folder / "manifest.json").is_file():
        path = folder / "manifest.json"
        manifest = read_json(path)
        if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
            return None
        identity = manifest.get("identity")
    elif (folder / "state.json").is_file():
        path = folder / "state.json"
        identity = read_json(path)
    else:
        return None
    if not isinstance(identity, dict):
        raise UserError(f"{path}: damaged (it does not say what the run is of); restore or delete")
    return identity


def next_folder(parent: Path, stem: str, identity: dict[str, Any]) -> Path:
    """`parent/stem-<n>`: an unfinished run of this identity if there is one, else a new number."""
    number = 1
    while (folder := parent / f"{stem}-{number}").exists():
        if _is_bare(folder):
            return folder
        recorded = identity_of(folder)
        ours = recorded is not None and not differing(in_todays_keys(recorded), identity)
        if ours and not _is_finished(folder):
            return folder
        number += 1
    return folder


def open_run(out: Path | None, parent: Path, stem: str, identity: dict[str, Any]) -> Run:
    """The run to work on: in `out`, else in `next_folder`.

    Raises:
        UserError: where `out` holds something else, or another process is about to begin there.
    """
    while out is None:
        # Another process may take the number in between, for another run.
        with contextlib.suppress(AnotherRunError):
            return Run(next_folder(parent, stem, identity), identity)
    return Run(out, identity)


def is_run(path: Path) -> bool:
    """Whether a path is a run folder, finished or not."""
    return path.is_dir() and any(
        (path / name).is_file() for name in ("manifest.json", "state.json", "recipe.yaml")
    )


def check_run(folder: Path) -> dict[str, Any]:
    """The manifest of a finished run, whose files are what it says.

    Raises:
        UserError: where the run is unfinished or its files are not what they were.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        if not (folder / "state.json").is_file():
            raise UserError(
                f"{folder}: this run is unfinished, and what it is of is lost (neither "
                "manifest.json nor state.json is there); delete it"
            )
        raise UserError(
            f"{folder}: this run is unfinished; run the same command again to finish it"
        )
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise UserError(f"{folder}: holds no quantized model (manifest.json is of something else)")
    check_format(path, manifest.get("format"))
    for key in _DESCRIBED:
        if not isinstance(manifest.get(key), dict):
            raise UserError(f"{path}: damaged (no {key}); restore it or make the run again")
    # Runs of format 1 have no sum of their metrics.
    files = {"model.safetensors": "model_sha256", "metrics.json": "metrics_sha256"}
    for name, key in files.items():
        if not (folder / name).is_file():
            how = "run the command that made it again"
            if name == "metrics.json":
                how = f"delete {folder / 'model.safetensors'} as well, and {how}"
            raise UserError(f"{folder / name}: missing; {how}")
        recorded = manifest.get(key)
        if recorded is None and key == "metrics_sha256" and manifest["format"] == 1:
            continue
        if sha256_of(folder / name) != recorded:
            raise UserError(
                f"{folder / name}: damaged or altered, as its sha256 is not the one in "
                f"manifest.json; restore both, or delete {folder / 'model.safetensors'} and run "
                "the command that made it again"
            )
    described = quantized_description(read_metadata(folder / "model.safetensors"))
    if described is None and manifest["format"] != 1:
        raise UserError(f"{folder / 'model.safetensors'}: does not say what it is; restore it")
    # Models of runs of format 1 say nothing of a format.
    alike = _DESCRIBED if manifest["format"] == 1 else (*_DESCRIBED, "format")
    for key in alike:
        if described is not None and manifest[key] != described.get(key):
            raise UserError(
                f"{path}: altered (its {key} is not the one that the model was saved with); "
                "restore it"
            )
    return manifest


def read_metrics(folder: Path) -> dict[str, Any]:
    """What `metrics.json` of a finished run says.

    Raises:
        UserError: where it is missing or broken.
    """
    metrics = read_json(folder / "metrics.json")
    if not (
        isinstance(metrics, dict)
        and isinstance(metrics.get("selected"), str)
        and _is_share(metrics.get("quantized_share_of_macs"))
    ):
        raise UserError(f"{folder / 'metrics.json'}: not as dfq wrote it; restore it")
    return metrics


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def load_run(folder: str | Path, *, device: str = "cpu") -> Model:
    """The quantized detector of a finished run; its outputs are bit-equal to those it was saved
    with.

    Raises:
        UserError: where the run is unfinished, or its files are not what they were.

    Example:
        >>> dfq.load_run("run").image_size
        160
    """
    folder = Path(folder)
    manifest = check_run(folder)
    detector = _rebuilt(folder / "model.safetensors", manifest)
    detector.source = str(folder)
    return detector.to(device)


def load_quantized(path: Path) -> Model:
    """The detector of a run's `model.safetensors`, with the run's folder around it or without.

    Raises:
        UserError: where the file is damaged, or not what the manifest beside it says.
    """
    beside = path.parent / "manifest.json"
    if path.name == "model.safetensors" and beside.is_file():
        manifest = read_json(beside)
        if isinstance(manifest, dict) and manifest.get("kind") == KIND:
            return load_run(path.parent)
    described = quantized_description(read_metadata(path))
    if described is None:
        raise UserError(f"{path}: does not say what it is the model of; give the run's folder")
    check_format(path, described["format"])
    return _rebuilt(path, described)


def check_format(path: Path, recorded: Any) -> None:
    """Refuse what is of no format that this version reads.

    Raises:
        UserError: says which ones it does.
    """
    if type(recorded) is not int or not 1 <= recorded <= FORMAT:
        raise UserError(
            f"{path}: of format {brief(recorded)}, and this dfq reads 1 to {FORMAT}; use the "
            "version that made it"
        )


def _rebuilt(path: Path, described: dict[str, Any]) -> Model:
    """The detector whose state a file holds, as `spec`, `policy` and `format` describe it."""
    try:
        with naming(path):
            # At 2 bits a file is an eighth of what it is in half precision.
            size = path.stat().st_size * 2 * WEIGHTS_PER_BYTE
            with bounded("its description", most=most_for(size)):
                detector = from_spec(described["spec"])
                insert_quantizers(fold(detector), Policy.from_dict(described["policy"]))
            tensors = read_safetensors(path)
            state = sound(tensors, str(path))
            restore_state(detector.module, state, str(path), floats=described["format"] < 3)
            require_intact(tensors, described, str(path))
    except ODD as error:
        raise UserError(
            f"{path}: damaged or does not fit its manifest ({one_line(error)})"
        ) from None
    return detector
