"""Weights on disk as the integers they are.

A quantized weight is a step size times an integer, and the integer is all that a file has to hold
beside the step size and the zero point, which are tensors of their own. Of a layer called `conv`
whose weight has `b` bits, the tensor `conv.weight` of the file is

- at 8 bits int8 in the weight's own shape (uint8 where the grid has a zero point);
- below 8 bits a flat stream of bits in uint8: each integer counted from the lowest level of its
  grid, so from 0 to 2^b - 1, in `b` bits, the lowest bit first and without gaps, in the order of a
  contiguous weight. At 4 bits these are two integers a byte, the first one in the lower half. What
  is left of the last byte is zero.

Integers count as the grid does: from its zero point, where it has one. All other tensors are in the
file as they are in the network, weights of layers in float too.

Integers of a piecewise grid (see `piecewise`) stand for levels of two steps; what follows holds for
each of them.

Reading multiplies each integer q with its step size s, in float32. The network then rounds the
product to the grid as it does with any weight, and meets q again: with the two roundings of float32
(relative errors of 2^-24 each, as s is from e^-80 to e^80 and neither the product nor the quotient
leaves the normal numbers), (s * q) / s is off from q by less than 255 * 2^-22, and that from half a
step by far. So what is computed with is equal, number by number, to what was saved. (Zero has no
sign in a file: -0 comes back as 0.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError, shown
from ..models.tensors import check_kinds
from .layers import QUANTIZED_LAYERS, QuantConv2d, QuantLinear, SplitOutput

BYTE = 8

WEIGHTS_PER_BYTE = 4
"""Weights that a byte of a file holds at most: those of 2 bits."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers as a stream of bits.

    Args:
        codes: whole numbers of any dtype from 0 to 2^bits - 1, any shape, n in all.
        bits: 1 to 8.

    Returns:
        uint8 `(ceil(n * bits / 8),)`: of each the lowest bit first, without gaps.
    """
    values = codes.reshape(-1, 1).to(torch.uint8).numpy()
    stream = np.unpackbits(values, axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        stream: uint8 `(ceil(count * bits / 8),)`.
        bits: 1 to 8.
        count: how many integers there are.

    Returns:
        uint8 `(count,)`, from 0 to 2^bits - 1.

    Raises:
        ValueError: the stream is of another length or dtype, or goes on behind the last integer.
    """
    size = packed_bytes(count, bits)
    if stream.dtype != torch.uint8 or tuple(stream.shape) != (size,):
        raise ValueError(
            f"holds {_kind(stream)}, where {count} integers of {bits} bits take uint8 ({size},)"
        )
    flat = np.unpackbits(stream.numpy(), bitorder="little")
    if flat[count * bits :].any():
        raise ValueError(f"goes on behind the last of its {count} integers of {bits} bits")
    values = np.packbits(flat[: count * bits].reshape(count, bits), axis=1, bitorder="little")
    return torch.from_numpy(values).reshape(count)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that so many integers of so many bits take without gaps."""
    return -(-count * bits // BYTE)


def stored_state(module: nn.Module) -> dict[str, Tensor]:
    """What a file holds of a network: its state, with the weights of quantized layers as integers.

    Args:
        module: calibrated; not changed.

    Returns:
        By the names of the state dict, contiguous copies on the CPU.
    """
    state = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in module.state_dict().items()
    }
    for name, layer in _layers(module):
        state[f"{name}.weight"] = _stored(layer)
    return state


@torch.no_grad()
def restore_state(
    module: nn.Module, state: Mapping[str, Tensor], source: str, *, floats: bool = False
) -> None:
    """Load what `stored_state` gave into a network of the same layers and bits, in place.

    Args:
        module: on the CPU.
        state: by name.
        source: of the state, for messages.
        floats: whether the weights of quantized layers may be there as floats: files were written
            so before they held integers.

    Raises:
        UserError: a tensor of integers is not as its layer's bits ask for, or there are integers
            where the network has floats, or the other way round; names it.
        RuntimeError: names or shapes are not those of the network.
    """
    plain, codes = _by_kind(module, state), {}
    for name, layer in _layers(module):
        key = f"{name}.weight"
        tensor = state.get(key)
        if tensor is None or (floats and tensor.is_floating_point()):
            continue
        try:
            codes[key] = (layer, _codes(layer, tensor))
        except ValueError as error:
            raise UserError(
                f"{source}: the tensor {shown(key)} {error}: the file is damaged; restore it, or "
                "make the run again"
            ) from None
        # Its place is taken until the step sizes are known.
        plain[key] = layer.weight
    check_kinds(module.state_dict(), plain, source)
    module.load_state_dict(plain)
    for layer, integers in codes.values():
        quantizer = layer.weight_quantizer
        lowest, _ = quantizer.limits_of(layer.weight)
        layer.weight.copy_(quantizer.values(integers + lowest))


def _by_kind(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with a grid for each kind of prediction where the network has them, though earlier
    versions had one for all kinds that a layer gives: each is then that one."""
    spread = dict(state)
    for name, split in module.named_modules(remove_duplicate=False):
        if not isinstance(split, SplitOutput):
            continue
        for kind, quantizer in split.named_children():
            for key in quantizer.state_dict():
                if (shared := state.get(f"{name}.{key}")) is not None:
                    spread.setdefault(f"{name}.{kind}.{key}", shared)
                    spread.pop(f"{name}.{key}", None)
    return spread


def _layers(module: nn.Module) -> Iterator[tuple[str, QuantConv2d | QuantLinear]]:
    """(name, layer) of every quantized layer under each of its names, as state dicts have them."""
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, QUANTIZED_LAYERS):
            yield name, layer


def _is_plain(layer: QuantConv2d | QuantLinear) -> bool:
    """Whether the integers of a layer are a tensor of its weight's shape, and no stream."""
    return layer.weight_quantizer.bits == BYTE


def _plain_dtype(layer: QuantConv2d | QuantLinear) -> torch.dtype:
    return torch.uint8 if layer.weight_quantizer.asymmetric else torch.int8


@torch.no_grad()
def _stored(layer: QuantConv2d | QuantLinear) -> Tensor:
    """A layer's weight as it is in a file."""
    quantizer = layer.weight_quantizer
    lowest, _ = quantizer.limits_of(layer.weight)
    codes = (quantizer.integers(layer.weight) - lowest).cpu().contiguous()
    if _is_plain(layer):
        return (codes + quantizer.bounds[0]).to(_plain_dtype(layer))
    return pack(codes, quantizer.bits)


def _codes(layer: QuantConv2d | QuantLinear, stored: Tensor) -> Tensor:
    """The integers of a weight in its shape, counted from the lowest level of the grid; float32.

    Raises:
        ValueError: says what is wrong with the tensor.
    """
    quantizer, shape = layer.weight_quantizer, layer.weight.shape
    if not _is_plain(layer):
        return unpack(stored, quantizer.bits, shape.numel()).reshape(shape).float()
    wanted = _plain_dtype(layer)
    if stored.dtype != wanted or stored.shape != shape:
        name = str(wanted).removeprefix("torch.")
        raise ValueError(f"holds {_kind(stored)}, where a weight is due of {name} {tuple(shape)}")
    return stored.float() - quantizer.bounds[0]


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
