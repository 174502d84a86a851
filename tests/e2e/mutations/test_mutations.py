"""Inputs that a seeded generator has damaged: used, or refused in one line, and never more.

Of every input and every command that meets it: it ends with exit code 0 or 2, and within
`CPU_SECONDS`; with 2 it says one line (or lines that all begin with `error: `, where a recipe or a
set has several faults) and nothing of a traceback; nothing is written but the command's own
outputs; no code of the input runs; nothing is asked of a network. Code 0 is wrong where a case says
`refused`: each kind's function in `models`, `sets` and `around` states for which damage that is,
namely whatever the command has a sum, a bound or a rule for.

`DFQ_MUTATIONS` is how many inputs there are, `DFQ_MUTATIONS_SEED` which.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support import small_ultralytics, yolov5_files
from support.mutations import around, models, sets
from support.mutations.cases import Case, Kind, Things, Words
from support.mutations.damage import MARK
from support.outputs_parts import everything
from support.small_mmdet import write_config

from dfq.cli.main import cli
from dfq.kernels import loader as compiled
from dfq.models import load_detector, save_detector
from dfq.models.torchvision.base import from_name
from dfq.qat.trainer import Trainer
from dfq.synthesis.inversion import Inversion

KINDS: dict[str, Kind] = {**models.KINDS, **sets.KINDS, **around.KINDS}
COUNT = int(os.environ.get("DFQ_MUTATIONS", "208"))
SEED = os.environ.get("DFQ_MUTATIONS_SEED", "0")
CPU_SECONDS = 20.0
WALL_SECONDS = 120.0
"""After which a command counts as waiting for something that never comes."""
OUTPUTS = ("out", "out.json", "out.csv", "out.png", "out.html", "out.py", "runs", "home")


class Hang(BaseException):
    """Not caught by what reads."""


@contextmanager
def limited() -> Iterator[None]:
    """End the block where it takes too much of the processor, or waits for ever."""

    def stop(number: int, _: Any) -> None:
        raise Hang(f"over {CPU_SECONDS if number == signal.SIGPROF else WALL_SECONDS} s")

    main = threading.main_thread().ident
    assert main is not None
    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGUSR1)}
    watch = threading.Timer(WALL_SECONDS, signal.pthread_kill, (main, signal.SIGUSR1))
    watch.daemon = True
    watch.start()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        watch.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def things(model: Path, made: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Things:
    folder = tmp_path_factory.mktemp("valid")
    shutil.copy(made.parent / "tiny.yaml", folder)
    config = write_config(folder, "retinanet")
    options = {
        "width": 0.35, "representation": 32, "anchors": [16, 32], "min_size": 64, "max_size": 64,
        "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 16,
    }  # fmt: skip
    ultralytics = small_ultralytics.save(small_ultralytics.network(), folder / "ultralytics.pt")
    saved = {
        "mmdet": load_detector(f"{config}@random"),
        "torchvision": from_name("fasterrcnn_mobilenet_v2", options=options),
        "ultralytics": load_detector(ultralytics),
    }
    for family, detector in saved.items():
        save_detector(detector, folder / f"{family}.safetensors")
    torch.save({"state_dict": saved["mmdet"].module.state_dict()}, folder / "weights.pth")
    whole = Inversion.batch

    def batch(self: Any, count: int, seed: int, shard: int, report: Any = None) -> Any:
        if shard == 1:
            raise KeyboardInterrupt
        return whole(self, count, seed, shard, report)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    words: Words = ("--recipe", folder / "tiny.yaml", "--model", model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inversion, "batch", batch)
        patch.setattr(Trainer, "_choose", interrupted)
        for begun in (
            ("synthesize", *words, "--out", folder / "begun-set", "--workers", "1"),
            ("qat", *words, "--data", made, "--out", folder / "begun-run"),
        ):
            stopped = CliRunner().invoke(cli, [str(word) for word in begun])
            assert stopped.exit_code == 130, stopped.output
    return Things(
        model=model,
        models={family: folder / f"{family}.safetensors" for family in saved},
        yolov5=yolov5_files.write(folder / "yolov5.pt"),
        ultralytics=ultralytics,
        config=config,
        weights=folder / "weights.pth",
        made=made,
        begun_set=folder / "begun-set",
        run=run,
        begun_run=folder / "begun-run",
    )


@pytest.fixture
def alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, without a network, whose every use leaves a mark, and with its own home
    and state."""

    def reached(*_: Any, **__: Any) -> Any:
        (place / MARK).touch()
        raise OSError("the network was asked")

    (place / "user").mkdir()
    monkeypatch.setenv("HOME", str(place / "user"))
    monkeypatch.setattr(socket, "create_connection", reached)
    monkeypatch.setattr(urllib.request, "urlopen", reached)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", reached)
    monkeypatch.setattr(torch.hub, "download_url_to_file", reached)
    return place


