"""The patch-similarity entropy against a plain reference."""

from __future__ import annotations

import math

import pytest
import torch
from support.small_mmdet import SIDE, enliven, write_config
from torch import Tensor, nn

from dfq.errors import UserError
from dfq.models import load_detector
from dfq.models.base import Detector, Targets
from dfq.synthesis.inversion import Inversion
from dfq.synthesis.losses.patch_entropy import (
    PatchSimilarity,
    kernel_entropy,
    patch_similarity_entropy,
)
from dfq.synthesis.pipeline import determinants
from dfq.synthesis.settings import Synthesis


def reference(tokens: Tensor, bandwidth: float, points: int) -> Tensor:
    """One window, one pair, one place at a time."""
    entropies = []
    for window in tokens:
        similar = [
            nn.functional.cosine_similarity(window[i], window[j], dim=0)
            for i in range(len(window))
            for j in range(i + 1, len(window))
        ]
        values = [float(value) for value in similar]
        width = max(bandwidth, (max(values) - min(values)) / (points - 7))
        start, end = min(values) - 3 * width, max(values) + 3 * width
        gap = (end - start) / (points - 1)
        total = torch.zeros((), dtype=tokens.dtype)
        for index in range(points):
            place = start + index * gap
            density = sum(torch.exp(-0.5 * ((value - place) / width) ** 2) for value in similar) / (
                len(similar) * width * math.sqrt(2 * math.pi)
            )
            share = 0.5 if index in (0, points - 1) else 1.0
            total = total - share * gap * density * torch.log(density)
        entropies.append(total)
    return torch.stack(entropies).mean()


@pytest.mark.parametrize(("bandwidth", "points"), [(0.01, 20), (0.3, 12)])
def test_values_and_gradients_equal_the_reference(bandwidth: float, points: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 6, 5, generator=generator).requires_grad_()
    ours = patch_similarity_entropy(tokens, bandwidth=bandwidth, points=points)
    theirs = reference(tokens, bandwidth, points)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(value, tokens)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert float(gradients[0].abs().max()) > 1e-3


def test_entropy_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(1, 20000, generator=generator, dtype=torch.float64)
    # log of the length, but for the rounding of the edges by the kernel.
    assert float(kernel_entropy(uniform, points=200)) == pytest.approx(0.0, abs=0.03)
    assert float(kernel_entropy(2 * uniform, points=200)) == pytest.approx(math.log(2), abs=0.03)
    normal = 0.1 * torch.randn(1, 20000, generator=generator, dtype=torch.float64)
    expected = 0.5 * math.log(2 * math.pi * math.e * 0.01)
    assert float(kernel_entropy(normal, points=200)) == pytest.approx(expected, abs=0.03)


def test_equal_tokens_are_no_trouble() -> None:
    tokens = torch.ones(2, 7, 4).requires_grad_()
    entropy = patch_similarity_entropy(tokens)
    # That of one kernel: samples of no spread at all.
    expected = 0.5 * math.log(2 * math.pi * math.e * 0.01**2)
    assert float(entropy.detach()) == pytest.approx(expected, abs=0.02)
    (gradient,) = torch.autograd.grad(entropy, tokens)
    assert torch.isfinite(gradient).all()
    nothing = torch.zeros(2, 7, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(patch_similarity_entropy(nothing), nothing)
    assert torch.isfinite(gradient).all()


def test_spread_similarities_have_more_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 16, 64, generator=generator)
    # Two groups of tokens, alike within themselves and unlike across, and shades in between.
    share = torch.linspace(0, 1, 16).view(1, 16, 1)
    ends = torch.randn(4, 2, 64, generator=generator)
    grouped = share * ends[:, :1] + (1 - share) * ends[:, 1:]
    assert patch_similarity_entropy(grouped) > patch_similarity_entropy(noise) + 0.5


def test_every_token_counts() -> None:
    tokens = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(patch_similarity_entropy(tokens), tokens)
    assert (gradient.abs().amax(dim=(0, 2)) > 0).all()


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    path = write_config(tmp_path_factory.mktemp("config"), "mask-rcnn-swin")
    return enliven(load_detector(path))


