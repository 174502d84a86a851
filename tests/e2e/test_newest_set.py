"""`dfq synthesize --model M`, then `dfq qat --recipe R` with nothing else: the set says what it was
made from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.cli_parts import real_set
from support.forks import ended, launch
from support.harness import command, has_one_error
from support.tiny_detector import tiny_detector

import dfq
from dfq.data.calibration_set import CalibrationSet
from dfq.models import load_detector, save_detector
from dfq.recipe import Recipe, load_recipe


def synthesized(place: Path, model: str | Path, *more: str) -> Path:
    """The folder of a set in the cache."""
    before = set((place / "home").iterdir()) if (place / "home").exists() else set()
    result = command("synthesize", "--model", model, "--recipe", "tiny.yaml", *more)
    assert result.exit_code == 0, result.output
    (made,) = set((place / "home").iterdir()) - before
    return made


def aged(folder: Path, seconds: int) -> None:
    """The set was finished so long ago."""
    then = folder.stat().st_mtime - seconds
    os.utime(folder / "manifest.json", (then, then))


def recorded(folder: str) -> Any:
    return load_recipe(folder + "/recipe.yaml").model


@pytest.fixture
def own(place: Path, model: Path) -> Path:
    """The model as a user has it: a relative path in the folder to work in."""
    shutil.copy(model, place / "mine.safetensors")
    return Path("mine.safetensors")


def test_nothing_but_the_recipe(
    place: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = synthesized(place, own)
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["model"] == "mine.safetensors"
    assert manifest["model_path"] == str(place / "mine.safetensors")
    # From anywhere: it is not the folder that tells.
    (place / "elsewhere").mkdir()
    shutil.copy(place / "tiny.yaml", place / "elsewhere")
    monkeypatch.chdir(place / "elsewhere")
    result = command("qat", "--recipe", "tiny.yaml")
    assert result.exit_code == 0, result.output
    # One line says what was taken, and from where; the set was not made a second time.
    told = [line for line in result.stderr.splitlines() if line.startswith("model: ")]
    assert told == [f"model: {place / 'mine.safetensors'}, which {made} was made from"]
    assert list((place / "home").iterdir()) == [made]
    assert result.stdout.splitlines()[-1] == "runs/tiny-mine-1"
    assert recorded("runs/tiny-mine-1") == str(place / "mine.safetensors")
    # It is the run that naming the model gives.
    named = command("qat", "--recipe", "tiny.yaml", "--model", place / own, "--out", "named")
    assert named.exit_code == 0, named.output
    assert "model: " not in named.stderr
    for file in ("model.safetensors", "metrics.json", "manifest.json"):
        one, other = Path("runs/tiny-mine-1") / file, Path("named") / file
        assert one.read_bytes() == other.read_bytes()


def test_a_shipped_recipe_finds_the_set_of_the_defaults() -> None:
    """`dfq synthesize` without a recipe and `dfq qat --recipe w4a8.yaml` mean the same images."""
    for name in ("w8a8", "w6a6", "w5a5", "w4a8", "w4a4", "w3a8", "mixed-w4a8", "mixed-w4a4"):
        assert load_recipe(name).synthesis == Recipe().synthesis
        assert load_recipe(name).seed == Recipe().seed


def test_the_recipes_model_and_the_commands_go_first(place: Path, own: Path, model: Path) -> None:
    save_detector(tiny_detector(seed=1), place / "other.safetensors")
    synthesized(place, own)
    (place / "tiny.yaml").write_text((place / "tiny.yaml").read_text() + "model: other.safetensors")
    result = command("qat", "--recipe", "tiny.yaml", "--out", "one")
    assert result.exit_code == 0, result.output
    assert recorded("one") == "other.safetensors"
    result = command("qat", "--recipe", "tiny.yaml", "--model", model, "--out", "two")
    assert result.exit_code == 0, result.output
    assert recorded("two") == str(model)


def test_of_several_sets_the_newest_counts(place: Path, own: Path) -> None:
    save_detector(tiny_detector(seed=1), place / "other.safetensors")
    first = synthesized(place, own)
    second = synthesized(place, "other.safetensors")
    # Not a set, and a set that is not finished: neither tells anything.
    (place / "home" / "notes").mkdir()
    (place / "home" / "notes" / "manifest.json").write_text('{"mine": 1}')
    shutil.copytree(second, place / "home" / "unfinished")
    (place / "home" / "unfinished" / "manifest.json").unlink()
    for older, newer, name in ((second, first, "mine"), (first, second, "other")):
        aged(newer, 50)
        aged(older, 100)
        result = command("qat", "--recipe", "tiny.yaml", "--out", name)
        assert result.exit_code == 0, result.output
        assert recorded(name) == str(place / f"{name}.safetensors")


def test_a_set_to_train_on_says_what_it_was_made_from(place: Path, own: Path) -> None:
    save_detector(tiny_detector(seed=1), place / "other.safetensors")
    made = synthesized(place, own)
    made.rename(place / "kept")
    synthesized(place, "other.safetensors")
    result = command("qat", "--recipe", "tiny.yaml", "--data", "kept", "--out", "run")
    assert result.exit_code == 0, result.output
    assert recorded("run") == str(place / "mine.safetensors")
    # Real images do not; there the newest set in the cache does.
    real_set(place / "real")
    words = ("--set", "distillation.weights.task=0", "--set", "synthesis.image_size=64")
    result = command("qat", "--recipe", "tiny.yaml", "--data", "real", "--out", "real-run", *words)
    assert result.exit_code == 0, result.output
    assert recorded("real-run") == str(place / "other.safetensors")


@pytest.mark.parametrize("kind", ["changed", "gone", "replaced by a folder"])
def test_a_model_that_is_not_the_one_any_more(place: Path, own: Path, kind: str) -> None:
    made = synthesized(place, own)
    (place / own).unlink()
    if kind == "changed":
        save_detector(tiny_detector(seed=1), place / own)
    elif kind != "gone":
        (place / own).mkdir()
    line = has_one_error(command("qat", "--recipe", "tiny.yaml"))
    assert str(made) in line
    assert str(place / own) in line
    assert "give --model" in line
    assert not (place / "runs").exists()


def test_a_renamed_model_has_the_set_it_had(
    place: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the file counts, not what it is called."""
    made = synthesized(place, own)
    (place / own).rename(place / "renamed.safetensors")
    words = ("synthesize", "--model", "renamed.safetensors", "--recipe", "tiny.yaml")
    result = command(*words)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f": {made}\n")
    assert list((place / "home").iterdir()) == [made]


