"""Rebuilt layers against PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dfq.models.nn.decomposed import DecomposedAttention, DecomposedDeconv, expose


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(("side", "bias"), [(2, True), (3, False)])
def test_transposed_convolutions(side: int, bias: bool) -> None:
    layer = nn.ConvTranspose2d(6, 4, side, stride=side, bias=bias)
    decomposed = DecomposedDeconv(layer)
    x = noise(2, 6, 5, 7)
    torch.testing.assert_close(decomposed(x), layer(x))
    assert sum(p.numel() for p in decomposed.parameters()) == (
        layer.weight.numel() + (layer.out_channels * side**2 if bias else 0)
    )


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("masks", ["none", "padding", "scores", "heads"])
def test_attention(first: bool, masks: str) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=first).eval()
    decomposed = DecomposedAttention(layer).eval()
    query, key, value = noise(3, 5, 8), noise(3, 7, 8), noise(3, 7, 8).flip(0)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    options = {
        "none": {},
        "padding": {"key_padding_mask": padding, "attn_mask": torch.eye(5, 7, dtype=torch.bool)},
        "scores": {"attn_mask": noise(5, 7)},
        "heads": {"attn_mask": noise(6, 5, 7)},
    }[masks]
    inputs = [x if first else x.transpose(0, 1) for x in (query, key, value)]
    expected, _ = layer(*inputs, **options, need_weights=False)
    found, weights = decomposed(query=inputs[0], key=inputs[1], value=inputs[2], **options)
    assert weights is None
    torch.testing.assert_close(found, expected)


def test_a_network_and_its_checkpoints() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2)
            self.parts = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, stride=2), nn.ReLU())

    network = Network()
    with torch.no_grad():
        network.attend.in_proj_bias.normal_()
    decomposed = copy.deepcopy(network)
    expose(decomposed)
    assert isinstance(decomposed.attend, DecomposedAttention)
    assert isinstance(decomposed.parts[0], DecomposedDeconv)
    for tensor in decomposed.state_dict().values():
        tensor.zero_()
    # Checkpoints have PyTorch's names; what was saved of the rebuilt network has its own.
    assert not any(decomposed.load_state_dict(network.state_dict()))
    again = copy.deepcopy(decomposed)
    assert not any(again.load_state_dict(decomposed.state_dict()))
    x, image = noise(4, 2, 8), noise(1, 8, 3, 3)
    for found in (decomposed, again):
        torch.testing.assert_close(found.attend(x, x, x)[0], network.attend(x, x, x)[0])
        torch.testing.assert_close(found.parts(image), network.parts(image))


def test_what_differs_is_left_alone() -> None:
    kept = nn.Sequential(
        nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1),
        nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2),
        nn.MultiheadAttention(8, 2, kdim=4),
        nn.MultiheadAttention(8, 2, add_bias_kv=True),
    )
    before = list(kept)
    expose(kept)
    assert list(kept) == before
