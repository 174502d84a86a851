"""A folded network computes what the unfolded one did; what cannot be folded is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.tiny_detector import blobs, stacked, tiny_detector
from torch import Tensor, nn

from dfq.graph.fold_batchnorm import FoldedBatchNorm, fold, fold_batchnorm


def randomise(module: nn.Module) -> nn.Module:
    """Statistics and affine parts that no BatchNorm has by default, some gammas negative."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 3)
            if norm.affine:
                norm.weight.data.normal_()
                norm.bias.data.normal_()
    return module.eval().requires_grad_(False)


def test_a_detector_gives_the_same_predictions() -> None:
    torch.manual_seed(0)
    detector = tiny_detector()
    randomise(detector.module)
    images = blobs(2)
    before = stacked(detector.raw(images))
    norms = [m for m in detector.module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert fold(detector) is detector
    assert len(norms) == 16
    assert not any(isinstance(m, nn.BatchNorm2d) for m in detector.module.modules())
    assert not any(p.requires_grad for p in detector.module.parameters())
    torch.testing.assert_close(stacked(detector.raw(images)), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_weights_and_bias_by_hand(bias: bool, affine: bool, groups: int) -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 8, 3, groups=groups, bias=bias)
    norm = nn.BatchNorm2d(8, affine=affine, eps=0.01)
    net = randomise(nn.Sequential(conv, norm))
    x = torch.randn(2, 4, 6, 6)
    before, kept, kept_bias = net(x), conv.weight.clone(), conv.bias
    assert fold_batchnorm(net, lambda: net(x)) == ["1"]
    assert isinstance(net[1], nn.Identity)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert conv.bias is not None
    for channel in range(8):
        factor = (float(norm.running_var[channel]) + 0.01) ** -0.5
        factor *= float(norm.weight[channel]) if affine else 1.0
        constant = float(kept_bias[channel]) if kept_bias is not None else 0.0
        constant = (constant - float(norm.running_mean[channel])) * factor
        constant += float(norm.bias[channel]) if affine else 0.0
        torch.testing.assert_close(conv.weight[channel], kept[channel] * factor)
        assert float(conv.bias[channel]) == pytest.approx(constant, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)


def test_what_is_left_remembers_the_statistics() -> None:
    """From the folded output back to the convolution's, and no word of it in the state dict."""
    net = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 5, 5)
    between, norm = net[0](x), net[1]
    fold_batchnorm(net, lambda: net(x))
    left = net[1]
    assert isinstance(left, FoldedBatchNorm)
    assert not left.training
    assert torch.equal(left.mean, norm.running_mean)
    assert torch.equal(left.var, norm.running_var)
    factor, shift, mean = (v[:, None, None] for v in (left.factor, left.shift, left.mean))
    torch.testing.assert_close((net(x) - shift) / factor + mean, between, rtol=1e-3, atol=1e-4)
    assert set(net.state_dict()) == {"0.weight", "0.bias"}


class Net(nn.Module):
    """Two convolutions and two BatchNorms of one width, wired by a function of them and x."""

    def __init__(self, wire: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.other = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.bn, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.wire = wire

    def forward(self, x: Tensor) -> Tensor:
        return self.wire(self, x)


def two_norms_on_one_output(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.bn(y) + net.second(y)


def one_convolution_shared_by_two_norms(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)) + net.second(net.conv(x[..., ::2, ::2])).mean()


def a_convolution_once_with_and_once_without(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)) + net.conv(x)


def one_norm_shared_by_two_convolutions(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)) + net.bn(net.other(x))


def a_norm_also_on_something_else(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)) + net.bn(x)


def a_skip_around_the_norm(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return y + net.bn(y)


def an_activation_between(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x).relu())


def a_norm_on_the_image(net: Net, x: Tensor) -> Tensor:
    return net.conv(net.bn(x))


@pytest.mark.parametrize(
    "wire",
    [
        two_norms_on_one_output,
        one_convolution_shared_by_two_norms,
        a_convolution_once_with_and_once_without,
        one_norm_shared_by_two_convolutions,
        a_norm_also_on_something_else,
        a_skip_around_the_norm,
        an_activation_between,
        a_norm_on_the_image,
    ],
    ids=lambda wire: wire.__name__,
)
def test_left_alone(wire: Callable[[Net, Tensor], Tensor]) -> None:
    torch.manual_seed(2)
    net = randomise(Net(wire))
    x = torch.randn(1, 4, 8, 8)
    before = net(x)
    assert fold_batchnorm(net, lambda: net(x)) == []
    assert torch.equal(net(x), before)


def test_what_can_be_folded_beside_what_cannot() -> None:
    def wire(net: Net, x: Tensor) -> Tensor:
        y = net.other(net.bn(net.conv(x)))
        # Looking at a tensor is no use of its values.
        return y + net.second(y) if y.shape[0] == 1 and y.dim() == 4 else y

    net = randomise(Net(wire))
    x = torch.randn(1, 4, 8, 8)
    before = net(x)
    assert fold_batchnorm(net, lambda: net(x)) == ["bn"]
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)


def test_a_pair_called_twice_is_folded_once() -> None:
    net = randomise(Net(lambda net, x: net.bn(net.conv(net.bn(net.conv(x)).relu()))))
    x = torch.randn(1, 4, 8, 8)
    before = net(x)
    assert fold_batchnorm(net, lambda: net(x)) == ["bn"]
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)


def test_batch_statistics_only_cannot_be_folded() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert fold_batchnorm(net, lambda: net(torch.randn(1, 3, 4, 4))) == []
