"""Shards that are optimised side by side, each with the same result as alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Batch:
    """A finished batch: uint8 `(n, 3, s, s)` RGB, labels `(n_i, 5)` and the teacher's scores."""

    images: Tensor
    labels: list[Tensor]
    scores: list[Tensor]


@dataclass(frozen=True)
class Stage:
    """A part of what a batch goes through: iterations on images of `side` pixels."""

    name: str
    iterations: int
    side: int


def generator_for(seed: int, shard: int, stage: str) -> Generator:
    """A generator that depends on these three alone, so any process can make any shard."""
    stages = {"labels": 1, "images": 2, "augment": 3}
    mixed = (seed * 1_000_003 + shard) * 8 + stages[stage]
    return Generator().manual_seed(mixed)


def several(value: Any) -> list[Any]:
    """One value for each shard as a list; a single value is the list of it."""
    return list(value) if isinstance(value, Sequence) else [value]


def joined(rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The lists of all shards as one, shard after shard; the tensors in them have any shape."""
    return [tensor for shard in rows for tensor in shard]


def split(raw: Any, shards: int) -> list[Any]:
    """Predictions of several batches of one size as those of each: every tensor in it is by
    image."""
    leaves, structure = tree_flatten(raw)
    parts = [
        leaf.unflatten(0, (shards, -1)).unbind() if isinstance(leaf, Tensor) else [leaf] * shards
        for leaf in leaves
    ]
    return [tree_unflatten(list(leaves), structure) for leaves in zip(*parts, strict=True)]
