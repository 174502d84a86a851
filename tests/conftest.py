"""Shared fixtures. The kit (real images and networks) is looked for once, here."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_VERBOSE", "False")

import numpy as np
import pytest
import torch

from dfq.runtime.processes import keeping_signal_stack

# A shell that starts the tests in the background has SIGINT ignored, by what they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Small networks on shared cores: threads that wait for each other take most of the time.
torch.set_num_threads(1)


TESTS = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test its tier: by its folder, by what it asks for, or as its file says."""
    for item in items:
        place = item.path.relative_to(TESTS).parts
        marks = set()
        if "kit" in getattr(item, "fixturenames", ()):
            marks.add("kit")
        told = "mmdet" in item.nodeid or "mask-rcnn" in item.nodeid or "integrations" in place
        if told or item.get_closest_marker("mmdet"):
            marks.add("mmdet")
        if place[0] == "e2e" or item.get_closest_marker("e2e"):
            marks.add("e2e")
        for mark in marks or {"unit"}:
            item.add_marker(mark)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test draws the same numbers in every run, and so do the fixtures it is first to ask
    for: one that holds for most draws fails for somebody else."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_signal_stack() -> Iterator[None]:
    """What a test does with OpenVINO by itself is not the next one's, which may send signals."""
    with keeping_signal_stack():
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of sets is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def event_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's files sort as they are written. Within a second their numbers decide, and those
    sort as text: 10 before 9, if so many were written before."""
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(0))


@pytest.fixture(scope="session")
def kit() -> Path:
    """The folder of real images and networks: `$DFQ_KIT`, else `../shared/kit` beside the clone."""
    default = Path(__file__).resolve().parents[2] / "shared" / "kit"
    folder = Path(os.environ.get("DFQ_KIT", default))
    if not (folder / "SOURCES.md").is_file():
        pytest.skip(f"the kit of real images and networks is not at {folder} (set DFQ_KIT)")
    return folder


@pytest.fixture(scope="session")
def yolov5n(kit: Path) -> Path:
    """A COCO-trained YOLOv5n v6 checkpoint."""
    return kit / "weights" / "yolov5n-coco" / "yolov5n.pt"
