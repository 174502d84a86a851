"""Curves of the loss, read back with TensorBoard's own reader."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dfq.errors import UserError
from dfq.runtime.tensorboard import _OPEN, Curves

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def curves_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = accumulator.EventAccumulator(str(folder))
    reader.Reload()
    tags = reader.Tags()["scalars"]
    return {tag: [(e.step, round(e.value, 5)) for e in reader.Scalars(tag)] for tag in tags}


def test_a_chart_for_each_stage_and_term(tmp_path: Path) -> None:
    curves = Curves(tmp_path / "new" / "folder")
    for step in (1, 11):
        curves.add("shard-000000", "labels", step, {"bn": 2.0 / step, "tv": 0.5})
    curves.add("shard-000000", "full", 1, {"bn": 0.25})
    curves.add("shard-000001", "full", 1, {"bn": 0.75})
    curves.close()
    assert curves_of(tmp_path / "new" / "folder" / "shard-000000") == {
        "labels/bn": [(1, 2.0), (11, 0.18182)],
        "labels/tv": [(1, 0.5), (11, 0.5)],
        "full/bn": [(1, 0.25)],
    }
    assert curves_of(tmp_path / "new" / "folder" / "shard-000001") == {"full/bn": [(1, 0.75)]}


@pytest.mark.usefixtures("event_files")
def test_a_second_attempt_hides_the_first(tmp_path: Path) -> None:
    for steps in ((1, 11), (1,)):
        curves = Curves(tmp_path)
        for step in steps:
            curves.add("shard-000000", "full", step, {"bn": float(step)})
        curves.close()
    assert curves_of(tmp_path / "shard-000000") == {"full/bn": [(1, 1.0)]}


def test_many_runs_do_not_keep_as_many_files_open(tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    for shard in range(_OPEN + 2):
        for step in (1, 2):
            curves.add(f"shard-{shard}", "full", step, {"bn": 1.0})
        assert len(curves._open) <= _OPEN
    curves.close()
    for shard in (0, _OPEN, _OPEN + 1):
        assert curves_of(tmp_path / f"shard-{shard}") == {"full/bn": [(1, 1.0), (2, 1.0)]}


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"not installed; pip install 'dfq\[tensorboard\]'"):
        Curves(tmp_path / "curves")
    assert not (tmp_path / "curves").exists()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="in the way"):
        Curves(tmp_path / name)
