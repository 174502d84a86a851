"""Several processes train what one would: here, threads with one store between them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.forks import PATIENCE
from support.tiny_detector import tiny_detector
from support.trainer_parts import Blobs, settings, state, student_of
from torch import Tensor

from dfq.errors import DivergedError
from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Detector
from dfq.qat.settings import DistillationWeights
from dfq.qat.trainer import Outcome, Trainer
from dfq.runtime.distributed import World


class Interrupt(Exception):
    """Stands for a killed process."""


def train(
    size: int, folder: Path, *, stop_after: int | None = None, **changes: Any
) -> list[tuple[Any, dict[str, Tensor]]]:
    """Each process's outcome, or what it raised, and its student's state."""
    folder.mkdir(exist_ok=True)
    store = dist.HashStore()
    results: list[Any] = [None] * size
    # Not in the threads: making a network seeds the one generator that they all have.
    teachers = [fold(tiny_detector()) for _ in range(size)]
    students: list[Detector] = [student_of(teacher) for teacher in teachers]

    def report(done: int, _total: int, _terms: dict[str, float]) -> None:
        if done == stop_after:
            raise Interrupt

    def work(rank: int) -> None:
        world = World(rank, size, rank, store if size > 1 else None)
        try:
            trainer = Trainer(
                students[rank], teachers[rank], Blobs(), settings(**changes),
                seed=11, folder=folder, world=world,
            )  # fmt: skip
            results[rank] = trainer.train(report)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other forever"
    return [(result, state(student)) for result, student in zip(results, students, strict=True)]


def distance(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """Norm of the difference of two lists of tensors, all taken as one vector."""
    squares = [(a.double() - b.double()).square().sum() for a, b in zip(one, other, strict=True)]
    return float(torch.stack(squares).sum().sqrt())


# Batches of 7, 7 and 4 images: uneven parts, and with five processes one without any image.
@pytest.mark.parametrize("size", [2, 5])
def test_the_same_weights_as_alone(tmp_path: Path, size: int) -> None:
    # Sums in another order round a few activations to the next level, and from there on the two
    # drift apart: small rates, and no interpolation that puts values between levels.
    changes: dict[str, Any] = {"lr": 1e-4, "scale_lr": 1e-4, "epochs": 2, "zoom": 0.0}
    ((alone, expected),) = train(1, tmp_path / "one", **changes)
    start = state(student_of(fold(tiny_detector())))
    assert isinstance(alone, Outcome)
    found = train(size, tmp_path / "many", **changes)
    moved = distance(start.values(), expected.values())
    for outcome, reached in found:
        assert isinstance(outcome, Outcome), outcome
        assert distance(reached.values(), found[0][1].values()) == 0
        assert distance(reached.values(), expected.values()) < 0.05 * moved
        for ours, theirs in zip(outcome.history, alone.history, strict=True):
            assert ours == pytest.approx(theirs, rel=0.03)
    # The first batch is seen before any step: but for the order of sums, it is the same loss.
    assert found[0][0].divergence["start"] == pytest.approx(alone.divergence["start"], rel=1e-5)


def test_one_step_gives_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    """Clipping comes after the sum: with a bound this low it decides the step."""
    changes: dict[str, Any] = {
        "epochs": 1, "batch_size": 18, "clip": 1e-3, "ema": 0, "zoom": 0.0,
    }  # fmt: skip
    gradients = []
    for size in (1, 3):
        (tmp_path / str(size)).mkdir()
        seen: dict[int, list[Tensor]] = {}
        plain = Trainer._gradient

        def keep(self: Trainer, *words: Any, seen: Any = seen, plain: Any = plain) -> Tensor:
            values: Tensor = plain(self, *words)
            seen[self.world.rank] = [
                p.grad.clone() for p in self.average.parameters if p.grad is not None
            ]
            return values

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_gradient", keep)
            train(size, tmp_path / str(size), **changes)
        gradients.append(seen)
    (alone,), together = gradients[0].values(), gradients[1]
    assert len(together) == 3
    for mine in together.values():
        assert distance(mine, alone) < 1e-3 * distance(alone, [torch.zeros(()) for _ in alone])


def test_labels_go_with_their_images(tmp_path: Path) -> None:
    """Alone, the task term's mean over a batch of equal parts is the mean of the parts' means."""
    weights = DistillationWeights(kl=0, feature=0, task=1)
    changes: dict[str, Any] = {
        "epochs": 1, "lr": 1e-12, "scale_lr": 1e-12, "weights": weights, "zoom": 0.0, "flip": 0.0,
    }  # fmt: skip
    ((one, _),) = train(1, tmp_path / "one", batch_size=9, **changes)
    ((two, _), *_) = train(2, tmp_path / "two", batch_size=18, **changes)
    # Batches of nine alone; halves of eighteen by two processes: the same nines.
    assert two.history[0]["task"] == pytest.approx(one.history[0]["task"], rel=1e-4)


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    whole = train(2, tmp_path / "whole")
    broken = train(2, tmp_path / "broken", stop_after=1)
    assert all(isinstance(result, Interrupt) for result, _ in broken)
    resumed = train(2, tmp_path / "broken")
    for (outcome, reached), (expected, end) in zip(resumed, whole, strict=True):
        assert outcome == expected
        assert distance(reached.values(), end.values()) == 0


def test_all_of_them_see_that_it_diverged(tmp_path: Path) -> None:
    found = train(2, tmp_path / "run", lr=1e30)
    assert [type(result) for result, _ in found] == [DivergedError, DivergedError]
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] == 0


def test_the_absolute_feature_term_is_the_whole_batchs(tmp_path: Path) -> None:
    weights = DistillationWeights(kl=0, feature=1, task=0)
    changes: dict[str, Any] = {
        "epochs": 1, "lr": 1e-12, "scale_lr": 1e-12, "weights": weights,
        "feature_form": "absolute",
    }  # fmt: skip
    ((one, _),) = train(1, tmp_path / "one", **changes)
    found = train(5, tmp_path / "many", **changes)
    for outcome, _ in found:
        assert outcome.history[0]["feature"] == pytest.approx(one.history[0]["feature"], rel=1e-4)
