"""Folders of runs that an earlier version began or finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dfq.errors import UserError
from dfq.recipe import Recipe, load_recipe
from dfq.runs.deployment import KIND, NAME, folder_for
from dfq.runs.folder import Run, next_folder
from dfq.runs.identity import identity_of_recipe
from dfq.runtime.files import write_json
from dfq.runtime.lock import LOCK, locked, sweep_lock

GONE = {"drift": 0.5, "dampen": 0.0, "freeze": 0.0, "masks": "ellipse"}


def identity(recipe: Recipe, **removed: Any) -> dict[str, Any]:
    values = identity_of_recipe(recipe)
    values["distillation"] |= removed
    return {"recipe": values, "data": "set"}


def test_a_run_whose_removed_keys_changed_nothing_goes_on(tmp_path: Path) -> None:
    for recipe, removed in (
        (load_recipe(None), GONE),
        # Nothing but the task's loss looks at masks.
        (load_recipe(None), {**GONE, "masks": "own"}),
        (load_recipe("lsq-real"), {**GONE, "drift": 0.0}),
    ):
        parent = tmp_path / str(len(list(tmp_path.iterdir())))
        Run(parent / "run-1", identity(recipe, **removed))
        now = identity(recipe)
        assert not Run(parent / "run-1", now).finished
        assert next_folder(parent, "run", now) == parent / "run-1"
        (parent / "made-1").mkdir()
        write_json(parent / "made-1" / NAME, {
            "kind": KIND, "format": 1, "identity": identity(recipe, **removed),
        })  # fmt: skip
        assert folder_for(parent, "made", now) == parent / "made-1"


@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("w4a8", {"dampen": 0.1}),
        ("w4a8", {"freeze": 0.02}),
        # Weights that are trained had a bound then.
        ("paper-yolov5", {"drift": 0.5}),
        ("paper-yolov5", {"masks": "none"}),
    ],
)
def test_a_run_whose_removed_keys_changed_something_is_refused_by_their_names(
    tmp_path: Path, name: str, removed: dict[str, Any]
) -> None:
    recipe = load_recipe(name)
    before = identity(recipe, **(GONE | {"drift": 0.0} | removed))
    Run(tmp_path / "run", before)
    (key,) = removed
    with pytest.raises(
        UserError, match=rf"run: holds a run with distillation\.{key}, which this version does not"
    ) as refused:
        Run(tmp_path / "run", identity(recipe))
    assert "\n" not in str(refused.value)


def test_a_finished_run_has_no_lock_of_a_killed_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recorded = identity(load_recipe(None))
    Run(folder, recorded)
    (folder / "state.json").unlink()
    (folder / "model.safetensors").touch()
    write_json(folder / "manifest.json", {"kind": "dfq quantized detector", "identity": recorded})
    (folder / ".lock").touch()
    assert Run(folder, recorded).finished
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "model.safetensors"]


def test_a_lock_that_is_held_stays(tmp_path: Path) -> None:
    with locked(tmp_path, "held"):
        sweep_lock(tmp_path)
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()
