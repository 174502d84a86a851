"""Rounding that makes up for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.tiny_detector import blobs, tiny_detector
from torch import Tensor

from dfq.errors import UserError
from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Detector
from dfq.ptq import gptq as second_order
from dfq.ptq.gptq import best_grid, gptq_quantize, gptq_round, target_weights
from dfq.ptq.input_moments import Moments
from dfq.qat.losses import distillation_terms
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.range_search import minmax
from dfq.quantization.traversal import activation_quantizers, quantized_layers


def correlated(count: int, size: int, seed: int = 0) -> Tensor:
    """Rows whose entries go together, as neighbouring pixels do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) + 2
    return torch.randn(count, size, generator=generator) @ mix / size


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    weight = torch.randn(1, 5, 12)
    scale = torch.full((1, 5), 0.3)
    power = torch.rand(12) + 0.5
    found = gptq_round(weight, torch.diag(power)[None], scale, -8, 7, damping=0.0)
    torch.testing.assert_close(found, (weight / 0.3).round().clamp(-8, 7) * 0.3)


@pytest.mark.parametrize("inputs", [20, 150])
def test_it_beats_nearest_rounding_where_inputs_go_together(inputs: int) -> None:
    # 150 inputs are more than one block of columns. A single draw may gain as little as a third.
    gains = []
    for seed in range(20):
        x = correlated(2000, inputs, seed)
        weight = torch.randn(1, 6, inputs)
        scale = weight.abs().amax(2) / 7
        found = gptq_round(weight, (x.T @ x / 2000)[None], scale, -8, 7, damping=0.01)
        steps = found / scale.unsqueeze(2)
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert steps.min() >= -8 - 1e-4
        assert steps.max() <= 7 + 1e-4
        nearest = (weight / scale.unsqueeze(2)).round().clamp(-8, 7) * scale.unsqueeze(2)
        errors = [(x @ (one - weight)[0].T).square().mean() for one in (found, nearest)]
        gains.append(errors[0] / errors[1])
    assert torch.stack(gains).median() < 0.25


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = correlated(500, 40).double(), torch.randn(2, 3, 40).double()
    second = torch.stack([x.T @ x / 500, torch.eye(40).double()])
    scale = torch.full((2, 3), 0.2).double()
    whole = gptq_round(weight, second, scale, -8, 7, damping=0.01)
    monkeypatch.setattr("dfq.ptq.gptq.BLOCK", 7)
    torch.testing.assert_close(gptq_round(weight, second, scale, -8, 7, damping=0.01), whole)


def test_a_singular_matrix_is_damped_until_it_is_not() -> None:
    x = torch.ones(10, 6)
    found = gptq_round(
        torch.full((1, 1, 6), 0.3), (x.T @ x)[None], torch.ones(1, 1), -8, 7, damping=0.0
    )
    # Together 1.8: rounded one by one it would be nothing.
    assert float(found.sum()) == 2


def test_inputs_that_never_are_do_no_harm() -> None:
    found = gptq_round(
        torch.full((1, 2, 4), 0.7), torch.zeros(1, 4, 4), torch.ones(1, 2), -8, 7, damping=0.01
    )
    assert (found == 1).all()


def double(moments: Moments) -> Moments:
    tensors = (moments.hessian, moments.cross, moments.mean, moments.float_mean)
    return Moments(*(tensor.double() for tensor in tensors), moments.samples)


def test_the_aim_is_the_least_squares_solution() -> None:
    x = correlated(300, 8)
    y = x + 0.2 * torch.randn(300, 8)
    weight = torch.randn(1, 3, 8)
    moments = Moments(
        (x.T @ x / 300)[None], (y.T @ x / 300)[None], x.mean(0)[None], y.mean(0)[None], 300
    )
    expected = torch.linalg.lstsq(x.double(), (y @ weight[0].T).double()).solution.T
    found = target_weights(weight.double(), double(moments), 0.0)
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-4)
    # A strong pull keeps the weights where they were.
    torch.testing.assert_close(target_weights(weight, moments, 1e5), weight, rtol=1e-3, atol=1e-3)


def divergence(student: Detector, teacher: Detector, images: Tensor) -> float:
    pixels = images.float() / 255
    with torch.no_grad():
        raw = student.raw(pixels), teacher.raw(pixels)
        return float(
            distillation_terms(student, *raw, batch=len(images), form="family", temperature=1.0)
        )


@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
def test_a_reconstructed_network_is_closer_to_its_teacher(weights: str) -> None:
    teacher = fold(tiny_detector().clone())
    student = insert_quantizers(
        teacher.clone(),
        Policy(weight_bits=4, activation_bits=8, first_last_bits="same", weights=weights),
    )
    images, unseen = ((blobs(count, seed=seed) * 255).byte() for count, seed in ((12, 1), (8, 2)))
    calibrate(student, [images.float() / 255])
    before = divergence(student, teacher, unseen)
    told: list[tuple[int, int]] = []
    gptq_quantize(student, teacher, images, batch_size=5, progress=lambda *done: told.append(done))
    assert divergence(student, teacher, unseen) < 0.5 * before
    layers = list(quantized_layers(student.module))
    assert told[-1] == (len(layers), len(layers))
    for name, layer in layers:
        quantizer = layer.weight_quantizer
        # Already on the grid: fake quantization changes nothing any more.
        torch.testing.assert_close(quantizer(layer.weight), layer.weight, rtol=1e-5, atol=1e-7)
        assert not torch.equal(layer.weight, teacher.module.get_submodule(name).weight)


