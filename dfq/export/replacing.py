"""Quantizers put where another runtime wants them, in a network that is quantized already."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..graph.fold_batchnorm import fold
from ..models import from_spec
from ..models.base import Model
from ..quantization.calibration import run_observers, set_range
from ..quantization.factors import bound_factors
from ..quantization.insertion import insert_quantizers
from ..quantization.policy import Policy
from ..quantization.quantizers import Quantizer
from ..quantization.traversal import activation_quantizers


def is_placed_for(policy: Policy, runtime: str) -> bool:
    """Whether a network of this policy has its quantizers where a runtime needs them."""
    return policy.placement == "qdq" and policy.runtime == runtime


@torch.no_grad()
def place_for(
    detector: Model, policy: Policy, runtime: str, batches: Iterable[Tensor]
) -> tuple[Model, Policy]:
    """A network's weights, and what of its grids the placement keeps, under another placement.

    Weights and biases stay as they are. So does the grid of an activation that is one tensor's in
    both; the others are found anew.

    Args:
        detector: quantized under `policy`; left as it is.
        runtime: a key of `placement.PLACEMENTS`.
        batches: images `(n, 3, h, w)` in [0, 1], to find ranges on.

    Returns:
        The network, and its policy.
    """
    wanted = replace(policy, placement="qdq", runtime=runtime)
    placed = insert_quantizers(fold(from_spec(detector.spec())), wanted)
    originals = {
        name: module
        for name, module in detector.module.named_modules(remove_duplicate=False)
        if isinstance(module, Quantizer)
    }
    originals_of: dict[Quantizer, list[Quantizer]] = defaultdict(list)
    for name, module in placed.module.named_modules(remove_duplicate=False):
        if isinstance(module, Quantizer) and name in originals:
            originals_of[module].append(originals[name])
    state = detector.module.state_dict()
    for name, tensor in placed.module.state_dict().items():
        # Of quantizers only those of weights: all others may have come to be shared.
        if name in state and (".weight_quantizer." in name or "_quantizer" not in name):
            tensor.copy_(state[name])
    values = run_observers(placed, batches)
    for name, quantizer in activation_quantizers(placed.module):
        before = originals_of[quantizer]
        alike = before and all(_agree(before[0], original) for original in before)
        if alike and _can_have(quantizer, before[0]):
            quantizer.load_state_dict(before[0].state_dict())
        else:
            set_range(quantizer, values[name], "mse")
    bound_factors(placed.module)
    return placed, wanted


def _can_have(quantizer: Quantizer, original: Quantizer) -> bool:
    """Whether the grid of another quantizer is one that this one may have."""
    placed = quantizer.asymmetric or quantizer.unsigned or not original.zero_point.any()
    return bool(placed) and original.bounds == quantizer.bounds


def _agree(first: Quantizer, second: Quantizer) -> bool:
    return torch.equal(first.log_scale, second.log_scale) and torch.equal(
        first.zero_point, second.zero_point
    )
