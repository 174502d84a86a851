"""Damaged, unfinished or foreign sets and runs, places that cannot be written, a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import command, contents, has_one_error, has_one_error_after_output
from support.tiny_detector import tiny_detector

from dfq.models import save_detector
from dfq.qat.trainer import Trainer


def test_a_set_of_another_checkpoint(place: Path, made: Path) -> None:
    save_detector(tiny_detector(seed=1), place / "other.safetensors")
    words = ("qat", "--recipe", "tiny.yaml", "--model", "other.safetensors", "--data", made)
    line = has_one_error(command(*words, "--out", "out"))
    assert "made from another checkpoint" in line
    assert "dfq synthesize" in line
    assert not (place / "out").exists()
    line = has_one_error(
        command(
            "synthesize", "--model", "other.safetensors", "--recipe", "tiny.yaml", "--out", made
        )
    )
    assert "holds a set made with another checkpoint" in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("annotations.json", "annotations.json: broken or truncated JSON"),
        ("manifest.json", "manifest.json: broken or truncated JSON"),
        ("images/00000001.png", "00000001.png: missing or not a readable image"),
    ],
)
def test_a_truncated_set(place: Path, model: Path, made: Path, name: str, message: str) -> None:
    shutil.copytree(made, place / "set")
    path = place / "set" / name
    path.write_bytes(path.read_bytes()[:60])
    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", "set", "--out", "out")
    assert message in has_one_error(command(*words))
    if "images" not in name:
        assert not (place / "out").exists()


def test_an_unfinished_set(place: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfq.synthesis.inversion import Inversion

    plain = Inversion.batch

    def batch(self: Any, count: int, seed: int, shard: int, report: Any = None) -> Any:
        if shard == 1:
            raise KeyboardInterrupt
        return plain(self, count, seed, shard, report)

    words = ("synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "set")
    with monkeypatch.context() as patch:
        patch.setattr(Inversion, "batch", batch)
        stopped = command(*words)
    assert stopped.exit_code == 130
    assert "the same command goes on from here" in stopped.stderr
    line = has_one_error(
        command("qat", "--recipe", "tiny.yaml", "--model", model, "--data", "set", "--out", "out")
    )
    assert "unfinished (1 shards so far)" in line
    assert "error" in has_one_error(command("eval", "--model", model, "--data", "set"))
    # A truncated shard is made again by the command that the line names.
    record = place / "set" / "shards" / "000000.json"
    record.write_bytes(record.read_bytes()[:30])
    assert command(*words).exit_code == 0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", lambda data: data[:1000], "model.safetensors: damaged"),
        ("model.safetensors", lambda _: b"", "model.safetensors: damaged"),
        ("model.safetensors", None, "model.safetensors: missing"),
        ("manifest.json", lambda data: data[:200], "manifest.json: broken or truncated JSON"),
        ("manifest.json", lambda _: b'{"kind": "else"}', "holds no quantized model"),
        ("manifest.json", lambda _: b"[]", "holds no quantized model"),
        ("manifest.json", None, "this run is unfinished"),
    ],
)
def test_a_damaged_run(
    place: Path, run: Path, made: Path, name: str, change: Any, message: str
) -> None:
    shutil.copytree(run, place / "run")
    path = place / "run" / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    assert message in has_one_error(command("inspect", "--model", "run"))
    assert message in has_one_error(command("eval", "--model", "run", "--data", made))


def test_a_truncated_training_checkpoint(
    place: Path, model: Path, made: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out", "out")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_choose", stop)
        assert command(*words).exit_code == 130
    assert "unfinished" in has_one_error(command("inspect", "--model", "out"))
    checkpoint = place / "out" / "checkpoint.pt"
    for size in (0, 10, checkpoint.stat().st_size // 2):
        checkpoint.write_bytes(checkpoint.read_bytes()[:size] or b"\0" * size)
        line = has_one_error(command(*words))
        assert "checkpoint.pt: cannot be read" in line
        assert "delete it" in line
    # The line's advice works, and leads to what an unbroken run gives.
    checkpoint.unlink()
    assert command(*words).exit_code == 0
    assert contents(place / "out") == contents(run)


@pytest.mark.parametrize("command_name", ["synthesize", "qat"])
@pytest.mark.parametrize("kind", ["foreign folder", "file", "inside a file", "set", "run"])
def test_out_that_is_taken(
    place: Path, model: Path, made: Path, run: Path, command_name: str, kind: str
) -> None:
    out = place / "out"
    if kind == "foreign folder":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    elif kind == "set":
        shutil.copytree(made, out)
    elif kind == "run":
        shutil.copytree(run, out)
    else:
        out.write_text("mine")
        out = out / "deeper" if kind == "inside a file" else out
    before = contents(place)
    words = ["synthesize"] if command_name == "synthesize" else ["qat", "--data", str(made)]
    line = has_one_error(
        command(*words, "--model", model, "--recipe", "tiny.yaml", "--out", out, "--seed", "3")
    )
    assert str(place / "out") in line
    assert contents(place) == before


@pytest.mark.parametrize("target", ["folder", "file/a.json"])
def test_json_that_cannot_be_written(place: Path, model: Path, made: Path, target: str) -> None:
    (place / "folder").mkdir()
    (place / "file").write_text("mine")
    before = contents(place)
    for words in (("eval", "--data", made), ("inspect",)):
        line = has_one_error_after_output(command(*words, "--model", model, "--json", target))
        assert "fil" in line or "folder" in line
    assert contents(place) == before


def full_disk(patch: pytest.MonkeyPatch, after: int) -> None:
    """From the `after`-th file on, nothing more reaches the disk."""
    count = 0
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(descriptor)

    patch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("after", [0, 1, 3, 6, 7])
def test_a_full_disk_while_synthesizing(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    words = ("synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "out")
    with monkeypatch.context() as patch:
        full_disk(patch, after)
        line = has_one_error_after_output(command(*words))
    assert "the disk is full" in line
    assert not list(place.rglob("*.tmp"))
    assert not (place / "out" / "manifest.json").exists()
    assert len([p for p in (place / "out").rglob("*") if p.is_file()]) == after
    # With room again, the same command finishes it.
    assert command(*words).exit_code == 0
    assert contents(place / "out") == contents(made)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_full_disk_while_training(
    place: Path,
    model: Path,
    made: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out", "out")
    with monkeypatch.context() as patch:
        full_disk(patch, after)
        line = has_one_error_after_output(command(*words))
    assert "the disk is full" in line
    assert not list(place.rglob(".*.tmp"))
    assert not (place / "out" / "manifest.json").exists()
    assert command(*words).exit_code == 0
    assert contents(place / "out") == contents(run)


def test_a_full_disk_for_the_checkpoint(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch reports a full disk in its own words.
    def save(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", save)
    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out", "out")
    line = has_one_error_after_output(command(*words))
    assert "the disk is full" in line
    assert not (place / "out" / "checkpoint.pt").exists()


def test_a_folder_that_may_not_be_written(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "locked").mkdir(mode=0o500)
    mkdir = os.mkdir

    def refusing(path: str | Path, *mode: int, **more: int) -> None:
        # The superuser, as whom containers run tests, would be let through.
        if "locked" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *mode, **more)

    monkeypatch.setattr(os, "mkdir", refusing)
    line = has_one_error(
        command("synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "locked/set")
    )
    assert "permission denied" in line
