"""What every kind of damaged input consists of: what was done, the commands that meet it, and
whether they have to refuse it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Words = tuple[str | Path, ...]


@dataclass(frozen=True)
class Things:
    """Valid things, not to be changed; files of models are small."""

    model: Path
    """A YOLOv5 that dfq saved."""
    models: dict[str, Path]
    """Others that dfq saved, by family."""
    yolov5: Path
    ultralytics: Path
    """Checkpoints (.pt)."""
    config: Path
    weights: Path
    """Of mmdet: a network, and a state dict for it."""
    made: Path
    begun_set: Path
    """A calibration set, finished and interrupted."""
    run: Path
    begun_run: Path
    """A run, finished and interrupted; both of `model` and `made`."""


@dataclass
class Case:
    """One damaged input.

    Attributes:
        what: was done.
        commands: that meet it.
        refused: whether each has to end with exit code 2; else they may also end with 0.
        environment: variables for the commands.
    """

    what: str
    commands: list[Words]
    refused: bool = False
    environment: dict[str, str] = field(default_factory=dict)


Kind = Callable[[Things, Path, random.Random], Case]


def inspect(model: str | Path) -> Words:
    return ("inspect", "--model", model)


def evaluate(model: str | Path, data: str | Path) -> Words:
    return ("eval", "--model", model, "--data", data, "--image-size", "64", "--json", "out.json")


def quantize(model: str | Path, data: str | Path) -> Words:
    return (
        "qat", "--recipe", "tiny.yaml", "--model", model, "--data", data, "--out", "out", "--set",
        "method=ptq", "--set", "quantization.calibration_images=2",
    )  # fmt: skip


def synthesize(model: str | Path) -> Words:
    return (
        "synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "out", "--images", "2",
        "--image-size", "64", "--set", "synthesis.iterations=1", "--labels", "multi", "--workers",
        "1",
    )  # fmt: skip


def sensitivity(model: str | Path, data: str | Path) -> Words:
    return (
        "sensitivity", "--model", model, "--data", data, "--images", "1", "--set",
        "quantization.mixed.candidates=[4, 8]", "--json", "out.json",
    )  # fmt: skip


def some_of(draw: random.Random, *commands: Words, most: int = 2) -> list[Words]:
    """Some of several commands, in any order."""
    return draw.sample(commands, min(most, len(commands)))


def meeting_model(things: Things, draw: random.Random, model: str | Path) -> list[Words]:
    """Commands that read a float detector."""
    return [
        inspect(model),
        *some_of(
            draw,
            evaluate(model, things.made),
            quantize(model, things.made),
            synthesize(model),
            sensitivity(model, things.made),
            most=1,
        ),
    ]