def skewed() -> tuple[Tensor, Tensor]:
    """Weights of which each channel reaches further to one side of zero, and second moments."""
    x = correlated(500, 30)
    weight = torch.rand(1, 8, 30) - torch.linspace(0, 1, 8)[None, :, None]
    return weight, (x.T @ x / 500)[None]


@pytest.mark.parametrize("channels", [1, 8])
def test_the_best_grid_of_skewed_weights_is_skewed(channels: int) -> None:
    weight, second = skewed()
    weight = weight if channels > 1 else weight.abs()
    error = {}
    for asymmetric in (False, True):
        quantizer = Quantizer(3, channels=channels, asymmetric=asymmetric)
        rows = weight[0] if channels > 1 else weight.reshape(1, -1)
        quantizer.initialise(*minmax(rows, 3, asymmetric=asymmetric))
        rounded = best_grid(quantizer, weight, second, damping=0.01)
        torch.testing.assert_close(quantizer(rounded[0]), rounded[0])
        off = (rounded - weight)[0]
        error[asymmetric] = float(((off @ second[0]) * off).sum())
    assert error[True] < 0.5 * error[False]


def test_grids_are_tried_side_by_side_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, second = skewed()
    found = []
    for at_once in (1, 500, 1 << 24):
        monkeypatch.setattr("dfq.ptq.gptq.MAX_WEIGHTS_PER_CHUNK", at_once)
        quantizer = Quantizer(3, channels=8, asymmetric=True)
        quantizer.initialise(*minmax(weight[0], 3, asymmetric=True))
        rounded = best_grid(quantizer, weight, second, damping=0.01)
        found.append((rounded, quantizer.scale.detach(), quantizer.zero_point.detach()))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_without_images_it_says_so() -> None:
    teacher = fold(tiny_detector().clone())
    with pytest.raises(UserError, match="no images"):
        gptq_quantize(teacher.clone(), teacher, torch.zeros(0, 3, 64, 64, dtype=torch.uint8))


def test_the_student_is_led_by_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = fold(tiny_detector())
    student = insert_quantizers(teacher.clone(), Policy())
    calibrate(student, [blobs(4)], search="minmax")
    entered: list[tuple[Detector, list[int]]] = []

    @contextmanager
    def shared_proposals(
        _self: Detector, leader: Detector, batches: list[Tensor]
    ) -> Iterator[None]:
        entered.append((leader, [len(batch) for batch in batches]))
        yield

    monkeypatch.setattr(Detector, "shared_proposals", shared_proposals)
    gptq_quantize(student, teacher, (blobs(4) * 255).to(torch.uint8), batch_size=3)
    assert entered == [(teacher, [3, 1])]


def test_layers_that_are_too_wide_are_left_to_the_nearest_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Second moments of the 62,720 inputs that a Faster R-CNN on MobileNetV2 has would take more
    memory than there is."""
    teacher = fold(tiny_detector())
    plain = insert_quantizers(teacher.clone(), Policy(weight_bits=4))
    images = (blobs(4) * 255).to(torch.uint8)
    calibrate(plain, [images.float() / 255])
    limit = 100
    monkeypatch.setattr(second_order, "WIDEST", limit)
    student = plain.clone()
    gptq_quantize(student, teacher, images)
    before = dict(quantized_layers(plain.module))
    wide = 0
    for name, layer in quantized_layers(student.module):
        same = torch.equal(layer.weight, before[name].weight)
        assert same == (layer.weight[0].numel() > limit), name
        assert same == second_order.is_too_wide(layer)
        wide += same
    assert 0 < wide < len(before)


@pytest.mark.parametrize(("bits", "same"), [(8, True), (6, False)])
def test_what_fine_activations_add_is_not_made_up_for(bits: int, same: bool) -> None:
    images = (blobs(8) * 255).round().to(torch.uint8)
    teacher = fold(tiny_detector())

    def rounded(enabled: bool) -> tuple[dict[str, Tensor], Detector]:
        student = insert_quantizers(teacher.clone(), Policy(4, bits, first_last_bits="same"))
        calibrate(student, [images.float() / 255])
        for _, quantizer in activation_quantizers(student.module):
            # Coarse, so that it makes a difference.
            quantizer.initialise(3 * quantizer.scale.detach(), quantizer.zero_point.detach())
            quantizer.enabled = enabled
        gptq_quantize(student, teacher, images)
        return {name: layer.weight for name, layer in quantized_layers(student.module)}, student

    (with_them, student), (without, _) = rounded(True), rounded(False)
    assert all(torch.equal(with_them[name], without[name]) for name in without) is same
    # They are back afterwards.
    assert all(q.enabled for _, q in activation_quantizers(student.module))
