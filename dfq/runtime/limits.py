"""How much of anything a file, a recipe or a command may ask for: every bound, in one place.

What is read may be damaged or hostile. Each bound is far above what any published detector or any
sensible experiment needs, and low enough that what is beyond it is refused at once and before
memory is taken.
"""

from __future__ import annotations

MOST_TEXT = 1 << 22
"""Bytes of a recipe's or a model's YAML, and of a description in JSON."""

MOST_NODES = 100_000
"""Values (mappings, lists and what is in them) of a YAML, a description or a recipe, with
everything that is referred to twice counted twice."""

DEEPEST = 64
"""How many mappings and lists may lie in each other."""

LONGEST_NAME = 1_000
"""Characters of a category's or a layer's name."""

MOST_CLASSES = 50_000
"""Categories of a detector."""

MOST_ROWS = 1_000
"""Rows (layers) of an architecture's description."""

MOST_REPEATS = 1_000
"""How often a row may be repeated, before and after its depth multiple."""

WIDEST = 65_536
"""Channels of a layer; also the largest whole number among a layer's arguments."""

LARGEST_MULTIPLE = 64.0
"""Of an architecture's depth and width multiples."""

MOST_MODULES = 20_000
"""Modules of a network, counted as often as they are used, and as often as one takes the place of
another: a quantized yolov9e asks for some 8,000."""

MOST_TENSORS = 50_000
"""Parameters and buffers of a network, counted as often as they are used; also modules, parameters
or buffers of one module."""

MOST_VALUES = 1 << 28
"""Numbers in one tensor that building or trying a network makes."""

MOST_WEIGHTS = 1 << 29
"""Numbers in all the tensors of a network, counted as often as they are used."""

MOST_MACS = 1 << 36
"""Multiplications of a network for one image of 256 pixels a side."""

MOST_UNPACKED = 64
"""How many times larger than itself what an archive holds may be."""

LARGEST_SIDE = 16_384
"""Pixels of an image's side."""

MOST_IMAGES = 1_000_000
"""Images of a set."""

MOST_OBJECTS = 2_000
"""Labels an image begins with."""

MOST_STEPS = 100_000_000
"""Iterations, epochs, updates."""

MOST_WORKERS = 4_096
"""Processes."""

LARGEST_WEIGHT = 1e9
"""Factor of a term of a loss."""

LARGEST_RATE = 100.0
"""Learning rate of synthesis, whose images lie in [0, 1]. One of training that is too large ends in
a line of its own: the loss says so."""