def invoke(words: Words) -> tuple[int, str, str]:
    """Exit code, standard error, and what was raised besides."""
    with limited():
        result = CliRunner().invoke(cli, [str(word) for word in words])
    raised = ""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert result.exc_info is not None
        raised = "".join(traceback.format_exception(*result.exc_info)[-6:])
    return result.exit_code, result.stderr, raised


def faults(place: Path, words: Words, case: Case, answer: tuple[int, str, str]) -> list[str]:
    """What is wrong with how a command met an input."""
    code, stderr, raised = answer
    errors = [line for line in stderr.splitlines() if line.lower().startswith("error: ")]
    found = []
    if raised or "Traceback" in stderr:
        found.append(raised or stderr[-2000:])
    elif code not in (0, 2):
        found.append(f"exit code {code}")
    elif (code == 2) != bool(errors):
        found.append(f"exit code {code} and {len(errors)} lines of errors: {stderr[-500:]}")
    elif code == 0 and case.refused:
        found.append("is used, though it is damaged")
    several = words[0] in ("qat", "synthesize", "sensitivity", "mmdet-config") or "verify" in words
    if len(errors) > 1 and not several:
        found.append(f"{len(errors)} lines of errors: {errors}")
    if any(len(line) > 2100 or not line.isprintable() for line in errors):
        found.append(f"a line that no terminal shows: {errors!r:.500}")
    if (place / MARK).exists():
        found.append("code of the input ran, or the network was asked")
    return found


def surroundings(place: Path) -> dict[str, object]:
    return {
        name: what
        for name, what in everything(place).items()
        if name.partition("/")[0] not in OUTPUTS
    }


def build(kind: str, number: int, things: Things, place: Path) -> Case:
    """The damaged input of a kind and a number, made in the folder to work in."""
    return KINDS[kind](things, place, random.Random(f"{SEED} {kind} {number}"))


NUMBERED = [
    (name, n // len(KINDS)) for n, name in zip(range(COUNT), [*KINDS] * COUNT, strict=False)
]


@pytest.mark.parametrize(("kind", "number"), NUMBERED)
def test_a_mutated_input(
    alone: Path, things: Things, kind: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build(kind, number, things, alone)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    if "CC" in case.environment:
        compiled._library.cache_clear()
    wrong = []
    for words in case.commands:
        # A link that leads nowhere is there, too.
        kept = {"out"} if os.path.lexists(alone / "out") else set()
        before = surroundings(alone)
        try:
            answer = invoke(words)
        except Hang as hang:
            answer = (-1, "", f"hangs: {hang}")
        found = faults(alone, words, case, answer)
        if surroundings(alone) != before:
            after = surroundings(alone)
            other = {n for n in {*before, *after} if before.get(n) != after.get(n)}
            found.append(f"written outside its outputs: {sorted(other)}")
        wrong += [f"dfq {' '.join(map(str, words))[:400]}\n  {one}" for one in found]
        for name in set(OUTPUTS) - kept - {"home"}:
            path = alone / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    if "CC" in case.environment:
        compiled._library.cache_clear()
    assert not wrong, f"{kind} {number}: {case.what}\n" + "\n".join(wrong)


SAMPLE = ["records of a checkpoint", "images of a set", "the environment", "a recipe"]


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_mutated_input_in_a_process_of_its_own(alone: Path, things: Things, kind: str) -> None:
    """As a user meets it: nothing on standard error but what is wrong, nothing left running."""
    numbers = (n for n in range(1000) if build(kind, n, things, _emptied(alone)).refused)
    case = build(kind, next(numbers), things, _emptied(alone))
    before = surroundings(alone)
    words = [sys.executable, "-m", "dfq", *map(str, case.commands[0])]
    result = subprocess.run(
        words, capture_output=True, text=True, timeout=2 * WALL_SECONDS, stdin=subprocess.DEVNULL,
        # Ultralytics keeps settings of its own.
        env={**os.environ, "YOLO_CONFIG_DIR": str(alone / "home"), **case.environment},
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert faults(alone, case.commands[0], case, (2, result.stderr, "")) == []
    assert surroundings(alone) == before


def _emptied(place: Path) -> Path:
    for path in place.iterdir():
        if path.name in ("tiny.yaml", "user"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return place
