"""Files take their places whole, together, or not at all."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiny_detector import tiny_detector

from dfq import export
from dfq.errors import UserError
from dfq.export import writers


@pytest.fixture
def info(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a format whose writer makes two files, as OpenVINO's does, that say which run they are
    of."""
    about = SimpleNamespace(format="pair", run="new")
    about.model_copy = lambda update: about

    def pair(_: Any, info: Any, path: Path, __: bool) -> list[Path]:
        files = [path, path.with_suffix(".bin")]
        for file in files:
            file.write_text(info.run)
        return files

    monkeypatch.setitem(writers._WRITERS, "pair", pair)
    return about


def test_a_file_is_never_beside_the_weights_of_another(
    tmp_path: Path, info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, weights = tmp_path / "x.xml", tmp_path / "x.bin"
    plain = os.replace
    # Killed after as many of its files have their places, which nothing of it sees to then.
    for moved in (0, 1, 2):
        path.write_text("old")
        weights.write_text("old")
        left = moved

        def stop(self: Path, target: Path) -> Path:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            plain(self, target)
            return target

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stop)
            if moved < 2:
                with pytest.raises(KeyboardInterrupt):
                    writers.write(SimpleNamespace(), info, path)  # type: ignore[arg-type]
            else:
                writers.write(SimpleNamespace(), info, path)  # type: ignore[arg-type]
        assert not path.exists() or path.read_text() == weights.read_text()
        assert path.exists() == (moved == 2)
        writers.write(SimpleNamespace(), info, path)  # type: ignore[arg-type]
        assert path.read_text() == weights.read_text() == "new"
        assert sorted(file.name for file in tmp_path.iterdir()) == ["x.bin", "x.xml"]


def test_a_full_disk_is_not_taken_for_a_network_that_cannot_be_written(
    tmp_path: Path, info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any, __: Any, path: Path, ___: bool) -> list[Path]:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(writers._WRITERS, "pair", full)
    (tmp_path / "x.xml").write_text("old")
    with pytest.raises(OSError, match="o") as caught:
        writers.write(SimpleNamespace(), info, tmp_path / "x.xml")  # type: ignore[arg-type]
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "x.xml"))
    assert [file.name for file in tmp_path.iterdir()] == ["x.xml"]
    assert (tmp_path / "x.xml").read_text() == "old"


@pytest.mark.parametrize("suffix", [".xml", ".pt2", ".tflite"])
@pytest.mark.e2e
def test_a_converter_on_a_full_disk(suffix: str, tmp_path: Path) -> None:
    # Those that write by themselves end the process, of which this test is part.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        with pytest.raises(OSError, match="o") as caught:
            export(tiny_detector(), tmp_path / f"x{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (
        errno.EFBIG,
        str(tmp_path / f"x{suffix}"),
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_of_any_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "x.bin").mkdir()
    with pytest.raises(UserError, match=r"x\.bin: is a folder"):
        export(tiny_detector(), tmp_path / "x.xml")
    (tmp_path / "y.bin").write_text("weights")
    with pytest.raises(UserError, match=r"y\.bin: is one of the inputs"):
        export(tmp_path / "y.bin", tmp_path / "y.xml")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.bin", "y.bin"]
