"""The BatchNorm loss against its definition, computed plainly with hooks and `torch.var_mean`."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from support.tiny_detector import tiny_detector
from torch import Tensor, nn

from dfq.errors import UserError
from dfq.graph.fold_batchnorm import FoldedBatchNorm, fold, fold_batchnorm
from dfq.synthesis.losses.batchnorm import BatchNormStatistics


def reference(network: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Distances in running order, and the network's output, by plain autograd."""
    distances: list[Tensor] = []

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        dims = [d for d in range(inputs[0].ndim) if d != 1]
        var, mean = torch.var_mean(inputs[0], dims, correction=0)
        distances.append(
            (mean - layer.running_mean).square().sum().sqrt()
            + (var - layer.running_var).square().sum().sqrt()
        )

    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    handles = [m.register_forward_pre_hook(watch) for m in norms]
    output = network(images)
    for handle in handles:
        handle.remove()
    return distances, output


def small_network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.LazyLinear(5),
        nn.BatchNorm1d(5),
    )
    network(torch.rand(8, 3, 9, 9))
    return network.eval().requires_grad_(False)


def test_distances_equal_the_definition() -> None:
    network, images = small_network(), torch.rand(4, 3, 9, 9)
    expected, output = reference(network, images)
    with BatchNormStatistics(network) as statistics:
        assert torch.equal(network(images), output), "watching must not change the output"
        found = statistics.distances()
    assert len(found) == 3
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_relative_distances_are_in_units_of_each_channel() -> None:
    network, images = small_network(), torch.rand(4, 3, 9, 9)
    seen: list[Tensor] = []
    norms = [m for m in network if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    handles = [m.register_forward_pre_hook(lambda _, x: seen.append(x[0])) for m in norms]
    network(images)
    for handle in handles:
        handle.remove()
    expected = []
    for norm, x in zip(norms, seen, strict=True):
        var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
        spread = norm.running_var + 1e-5
        to_mean, to_var = (mean - norm.running_mean) / spread.sqrt(), var / spread - 1
        expected.append(to_mean.square().mean().sqrt() + to_var.square().mean().sqrt())
    with BatchNormStatistics(network) as statistics:
        network(images)
        found = statistics.distances(relative=True)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-3)


def test_gradient_equals_plain_autograd() -> None:
    # A term of the network's own output is added: its gradient joins that of the statistics.
    network, start = small_network(), torch.rand(4, 3, 9, 9)
    weights = (0.3, 2.0, 0.7)
    plain = start.clone().requires_grad_()
    distances, output = reference(network, plain)
    loss = sum(w * d for w, d in zip(weights, distances, strict=True)) + output.square().sum()
    (expected,) = torch.autograd.grad(loss, plain)

    fused = start.clone().requires_grad_()
    with BatchNormStatistics(network) as statistics:
        output = network(fused)
        found = statistics.distances()
        loss = sum(w * d for w, d in zip(weights, found, strict=True)) + output.square().sum()
        (gradient,) = torch.autograd.grad(loss, fused)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_detector_s_layers_in_running_order() -> None:
    detector, images = tiny_detector(), torch.rand(2, 3, 64, 64)
    wrapped = nn.Module()
    wrapped.inner = detector.module
    wrapped.forward = detector.raw  # type: ignore[method-assign]
    expected, _ = reference(wrapped, images)
    with BatchNormStatistics(detector.module) as statistics:
        detector.raw(images)
        found = statistics.distances()
    count = sum(isinstance(m, nn.BatchNorm2d) for m in detector.module.modules())
    assert len(found) == len(expected) == count
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_folded_network_gives_the_same_distances_and_gradients() -> None:
    detector, images = tiny_detector(), torch.rand(2, 3, 64, 64)
    results = []
    for network in (detector, fold(detector.clone())):
        pixels = images.clone().requires_grad_()
        with BatchNormStatistics(network.module) as statistics:
            network.raw(pixels)
            distances = statistics.distances()
        (gradient,) = torch.autograd.grad(distances.sum(), pixels)
        results.append((distances.detach(), gradient))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.module.modules())
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_a_folded_channel_that_died_does_not_count() -> None:
    # gamma = 0: what leaves the BatchNorm says nothing about what went in.
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    norm = network[1]
    norm.running_mean.copy_(torch.randn(4))
    norm.weight.data.copy_(torch.tensor([1.0, 0.0, 0.5, -2.0]))
    images = torch.rand(2, 3, 8, 8)
    var, mean = torch.var_mean(network[0](images), (0, 2, 3), correction=0)
    alive = [0, 2, 3]
    expected = (mean - norm.running_mean)[alive].norm() + (var - norm.running_var)[alive].norm()
    fold_batchnorm(network, lambda: network(images))
    with BatchNormStatistics(network) as statistics:
        network(images)
        (distance,) = statistics.distances()
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_left_behind() -> None:
    network, images = small_network(), torch.rand(2, 3, 9, 9)
    statistics = BatchNormStatistics(network)
    with statistics:
        network(images)
    assert not any(m._forward_pre_hooks for m in network.modules())
    network(images)
    with pytest.raises(RuntimeError, match="no forward pass"):
        statistics.distances()