@pytest.mark.mmdet
def test_every_attention_of_a_swin_is_watched(swin: Detector) -> None:
    names = swin.attention_layers()
    assert len(names) == 5  # One a block.
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with PatchSimilarity(swin.module, names) as watcher, torch.no_grad():
        swin.raw(image)
        swin.raw(image)
        value = watcher.entropy()
        with pytest.raises(RuntimeError, match="no forward pass"):
            watcher.entropy()
        outputs = {}
        for name in names:
            swin.module.get_submodule(name).register_forward_hook(
                lambda _m, _i, output, name=name: outputs.__setitem__(name, output)
            )
        swin.raw(image)
    expected = torch.stack([patch_similarity_entropy(outputs[name]) for name in names]).mean()
    torch.testing.assert_close(value, expected)
    for name in names:
        swin.module.get_submodule(name)._forward_hooks.clear()


def _settings(**weights: float) -> Synthesis:
    stage = {"image_size": SIDE, "iterations": 2, "updates": 1}
    return Synthesis(image_size=SIDE, iterations=20, multires=0, label_stage=stage, weights=weights)


@pytest.mark.mmdet
def test_a_network_without_batchnorm_is_inverted(swin: Detector) -> None:
    inversion = Inversion(swin, _settings(task=0, tv=0))
    assert inversion.statistics is None
    seen: list[float] = []
    inversion.image_stage(
        [torch.tensor([[1.0, 0.5, 0.5, 0.4, 0.4]])] * 2,
        torch.Generator().manual_seed(0),
        torch.Generator().manual_seed(0),
        lambda stage, step, steps, values: seen.append(-values["entropy"]),
    )
    assert seen[-1] > seen[0] + 0.02
    with pytest.raises(UserError, match="no BatchNorm"):
        Inversion(swin, _settings(entropy=0))


@pytest.mark.parametrize("balance", ["loss", "gradient"])
def test_the_papers_entropy_is_summed_over_the_blocks(swin: Detector, balance: str) -> None:
    changed = {"balance": balance, "precision": "float32"}
    settings = _settings(task=0, tv=0).model_copy(update=changed)
    inversion = Inversion(swin, settings)
    network, outputs = inversion.detector, []
    layers = [network.module.get_submodule(name) for name in network.attention_layers()]
    handles = [
        layer.register_forward_hook(lambda _m, _i, tokens: outputs.append(tokens.detach()))
        for layer in layers
    ]
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with inversion._watching(torch.Generator()):
        term = inversion._losses(image, Targets.empty())["entropy"]
    for handle in handles:
        handle.remove()
    each = [float(patch_similarity_entropy(tokens)) for tokens in outputs]
    assert len(each) == 5
    expected = math.fsum(each) / (1 if balance == "loss" else 5)
    assert float(term) == pytest.approx(-expected, rel=1e-5)


def test_it_stands_beside_batchnorm(swin: Detector) -> None:
    both = swin.clone()
    conv = both.module.neck.lateral_convs[0].conv
    both.module.neck.lateral_convs[0].conv = nn.Sequential(
        conv, nn.BatchNorm2d(conv.out_channels).eval()
    )
    inversion = Inversion(both, _settings())
    assert inversion.statistics is not None
    assert len(inversion.statistics.layers) == 1
    terms: dict[str, float] = {}
    inversion.image_stage(
        [torch.tensor([[1.0, 0.5, 0.5, 0.4, 0.4]])] * 2,
        torch.Generator().manual_seed(0),
        torch.Generator().manual_seed(0),
        lambda stage, step, steps, values: terms.update(values),
    )
    assert {"bn", "entropy", "task"} <= terms.keys()


def test_the_weight_counts_only_where_there_is_attention(swin: Detector) -> None:
    from support.tiny_detector import tiny_detector

    changed = _settings(entropy=3.0)
    with_attention = [determinants(swin, s, 0) for s in (_settings(), changed)]
    assert with_attention[0] != with_attention[1]
    without = [determinants(tiny_detector(), s, 0) for s in (_settings(), changed)]
    assert without[0] == without[1]
