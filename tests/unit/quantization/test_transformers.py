"""Quantization of attention: its two products, and the backbone alone."""

from __future__ import annotations

import pytest
import torch
from support.small_mmdet import SIDE, enliven, write_config
from support.tiny_detector import tiny_detector
from torch import Tensor

from dfq.errors import UserError
from dfq.models import load_detector
from dfq.models.base import Detector
from dfq.models.mmdet.ops import ensure_ops
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.inspection import list_layers
from dfq.quantization.layers import QuantMatmul
from dfq.quantization.logarithmic import LogarithmicQuantizer
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.traversal import activation_quantizers, float_mode


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    path = write_config(tmp_path_factory.mktemp("config"), "mask-rcnn-swin")
    return enliven(load_detector(path))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("masked", [False, True])
def test_exposed_attention_is_mmdets(masked: bool) -> None:
    ensure_ops()
    from mmdet.models.backbones.swin import WindowMSA

    from dfq.models.mmdet.attention import DecomposedWindowMSA, expose_products

    torch.manual_seed(0)
    theirs = WindowMSA(embed_dims=12, num_heads=3, window_size=(4, 3)).eval()
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    tokens = torch.randn(6, 12, 12).requires_grad_()
    mask = torch.randn(3, 12, 12) if masked else None
    expected = theirs(tokens, mask)
    (gradient,) = torch.autograd.grad(expected.square().sum(), tokens)
    expose_products(theirs)
    assert type(theirs) is DecomposedWindowMSA
    assert state.keys() == theirs.state_dict().keys()
    found = theirs(tokens, mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), tokens)[0], gradient)


def test_a_product_is_quantized_on_both_sides() -> None:
    torch.manual_seed(0)
    left, right = torch.rand(2, 3, 4), torch.randn(2, 4, 5)
    product = QuantMatmul(Quantizer(3, asymmetric=True), Quantizer(4, asymmetric=True))
    product.left_quantizer.initialise(torch.tensor([1 / 7]), torch.tensor([0.0]))
    product.right_quantizer.initialise(torch.tensor([0.3]), torch.tensor([7.0]))
    on_grid = (left * 7).round() / 7
    shifted = ((right / 0.3).round() + 7).clamp(0, 15) - 7
    torch.testing.assert_close(product(left, right), on_grid @ (shifted * 0.3))
    left.requires_grad_()
    product(left, right).sum().backward()
    assert left.grad is not None
    assert float(left.grad.abs().sum()) > 0
    with float_mode(product):
        torch.testing.assert_close(product(left, right), left @ right)


@pytest.mark.mmdet
def test_products_are_listed_calibrated_and_quantized(swin: Detector, images: Tensor) -> None:
    student = insert_quantizers(swin.clone(), Policy(weight_bits=8, activation_bits=8))
    calibrate(student, [images], search="minmax")
    quantizers = dict(activation_quantizers(student.module))
    assert all(bool(quantizer.initialised) for quantizer in quantizers.values())
    rows = {row.name: row for row in list_layers(student, SIDE)}
    products = [row for row in rows.values() if row.kind == "matmul"]
    assert len(products) == 2 * len(swin.attention_layers())
    assert {(row.weight_bits, row.activation_bits) for row in products} == {(8, 8)}
    # 16 x 16 tokens in windows of 16; one head of 16 channels: queries by keys.
    assert rows["backbone.stages.0.blocks.0.attn.w_msa.scores"].macs == 16 * 16 * 16 * 16
    softmax = quantizers["backbone.stages.0.blocks.0.attn.w_msa.mix.left_quantizer"]
    assert float(softmax.zero_point) == 0  # A softmax is never negative.
    assert 0 < float(softmax.scale) * 255 <= 1.0001
    with torch.no_grad():
        ours, theirs = student.raw(images), swin.raw(images)
    for one, other in zip(student.levels(ours), swin.levels(theirs), strict=True):
        assert not torch.equal(one, other)
        assert float((one - other).norm() / other.norm()) < 0.3


@pytest.mark.mmdet
def test_each_softmax_can_have_powers_of_two(swin: Detector, images: Tensor) -> None:
    student = insert_quantizers(swin.clone(), Policy(8, 4, softmax="log2"))
    calibrate(student, [images])
    found = {
        name: isinstance(layer.left_quantizer, LogarithmicQuantizer)
        for name, layer in student.module.named_modules()
        if isinstance(layer, QuantMatmul)
    }
    assert len(found) == 2 * len(swin.attention_layers())
    assert all(is_softmax == name.endswith(".mix") for name, is_softmax in found.items())
    with torch.no_grad():
        levels = student.levels(student.raw(images))
    assert all(bool(level.isfinite().all()) for level in levels)


@pytest.mark.mmdet
def test_products_can_be_left_in_float(swin: Detector) -> None:
    policy = Policy(overrides=(("*.scores", "float"), ("*.mix", 6)))
    rows = list_layers(insert_quantizers(swin.clone(), policy), SIDE)
    bits = {row.name.rpartition(".")[2]: row.activation_bits for row in rows}
    assert (bits["scores"], bits["mix"]) == (32, 6)


@pytest.mark.mmdet
def test_the_backbone_alone(swin: Detector) -> None:
    student = insert_quantizers(swin.clone(), Policy(scope="backbone"))
    for row in list_layers(student, SIDE):
        assert row.quantized == row.name.startswith("backbone."), row.name
    assert Policy.from_dict(Policy(scope="backbone").to_dict()).scope == "backbone"
    torchvision = load_detector("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn")
    rows = list_layers(insert_quantizers(torchvision, Policy(scope="backbone")), SIDE)
    assert {row.quantized for row in rows if row.name.startswith("backbone.fpn")} == {False}
    assert {row.quantized for row in rows if row.name.startswith("backbone.body")} == {True}
    with pytest.raises(UserError, match="no backbone apart") as error:
        insert_quantizers(tiny_detector(), Policy(scope="backbone"))
    assert "\n" not in str(error.value)