class Thing:
    """Something to see the end of."""


class Attached(torch.autograd.Function):
    """Identity whose node in the graph holds a thing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, thing: Thing) -> Tensor:
        ctx.thing = thing
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def test_no_graph_outlives_its_gradient() -> None:
    network, thing = small_network(), Thing()
    alive = weakref.ref(thing)
    images = torch.rand(2, 3, 9, 9, requires_grad=True)
    with BatchNormStatistics(network) as statistics:
        network(Attached.apply(images, thing))
        del thing
        torch.autograd.grad(statistics.distances().sum(), images)
        # A node that held itself would hold all before it, which no garbage collector sees.
        assert alive() is None


def test_statistics_are_zero_for_what_the_layer_was_fed() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3, momentum=1.0))
    images = torch.rand(5, 3, 8, 8)
    network.train()(images)
    # Training stores the unbiased variance, the loss compares the biased one.
    n = 5 * 8 * 8
    network[0].running_var *= (n - 1) / n
    with BatchNormStatistics(network.eval()) as statistics:
        network(images)
        (distance,) = statistics.distances()
    assert float(distance) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
        nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)),
    ],
    ids=["no BatchNorm", "no running statistics"],
)
def test_without_statistics_it_is_refused(network: nn.Module) -> None:
    with pytest.raises(UserError, match="no BatchNorm statistics") as refused:
        BatchNormStatistics(network)
    assert "\n" not in str(refused.value)


class _Residual(nn.Module):
    """A block that writes into what its folded BatchNorm gave."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        ones = torch.ones(3)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = FoldedBatchNorm(0.1 * ones, 2 * ones, 0.5 * ones, 0.2 * ones, 1e-5)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.in_place:
            y += x
            return y.relu_()
        return (y + x).relu()


def test_what_is_overwritten_is_kept_apart() -> None:
    torch.manual_seed(0)
    blocks = [_Residual(True), _Residual(False)]
    blocks[1].load_state_dict(blocks[0].state_dict())
    results = []
    for block in blocks:
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with BatchNormStatistics(block, lambda block=block, x=x: block(x.detach())) as statistics:
            output = block(x)
            loss = statistics.distances().sum() + output.square().mean()
        results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    torch.testing.assert_close(results[0], results[1])


