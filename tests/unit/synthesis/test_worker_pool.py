"""Worker processes: how many, what they say, how they end. What they make is compared with one
process' work in `tests/e2e/test_torchrun.py`."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forks import FORKS, ended
from support.tiny_detector import tiny_detector

from dfq.data.calibration_writer import CalibrationWriter
from dfq.errors import UserError
from dfq.models.base import Detector
from dfq.synthesis import worker_pool as workers
from dfq.synthesis import worker_process as worker
from dfq.synthesis.pipeline import synthesize_set
from dfq.synthesis.settings import LabelStage, Synthesis
from dfq.synthesis.shards import Plan
from dfq.synthesis.worker_pool import Workers, worker_count

# Processes that are started, and killed.
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def detector() -> Detector:
    detector = tiny_detector()
    detector.module.requires_grad_(False)
    detector.fingerprint, detector.source = "f" * 64, "weights/tiny.pt"
    return detector


def settings(**changes: Any) -> Synthesis:
    stage = LabelStage(image_size=64, iterations=3, updates=2)
    defaults = {"images": 6, "image_size": 64, "iterations": 1, "batch_size": 1, "labels": "multi"}
    return Synthesis(**{"label_stage": stage, **defaults, **changes})


@pytest.mark.parametrize(
    ("asked", "cores", "images", "expected"),
    [
        (None, 8, 6, 1),  # not worth it
        (3, 8, 6, 3),
        (9, 2, 6, 6),  # no more than shards
        (1, 8, 10**6, 1),
        (None, 8, 10**6, 8),
        (None, 1, 10**6, 1),
    ],
)
def test_how_many(
    detector: Detector, asked: int | None, cores: int, images: int, expected: int
) -> None:
    chosen = settings(images=images)
    plan = Plan(0, images, 1)
    missing = list(range(plan.shards))
    assert worker_count(asked, cores, detector, chosen, plan, missing) == expected


def test_how_many_fit_into_memory(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, plan = settings(images=99, iterations=1000), Plan(0, 99, 1)
    need = workers._PROCESS_BYTES + workers._activation_bytes(detector, 64)
    for room, expected in ((0.5, 1), (1.5, 1), (3.5, 3), (100.0, 8)):
        monkeypatch.setattr(workers, "_free_memory", lambda room=room: room * need)
        assert worker_count(None, 8, detector, chosen, plan, list(range(99))) == expected


def test_memory_of_an_image(detector: Detector) -> None:
    small, large = (workers._activation_bytes(detector, side) for side in (64, 640))
    assert large == pytest.approx(100 * small)
    # At the least, the output of every layer that is not computed in place.
    outputs = 0

    def count(_: Any, __: Any, output: Any) -> None:
        nonlocal outputs
        outputs += output.nbytes if isinstance(output, torch.Tensor) else 0

    convolutions = [m for m in detector.module.modules() if isinstance(m, torch.nn.Conv2d)]
    handles = [layer.register_forward_hook(count) for layer in convolutions]
    detector.raw(torch.rand(1, 3, 64, 64))
    for handle in handles:
        handle.remove()
    assert outputs < small < 20 * outputs
    assert 0 < workers._free_memory() < 1e16


def test_numbers_that_cannot_be(detector: Detector) -> None:
    plan = Plan(0, 6, 1)
    with pytest.raises(UserError, match="0 is no number"):
        worker_count(0, 2, detector, settings(), plan, [0])
    on_gpu = tiny_detector()
    on_gpu.module.to("meta")
    assert worker_count(None, 2, on_gpu, settings(images=10**6), plan, [0]) == 1
    # One process keeps a GPU busy; more are for those who ask.
    assert worker_count(2, 2, on_gpu, settings(), plan, [0, 1, 2]) == 2


class Fork:
    """Stands for the process of a worker."""

    def __init__(self, process: Any) -> None:
        self.process = process

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> int:
        return ended(self.process)


def _entry(connection: Connection, parent: int, trouble: str) -> None:
    from dfq.synthesis.inversion import Inversion

    plain = Inversion.batch

    def batch(self: Any, count: int, seed: int, shard: int, report: Any = None) -> Any:
        if shard == 3:
            if trouble == "mistake":
                raise UserError("the loss is not finite")
            if trouble == "disk":
                raise OSError(28, "No space left on device", "images/3.png")
            if trouble == "bug":
                raise ZeroDivisionError("a bug of ours")
            if trouble == "death":
                os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, count, seed, shard, report)

    Inversion.batch = batch  # type: ignore[method-assign]
    worker.main(connection, parent)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Workers are forks that get into trouble at shard 3."""

    def with_trouble(trouble: str) -> list[Fork]:
        started: list[Fork] = []

        def start() -> Any:
            ours, theirs = Pipe()
            # A forked process is a child of the server that forks it.
            process = FORKS.Process(target=_start, args=(theirs, trouble), daemon=True)
            process.start()
            theirs.close()
            started.append(Fork(process))
            return ours, started[-1]

        monkeypatch.setattr(workers, "_start", start)
        return started

    return with_trouble


