"""Many processes make the same set as one, file for file, whichever of them die on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image
from support.forks import PATIENCE, ended, killed, launch, start, until, wait_for
from support.harness import RECIPE, command, contents
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Twelve shards, the last one smaller, with enough work for a kill to fall into it.
SYNTHESIS = [
    "--set", "synthesis.images=23", "--set", "synthesis.iterations=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(RECIPE)
    recipe, out = folder / "tiny.yaml", folder / "set"
    result = command("synthesize", "--model", model, "--recipe", recipe, *SYNTHESIS, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def words_for(model: Path, *more: str) -> list[str]:
    return [
        "synthesize", "--model", str(model), "--recipe", "tiny.yaml", *SYNTHESIS, "--out", "set",
        *more,
    ]  # fmt: skip


def records(folder: Path) -> int:
    return len(list((folder / "shards").glob("0*.json")))


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_set_from_several_processes(
    place: Path, model: Path, whole: Path, size: int
) -> None:
    processes = launch(words_for(model), size, place)
    assert [ended(process) for process in processes] == [0] * size
    assert contents(place / "set") == contents(whole)
    assert "23 images" in (place / "rank-0.txt").read_text()
    assert all((place / f"rank-{rank}.txt").read_text() == "" for rank in range(1, size))


def test_a_mistake_is_told_once(place: Path, model: Path) -> None:
    processes = launch(words_for(place / "absent.pt"), 2, place)
    assert [ended(process) for process in processes] == [2, 2]
    assert (place / "rank-0.txt").read_text().count("error: ") == 1
    assert "absent.pt" in (place / "rank-0.txt").read_text()
    assert (place / "rank-1.txt").read_text() == ""


def test_workers_on_top_of_several_processes_are_refused(place: Path, model: Path) -> None:
    processes = launch(words_for(model, "--workers", "2"), 2, place)
    assert [ended(process) for process in processes] == [2, 2]
    assert "leave --workers out" in (place / "rank-0.txt").read_text()
    assert not (place / "set").exists()


def test_the_leading_process_dies(place: Path, model: Path, whole: Path) -> None:
    """Nobody stops the others here, as torchrun would: they find out when they wait for it."""
    first, second = launch(words_for(model), 2, place)
    wait_for(lambda: records(place / "set") > 0, first)
    killed(first)
    assert ended(second) == 2
    printed = (place / "rank-1.txt").read_text()
    # PyTorch may have told before that a connection broke.
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: the leading process of this run died; ")
    assert printed.endswith(f"{line}\n")
    assert "Traceback" not in printed
    assert not (place / "set" / "manifest.json").exists()
    assert command(*words_for(model)).exit_code == 0
    assert contents(place / "set") == contents(whole)


def test_torchrun_and_one_of_its_processes_dies(place: Path, model: Path, whole: Path) -> None:
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "dfq", *words_for(model),
    ]  # fmt: skip
    with subprocess.Popen(
        torchrun, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        # Found before there is anything to see, so as to lose no time then.
        until(lambda: len(ranks_of(process)) == 2, lambda: process.poll() is None)
        ranks = ranks_of(process)
        until(lambda: records(place / "set") > 0, lambda: process.poll() is None)
        ranks["1"].kill()
        errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode != 0
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert "another process of this run died" in lines[0]
    assert not any(alive(rank) for rank in ranks.values())
    assert 0 < records(place / "set") < 12
    assert not (place / "set" / "manifest.json").exists()

    again = subprocess.run(torchrun, capture_output=True, text=True, timeout=PATIENCE)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("23 images") == 1
    assert contents(place / "set") == contents(whole)


def test_workers_whose_parent_dies(place: Path, model: Path, whole: Path) -> None:
    parent = start(words_for(model, "--workers", "2"))
    # The parent compiles in processes of its own as well.
    wait_for(lambda: len(workers_of(parent.pid)) == 2, parent)
    workers = workers_of(parent.pid)
    wait_for(lambda: records(place / "set") > 0, parent)
    killed(parent)
    until(lambda: not any(alive(worker) for worker in workers))
    # They were killed with it, by the kernel, and did not go on until they noticed.
    assert not (place / "set" / "manifest.json").exists()
    assert records(place / "set") < 12
    result = command(*words_for(model, "--workers", "1"))
    assert result.exit_code == 0, result.output
    assert contents(place / "set") == contents(whole)


def test_curves_and_a_preview(place: Path, model: Path, made: Path) -> None:
    words = ["synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "set"]
    result = command(*words, "--tensorboard", "curves")
    assert result.exit_code == 0, result.output
    # Watching changes nothing.
    assert contents(place / "set") == contents(made)
    assert sorted(path.name for path in (place / "curves").iterdir()) == [
        "shard-000000", "shard-000001",
    ]  # fmt: skip
    reader = EventAccumulator(str(place / "curves" / "shard-000001"))
    reader.Reload()
    tags = reader.Tags()["scalars"]
    assert {tag.split("/")[0] for tag in tags} == {"labels", "small", "full"}
    assert {tag.split("/")[1] for tag in tags} == {"bn", "task", "tv"}
    assert [event.step for event in reader.Scalars("labels/bn")] == [1, 2, 3, 4]
    # Four images in a row, each enlarged to 320 px, and the space between them.
    with Image.open(place / "set" / "preview.png") as preview:
        assert preview.size == (4 * (320 + 4) + 4, 320 + 2 * 4)


def ranks_of(torchrun: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """The processes that it started, by their rank."""
    found = {}
    for child in psutil.Process(torchrun.pid).children():
        with contextlib.suppress(psutil.Error, KeyError):
            found[child.environ()["RANK"]] = child
    return found


def workers_of(parent: int) -> list[psutil.Process]:
    """The workers of a process."""
    found = []
    for child in psutil.Process(parent).children():
        with contextlib.suppress(psutil.Error):
            if "dfq.synthesis.worker_process" in child.cmdline():
                found.append(child)
    return found


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_a_worker_that_dies(place: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Instead of a worker, something that is killed at once.
    suicide = place / "suicide"
    suicide.write_text(f"#!/bin/sh\nkill -{signal.SIGKILL.value} $$\n")
    suicide.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(suicide))
        result = command(*words_for(model, "--workers", "3"))
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: a worker process died (signal 9, SIGKILL); ")
    assert "start the same command again" in line
    assert "--workers" in line
    assert not (place / "set" / ".lock").exists()
    assert os.listdir(place / "set" / "images") == []
