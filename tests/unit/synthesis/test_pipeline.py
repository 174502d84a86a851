"""A set from a detector: shards, resumption at any moment, and what identifies a set."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.tiny_detector import tiny_detector

from dfq.data.calibration_set import CalibrationSet
from dfq.errors import UserError
from dfq.models.base import Detector
from dfq.synthesis import inversion
from dfq.synthesis.pipeline import check, determinants, set_name, synthesize_set
from dfq.synthesis.settings import LabelStage, Synthesis, SynthesisWeights


@pytest.fixture(scope="module")
def detector() -> Detector:
    detector = tiny_detector()
    detector.module.requires_grad_(False)
    detector.fingerprint, detector.source = "f" * 64, "weights/tiny.pt"
    return detector


def settings(**changes: Any) -> Synthesis:
    defaults: dict[str, Any] = {
        "images": 3,
        "image_size": 64,
        "iterations": 1,
        "batch_size": 2,
        "labels": "multi",
        "label_stage": LabelStage(image_size=64, iterations=3, updates=2),
    }
    return Synthesis(**{**defaults, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


def test_a_whole_set(detector: Detector, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    made = synthesize_set(
        detector, settings(), 0, tmp_path / "set", shard_done=lambda *at: progress.append(at)
    )
    # The last shard is smaller; a slow disk may finish both before it is told of the first.
    assert progress in ([(0, 3), (2, 3), (3, 3)], [(0, 3), (3, 3)])
    assert len(made) == 3
    assert made.verify() == []
    assert made.load([0, 1, 2]).shape == (3, 3, 64, 64)
    assert [len(shard["files"]) for shard in made.manifest["shards"]] == [2, 1]
    assert made.manifest["determinants"]["checkpoint"] == detector.fingerprint
    assert made.manifest["model"] == "weights/tiny.pt"
    names = {p.name for p in (tmp_path / "set").iterdir()}
    assert names == {"images", "annotations.json", "manifest.json", "preview.png"}


def test_a_finished_set_is_not_made_again(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesize_set(detector, settings(), 0, tmp_path)
    before = contents(tmp_path)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished set was optimised again")

    monkeypatch.setattr(inversion.Inversion, "batch", forbidden)
    again = synthesize_set(detector, settings(), 0, tmp_path)
    assert len(again) == 3
    assert contents(tmp_path) == before


class Killed(BaseException):
    """What stands for the end of the process."""


@contextmanager
def killed_at(step: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The process "dies" before its `step`-th change of a file: that change and all later ones, of
    clean-ups too, no longer happen. Yields a list whose length is the number of changes tried."""
    changes: list[int] = []

    def guarded(function: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **more: Any) -> Any:
            relative = "dir_fd" in more
            inside = isinstance(path, str | os.PathLike) and str(path).startswith(str(root))
            if (inside or relative) and writes(*args, **more):
                changes.append(len(changes))
                if len(changes) > step:
                    raise Killed
            return function(path, *args, **more)

        return call

    def opens_for_writing(mode: str = "r", *_: Any, **__: Any) -> bool:
        return any(letter in mode for letter in "wax+")

    with monkeypatch.context() as patch:
        for name in ("mkdir", "unlink", "rmdir", "replace", "rename"):
            patch.setattr(os, name, guarded(getattr(os, name), lambda *_, **__: True))
        opener = guarded(io.open, opens_for_writing)
        patch.setattr(io, "open", opener)
        patch.setattr(builtins, "open", opener)
        yield changes