@pytest.mark.parametrize(
    "manifest",
    [
        "{", "[]", '{"determinants": {}, "shards": []}',
        '{"determinants": {"checkpoint": 3}, "shards": [], "model": "m"}',
        '{"determinants": [], "shards": [], "model": "m"}',
        '{"determinants": {"checkpoint": "a"}, "shards": [], "model": ["m"]}',
    ],
)  # fmt: skip
def test_a_broken_manifest_is_one_line(place: Path, own: Path, manifest: str) -> None:
    made = synthesized(place, own)
    (made / "manifest.json").write_text(manifest)
    result = command("qat", "--recipe", "tiny.yaml")
    assert "manifest.json" in has_one_error(result) or "which model?" in result.stderr
    assert not (place / "runs").exists()


def test_without_any_set(place: Path) -> None:
    line = has_one_error(command("qat", "--recipe", "tiny.yaml"))
    assert "which model? give --model" in line
    assert str(place / "home") in line


@pytest.mark.parametrize("key", ["model", "model_path"])
def test_a_manifest_runs_no_program(place: Path, own: Path, key: str) -> None:
    """A config of mmdet is one; a set may come from anybody."""
    made = synthesized(place, own)
    (place / "evil.py").write_text(f"open({str(place / 'ran')!r}, 'w')\nmodel = dict(type='X')\n")
    for named in (
        str(place / "evil.py"), "evil.py", f"evil.py@{place / own}",
        f"{place / 'evil.py'}@{place / own}", "./evil.PY",
    ):  # fmt: skip
        manifest = json.loads((made / "manifest.json").read_text())
        manifest.pop("model_path", None)
        (made / "manifest.json").write_text(json.dumps({**manifest, key: named}))
        line = has_one_error(command("qat", "--recipe", "tiny.yaml"))
        assert "give --model" in line
        assert not (place / "ran").exists()


def test_networks_whose_weights_are_apart(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    name = "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn"
    torch.save(load_detector(name).module.state_dict(), place / "w.pth")
    words = ("--set", "synthesis.iterations=0", "--set", "synthesis.labels=multi")
    made = synthesized(place, name, "--checkpoint", "w.pth", *words)
    assert CalibrationSet.open(made).manifest["model_path"] == f"{name}@{place / 'w.pth'}"
    monkeypatch.chdir("/")
    run = dfq.quantize(
        load_recipe(place / "tiny.yaml", [*words[1::2], "method=ptq"]), out=place / "run"
    )
    assert recorded(str(run)) == f"{name}@{place / 'w.pth'}"
    assert list((place / "home").iterdir()) == [made]


WITHOUT_WEIGHTS = """nc: 2
scales: {n: [0.5, 0.25, 1024]}
backbone:
- [-1, 1, Conv, [32, 3, 2]]
- [-1, 1, Conv, [64, 3, 2]]
- [-1, 1, Conv, [64, 3, 2]]
head:
- [-1, 1, nn.Upsample, [None, 2, nearest]]
- [[-1, 1], 1, Concat, [1]]
- [-1, 1, C2f, [64]]
- [[5, 2], 1, Detect, [nc]]
"""


def test_a_network_with_random_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ones are drawn again, from wherever it is asked."""
    (place / "mine.yaml").write_text(WITHOUT_WEIGHTS)
    made = synthesized(place, "mine.yaml", "--random-weights")
    monkeypatch.chdir("/")
    words = ("qat", "--recipe", place / "tiny.yaml", "--set", "method=ptq", "--out", place / "run")
    result = command(*words)
    assert result.exit_code == 0, result.output
    assert recorded(str(place / "run")) == f"{place / 'mine.yaml'}@random"
    shutil.rmtree(place / "run")
    (place / "mine.yaml").rename(place / "renamed.yaml")
    line = has_one_error(command(*words))
    assert str(made) in line
    assert "give --model" in line


@pytest.mark.parametrize("named", ["mine.yaml@random", "mine.safetensors", "random", "@random"])
def test_a_model_that_only_another_folder_has(
    place: Path, own: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """What the set calls its model is none here: the line says whose words these are."""
    made = synthesized(place, own)
    manifest = json.loads((made / "manifest.json").read_text())
    manifest.update(model=named, model_path=None)
    (made / "manifest.json").write_text(json.dumps(manifest))
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    line = has_one_error(command("qat", "--recipe", place / "tiny.yaml"))
    assert f"{made}: was made from {named}" in line
    assert "give --model" in line


def test_several_processes_take_the_same(place: Path, own: Path) -> None:
    synthesized(place, own)
    processes = launch(["qat", "--recipe", "tiny.yaml", "--out", "run"], 2, place)
    codes = [ended(process) for process in processes]
    printed = [(place / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert codes == [0, 0], printed
    assert printed[0].count("model: ") == 1
    assert printed[1] == ""
    assert recorded("run") == str(place / "mine.safetensors")