def test_activations_take_the_statistics_of_what_goes_into_them() -> None:
    # 64 px and eight images: large enough for convolutions that keep the channels innermost.
    detector, images = tiny_detector(), torch.rand(8, 3, 64, 64)
    folded = fold(detector.clone())
    folded.module.to(memory_format=torch.channels_last)
    results = []
    for run in (None, lambda: folded.raw(images)):
        pixels = images.clone().requires_grad_()
        watched = BatchNormStatistics(folded.module, run)
        assert bool(watched._fused) == (run is not None)
        with watched as statistics:
            raw = folded.raw(pixels)
            distances = statistics.distances()
            loss = distances.sum() + sum(level.square().sum() for level in raw)
            (gradient,) = torch.autograd.grad(loss, pixels, retain_graph=True)
            # Without the statistics, the activation's gradient alone.
            (plain,) = torch.autograd.grad(raw[0].sum(), pixels)
        results.append((distances.detach(), gradient, plain))
    for fused, apart in zip(results[1], results[0], strict=True):
        assert float((fused - apart).norm() / apart.norm()) < 1e-3
    assert not any("forward" in vars(m) for m in folded.module.modules()), "left behind"


def test_parts_of_a_batch_have_the_gradient_of_the_whole() -> None:
    network, images = small_network(), torch.rand(7, 3, 9, 9)
    whole = images.clone().requires_grad_()
    with BatchNormStatistics(network) as statistics:
        network(whole)
        expected = statistics.distances()
        (gradient,) = torch.autograd.grad(expected.sum(), whole)
        parts = [part.clone() for part in images.split(3)]
        with torch.no_grad():
            for part in parts:
                network(part)
                statistics.gather()
        for index, part in enumerate(parts):
            network(part.requires_grad_())
            found = statistics.distances()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            (own,) = torch.autograd.grad(found.sum(), part)
            torch.testing.assert_close(own, gradient.split(3)[index], rtol=1e-3, atol=1e-5)
        statistics.release()
        network(parts[0])
        assert not torch.allclose(statistics.distances(), expected)


@pytest.mark.parametrize("folded", [False, True])
def test_divergences_are_those_of_gaussians(folded: bool) -> None:
    network, images = small_network(), torch.rand(4, 3, 9, 9, requires_grad=True)
    expected = []

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        dims = [d for d in range(inputs[0].ndim) if d != 1]
        var, mean = torch.var_mean(inputs[0], dims, correction=0)
        seen = torch.distributions.Normal(mean, var.sqrt())
        known = torch.distributions.Normal(layer.running_mean, layer.running_var.sqrt())
        expected.append(torch.distributions.kl_divergence(seen, known).mean())

    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    handles = [m.register_forward_pre_hook(watch) for m in norms]
    network(images)
    for handle in handles:
        handle.remove()
    (wanted,) = torch.autograd.grad(torch.stack(expected).sum(), images)
    if folded:
        fold_batchnorm(network, lambda: network(images))
    with BatchNormStatistics(network) as statistics:
        network(images)
        found = statistics.divergences()
    (gradient,) = torch.autograd.grad(found.sum(), images)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient, wanted, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("folded", [False, True])
def test_a_channel_that_never_varied_says_nothing(folded: bool) -> None:
    """Its spread is zero, and no rounding error is to count as thousands of it."""
    network, images = small_network(), torch.rand(4, 3, 9, 9)
    convolution, norm = network[0], network[1]
    with torch.no_grad():
        convolution.weight[2], norm.running_var[2] = 0.0, 0.0
        norm.running_mean[2] = convolution.bias[2] + 1e-4
    if folded:
        fold_batchnorm(network, lambda: network(images))
    with BatchNormStatistics(network) as statistics:
        network(images)
        with_it = statistics.divergences()
        network(images)
        statistics.gather()
        ((_, shift_told, _), *_) = statistics.compared()
    living = torch.tensor([0, 1, 3, 4, 5])
    var, mean = torch.var_mean(convolution(images), (0, 2, 3), correction=0)
    known_mean, known_var = norm.running_mean, norm.running_var
    if folded:
        known_mean, known_var = network[1].shift, network[1].var * network[1].factor.square()
    ratio = (var / known_var)[living]
    shift = ((mean - known_mean).square() / known_var)[living]
    wanted = 0.5 * (ratio + shift - 1 - ratio.log()).mean()
    torch.testing.assert_close(with_it[0], wanted, rtol=1e-3, atol=1e-5)
    assert shift_told < 10