def _start(connection: Connection, trouble: str) -> None:
    _entry(connection, os.getppid(), trouble)


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        ("mistake", UserError, "^the loss is not finite$"),
        ("disk", OSError, "No space left"),
        ("bug", ZeroDivisionError, "a bug of ours"),
        ("death", UserError, r"a worker process died \(signal 9, SIGKILL\); .*again"),
    ],
)
def test_trouble_in_a_worker(
    detector: Detector,
    tmp_path: Path,
    forked: Any,
    trouble: str,
    kind: type[Exception],
    message: str,
) -> None:
    started = forked(trouble)
    with pytest.raises(kind, match=message) as caught:
        synthesize_set(detector, settings(), 0, tmp_path / "set", workers=2)
    assert len(started) == 2
    assert not any(fork.process.is_alive() for fork in started)
    if trouble == "disk":
        assert (caught.value.errno, caught.value.filename) == (28, "images/3.png")
    if trouble == "bug":
        assert 'raise ZeroDivisionError("a bug of ours")' in str(caught.value.__cause__)
    assert not (tmp_path / "set" / "manifest.json").exists()
    synthesize_set(detector, settings(), 0, tmp_path / "set", workers=1)
    synthesize_set(detector, settings(), 0, tmp_path / "whole", workers=1)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_workers_make_and_report(detector: Detector, tmp_path: Path, forked: Any) -> None:
    forked("none")
    chosen = settings(images=5, batch_size=2, iterations=4)
    reports: list[tuple[Any, ...]] = []
    done: list[tuple[int, int]] = []
    made = synthesize_set(
        detector,
        chosen,
        0,
        tmp_path / "set",
        workers=2,
        report=lambda *values: reports.append(values),
        shard_done=lambda *at: done.append(at),
    )
    assert made.verify() == []
    synthesize_set(detector, chosen, 0, tmp_path / "one", workers=1)
    assert contents(tmp_path / "set") == contents(tmp_path / "one")
    assert {values[0] for values in reports} == {0, 1, 2}
    assert {values[1] for values in reports} == {"small", "full"}
    assert {"bn", "task", "tv"} <= reports[0][4].keys()
    assert done[0] == (0, 5)
    assert done[-1] == (5, 5)
    assert done == sorted(set(done))


def test_a_detector_that_cannot_be_sent(detector: Detector, tmp_path: Path) -> None:
    odd = detector.clone()
    made: list[int] = []
    # A closure cannot be pickled.
    odd.module.register_forward_pre_hook(lambda *_: made.append(1))
    writer = CalibrationWriter(tmp_path / "probe", {}, odd.names, 6)
    with pytest.raises((AttributeError, TypeError)):
        Workers(odd, settings(), Plan(0, 6, 1), writer, 2)
    synthesize_set(odd, settings(), 0, tmp_path / "set", workers=2)
    assert made


def test_as_many_threads_as_it_likes(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large enough for torch to split its sums over threads."""
    chosen = settings(images=4, batch_size=4, image_size=128, iterations=4)
    before = torch.get_num_threads()
    synthesize_set(detector, chosen, 0, tmp_path / "one")
    torch.set_num_threads(2)
    try:
        synthesize_set(detector, chosen, 0, tmp_path / "two", workers=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
