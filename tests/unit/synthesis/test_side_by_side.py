"""Shards optimised side by side, and recorded iterations, give the results of plain ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiers import published
from support.tiny_detector import tiny_detector
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.operations import Counted
from dfq.demo import demo_weights
from dfq.errors import UserError
from dfq.kernels.loader import why_none
from dfq.models import load_detector
from dfq.models.base import Detector, Targets
from dfq.synthesis import loop
from dfq.synthesis.draws import filled_up, room_for
from dfq.synthesis.inversion import Inversion
from dfq.synthesis.iteration import Iteration
from dfq.synthesis.labels import scattered
from dfq.synthesis.pipeline import synthesize_set
from dfq.synthesis.settings import LabelStage, Synthesis, Techniques
from dfq.synthesis.shards import Plan
from dfq.synthesis.side_by_side import generator_for, split
from dfq.synthesis.together import seconds_of, shards_at_once

SIZE = 64
COUNT = 3


def network(name: str) -> Detector:
    if name == "tiny YOLOv5":
        detector = tiny_detector()
        detector.module.requires_grad_(False)
        return detector
    return load_detector(demo_weights() if name == "demo" else name)


@pytest.fixture(scope="module", params=["demo", published("yolo11n.yaml"), "tiny YOLOv5"])
def detector(request: pytest.FixtureRequest) -> Detector:
    return network(request.param)


def require_alike(images: Tensor, others: Tensor) -> None:
    """Adam's first steps follow the sign of a gradient, which is the last bits' where it is nearly
    zero: such pixels are few, and no more than some steps apart."""
    apart = (images - others).abs()
    assert float((apart > 1e-4).float().mean()) < 1e-3
    assert float(apart.max()) < 0.01


def settings(**changes: Any) -> Synthesis:
    defaults: dict[str, Any] = {
        "image_size": SIZE,
        "iterations": 7,
        "precision": "float32",
        # At the default rate, steps as long as the pixels' range make of every last bit an image.
        "learning_rate": 1e-3,
        "label_stage": LabelStage(image_size=32, iterations=4, updates=2),
    }
    return Synthesis(**{**defaults, **changes})


VARIANTS = [
    {"bn_form": "gaussian"},
    {"bn_form": "relative", "weights": {"l2": 0.1}},
    {"bn_form": "absolute", "balance": "loss", "weights": {"l2": 0.1, "bn": 0.1, "tv": 1e-3}},
    {"bn_form": "gaussian", "balance": "loss", "settle": 0.3},
]


def made(
    inversion: Inversion, shards: list[int], reports: list[list[Any]] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Images in [0, 1] and labels of shards that are made together."""

    def each(stage: str) -> list[Generator]:
        return [generator_for(0, shard, stage) for shard in shards]

    told: Any = None
    if reports is not None:
        told = [lambda *said, row=row: row.append(said) for row in reports]
    augment = each("augment")
    labels = inversion.label_stage(COUNT, each("labels"), augment, told)
    return inversion.image_stage(labels, each("images"), augment, told), labels


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: f"{c['bn_form']}-{len(c)}")
@pytest.mark.parametrize("static", [False, True])
def test_each_shard_is_what_it_is_alone(
    detector: Detector, changes: dict[str, Any], static: bool
) -> None:
    inversion = Inversion(detector, settings(**changes))
    alone = [made(inversion, [shard]) for shard in (4, 5)]
    inversion.static = static
    told: list[list[Any]] = [[], []]
    images, labels = made(inversion, [4, 5], told)
    require_alike(images, torch.cat([one for one, _ in alone]))
    for ours, theirs in zip(labels, [*alone[0][1], *alone[1][1]], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    # Each is told of, and of itself.
    assert [said[:3] for said in told[0]] == [said[:3] for said in told[1]]
    assert told[0][0][3]["bn"] != told[1][0][3]["bn"]


def test_convolutions_swing_by_shard() -> None:
    detector = load_detector(demo_weights())
    inversion = Inversion(
        detector, settings(techniques=Techniques(swing=True), labels="multi", multires=0)
    )
    alone = torch.cat([made(inversion, [shard])[0] for shard in (4, 5)])
    require_alike(made(inversion, [4, 5])[0], alone)


@pytest.mark.parametrize(
    "name", ["demo", "tiny YOLOv5", published("yolov10n.yaml"), published("yolo26n.yaml")]
)
def test_losses_of_static_shapes_are_the_familys(name: str) -> None:
    detector = network(name)
    generator = Generator().manual_seed(3)
    images = torch.rand(2 * COUNT, 3, SIZE, SIZE, generator=generator)
    with torch.no_grad():
        raw = detector.raw(images)
    leaves: list[Tensor] = []

    def leaf(value: Tensor) -> Tensor:
        # Away from what the network says of noise: predictions of all kinds.
        leaves.append((value + 2 * torch.randn(value.shape, generator=generator)).requires_grad_())
        return leaves[-1]

    raw = torch.utils._pytree.tree_map_only(Tensor, leaf, raw)
    labels = scattered(generator, 2 * COUNT, detector.num_classes, most=20, smallest_area=0.002)
    # Objects of which several claim one place, and images without any.
    labels[1] = labels[1][:1].repeat(3, 1)
    labels[3:5] = [torch.zeros(0, 5)] * 2
    shape = (SIZE, SIZE)
    each = [
        torch.stack(
            list(detector.task_loss(part, Targets.from_per_image(rows), shape).values())
        ).sum()
        for part, rows in zip(split(raw, 2), (labels[:COUNT], labels[COUNT:]), strict=True)
    ]
    expected = torch.stack(each)
    weight = torch.tensor([1.0, 3.0])
    slopes = torch.autograd.grad((expected * weight).sum(), leaves)
    for room in (room_for(labels, 2), 2 * room_for(labels, 2)):
        found = detector.shard_losses(raw, filled_up(labels, 2, room), shape, 2)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        gradient = torch.autograd.grad((found * weight).sum(), leaves)
        torch.testing.assert_close(gradient, slopes, rtol=1e-4, atol=1e-6)


class Replayed:
    """Stands in for a recording: what it runs later sees only what was there when it was made."""

    def __init__(self) -> None:
        self.made = self.played = 0

    def warm_up(self, step: int) -> int:
        return 1 if step < 2 else 0

    def __call__(self, function: Callable[[], dict[str, Tensor]]) -> Any:
        self.made += 1
        terms: dict[str, Tensor] = {}

        def play() -> None:
            self.played += 1
            terms.update(function())

        return play, terms


def test_an_iteration_reads_nothing_but_its_inputs(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    inversion = Inversion(detector, settings(iterations=30, multires=0))
    inversion.static = True
    plain, labels = made(inversion, [4, 5])
    recorder = Replayed()
    monkeypatch.setattr(loop, "recorder", lambda _: recorder)
    again, same = made(inversion, [4, 5])
    assert recorder.made >= 4
    assert recorder.played > 25
    require_alike(again, plain)
    torch.testing.assert_close(same, labels, rtol=0, atol=1e-4)


def test_what_cannot_be_recorded_is_done_as_it_is(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Replayed):
        def __call__(self, function: Callable[[], dict[str, Tensor]]) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    inversion = Inversion(detector, settings(multires=0))
    inversion.static = True
    plain, _ = made(inversion, [4])
    monkeypatch.setattr(loop, "recorder", lambda _: Broken())
    again, _ = made(inversion, [4])
    require_alike(again, plain)
    assert "not permitted" in inversion.not_recorded


def test_a_set_is_made_of_shards_side_by_side(tmp_path: Path) -> None:
    detector = load_detector(demo_weights())
    chosen = settings(images=8, batch_size=3, label_stage=LabelStage(image_size=32, iterations=2))
    reports: list[tuple[Any, ...]] = []
    made = synthesize_set(
        detector, chosen, 0, tmp_path / "set", at_once=2, workers=1,
        report=lambda *said: reports.append(said),
    )  # fmt: skip
    alone = synthesize_set(detector, chosen, 0, tmp_path / "alone", workers=1)
    assert made.verify() == []
    assert made.manifest["determinants"] == alone.manifest["determinants"]
    apart = (made.load(range(8)).float() - alone.load(range(8)).float()).abs()
    assert float((apart > 0).float().mean()) < 0.01
    # The first two in turns, the smaller last one by itself.
    order = [said[0] for said in reports]
    assert order.index(1) < len(order) - 1 - order[::-1].index(0)
    assert order.index(2) > len(order) - 1 - order[::-1].index(1)


def test_what_cannot_be_side_by_side_is_refused() -> None:
    detector = load_detector(demo_weights())
    plan = Plan(0, 8, 2)
    inversion = Inversion(detector, settings(micro_batch=1))
    assert shards_at_once(None, inversion, plan, [0, 1, 2]) == 1
    assert shards_at_once(1, inversion, plan, [0, 1, 2]) == 1
    with pytest.raises(UserError, match=r"2 side by side cannot be: synthesis\.micro_batch"):
        shards_at_once(2, inversion, plan, [0, 1, 2])
    with pytest.raises(UserError, match="0 is no number"):
        shards_at_once(0, inversion, plan, [0, 1, 2])
    whole = Inversion(detector, settings())
    assert shards_at_once(5, whole, plan, [0, 1, 2]) == 3
    assert seconds_of(whole, 1, 2) > 0


class Waiting(TorchDispatchMode):
    """Refuses what would make a GPU's user wait: shapes that depend on values, values that are
    asked for, constants that are moved there."""

    KINDS = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "lift_fresh", "bincount")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.rpartition("::")[2]
        assert not name.startswith(self.KINDS), name
        if name.startswith(("index", "_index_put")) and isinstance(args[1], list | tuple):
            assert not any(part is not None and part.dtype == torch.bool for part in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("balance", ["gradient", "loss"])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "name", ["tiny YOLOv5", published("yolo11n.yaml"), published("yolo26n.yaml")]
)
def test_an_iteration_waits_for_nothing(
    name: str, shards: int, balance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = "gaussian" if balance == "gradient" else "absolute"
    inversion = Inversion(network(name), settings(balance=balance, bn_form=form, iterations=5))
    inversion.static = True
    plain, steps = Iteration.__call__, []

    def watched(self: Iteration, inputs: Any, step: int) -> Any:
        steps.append(step)
        # In the first ones what is known from then on is computed.
        with Waiting() if len(steps) > 2 else contextlib.nullcontext():
            return plain(self, inputs, 0 if step == 3 else step)

    monkeypatch.setattr(Iteration, "__call__", watched)
    generators = [Generator().manual_seed(shard) for shard in range(shards)]
    images = torch.rand(COUNT * shards, 3, SIZE, SIZE)
    labels = scattered(Generator(), COUNT * shards, 3, most=9, smallest_area=0.01)
    inversion.optimise(images, labels, 5, 0.01, generators, stage="full")
    assert steps == [0, 1, 2, 3, 4]


@pytest.fixture(params=["yolo11n.yaml", "yolov5n"])
def published_network(request: pytest.FixtureRequest) -> str:
    if request.param == "yolov5n":
        return str(request.getfixturevalue("yolov5n"))
    return str(request.param)


@pytest.mark.e2e
@pytest.mark.parametrize("static", [False, True])
def test_an_iteration_has_few_operations_more_than_the_bare_pass(
    published_network: str, static: bool
) -> None:
    if why_none() is not None:
        pytest.skip(f"without compiled functions there are more ({why_none()})")
    counted = Counted(load_detector(published_network), static=static)
    _, usual, *others = [counting.count for counting in counted.iterations]
    assert usual >= max(others), "settling takes no more"
    assert usual <= 1.5 * counted.bare.count
    # What is not counted is a compiled function for each SiLU of the bare pass, and its gradient.
    assert all(0 < part.in_place == counted.bare.silus for part in counted.iterations[1:])


def test_in_half_precision_even_with_compiled_functions_counted(
    published_network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are not cast in every pass, as they are in the bare one."""
    monkeypatch.setattr("dfq.synthesis.inversion.resolve_precision", lambda *_: "bfloat16")
    counted = Counted(load_detector(published_network), static=True, precision="bfloat16")
    counts = [part.count + part.in_place for part in counted.iterations[1:]]
    assert max(counts) <= 1.5 * counted.bare.count


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("shards", [1, 2])
def test_a_gpu_is_never_waited_for_and_recordings_give_the_same(
    detector: Detector, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inversion = Inversion(detector.clone().to("cuda"), settings(iterations=30, multires=0))
    plain, steps = Iteration.__call__, []

    def watched(self: Iteration, inputs: Any, step: int) -> Any:
        steps.append(step)
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 3 else "default")
        try:
            return plain(self, inputs, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    recorded, _ = made(inversion, list(range(shards)))
    assert inversion.not_recorded == ""
    inversion.record = False
    monkeypatch.setattr(Iteration, "__call__", watched)
    images, _ = made(inversion, list(range(shards)))
    assert float((images - recorded).abs().mean()) < 1e-3


def test_room_for_labels_doubles() -> None:
    def room(*counts: int) -> int:
        return room_for([torch.zeros(n, 5) for n in counts], 2)

    assert [room(0, 0), room(64, 3), room(3, 65), room(128, 1), room(1, 129)] == [
        64, 64, 128, 128, 256,
    ]  # fmt: skip