def test_statistics_that_were_lost_are_refused() -> None:
    network = small_network()
    for layer in network.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.running_var.zero_()
    with pytest.raises(UserError, match="running variances of zero"):
        BatchNormStatistics(network)


def test_a_channel_whose_gamma_has_died_says_nothing() -> None:
    network = small_network()
    network[1].weight.data[2] = 0
    images = torch.rand(4, 3, 9, 9)
    fold_batchnorm(network, lambda: network(images))
    with BatchNormStatistics(network) as statistics:
        network(images)
        first = statistics.first_layer()
        network(images)
        divergences = statistics.divergences()
    assert [len(v) for v in first] == [5] * 4
    assert torch.isfinite(divergences).all()


class _SharedHead(nn.Module):
    """Two levels of features, and a head that both share, as a RetinaNet's; folded or not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 4, 3, stride=2)
        self.head = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.SiLU())
        for layer in (self.norm, self.head[1]):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.05, 0.2)
            layer.weight.data.uniform_(0.5, 1.5)
        self.eval().requires_grad_(False).double()

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.norm(self.stem(x))
        return [self.head(level) for level in (fine, self.down(fine), self.down(2 * fine))]


def joined(network: nn.Module, images: Tensor, weights: Tensor) -> Tensor:
    """A loss of every run of every layer, and of what the network gives."""
    with BatchNormStatistics(network, lambda: network(images.detach())) as statistics:
        outputs = network(images)
        found = statistics.distances()
    assert len(found) == 4
    return (weights * found).sum() + sum(level.square().mean() for level in outputs)


@pytest.mark.parametrize("folded", [False, True])
def test_a_layer_that_runs_several_times_counts_each_time(folded: bool) -> None:
    network, images = _SharedHead(), torch.rand(2, 3, 15, 15, dtype=torch.float64)
    weights = torch.tensor([0.3, 2.0, 0.7, 1.1], dtype=torch.float64)
    plain = images.clone().requires_grad_()
    distances, outputs = reference(network, plain)
    expected = (weights * torch.stack(distances)).sum()
    expected = expected + sum(level.square().mean() for level in outputs)
    (gradient,) = torch.autograd.grad(expected, plain)
    if folded:
        fold_batchnorm(network, lambda: network(images))
    pixels = images.clone().requires_grad_()
    loss = joined(network, pixels, weights)
    (found,) = torch.autograd.grad(loss, pixels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)
    # And by finite differences, which know of no graph.
    way = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ahead, behind = (joined(network, images + h * way, weights) for h in (1e-5, -1e-5))
    assert float((ahead - behind) / 2e-5) == pytest.approx(float((found * way).sum()), rel=1e-5)


def test_parts_of_a_batch_are_put_together_run_by_run() -> None:
    network, images = _SharedHead(), torch.rand(6, 3, 15, 15, dtype=torch.float64)
    with BatchNormStatistics(network) as statistics:
        network(images)
        expected = statistics.divergences()
    with BatchNormStatistics(network) as statistics:
        for part in images.split(2):
            network(part)
            statistics.gather()
        names = [name for name, *_ in statistics.compared()]
        network(images[:2])
        found = statistics.divergences()
    assert names == ["norm", "head.1", "head.1", "head.1"]
    torch.testing.assert_close(found, expected)


def test_a_pass_that_nobody_asks_of_does_not_count() -> None:
    detector, images = tiny_detector(), torch.rand(2, 3, 64, 64)
    with BatchNormStatistics(detector.module) as statistics:
        detector.raw(images)
        expected = statistics.distances()
        detector.raw(1 - images)
        statistics.forget()
        detector.raw(images)
        assert torch.equal(statistics.distances(), expected)
        # What calls the network as a whole says itself where a pass begins.
        detector.module(1 - images)
        detector.module(images)
        assert torch.equal(statistics.distances(), expected)
