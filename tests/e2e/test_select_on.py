"""`dfq qat --select-on SET`: the paper's protocol, named wherever the result is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cli_parts import real_set
from support.forks import ended, launch
from support.harness import command, has_one_error

import dfq


def words_for(model: Path, made: Path, real: Path, out: str = "run") -> list[str]:
    return [
        "qat", "--recipe", "tiny.yaml", "--model", str(model), "--data", str(made), "--out", out,
        "--select-on", str(real), "--set", "distillation.epochs=3",
    ]  # fmt: skip


def test_the_best_epoch_on_real_images(place: Path, model: Path, made: Path) -> None:
    # The set's own images, so that there is something to find.
    result = command(*words_for(model, made, made))
    assert result.exit_code == 0, result.output
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    on = metrics["selected_on_real_images"]
    scores = [terms["score"] for terms in metrics["history"]]
    assert len(scores) == 3
    assert on == {"data": str(made), "epoch": 1 + scores.index(max(scores)), "AP": max(scores)}
    said = f"qat: epoch {on['epoch']}, the best by AP on the real images of {made}"
    assert metrics["selected"] == said
    assert said in result.stdout
    log = (place / "run" / "log.txt").read_text()
    assert f"weights are selected by AP on {made}: not data-free" in log
    # What was kept is what was measured.
    score = dfq.evaluate(place / "run", made).AP
    assert score == pytest.approx(on["AP"])
    # Without the option, nobody looks.
    words = words_for(model, made, made, "free")
    del words[words.index("--select-on") : words.index("--select-on") + 2]
    assert command(*words).exit_code == 0
    free = json.loads((place / "free" / "metrics.json").read_text())
    assert "selected_on_real_images" not in free
    assert all("score" not in terms for terms in free["history"])


def test_two_processes_select(place: Path, model: Path, made: Path) -> None:
    processes = launch(words_for(model, made, made), 2, place)
    codes = [ended(process) for process in processes]
    assert codes == [0, 0], (place / "rank-0.txt").read_text()
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    on = metrics["selected_on_real_images"]
    score = dfq.evaluate(place / "run", made).AP
    assert score == pytest.approx(on["AP"])


def test_mistakes(place: Path, model: Path, made: Path) -> None:
    assert "absent" in has_one_error(command(*words_for(model, made, place / "absent")))
    stranger = real_set(place / "stranger", names=("x", "y"))
    line = has_one_error(command(*words_for(model, made, stranger)))
    assert str(stranger) in line
    assert not (place / "run").exists()
