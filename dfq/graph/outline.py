"""The outline of a network: its layers in execution order, their shapes and costs, its boundary.

Found by watching one forward pass, and known from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.base import Boundary, Model
from ..models.nn.matmul import Matmul
from .execution import blank_images, hooks

WEIGHTED = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d, nn.MultiheadAttention)
"""Layers of weights, quantized or not."""

LISTED = (*WEIGHTED, Matmul)
"""Layers that an outline holds."""


@dataclass(frozen=True)
class LayerOutline:
    """A layer of weights, or a product of two activations.

    Attributes:
        name: qualified name in the network.
        kind: "conv" or "linear"; "matmul", a product without a weight; "deconv" or "attention".
        weight_shape: of a product, `()`.
        output_shape: of one call, without the batch.
        macs: multiply-accumulates of all its calls, for one image.
        calls: how often it runs in a forward pass.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    calls: int


@dataclass(frozen=True)
class NetworkOutline:
    """What is known of a network from watching it.

    Attributes:
        image_size: side in pixels of the image it was watched on, which MACs and shapes are for.
        layers: in the order in which they first run; what computes no prediction is not among them.
        boundary: first layers, which see the image, and last ones, which give the predictions.
    """

    image_size: int
    layers: tuple[LayerOutline, ...]
    boundary: Boundary

    @property
    def edge(self) -> frozenset[str]:
        """Names of the first and last layers."""
        return frozenset({*self.boundary.first, *self.boundary.last})


def outline(model: Model, image_size: int | None = None) -> NetworkOutline:
    """The outline of a network, watched once: a network that is quantized, folded or copied has the
    layers it had, and need not be watched again.

    Args:
        model: float or quantized.
        image_size: side in pixels; None: the model's own.
    """
    known, size = _known(model), image_size or model.image_size
    if size not in known:
        known[size] = _watch(model, size)
    return known[size]


def outline_of_any_size(model: Model) -> NetworkOutline:
    """An outline for where shapes and costs do not matter: one that is known, else that of a small
    image, which takes little time."""
    known = _known(model)
    return next(iter(known.values())) if known else outline(model, model.stride * 2)


def _known(model: Model) -> dict[int, NetworkOutline]:
    """The outlines of a network by image size; none where its layers have changed since."""
    layers = tuple(
        (name, tuple(weight.shape))
        for name, child in model.module.named_modules()
        if isinstance(child, LISTED)
        for weight in [getattr(child, "weight", None)]
        if isinstance(weight, Tensor)
    )
    outlines: dict[Any, dict[int, NetworkOutline]] = model.__dict__.setdefault("_outlines", {})
    return outlines.setdefault(layers, {})


def _watch(model: Model, size: int) -> NetworkOutline:
    """The outline, by one forward pass with hooks."""
    rows: dict[str, LayerOutline] = {}

    def after(
        name: str, layer: nn.Module, inputs: Sequence[Tensor], output: Tensor | tuple[Tensor, ...]
    ) -> None:
        kind, shape, macs = _cost(layer, inputs, output)
        first = output[0] if isinstance(output, tuple) else output
        before, calls = (rows[name].macs, rows[name].calls) if name in rows else (0, 0)
        rows[name] = LayerOutline(
            name, kind, shape, tuple(first.shape[1:]), macs + before, calls + 1
        )

    with (
        hooks(
            child.register_forward_hook(
                lambda layer, inputs, named, output, name=name: after(
                    name, layer, [*inputs, *named.values()], output
                ),
                with_kwargs=True,
            )
            for name, child in model.module.named_modules()
            if isinstance(child, LISTED)
        ),
        torch.no_grad(),
    ):
        model.raw(blank_images(model, size))
    return NetworkOutline(size, tuple(rows.values()), model.boundary_layers())


def _cost(
    layer: nn.Module, inputs: Sequence[Tensor], output: Any
) -> tuple[str, tuple[int, ...], int]:
    """Kind, weight shape and MACs of one call of a layer."""
    # All of the output: rows may be windows or proposals of the one image.
    if isinstance(layer, Matmul):
        return "matmul", (), output.numel() * inputs[0].shape[-1]
    if isinstance(layer, nn.MultiheadAttention):
        width, queries, keys = layer.embed_dim, inputs[0].numel(), inputs[1].numel()
        # Projections of queries, output, keys and values, and the two products (one image).
        return "attention", (), 2 * (queries + keys) * width + 2 * queries * keys // width
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.ConvTranspose2d):
        # Each input element is multiplied with one filter: all of the weight but its input axis.
        return "deconv", tuple(weight.shape), inputs[0].numel() * weight[0].numel()
    kind = "linear" if isinstance(layer, nn.Linear) else "conv"
    # Each output element costs one filter: all of the weight but its output axis.
    return kind, tuple(weight.shape), output.numel() * weight[0].numel()
