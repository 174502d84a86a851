"""The policy, where quantizers go, and what calibration leaves behind."""

from __future__ import annotations

import json

import pytest
import torch
from support.listing_parts import FIRST, LAST, SharedDetector
from support.tiny_detector import blobs, stacked, tiny_detector
from torch import Tensor, nn

from dfq.errors import UserError
from dfq.graph.fold_batchnorm import fold
from dfq.models.yolov5.detector import YOLOv5
from dfq.quantization.calibration import calibrate, set_range
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.inspection import list_layers
from dfq.quantization.layers import QUANTIZED_LAYERS
from dfq.quantization.margins import keep_within_statistics
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.range_search import SEARCHES, mse
from dfq.quantization.traversal import activation_quantizers, float_mode, quantized_layers


@pytest.fixture
def detector() -> YOLOv5:
    return fold(tiny_detector())  # type: ignore[return-value]


def bits(detector: YOLOv5) -> dict[str, tuple[int, int]]:
    return {row.name: (row.weight_bits, row.activation_bits) for row in list_layers(detector)}


# ---- policy


@pytest.mark.parametrize(
    ("first_last", "expected"), [(8, (8, 8)), ("float", (32, 32)), ("same", (3, 5))]
)
def test_first_and_last_layers(
    detector: YOLOv5, first_last: int | str, expected: tuple[int, int]
) -> None:
    insert_quantizers(
        detector, Policy(weight_bits=3, activation_bits=5, first_last_bits=first_last)
    )
    found = bits(detector)
    assert len(found) == 18
    for name, pair in found.items():
        assert pair == (expected if name in (FIRST, *LAST) else (3, 5)), name
    assert isinstance(detector.module.get_submodule(FIRST), QUANTIZED_LAYERS) == (expected[0] < 32)


