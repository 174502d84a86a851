"""An epoch selected by a evaluator, as the paper selects it by AP on real images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_detector import tiny_detector
from support.trainer_parts import Blobs, Interrupt, assert_same, settings, state, student_of
from torch import Tensor

from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Detector
from dfq.qat.trainer import Trainer


class Scripted:
    """Gives the scores it was told to, and keeps what it was shown."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)
        self.shown: list[dict[str, Tensor]] = []

    def __call__(self, student: Detector) -> float:
        self.shown.append(state(student))
        return self.scores[len(self.shown) - 1]


def trainer(
    folder: Path, evaluator: Callable[[Detector], float] | None, *, selection: str = "ema"
) -> Trainer:
    folder.mkdir(exist_ok=True)
    teacher = fold(tiny_detector())
    return Trainer(
        student_of(teacher), teacher, Blobs(), settings(selection=selection),
        seed=11, folder=folder, evaluator=evaluator,
    )  # fmt: skip


@pytest.mark.parametrize("selection", ["ema", "last"])
def test_the_epoch_it_likes_most_is_kept(tmp_path: Path, selection: str) -> None:
    evaluator = Scripted(0.1, 0.5, 0.3)
    judged = trainer(tmp_path / "judged", evaluator, selection=selection)
    outcome = judged.train()
    assert (outcome.selected, outcome.best) == ("best", (2, 0.5))
    assert [terms["score"] for terms in outcome.history] == [0.1, 0.5, 0.3]
    assert set(outcome.divergence) == {"start", "last", "best"}
    assert_same(state(judged.student), evaluator.shown[1])
    assert judged.divergence() == outcome.divergence["best"]
    # Looking on changes nothing of the training, and sees the weights that would be selected.
    alone = trainer(tmp_path / "alone", None, selection=selection)
    plain = alone.train()
    assert plain.selected == selection
    assert plain.best is None
    assert_same(state(alone.student), evaluator.shown[2])
    losses = [{k: v for k, v in terms.items() if k != "score"} for terms in outcome.history]
    assert losses == plain.history


def test_the_first_of_equals(tmp_path: Path) -> None:
    outcome = trainer(tmp_path / "run", Scripted(0.0, 0.0, 0.0)).train()
    assert outcome.best == (1, 0.0)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_selection_ends_the_same(tmp_path: Path, after: int) -> None:
    scores = (0.1, 0.5, 0.3)
    whole = trainer(tmp_path / "whole", Scripted(*scores))
    expected = whole.train()

    def stop(done: int, _total: int, _terms: dict[str, float]) -> None:
        if done == after:
            raise Interrupt

    with pytest.raises(Interrupt):
        trainer(tmp_path / "broken", Scripted(*scores)).train(stop)
    resumed = trainer(tmp_path / "broken", Scripted(*scores[after:]))
    assert resumed.train() == expected
    assert_same(state(resumed.student), state(whole.student))


def test_a_checkpoint_without_a_best_one_goes_on(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise Interrupt

    with pytest.raises(Interrupt):
        trainer(tmp_path / "run", None).train(stop)
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    del saved["best"]
    torch.save(saved, path)
    outcome = trainer(tmp_path / "run", None).train()
    assert (outcome.selected, len(outcome.history)) == ("ema", 3)
