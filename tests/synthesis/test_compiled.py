"""Whether there are compiled functions."""

from __future__ import annotations

import shutil

import pytest

from dfq.synthesis import compiled


def test_a_compiler_is_made_use_of() -> None:
    assert (compiled._library() is None) == (shutil.which("cc") is None)


def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert compiled._library.__wrapped__() is None


def test_a_compiler_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    assert compiled._library.__wrapped__() is None
