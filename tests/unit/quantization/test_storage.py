"""Weights on disk as integers: exact, as small as their bits, refused where they are damaged."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.listing_parts import SharedDetector
from support.tiny_detector import blobs, stacked, tiny_detector
from torch import Tensor

from dfq.errors import UserError
from dfq.export.grids import grid_of
from dfq.export.replacing import place_for
from dfq.graph.fold_batchnorm import fold
from dfq.models import load_detector
from dfq.models.base import Detector
from dfq.models.torchvision.base import from_name
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer, fake_quantize
from dfq.quantization.storage import pack, restore_state, stored_state, unpack
from dfq.quantization.traversal import activation_quantizers, quantized_layers
from dfq.runs.folder import Run, load_run


def quantized(policy: Policy, seed: int = 0) -> Detector:
    detector = insert_quantizers(fold(tiny_detector(seed)), policy)
    calibrate(detector, [blobs(2)])
    return detector


def reloaded(detector: Detector, policy: Policy) -> Detector:
    """Another network of the same bits, other weights, and the stored state of `detector`."""
    other = insert_quantizers(fold(tiny_detector(seed=7)), policy)
    restore_state(other.module, stored_state(detector.module), "here")
    return other


def used_weights(detector: Detector) -> dict[str, Tensor]:
    """What the layers compute with."""
    with torch.no_grad():
        return {
            name: layer.weight_quantizer(layer.weight)
            for name, layer in quantized_layers(detector.module)
        }


# ---- streams of bits


def test_streams_by_hand() -> None:
    # Two a byte, the first one in the lower half.
    assert pack(torch.tensor([1, 2, 15]), 4).tolist() == [0x21, 0x0F]
    # 101 011 110 from the lowest bit on: 0b10_011_101 and the last one's upper bit.
    assert pack(torch.tensor([0b101, 0b011, 0b110]), 3).tolist() == [0b10011101, 0b1]
    assert pack(torch.tensor([3, 0, 1, 2]), 2).tolist() == [0b10_01_00_11]
    assert pack(torch.tensor([255, 0]), 8).tolist() == [255, 0]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 1001])
def test_streams_come_back_and_take_no_bit_too_many(bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (count,), generator=generator)
    stream = pack(codes, bits)
    assert stream.dtype == torch.uint8
    assert stream.shape == (math.ceil(count * bits / 8),)
    assert torch.equal(unpack(stream, bits, count), codes.to(torch.uint8))


# ---- the same integers again


def test_a_step_size_times_an_integer_is_rounded_to_that_integer() -> None:
    """For every integer of up to 8 bits with a sign beside, over all step sizes there are."""
    integers = torch.arange(-255.0, 256.0)
    generator = torch.Generator().manual_seed(0)
    logarithms = torch.cat(
        [160 * torch.rand(5000, generator=generator) - 80, torch.tensor([-80.0, 0.0, 80.0])]
    )
    quantizer = Quantizer(8, channels=len(logarithms))
    with torch.no_grad():
        quantizer.log_scale.copy_(logarithms)
    scale = quantizer.scale[:, None]
    weights = scale * integers
    assert torch.equal((weights / scale).round(), integers.expand_as(weights))
    # And what is computed with is the weight itself.
    zero = torch.zeros_like(scale)
    assert torch.equal(fake_quantize(weights, scale, zero, -255, 255), weights)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("grid", ["asymmetric", "symmetric"])
def test_what_is_computed_with_comes_back(bits: int, weights: str, grid: str) -> None:
    policy = Policy(bits, 8, weights=weights, weight_grid=grid, first_last_bits="same")
    detector = quantized(policy, seed=bits)
    other = reloaded(detector, policy)
    expected, found = used_weights(detector), used_weights(other)
    assert any(len(tensor.unique()) > 2 for tensor in expected.values())
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert torch.equal(stacked(other.raw(blobs(2))), stacked(detector.raw(blobs(2))))
    # Of what came back the same is stored again.
    first, second = stored_state(detector.module), stored_state(other.module)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_take_their_bits_and_float_layers_stay_as_they_are(bits: int) -> None:
    detector = quantized(Policy(bits, 8, first_last_bits="float", weight_grid="symmetric"))
    before = {name: tensor.clone() for name, tensor in detector.module.state_dict().items()}
    state = stored_state(detector.module)
    assert state.keys() == before.keys()
    names = {f"{name}.weight" for name, _ in quantized_layers(detector.module)}
    assert "model.0.conv.weight" not in names
    for name, tensor in before.items():
        if name in names:
            assert state[name].dtype in (torch.int8, torch.uint8)
            assert state[name].numel() == math.ceil(tensor.numel() * bits / 8)
        else:
            assert torch.equal(state[name], tensor)
            assert state[name].dtype == tensor.dtype
    # The network itself is left as it is.
    after = detector.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_integers_of_8_bits_are_their_values() -> None:
    detector = quantized(Policy(8, 8))
    state = stored_state(detector.module)
    for name, layer in quantized_layers(detector.module):
        stored = state[f"{name}.weight"]
        assert stored.dtype == torch.int8
        scale = layer.weight_quantizer.scale_of(layer.weight)
        assert torch.equal(stored.float(), (layer.weight / scale).round().clamp(-128, 127))


def test_integers_that_are_held_are_the_ones_stored() -> None:
    """The step sizes may have moved so far that rounding anew would give others."""
    policy = Policy(4, 8)
    detector = quantized(policy)
    _, layer = next(iter(quantized_layers(detector.module)))
    layer.weight_quantizer.freeze_integers(layer.weight)
    with torch.no_grad():
        layer.weight_quantizer.log_scale.add_(0.3)
    held = layer.weight_quantizer.levels
    assert held is not None
    other = reloaded(detector, policy)
    _, again = next(iter(quantized_layers(other.module)))
    assert torch.equal(again.weight_quantizer.integers(again.weight), held)
    assert torch.equal(stacked(other.raw(blobs(2))), stacked(detector.raw(blobs(2))))
    # Held again, they are the same.
    again.weight_quantizer.freeze_integers(again.weight)
    assert torch.equal(again.weight_quantizer.levels, held)


def test_a_layer_of_several_names_comes_back_under_each() -> None:
    def shared(seed: int) -> SharedDetector:
        torch.manual_seed(seed)
        detector = SharedDetector()
        insert_quantizers(detector, Policy(3, 8, first_last_bits="same"))
        calibrate(detector, [blobs(1)[..., :16, :16]])
        return detector

    detector, other = shared(0), shared(1)
    state = stored_state(detector.module)
    assert state["levels.1.0.weight"].dtype == torch.uint8
    restore_state(other.module, state, "here")
    images = blobs(1)[..., :16, :16]
    assert torch.equal(other.raw(images)[0], detector.raw(images)[0])


# ---- damage


def longer(stored: Tensor) -> Tensor:
    return torch.cat([stored, stored[:1]])


def shorter(stored: Tensor) -> Tensor:
    return stored[:-1]


def floats(stored: Tensor) -> Tensor:
    return stored.float()


def wide(stored: Tensor) -> Tensor:
    return stored.to(torch.int32)


def flat(stored: Tensor) -> Tensor:
    return stored.flatten() if stored.ndim > 1 else stored[None]


@pytest.mark.parametrize("damage", [longer, shorter, floats, wide, flat])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_damaged_integers_are_named(damage: Callable[[Tensor], Tensor], bits: int) -> None:
    policy = Policy(bits, 8)
    state = stored_state(quantized(policy).module)
    name = "model.1.conv.weight"
    state[name] = damage(state[name])
    fresh = insert_quantizers(fold(tiny_detector()), policy)
    with pytest.raises(UserError, match=r"here: the tensor model\.1\.conv\.weight holds") as error:
        restore_state(fresh.module, state, "here")
    assert "damaged" in str(error.value)
    assert "\n" not in str(error.value)


def test_bits_behind_the_last_integer_are_damage() -> None:
    stream = pack(torch.tensor([1, 2, 3]), 5)
    stream[-1] |= 0x80
    with pytest.raises(ValueError, match="goes on behind the last of its 3 integers of 5 bits"):
        unpack(stream, 5, 3)


def test_integers_of_other_bits_are_damage() -> None:
    state = stored_state(quantized(Policy(4, 8)).module)
    fresh = insert_quantizers(fold(tiny_detector()), Policy(5, 8))
    with pytest.raises(UserError, match="integers of 5 bits take"):
        restore_state(fresh.module, state, "here")


def test_integers_where_floats_are_due_are_damage() -> None:
    """In a layer that is not quantized, and among what is kept in float of one that is."""
    policy = Policy(4, 8, first_last_bits="float")
    for name in ("model.0.conv.weight", "model.1.conv.weight_quantizer.log_scale"):
        state = stored_state(quantized(policy).module)
        state[name] = state[name].to(torch.int8)
        fresh = insert_quantizers(fold(tiny_detector()), policy)
        with pytest.raises(UserError, match=f"{name} is of int8, where the network has float32"):
            restore_state(fresh.module, state, "here")


# ---- real sizes


def test_an_8_bit_yolov5n_takes_a_byte_a_weight(yolov5n: Path, tmp_path: Path) -> None:
    policy = Policy(8, 8)
    detector = insert_quantizers(fold(load_detector(yolov5n)), policy)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    calibrate(detector, [image], search="minmax")
    run = Run(tmp_path / "run", {"of": "a test"})
    metrics = {"selected": "ptq", "quantized_share_of_macs": 1.0}
    run.finish(detector, policy, metrics, {})
    weights = sum(layer.weight.numel() for _, layer in quantized_layers(detector.module))
    assert weights > 1_800_000
    assert (tmp_path / "run" / "model.safetensors").stat().st_size <= 2_300_000
    loaded = load_run(tmp_path / "run")
    expected, found = used_weights(detector), used_weights(loaded)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with torch.no_grad():
        assert torch.equal(stacked(loaded.raw(image)), stacked(detector.raw(image)))


def test_a_large_network_of_2_bits_is_within_the_bounds_of_its_file(tmp_path: Path) -> None:
    """How many numbers a network may have goes by the size of its file, and four weights may now
    share a byte of it."""
    policy = Policy(2, 8, first_last_bits="same")
    detector = insert_quantizers(fold(from_name("retinanet_resnet50_fpn")), policy)
    run = Run(tmp_path / "run", {"of": "a test"})
    run.finish(detector, policy, {"selected": "ptq", "quantized_share_of_macs": 1.0}, {})
    weights = sum(layer.weight.numel() for _, layer in quantized_layers(detector.module))
    size = (tmp_path / "run" / "model.safetensors").stat().st_size
    assert weights / 4 < size < weights / 3.5
    assert load_run(tmp_path / "run").num_classes == detector.num_classes


def test_unsigned_symmetric_grids_come_back_and_are_exported_as_such() -> None:
    policy = Policy(8, 8, activations="symmetric")
    detector = quantized(policy)
    other = reloaded(detector, policy)
    assert torch.equal(stacked(other.raw(blobs(2))), stacked(detector.raw(blobs(2))))
    image = next(quantized_layers(other.module))[1].input_quantizer
    plain = grid_of(image, signed=False)
    assert (plain.zero_point, plain.low, plain.high, plain.dtype) == (0, 0, 255, torch.uint8)
    signed = grid_of(image, signed=True)
    assert (signed.zero_point, signed.low, signed.high, signed.dtype) == (
        -128, -128, 127, torch.int8,
    )  # fmt: skip
    # TensorRT has no such grids: there it is found anew.
    placed, _ = place_for(other, policy, "tensorrt", [blobs(2)])
    assert not any(q.zero_point.any() for _, q in activation_quantizers(placed.module))
