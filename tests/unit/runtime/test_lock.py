"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from dfq.errors import UserError
from dfq.runtime import lock
from dfq.runtime.lock import locked


def test_a_second_one_is_refused_until_the_first_is_through(tmp_path: Path) -> None:
    with locked(tmp_path, "taken"):
        with pytest.raises(UserError, match="taken"), locked(tmp_path, "taken"):
            raise AssertionError("two at once")
        # Being refused does not free what the first one holds.
        with pytest.raises(UserError, match="taken"), locked(tmp_path, "taken"):
            raise AssertionError("two at once")
    with locked(tmp_path, "taken"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_a_holder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / lock.LOCK).write_text("")
    with locked(tmp_path, "taken"):
        pass


def test_a_lock_on_a_removed_file_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one removes its file between the second one's opening and locking it."""
    plain = fcntl.flock
    removed: list[bool] = []

    def flock(file: Any, how: int) -> None:
        if not removed:
            (tmp_path / lock.LOCK).unlink()
            removed.append(True)
        plain(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path, "mine"):
        assert removed
        with pytest.raises(UserError, match="taken"), locked(tmp_path, "taken"):
            raise AssertionError("two at once")


@pytest.mark.parametrize("kind", ["link", "loop", "pipe", "folder"])
def test_something_else_in_the_place_of_the_lock(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / lock.LOCK, tmp_path / "other"
    other.write_text("mine")
    if kind == "link":
        path.symlink_to(other)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(UserError, match=r"\.lock: is in the way"), locked(tmp_path, "taken"):
        raise AssertionError("locked all the same")
    assert other.read_text() == "mine"
