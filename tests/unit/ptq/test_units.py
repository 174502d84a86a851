"""PFCR: what is reconstructed in which stage, from where each stage starts, and its error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.toys import SIDE, Toy
from torch import Tensor, nn

from dfq.graph.fold_batchnorm import fold
from dfq.ptq import block_learning, blocks
from dfq.ptq.adaround import SoftRounding
from dfq.ptq.blocks import reconstruct
from dfq.ptq.input_moments import execution_order
from dfq.ptq.objectives import METHODS, Step
from dfq.ptq.objectives.block_error import block_error
from dfq.ptq.units import progressive_stages
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.traversal import activation_quantizers, quantized_layers


class Pair(nn.Module):
    """Two layers and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.a(x)))


class Chain(nn.Module):
    """A layer and four blocks; `open_after` of them have another reader."""

    def __init__(self, open_after: int = 0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.ModuleList(Pair() for _ in range(4))
        self.open_after = open_after

    def forward(self, images: Tensor) -> Any:
        # Something stands between the stem and the blocks.
        x = self.stem(images).relu()
        seen = []
        for block in self.body:
            x = block(x)
            seen.append(x)
        return [x, *(0.1 * other for other in seen[: self.open_after])]


class Blocks(Toy):
    """With the blocks of `Chain`."""

    def blocks(self) -> list[str]:
        return ["stem", *(f"body.{i}" for i in range(4))]


IMAGES = (torch.rand(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 255).byte()
PIXELS = IMAGES.float() / 255


def made(open_after: int = 0) -> tuple[Toy, Toy]:
    torch.manual_seed(0)
    teacher = fold(Blocks(Chain(open_after)))
    student = insert_quantizers(teacher.clone(), Policy(3, 4, first_last_bits="same"))
    calibrate(student, [PIXELS])
    return student, teacher


def stages(model: Toy) -> list[list[tuple[str, ...]]]:
    order = list(execution_order(model.module, lambda: model.raw(PIXELS[:1])))
    return progressive_stages(model, order, PIXELS[:1])


def test_parts_come_before_blocks_and_these_before_pairs() -> None:
    fine = [("stem",), *((f"body.{i}.{part}",) for i in range(4) for part in "ab")]
    whole = [(f"body.{i}",) for i in range(4)]
    pairs = [("body.0", "body.1"), ("body.2", "body.3")]
    assert stages(made()[0]) == [fine, whole, pairs]
    # What the first block gives is a prediction as well: the second one alone does not stand for
    # it. So it is with the second block; what the last one gives counts only at its own end.
    assert stages(made(open_after=1)[0]) == [fine, whole, [("body.1", "body.2")]]
    assert stages(made(open_after=3)[0]) == [fine, whole]


def test_each_stage_starts_from_the_integers_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = made()
    starts: list[Tensor | None] = []

    class Watched(SoftRounding):
        def __init__(self, quantizer: Quantizer, weight: Tensor, codes: Tensor | None) -> None:
            super().__init__(quantizer, weight, codes)
            starts.append(codes)

    monkeypatch.setattr(block_learning, "SoftRounding", Watched)
    integers = []

    def after(done: int, total: int) -> None:
        layers = quantized_layers(student.module)
        integers.append({n: q.weight_quantizer.integers(q.weight) for n, q in layers})

    reconstruct(student, teacher, IMAGES, METHODS["pfcr"], iterations=4, batch_size=4, after=after)
    assert len(integers) == 9 + 4 + 2
    assert starts[:9] == [None] * 9
    # Blocks start from what the layers ended with, pairs from what the blocks did.
    names = [f"body.{i}.{part}" for i in range(4) for part in "ab"]
    for stage, ended in ((starts[9:17], integers[8]), (starts[17:], integers[12])):
        assert len(stage) == 8
        for name, codes in zip(names, stage, strict=True):
            assert codes is not None
            assert torch.equal(codes, ended[name]), name


def test_the_error_of_a_pair_is_that_of_one_block_on_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By hand in float64, activations in float in the first iterations, as weights come first."""
    student, teacher = made()
    first: dict[tuple[str, ...], float] = {}
    learned: list[Any] = []
    start = block_learning.Block.__init__

    def begun(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        learned.append(self)
        before.append({n: q.weight.clone() for n, q in quantized_layers(student.module)})

    before: list[dict[str, Tensor]] = []
    monkeypatch.setattr(block_learning.Block, "__init__", begun)
    monkeypatch.setattr(blocks, "resolve_precision", lambda *_: "float32")

    def objective(step: Step) -> Tensor:
        error = block_error(step)
        first.setdefault(learned[-1].unit, float(error.detach()))
        return error

    method = replace(METHODS["pfcr"], objective=objective)
    reconstruct(student, teacher, IMAGES, method, iterations=2, batch_size=8)
    # The last pair: what comes before it is not touched after, and is quantized.
    unit = ("body.2", "body.3")
    x = student.module.stem(PIXELS).relu()
    expected = teacher.module.stem(PIXELS).relu()
    for i in (0, 1):
        x, expected = student.module.body[i](x), teacher.module.body[i](expected)
    # Inputs and targets are kept in half precision.
    x, wanted = x.half().double(), expected
    for i in (2, 3):
        wanted = teacher.module.body[i](wanted)
    wanted = wanted.half().double()
    for i in (2, 3):
        inner = x
        for part in "ab":
            name = f"body.{i}.{part}"
            layer = student.module.get_submodule(name)
            original = teacher.module.get_submodule(name).weight.double()
            quantizer = layer.weight_quantizer
            step = quantizer.scale.double().view(-1, 1, 1, 1)
            low, high = (limit.double() for limit in quantizer.limits_of(original))
            steps = (original / step).clamp(low, high)
            code = (before[-1][name].double() / step).round()
            base = torch.where(steps >= code, code, code - 1).clamp(low, high - 1)
            near = (steps - base).clamp(0, 1)
            share = (near + 0.95 * ((code - base) - near)).clamp(0.05, 0.95)
            weight, bias = step * (base + share), layer.bias.double()
            if part == "a":
                inner = F.conv2d(inner, weight, bias, padding=1).relu()
            else:
                x = x + F.conv2d(inner, weight, bias)
    error = (x - wanted).square().sum(1).mean() / wanted.var()
    assert first[unit] == pytest.approx(float(error), rel=2e-4)


def test_activations_are_quantized_in_the_second_half_alone() -> None:
    student, teacher = made()
    scales = {n: q.log_scale.clone() for n, q in activation_quantizers(student.module)}
    for iterations, moved in ((1, False), (2, True)):
        twin = student.clone()
        reconstruct(twin, teacher, IMAGES, METHODS["pfcr"], iterations=iterations, batch_size=4)
        now = {n: q.log_scale for n, q in activation_quantizers(twin.module)}
        assert all(torch.equal(now[name], scales[name]) is not moved for name in scales)


def test_a_stage_of_pairs_brings_their_ends_closer() -> None:
    """At 2 bits, with the stages before it and without."""
    torch.manual_seed(0)
    teacher = fold(Blocks(Chain()))
    found = {}
    for method in ("adaround", "pfcr"):
        student = insert_quantizers(teacher.clone(), Policy(2, 4, first_last_bits="same"))
        calibrate(student, [PIXELS])
        made_of = replace(METHODS[method], scales=True)
        reconstruct(student, teacher, IMAGES, made_of, iterations=40, batch_size=4)
        with torch.no_grad():
            found[method] = float((student.raw(PIXELS)[0] - teacher.raw(PIXELS)[0]).square().mean())
    assert found["pfcr"] < 0.9 * found["adaround"], found