def test_killed_before_any_change_of_a_file(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(images=2, batch_size=1, iterations=0)
    whole = tmp_path / "whole"
    with killed_at(10**6, whole, monkeypatch) as changes:
        synthesize_set(detector, chosen, 0, whole)
    expected = contents(whole)
    assert len(changes) > 15
    unfinished = 0
    for step in range(len(changes)):
        folder = tmp_path / str(step)
        with killed_at(step, folder, monkeypatch), pytest.raises(Killed):
            synthesize_set(detector, chosen, 0, folder)
        unfinished += not (folder / "manifest.json").exists()
        made = synthesize_set(detector, chosen, 0, folder)
        assert contents(folder) == expected, f"killed at change {step} of {len(changes)}"
        assert made.verify() == []
    assert unfinished > 10


def test_only_missing_shards_are_made(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(images=3, batch_size=1)
    synthesize_set(detector, chosen, 0, tmp_path / "whole")
    made: list[int] = []
    plain = inversion.Inversion.batch

    def batch(self: Any, count: int, seed: int, shard: int, report: Any = None) -> Any:
        if shard == 2 and 2 not in made:
            made.append(shard)
            raise KeyboardInterrupt
        made.append(shard)
        return plain(self, count, seed, shard, report)

    monkeypatch.setattr(inversion.Inversion, "batch", batch)
    with pytest.raises(KeyboardInterrupt):
        synthesize_set(detector, chosen, 0, tmp_path / "set")
    progress: list[tuple[int, int]] = []
    synthesize_set(
        detector, chosen, 0, tmp_path / "set", shard_done=lambda *at: progress.append(at)
    )
    assert made == [0, 1, 2, 2]
    # What was there already counts from the start.
    assert progress == [(2, 3), (3, 3)]
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_truncated_record_is_made_again(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(images=2, batch_size=1)
    synthesize_set(detector, chosen, 0, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            "dfq.data.calibration_writer.CalibrationWriter.finish",
            lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            synthesize_set(detector, chosen, 0, tmp_path / "set")
    record = tmp_path / "set" / "shards" / "000001.json"
    record.write_bytes(record.read_bytes()[:50])
    with pytest.raises(UserError, match=r"unfinished .*dfq synthesize"):
        CalibrationSet.open(tmp_path / "set")
    synthesize_set(detector, chosen, 0, tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "seed"),
    [
        ({"iterations": 2}, 0),
        ({"labels": "tile"}, 0),
        ({"weights": SynthesisWeights(tv=1.0)}, 0),
        ({"label_stage": LabelStage(iterations=9)}, 0),
        ({"image_size": 32}, 0),
        ({}, 1),
    ],
)
def test_the_name_follows_from_all_settings(
    detector: Detector, changes: dict[str, Any], seed: int
) -> None:
    assert set_name(detector, settings(), 0) == set_name(detector, settings(), 0)
    assert set_name(detector, settings(**changes), seed) != set_name(detector, settings(), 0)


def test_the_name_follows_from_the_checkpoint_not_its_path(detector: Detector) -> None:
    other = tiny_detector(1)
    other.source, other.fingerprint = detector.source, "0" * 64
    assert set_name(other, settings(), 0) != set_name(detector, settings(), 0)
    other.source, other.fingerprint = "elsewhere/tiny.pt", detector.fingerprint
    assert set_name(other, settings(), 0) == set_name(detector, settings(), 0)
    assert set_name(detector, settings(), 0).startswith("tiny-3x64-")


def test_the_default_size_is_written_out(detector: Detector) -> None:
    asked = determinants(detector, settings(image_size=detector.image_size), 0)
    assert determinants(detector, settings(image_size=None), 0) == asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 100}, r"synthesis\.image_size: 100 .*stride 16; try 96 or 112"),
        (
            {"labels": "adaptive", "label_stage": LabelStage(image_size=40)},
            r"synthesis\.label_stage\.image_size: 40 .*try 32 or 48",
        ),
        (
            {"weights": SynthesisWeights(task=0, bn=0, first_bn=0, tv=0)},
            r"synthesis\.weights: .*nothing to optimise",
        ),
        (
            {"labels": "none", "weights": SynthesisWeights(bn=0, first_bn=0, tv=0)},
            r"synthesis\.weights: .*nothing to optimise",
        ),
    ],
)
def test_settings_that_cannot_work(
    detector: Detector, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        synthesize_set(detector, settings(**changes), 0, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_settings_that_need_no_loss(detector: Detector) -> None:
    weights = SynthesisWeights(task=0, bn=0, first_bn=0, tv=0)
    check(detector, settings(iterations=0, weights=weights))
    # The size of a stage that does not run does not matter.
    check(detector, settings(labels="single", label_stage=LabelStage(image_size=33)))
