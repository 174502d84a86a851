"""`dfq qat` in several processes: one run, near what one process makes, whichever of them dies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.forks import ended, killed, launch, wait_for
from support.harness import command, contents


def words_for(model: Path, data: Path, *more: str) -> list[str]:
    # Sums in another order round single activations to another level, and networks part from there
    # on, the sooner the larger the rates.
    return [
        "qat", "--recipe", "tiny.yaml", "--model", str(model), "--data", str(data),
        "--out", "run", "--set", "distillation.lr=1e-4", "--set", "distillation.scale_lr=1e-5",
        "--set", "distillation.batch_size=3", "--set", "distillation.precision=float32", *more,
    ]  # fmt: skip


def moved(model: Path, data: Path, place: Path) -> dict[str, torch.Tensor]:
    """The weights of a run by one process, in a folder beside."""
    words = words_for(model, data)
    words[words.index("--out") + 1] = "alone"
    result = command(*words)
    assert result.exit_code == 0, result.output
    return load_file(place / "alone" / "model.safetensors")


def test_two_processes_make_one_run(place: Path, model: Path, made: Path) -> None:
    # Four images in batches of three and one: of the last, the first process has none.
    processes = launch(words_for(model, made), 2, place)
    codes = [ended(process) for process in processes]
    printed = [(place / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert codes == [0, 0], printed
    assert "run\n" in printed[0]
    assert printed[1] == ""
    assert {p.name for p in (place / "run").iterdir()} == {
        "recipe.yaml", "metrics.json", "model.safetensors", "manifest.json", "report.html",
        "log.txt",
    }  # fmt: skip
    log = (place / "run" / "log.txt").read_text()
    assert log.count("epoch 2/2") == 1
    alone = moved(model, made, place)
    together = load_file(place / "run" / "model.safetensors")
    assert together.keys() == alone.keys()
    for name, weights in alone.items():
        assert torch.allclose(together[name].float(), weights.float(), atol=2e-3), name
    histories = [
        json.loads((place / run / "metrics.json").read_text())["history"]
        for run in ("run", "alone")
    ]
    for ours, theirs in zip(*histories, strict=True):
        # Sums in another order move a few values to the next step of their grid.
        assert ours == pytest.approx(theirs, rel=0.05)


def test_one_process_dies(place: Path, model: Path, made: Path) -> None:
    """Nobody stops the other, as torchrun would: it finds out when it waits for gradients."""
    words = words_for(model, made, "--set", "distillation.epochs=40")
    checkpoint = place / "run" / "checkpoint.pt"
    first, second = launch(words, 2, place)
    wait_for(lambda: checkpoint.exists() and "epoch 2/" in log(place), first)
    killed(second)
    assert ended(first) == 2
    errors = [line for line in printed(place, 0).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    assert "another process of this run died; what is finished is kept" in errors[0]
    assert "Traceback" not in printed(place, 0)
    assert not (place / "run" / "manifest.json").exists()
    # Any number of processes goes on with it.
    processes = launch(words, 3, place)
    codes = [ended(process) for process in processes]
    assert codes == [0, 0, 0], printed(place, 0)
    assert log(place).count("training resumed") == 1
    assert log(place).count("epoch 40/40") == 1


def log(place: Path) -> str:
    path = place / "run" / "log.txt"
    return path.read_text() if path.exists() else ""


def printed(place: Path, rank: int) -> str:
    return (place / f"rank-{rank}.txt").read_text()


def test_killed_and_resumed_by_as_many(place: Path, model: Path, made: Path) -> None:
    words = words_for(model, made, "--set", "distillation.epochs=12")
    for process in launch(words, 2, place):
        assert ended(process) == 0, printed(place, 0)
    (place / "run").rename(place / "whole")
    processes = launch(words, 2, place)
    wait_for(lambda: "epoch 3/" in log(place), processes[0])
    for process in processes:
        killed(process)
    assert not (place / "run" / "manifest.json").exists()
    for process in launch(words, 2, place):
        assert ended(process) == 0, printed(place, 0)
    assert "training resumed" in log(place)
    assert contents(place / "run") == contents(place / "whole")


def test_divergence_is_told_once(place: Path, model: Path, made: Path) -> None:
    words = words_for(model, made, "--set", "distillation.lr=1e30")
    processes = launch(words, 2, place)
    assert [ended(process) for process in processes] == [2, 2]
    assert printed(place, 0).count("error: training diverged in epoch 1") == 1
    assert "error" not in printed(place, 1)
