"""Quantizers put into a detector as a policy says; their scales are not set yet."""

from __future__ import annotations

import fnmatch

from torch import nn

from ..errors import UserError
from ..graph.outline import outline_of_any_size
from ..graph.tracing import trace
from ..models.base import AnyModel
from .bit_widths import Widths
from .inspection import FLOAT_KINDS
from .layers import QuantConv2d, QuantLinear, QuantMatmul
from .output_quantizers import insert_output_quantizers
from .policy import Policy


def _replace(module: nn.Module, layer: nn.Module, wrapped: nn.Module) -> None:
    """Put `wrapped` wherever `layer` is: heads that share a layer hold it under several names."""
    for parent in list(module.modules()):
        # Not named_children(): it passes over the second name.
        for leaf, child in list(parent._modules.items()):
            if child is layer:
                setattr(parent, leaf, wrapped)


def _softmaxes(detector: AnyModel) -> frozenset[str]:
    products = trace(detector, ()).softmax_products()
    if not products:
        raise UserError(
            "quantization.softmax: no softmax of this network goes into a product of activations, "
            "as in attention; leave it at uniform"
        )
    return products


def insert_quantizers(detector: AnyModel, policy: Policy) -> AnyModel:
    """Replace the layers of `detector` in place as `policy` says; scales are not set yet.

    Raises:
        UserError: where an override matches no layer, the scope is a backbone that the network does
            not have, or outputs of softmax are to have a grid of their own and there are none.
    """
    if policy.scope == "backbone" and detector.backbone is None:
        raise UserError(
            "quantization.scope: this network has no backbone apart from neck and heads; use all, "
            "and overrides for the layers to leave in float"
        )
    known = outline_of_any_size(detector)
    edge, layers = known.edge, known.layers
    for pattern, _ in policy.overrides:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in layers):
            raise UserError(
                f"quantization.overrides: no layer is called '{pattern}' "
                f"(for example '{layers[0].name}'; dfq inspect lists them all)"
            )
    widths: dict[str, Widths] = {}
    for row in layers:
        bits = policy.bits_for(row.name, row.name in edge, detector.backbone)
        if bits is not None and row.kind not in FLOAT_KINDS:
            widths[row.name] = bits
    traced = trace(detector, widths) if policy.where.adds_and_concats else None
    softmaxes = _softmaxes(detector) if policy.softmax != "uniform" else frozenset()
    for row in layers:
        if row.name not in widths:
            continue
        bits = widths[row.name]
        layer = detector.module.get_submodule(row.name)
        if row.kind == "matmul":
            left = policy.softmax_quantizer if row.name in softmaxes else policy.quantizer
            product = QuantMatmul(left(bits[1]), policy.quantizer(bits[1]))
            _replace(detector.module, layer, product.train(layer.training).to(detector.device))
            continue
        weights = policy.weight_quantizer(bits[0], row.weight_shape[0])
        inputs = policy.quantizer(bits[1])
        wrapped: nn.Module
        if isinstance(layer, nn.Conv2d):
            wrapped = QuantConv2d.wrap(layer, inputs, weights)
        else:
            assert isinstance(layer, nn.Linear)
            wrapped = QuantLinear.wrap(layer, inputs, weights)
        wrapped.train(layer.training).to(detector.device)
        _replace(detector.module, layer, wrapped)
    if traced is not None:
        insert_output_quantizers(detector, traced, policy.where, policy.quantizer)
    return detector
