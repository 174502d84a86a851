"""Training that made the network worse: the better start is kept, or what was trained where the
user asks for it; either way it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.forks import killed, start, wait_for
from support.harness import command, contents, has_one_error_after_output
from support.keep_worse_parts import SPOILT


def words_for(model: Path, made: Path, out: str, *more: str) -> list[str]:
    return [
        "qat", "--recipe", "tiny.yaml", "--model", str(model), "--data", str(made), "--out", out,
        *more,
    ]  # fmt: skip


def metrics_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "metrics.json").read_text()))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("method", ["qat", "auto"])
def test_the_better_start_is_kept(place: Path, model: Path, made: Path, method: str) -> None:
    result = command(*words_for(model, made, "run", *SPOILT, "--set", f"method={method}"))
    assert result.exit_code == 0, result.output
    metrics = metrics_of(place / "run")
    far = metrics["teacher_divergence"]
    assert far["last"] > 10 * far["start"]
    assert metrics["selected"].startswith("ptq: training ended further from the teacher than")
    assert "times as far" in result.stdout
    assert ("keep_worse" in result.stdout) == (method == "qat")
    assert command(*words_for(model, made, "start", "--set", "method=ptq")).exit_code == 0
    kept, began = weights(place / "run"), weights(place / "start")
    assert all(torch.equal(kept[name], tensor) for name, tensor in began.items())


def test_what_was_trained_is_kept_where_it_is_asked_for(
    place: Path, model: Path, made: Path
) -> None:
    asked = ("--set", "distillation.keep_worse=true")
    result = command(*words_for(model, made, "run", *SPOILT, *asked))
    assert result.exit_code == 0, result.output
    metrics = metrics_of(place / "run")
    assert metrics["selected"].startswith("qat: last weights; but training ended further")
    far = metrics["teacher_divergence"]
    assert f"({far['last'] / far['start']:.3g} times as far)" in result.stdout
    assert command(*words_for(model, made, "start", "--set", "method=ptq")).exit_code == 0
    kept, began = weights(place / "run"), weights(place / "start")
    assert not all(torch.equal(kept[name], tensor) for name, tensor in began.items())
    # With method auto it is no question.
    words = words_for(model, made, "auto", *SPOILT, *asked, "--set", "method=auto")
    assert command(*words).exit_code == 0
    assert metrics_of(place / "auto")["selected"].startswith("ptq: ")


def test_an_epoch_chosen_on_real_images_that_lost_everything_is_not_kept(
    place: Path, model: Path, made: Path
) -> None:
    chosen = ("--select-on", str(made))
    result = command(*words_for(model, made, "run", *SPOILT, *chosen))
    assert result.exit_code == 0, result.output
    metrics = metrics_of(place / "run")
    assert metrics["selected"].startswith("ptq: training ended further")
    assert "selected_on_real_images" not in metrics
    asked = ("--set", "distillation.keep_worse=true")
    assert command(*words_for(model, made, "asked", *SPOILT, *chosen, *asked)).exit_code == 0
    selected = metrics_of(place / "asked")["selected"]
    assert "the best by AP" in selected
    assert "but training ended further" in selected


def test_killed_on_the_way_to_the_start(place: Path, model: Path, made: Path) -> None:
    more = (*SPOILT, "--set", "distillation.epochs=14")
    assert command(*words_for(model, made, "whole", *more)).exit_code == 0
    process = start(words_for(model, made, "run", *more))
    wait_for((place / "run" / "checkpoint.pt").exists, process)
    killed(process)
    assert not (place / "run" / "manifest.json").exists()
    again = command(*words_for(model, made, "run", *more))
    assert again.exit_code == 0, again.output
    assert contents(place / "run") == contents(place / "whole")


def test_a_loss_that_is_not_finite_still_fails(place: Path, model: Path, made: Path) -> None:
    result = command(*words_for(model, made, "run", *SPOILT, "--set", "distillation.lr=1e30"))
    assert "training diverged in epoch 1" in has_one_error_after_output(result)