@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("activations", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("weight_grid", ["asymmetric", "symmetric"])
def test_kind_of_quantizers(
    detector: YOLOv5, weights: str, activations: str, weight_grid: str
) -> None:
    policy = Policy(weights=weights, activations=activations, weight_grid=weight_grid)
    insert_quantizers(detector, policy)
    for name, layer in quantized_layers(detector.module):
        assert layer.weight_quantizer.channels == (
            layer.weight.shape[0] if weights == "per_channel" else 1
        )
        assert layer.input_quantizer.channels == 1
        narrow = name not in (FIRST, *LAST)
        assert layer.weight_quantizer.asymmetric == (narrow and weight_grid == "asymmetric")
        assert layer.input_quantizer.asymmetric == (activations == "asymmetric")


def test_the_first_override_that_matches_wins(detector: YOLOv5) -> None:
    overrides = (("model.3.cv1.conv", 6), ("model.3.*", "float"), (FIRST, 2), ("*.cv1.conv", 5))
    insert_quantizers(detector, Policy(weight_bits=4, activation_bits=8, overrides=overrides))
    found = bits(detector)
    assert found["model.3.cv1.conv"] == (6, 6)
    assert found["model.3.cv2.conv"] == found["model.3.m.0.cv1.conv"] == (32, 32)
    assert found["model.8.cv1.conv"] == found["model.5.cv1.conv"] == (5, 5)
    assert found[FIRST] == (2, 2)
    assert found[LAST[0]] == (8, 8)
    assert found["model.2.conv"] == (4, 8)


def test_an_override_of_no_layer_is_the_users_mistake(detector: YOLOv5) -> None:
    policy = Policy(overrides=(("model.0.conv", 8), ("backbone.*", "float")))
    with pytest.raises(UserError, match=r"no layer is called 'backbone\.\*'") as raised:
        insert_quantizers(detector, policy)
    assert "\n" not in str(raised.value)
    assert not list(quantized_layers(detector.module))


def test_policy_survives_json() -> None:
    policy = Policy(2, 6, "float", "per_tensor", "symmetric", (("a.*", "float"), ("b", 5)))
    saved = json.loads(json.dumps(policy.to_dict()))
    assert Policy.from_dict(saved) == policy
    # As runs were saved when weights had no zero points.
    del saved["weight_grid"]
    assert Policy.from_dict(saved).weight_grid == "symmetric"


def test_a_shared_layer_is_quantized_under_all_its_names() -> None:
    detector = SharedDetector()
    insert_quantizers(detector, Policy())
    levels = detector.module.levels
    assert isinstance(levels[0][0], QUANTIZED_LAYERS)
    assert levels[1][0] is levels[0][0]


# ---- calibration


def quantized(source: YOLOv5, policy: Policy, images: Tensor, **options: object) -> YOLOv5:
    student = insert_quantizers(source.clone(), policy)
    calibrate(student, images.split(4), **{"samples": 1024, **options})
    return student  # type: ignore[return-value]


@pytest.mark.parametrize("search", sorted(SEARCHES))
def test_calibration_initialises_everything(detector: YOLOv5, search: str) -> None:
    progress: list[int] = []
    student = insert_quantizers(detector.clone(), Policy())
    quantizers = [m for m in student.module.modules() if isinstance(m, Quantizer)]
    assert len(quantizers) == 2 * 18
    assert not any(q.initialised for q in quantizers)
    calibrate(student, blobs(10).split(4), search=search, progress=progress.append)
    assert progress == [4, 8, 10]
    assert all(q.initialised and q.enabled for q in quantizers)
    assert all(q.scale.isfinite().all() and (q.scale != 1).all() for q in quantizers)
    assert not any(m._forward_pre_hooks for m in student.module.modules())
    assert stacked(student.raw(blobs(2))).isfinite().all()


def test_minmax_sees_every_value_and_in_float(detector: YOLOv5) -> None:
    """Whatever the sample: one extreme pixel of one image decides the first layer's range, and
    layers further on are calibrated on the float network's activations."""
    images = blobs(6)
    images[4, 1, 13, 17] = 7.5
    student = quantized(
        detector, Policy(first_last_bits="same"), images, search="minmax", samples=64
    )
    quantizer = student.module.get_submodule(f"{FIRST}.input_quantizer")
    assert isinstance(quantizer, Quantizer)
    assert quantizer.scale.tolist() == pytest.approx([7.5 / 255])

    seen: list[Tensor] = []
    layer = detector.module.get_submodule("model.2.conv")
    handle = layer.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    detector.raw(images)
    handle.remove()
    after = student.module.get_submodule("model.2.conv.input_quantizer")
    assert isinstance(after, Quantizer)
    want = (seen[0].max() - seen[0].min().clamp_max(0)) / 255
    torch.testing.assert_close(after.scale[0], want)


def test_calibration_needs_an_image(detector: YOLOv5) -> None:
    insert_quantizers(detector, Policy())
    with pytest.raises(UserError, match="no images"):
        calibrate(detector, [])


def relative_error(got: Tensor, want: Tensor) -> float:
    """Of what the predictions say beyond their mean over the images."""
    return float((got - want).norm() / (want - want.mean(0)).norm())


def rounding_noise(source: YOLOv5, student: YOLOv5, images: Tensor) -> Tensor:
    """Predictions of the float network with uniform noise in the place of every rounding: as wide
    as the student's steps, on weights and on inputs, drawn independently."""
    generator = torch.Generator().manual_seed(0)

    def noise(x: Tensor, scale: Tensor) -> Tensor:
        shape = (-1, *([1] * (x.ndim - 1)))
        return (torch.rand(x.shape, generator=generator) - 0.5) * scale.detach().view(shape)

    noisy = source.clone()
    for name, layer in quantized_layers(student.module):
        twin = noisy.module.get_submodule(name)
        twin.weight.data += noise(layer.weight, layer.weight_quantizer.scale)

        def before(
            _m: nn.Module, inputs: tuple[Tensor, ...], scale: Tensor = layer.input_quantizer.scale
        ) -> Tensor:
            return inputs[0] + noise(inputs[0], scale)

        twin.register_forward_pre_hook(before)
    return stacked(noisy.raw(images))


def test_eight_bits_lose_what_rounding_alone_explains(detector: YOLOv5) -> None:
    """A wrong range, zero point or layer would show as much more than the noise of its steps."""
    images = blobs(12, seed=5)
    want = stacked(detector.raw(images))
    student = quantized(detector, Policy(8, 8), images)
    error = relative_error(stacked(student.raw(images)), want)
    explained = relative_error(rounding_noise(detector, student, images), want)
    assert 0.4 * explained < error < 1.3 * explained
    assert error < 0.2


@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
def test_more_bits_are_closer_to_float(detector: YOLOv5, weights: str) -> None:
    images = blobs(12, seed=5)
    want = stacked(detector.raw(images))
    errors = {
        bits: relative_error(
            stacked(quantized(detector, Policy(bits, 8, weights=weights), images).raw(images)), want
        )
        for bits in (2, 4, 8)
    }
    assert errors[8] < 0.5 * errors[4]
    assert errors[4] < 0.9 * errors[2]


def test_float_mode_is_bit_equal_and_ends(detector: YOLOv5) -> None:
    images = blobs(2)
    want = stacked(detector.raw(images))
    student = quantized(detector, Policy(), images)
    switched_off = student.module.get_submodule(f"{FIRST}.input_quantizer")
    switched_off.enabled = False

    def interrupted() -> None:
        with float_mode(student.module):
            assert torch.equal(stacked(student.raw(images)), want)
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        interrupted()
    states = [m.enabled for m in student.module.modules() if isinstance(m, Quantizer)]
    assert states.count(False) == 1
    assert not switched_off.enabled
    assert not torch.equal(stacked(student.raw(images)), want)


def test_a_fine_grid_in_front_of_a_silu_clips_nothing_that_it_lets_through() -> None:
    values = torch.cat([torch.randn(20_000) - 3, torch.tensor([-40.0, 9.0])])
    before_silu = Quantizer(8, asymmetric=True)
    before_silu.consumer = "silu"
    set_range(before_silu, values, "mse")
    step, zero = before_silu.scale.item(), before_silu.zero_point.item()
    assert -zero * step == pytest.approx(-7, abs=step)
    assert (255 - zero) * step == pytest.approx(9, abs=step)
    # Of few bits each is worth more than what is clipped: the search decides.
    coarse = Quantizer(4, asymmetric=True)
    coarse.consumer = "silu"
    set_range(coarse, values, "mse")
    wanted, _ = mse(values[None], 4, asymmetric=True, through=torch.nn.functional.silu)
    assert torch.allclose(coarse.scale, wanted)


@pytest.mark.parametrize(("search", "step"), [("minmax", 4 / 255), ("lsq", 2 * 2 / 255**0.5)])
def test_symmetric_grids_of_what_is_never_below_zero_have_no_levels_there(
    search: str, step: float
) -> None:
    values = torch.linspace(0, 4, 1001)
    unsigned = Quantizer(8, unsigned=True)
    set_range(unsigned, values, search)
    assert unsigned.scale.item() == pytest.approx(step, rel=1e-5)
    assert [int(end) for end in unsigned.limits_of(values)] == [0, 255]
    # Of what a ReLU reads nothing below zero counts.
    behind = Quantizer(8, unsigned=True)
    behind.consumer = "relu"
    set_range(behind, torch.cat([values, -values]), "minmax")
    assert [int(end) for end in behind.limits_of(values)] == [0, 255]
    for quantizer, given in (
        (Quantizer(8), values),
        (Quantizer(8, unsigned=True), torch.cat([values, values[:1] - 0.1])),
    ):
        set_range(quantizer, given, search)
        assert [int(end) for end in quantizer.limits_of(values)] == [-128, 127]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "tensorrt", "litert"])
