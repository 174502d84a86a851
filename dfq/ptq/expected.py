"""How long calibration, rounding and reconstruction take on a set, from the rates of a few images.

Layers differ. GPTQ rounds outputs * inputs weights of a layer to each grid that it tries, which
takes outputs * inputs^2 products, gathers what thousands of outputs read, and runs the images up to
the layer from the last block that is done. Counted as equals, the first layers of a network say
nothing of its last ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..graph.execution import is_inside, last_layer_of_block
from ..models.base import Model
from ..quantization.margins import BITS as MARGIN_BITS
from ..quantization.settings import Quantization
from .activation_refinement import BITS as REFINED_BITS
from .blocks import BATCH
from .gptq import SAMPLES
from .last_layer_ranges import CLIP_RATIOS
from .objectives import METHODS
from .pipeline import MARGIN_IMAGES
from .prediction_search import METRICS, MOST_BITS
from .rates import LayerWork, Rates
from .units import units_of

MARGIN_PASSES, WALK_PASSES = 4, 4
"""Passes over the images in which margins are found, and before grids are walked through."""

REFINED_GRIDS, SEARCHED_GRIDS = 6, 9
"""Of a quantizer, those that are tried on the network, where its range is refined or searched by
the predictions: of those that come into question most are left out as hopeless."""

FACTORISED, ROUNDED = 2.0, 2.0
"""Products for each cube of the inputs (of two factorisations, an inverse and a solution), and for
each output and square of the inputs, to each grid."""

LEARNED = 3.0
"""Passes of the float network that a step of learning takes, there and back."""

ROUNDING_BATCH = 32
"""Images of one pass while GPTQ looks at them."""


def calibration_seconds(rates: Rates, section: Quantization, count: int) -> list[float]:
    """Seconds of the steps of calibration: ranges of their own, and what BatchNorm and the last
    layers say of them.

    Args:
        rates: as measured.
        section: of the recipe.
        count: images there are.
    """
    weights = sum(work.groups * work.outputs * work.inputs for work in rates.layers)
    first = (
        min(section.calibration_images, count) * rates.observed
        + len(rates.activations) * rates.activation
        + weights * rates.weight
    )
    if section.ranges != "mse" or section.activation_ranges != "static":
        return [first]
    images = min(MARGIN_IMAGES, count)
    wide = any(bits >= MARGIN_BITS for bits in rates.activations.values())
    second = images * MARGIN_PASSES * rates.observed if wide else 0.0
    if rates.last:
        tried = rates.last * (len(CLIP_RATIOS) + 1)
        second += images * (
            WALK_PASSES * rates.forward + rates.observed + tried * (rates.tail + rates.divergence)
        )
    return [first, second]


def ranges_seconds(rates: Rates, section: Quantization, count: int) -> list[float]:
    """Seconds of each range that is looked for by the predictions; none where none is."""
    searched = section.ranges in METRICS
    refined = section.ranges == "mse" and section.activation_ranges == "static"
    bits = range(MOST_BITS + 1) if searched else REFINED_BITS if refined else range(0)
    grids = SEARCHED_GRIDS if searched else REFINED_GRIDS
    images = min(section.refine_images, count)
    reached = {work.name: work.reached for work in rates.layers}
    seconds = []
    for name, its_bits in rates.activations.items():
        if images and its_bits in bits:
            # Of what is behind it, where that is known.
            tail = rates.forward - reached.get(name.removesuffix(".output_quantizer"), 0.0)
            seconds.append(images * grids * (tail + rates.divergence))
    return seconds


def rounding_seconds(rates: Rates, blocks: Sequence[str], count: int) -> list[float]:
    """Seconds of each layer that GPTQ rounds.

    Args:
        rates: as measured.
        blocks: names of the blocks whose outputs are kept once they are done.
        count: images it looks at.
    """
    ended = last_layer_of_block([work.name for work in rates.layers], blocks)
    both, since, seconds = count * (1 + rates.rounding), 0.0, []
    for number, work in enumerate(rates.layers):
        taken = 0.0 if work.wide else _algebra_seconds(rates, work, count)
        taken += 0.0 if work.wide else both * max(0.0, work.reached - since)
        if number == 0:
            # Two networks are looked at, whether their blocks can be kept.
            taken += min(ROUNDING_BATCH, count) * (1 + rates.rounding) * rates.forward
        if work.name in ended:
            following = rates.layers[number + 1 :]
            end = following[0].reached if following else rates.forward
            taken += both * max(0.0, end - since)
            since = max(since, end)
        seconds.append(taken)
    return seconds


def _algebra_seconds(rates: Rates, work: LayerWork, count: int) -> float:
    rows, k = work.groups * work.outputs * work.grids, work.inputs
    products = ROUNDED * rows * k**2 + FACTORISED * work.groups * k**3
    gathered = min(SAMPLES, work.places * count) * work.groups * k
    return (
        rates.gather * gathered
        + rates.column * k
        + rates.element * rows * k
        + rates.product * products
    )


def reconstruction_seconds(
    rates: Rates, model: Model, section: Quantization, count: int
) -> list[float]:
    """Seconds of each unit that is reconstructed.

    Args:
        rates: as measured.
        model: quantized.
        section: of the recipe.
        count: images it looks at.
    """
    method = METHODS[section.reconstruction]
    order = [work.name for work in rates.layers]
    images = section.reconstruction_iterations * min(BATCH, count)
    seconds, since = [], 0.0
    for unit in units_of(model, order, layers=method.layers):
        last = max(place for place, name in enumerate(order) if is_inside(name, unit))
        end = rates.layers[last + 1].reached if last + 1 < len(order) else rates.forward
        # Where a step looks at the predictions, all that is behind the unit runs as well.
        upto = rates.forward if method.predictions else end
        passes = images * LEARNED * rates.student / rates.forward
        seconds.append((passes + 2 * count) * max(0.0, upto - since))
        since = max(since, end)
    # Parts of blocks, blocks, and pairs of blocks.
    return seconds * 3 if method.progressive else seconds
