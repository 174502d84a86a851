"""What tests of progress share."""

from __future__ import annotations

import pytest
from support.clock import Clock

from dfq.runtime import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    return clock
