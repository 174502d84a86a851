"""Killed at any moment, the same command ends in the same bytes as an unbroken one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.forks import ended, killed, paused, start, until, wait_for
from support.harness import RECIPE, command, contents, has_one_error

# Enough work for a kill to fall into it: a shard every tenth of a second or so.
SYNTHESIS = [
    "--set", "synthesis.images=18", "--set", "synthesis.batch_size=1",
    "--set", "synthesis.iterations=20",
]  # fmt: skip
TRAINING = ["--set", "distillation.epochs=30"]


def kill_and_resume(
    words: list[str], folder: Path, progress: Callable[[], object], kills: int, seed: int
) -> int:
    """Kill the command `kills` times, each at a random moment after it got further, then let it
    end. Returns how often it was killed mid-work."""
    draw = random.Random(seed)
    mid_work = 0
    for _ in range(kills):
        process = start(words)
        # As long as a step of this very process takes, on whatever machine.
        moments = []
        for _ in range(2):
            before = progress()
            wait_for(lambda: progress() != before, process)  # noqa: B023
            moments.append(time.monotonic())
        time.sleep(draw.uniform(0, moments[1] - moments[0]))
        killed(process)
        mid_work += process.exitcode == -signal.SIGKILL and not (folder / "manifest.json").exists()
    process = start(words)
    assert ended(process) == 0
    return mid_work


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an unbroken `dfq synthesize` with SYNTHESIS makes."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(RECIPE)
    recipe, out = folder / "tiny.yaml", folder / "set"
    words = ("--model", model, "--recipe", recipe, *SYNTHESIS)
    result = command("synthesize", *words, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_synthesize_killed_again_and_again(place: Path, model: Path, whole: Path) -> None:
    words = ["synthesize", "--model", str(model), "--recipe", "tiny.yaml", *SYNTHESIS]
    folder = place / "set"

    def shards() -> int:
        return len(list((folder / "shards").glob("0*.json")))

    killed = kill_and_resume([*words, "--out", "set"], folder, shards, kills=4, seed=0)
    assert killed >= 3
    assert contents(folder) == contents(whole)


def test_qat_killed_again_and_again(place: Path, model: Path, made: Path) -> None:
    words = [
        "qat", "--recipe", "tiny.yaml", "--model", str(model), "--data", str(made), *TRAINING,
    ]  # fmt: skip
    whole = command(*words, "--out", "whole")
    assert whole.exit_code == 0, whole.output
    folder = place / "run"

    def checkpoint() -> int:
        path = folder / "checkpoint.pt"
        return path.stat().st_mtime_ns if path.exists() else 0

    killed = kill_and_resume([*words, "--out", "run"], folder, checkpoint, kills=5, seed=1)
    assert killed >= 3
    assert contents(folder) == contents(place / "whole")
    log = (folder / "log.txt").read_text()
    assert log.count("training started") == 1
    # Fast machines may be through before the last of them.
    assert log.count("training resumed") == killed


def test_falling_back_after_a_kill_gives_the_same_files(
    place: Path, model: Path, made: Path
) -> None:
    # A rate that spoils the student, and no bound: training ends worse than it began.
    words = [
        "qat", "--recipe", "tiny.yaml", "--model", str(model), "--data", str(made), *TRAINING,
        "--set", "method=auto", "--set", "distillation.lr=0.5", "--set", "distillation.clip=1e9",
        "--set", "quantization.reconstruction=gptq", "--set", "distillation.ema=0",
    ]  # fmt: skip
    whole = command(*words, "--out", "whole")
    assert whole.exit_code == 0, whole.output
    metrics = json.loads((place / "whole" / "metrics.json").read_text())
    assert metrics["selected"].startswith("ptq: training")
    folder = place / "run"
    process = start([*words, "--out", "run"])
    wait_for(lambda: (folder / "checkpoint.pt").exists(), process)
    killed(process)
    assert not (folder / "manifest.json").exists()
    again = command(*words, "--out", "run")
    assert again.exit_code == 0, again.output
    assert "training resumed" in (folder / "log.txt").read_text()
    assert contents(folder) == contents(place / "whole")


def test_qat_killed_while_it_makes_its_set(place: Path, model: Path, whole: Path) -> None:
    # No --data, no --out: set and run are found again by what determines them.
    words = ["qat", "--recipe", "tiny.yaml", "--model", str(model), *SYNTHESIS]
    process = start(words)
    wait_for(lambda: bool(list((place / "home").glob("*/shards/0*.json"))), process)
    killed(process)
    (made,) = (place / "home").iterdir()
    assert not (made / "manifest.json").exists()
    assert not (place / "runs").exists()

    process = start(words)
    wait_for(lambda: (place / "runs" / "tiny-tiny-1" / "checkpoint.pt").exists(), process)
    killed(process)
    assert not (place / "runs" / "tiny-tiny-1" / "manifest.json").exists()

    assert command(*words).exit_code == 0
    assert [p.name for p in (place / "runs").iterdir()] == ["tiny-tiny-1"]
    assert list((place / "home").iterdir()) == [made]
    assert contents(made) == contents(whole)
    resumed = contents(place / "runs")
    (place / "runs").rename(place / "resumed")
    assert command(*words).exit_code == 0
    assert contents(place / "runs") == resumed


def test_python_m_dfq_killed(place: Path, model: Path, whole: Path) -> None:
    """The same with the real command in a process of its own."""
    words = ["synthesize", "--model", str(model), "--recipe", "tiny.yaml", *SYNTHESIS]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    shell = [sys.executable, "-m", "dfq", *words, "--out", "set"]
    with subprocess.Popen(
        shell, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        until(
            lambda: bool(list((place / "set" / "shards").glob("0*.json"))),
            lambda: process.poll() is None,
        )
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (place / "set" / "manifest.json").exists()
    assert command(*words, "--out", "set").exit_code == 0
    assert contents(place / "set") == contents(whole)


def test_two_at_once(place: Path, model: Path) -> None:
    words = ["synthesize", "--model", str(model), "--recipe", "tiny.yaml", *SYNTHESIS]
    process = start([*words, "--out", "set"])
    wait_for(lambda: bool(list((place / "set" / "shards").glob("0*.json"))), process)
    with paused(process):
        second = command(*words, "--out", "set")
    assert "another process is making this set" in has_one_error(second)
    assert ended(process) == 0
    assert command(*words, "--out", "set").exit_code == 0


def test_two_trainings_at_once(place: Path, model: Path, made: Path) -> None:
    # Without --out both would take the same number, as both are the same experiment.
    words = ["qat", "--recipe", "tiny.yaml", "--model", str(model), "--data", str(made)]
    folder = place / "runs" / "tiny-tiny-1"
    process = start([*words, "--set", "distillation.epochs=60"])
    wait_for((folder / "checkpoint.pt").exists, process)
    with paused(process):
        second = command(*words, "--set", "distillation.epochs=60")
    line = has_one_error(second)
    assert "runs/tiny-tiny-1: another process is working on this run" in line
    killed(process)
    # The lock died with its process, though its file is there.
    assert (folder / ".lock").exists()
    third = command(*words, "--set", "distillation.epochs=60")
    assert third.exit_code == 0, third.output
    assert "training resumed" in (folder / "log.txt").read_text()
    assert not (folder / ".lock").exists()