def test_symmetric_grids_are_unsigned_where_a_runtime_has_such_integers(runtime: str) -> None:
    policy = Policy(activations="symmetric", placement="qdq", runtime=runtime)
    student = insert_quantizers(fold(tiny_detector()), policy)
    calibrate(student, [blobs(2)], samples=256)
    keep_within_statistics(student, (blobs(2) * 255).to(torch.uint8))
    points = {name: int(q.zero_point) for name, q in activation_quantizers(student.module)}
    # The image is never below zero, what a SiLU gives is.
    wanted = -128 if runtime in ("onnxruntime", "openvino") else 0
    assert points.pop(FIRST) == wanted
    assert 0 in points.values()
    assert {-128, 0} >= set(points.values()) or wanted == 0 == max(map(abs, points.values()))


def test_lsq_ranges_are_those_of_lsq_plus_where_activations_have_zero_points() -> None:
    for activations in ("symmetric", "asymmetric"):
        policy = Policy(8, 8, weights="per_tensor", activations=activations)
        student = insert_quantizers(fold(tiny_detector()), policy)
        calibrate(student, [blobs(2)], search="lsq", samples=256)
        for _, layer in quantized_layers(student.module):
            weight = layer.weight.detach().double()
            step = 2 * weight.abs().mean() / 127**0.5
            if activations == "asymmetric":
                mean, deviation = weight.mean(), weight.var(correction=0).sqrt()
                step = max((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / 128
            assert layer.weight_quantizer.scale.item() == pytest.approx(float(step), rel=1e-4)
