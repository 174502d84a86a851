"""The paper's recipes: their numbers are the paper's, their notes say what works, and each trains
a small network of its family by exactly these numbers."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import as_shipped, command
from support.small_mmdet import enliven, write_config
from torch import Tensor

import dfq
from dfq.models import load_detector
from dfq.qat import trainer
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.inspection import list_layers
from dfq.recipe import load_recipe, shipped_recipes
from dfq.synthesis.adaptive_labels import update_steps
from dfq.synthesis.loss_weighting import FixedWeighting
from dfq.synthesis.losses.patch_entropy import PatchSimilarity
from dfq.synthesis.losses.total_variation import total_variation

NAMES = sorted(name for name in shipped_recipes() if name.startswith("paper-"))

# "Task-Specific Zero-shot Quantization-Aware Training for Object Detection", ICCV 2025, arXiv
# 2507.16782: its settings of YOLOv5, YOLO11 and Mask R-CNN on ResNet-50 and Swin; where it says
# nothing (batches of training, label schedule, temperatures), those of its public code. That code's
# YOLO losses are multiplied by the batch: a weight of w there is w * batch of a mean.
EVERY = {
    "method": "qat",
    "synthesis.images": 2000,
    "synthesis.learning_rate": 0.01,
    "synthesis.labels": "adaptive",
    "synthesis.balance": "loss",
    "synthesis.bn_form": "absolute",
    "synthesis.multires": 0.0,
    "synthesis.scales": 0,
    "synthesis.settle": 0.0,
    "synthesis.flip": 0.0,
    "synthesis.weights.l2": 0.0,
    "synthesis.label_stage.sampler": "paper",
    "synthesis.label_stage.image_size": 160,
    "synthesis.label_stage.score_threshold": 0.2,
    "synthesis.label_stage.smallest_area": 0.01,
    "quantization.first_last_bits": "float",
    "quantization.weights": "per_tensor",
    "quantization.weight_grid": "symmetric",
    "quantization.activations": "symmetric",
    "quantization.ranges": "lsq",
    "quantization.reconstruction": "none",
    "quantization.refine_images": 0,
    "distillation.weight_lr": None,
    "distillation.zero_lr": 0.0,
    "distillation.kl_form": "flattened",
    "distillation.feature_form": "absolute",
    "distillation.weights.feature": 1.0,
    "distillation.flip": 0.0,
    "distillation.keep_worse": True,
}  # fmt: skip
MASK_RCNN = {
    "synthesis.init": "gaussian",
    "synthesis.erase": 0.0,
    "synthesis.weights.first_bn": 0.0,
    "distillation.weights.task": 1.0,
    "distillation.weights.kl": 1.0,
    "distillation.ema": 0.0,
    "distillation.selection": "last",
}  # fmt: skip
PAPER: dict[str, dict[str, Any]] = {
    "paper-yolov5": {
        **EVERY,
        "synthesis.image_size": None,
        "synthesis.iterations": 2500,
        "synthesis.batch_size": 64,
        "synthesis.init": "uniform",
        "synthesis.erase": 0.5,
        "synthesis.weights.task": 0.5 * 64,
        "synthesis.weights.bn": 0.01,
        "synthesis.weights.first_bn": 2.0,
        "synthesis.weights.tv": 5e-4,
        "synthesis.label_stage.iterations": 2500,
        "quantization.overrides": {},
        "distillation.epochs": 100,
        "distillation.batch_size": 32,
        "distillation.lr": 1e-4,
        "distillation.scale_lr": 1e-3,
        "distillation.weights.task": 0.04 * 32,
        "distillation.weights.kl": 0.1,
        "distillation.temperature": 4.0,
        "distillation.ema": 0.9999,
    },
    "paper-yolo11": {
        **EVERY,
        "synthesis.image_size": None,
        "synthesis.iterations": 3000,
        "synthesis.batch_size": 32,
        "synthesis.init": "uniform",
        "synthesis.erase": 0.5,
        "synthesis.weights.task": 0.5 * 32,
        "synthesis.weights.bn": 0.05,
        "synthesis.weights.first_bn": 5.0,
        "synthesis.weights.tv": 2e-3,
        "synthesis.label_stage.iterations": 3000,
        "quantization.overrides": {},
        "distillation.epochs": 100,
        "distillation.batch_size": 16,
        "distillation.lr": 1e-5,
        "distillation.scale_lr": 1e-4,
        "distillation.weights.task": 0.01 * 16,
        "distillation.weights.kl": 0.1,
        "distillation.temperature": 4.0,
        "distillation.ema": 0.9999,
    },
    "paper-mask-rcnn-r50": {
        **EVERY,
        **MASK_RCNN,
        "synthesis.image_size": None,
        "synthesis.iterations": 8000,
        "synthesis.batch_size": 32,
        "synthesis.weights.task": 1.0,
        "synthesis.weights.bn": 0.05,
        "synthesis.weights.entropy": 0.0,
        "synthesis.weights.tv": 1e-4,
        "synthesis.label_stage.iterations": 3000,
        "quantization.overrides": {},
        "distillation.epochs": 100,
        "distillation.batch_size": 32,
        "distillation.lr": 1e-4,
        "distillation.scale_lr": 1e-3,
        "distillation.temperature": 4.0,
    },
    "paper-mask-rcnn-swin": {
        **EVERY,
        **MASK_RCNN,
        "synthesis.image_size": 640,
        "synthesis.iterations": 4000,
        "synthesis.batch_size": 12,
        "synthesis.weights.task": 10.0,
        "synthesis.weights.bn": 0.0,
        "synthesis.weights.entropy": 1.0,
        "synthesis.weights.tv": 1e-3,
        "synthesis.label_stage.iterations": 3000,
        "quantization.overrides": {"*.w_msa.scores": "float", "*.w_msa.mix": "float"},
        "distillation.epochs": 15,
        "distillation.batch_size": 8,
        "distillation.lr": 1e-6,
        "distillation.scale_lr": 1e-5,
        "distillation.temperature": 1.0,
    },
}  # fmt: skip

WIDTHS = {(8, 8), (6, 6), (5, 5), (4, 8), (4, 4)}


def value_of(recipe: Any, key: str) -> Any:
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


def notes(name: str) -> str:
    """What docs/paper-recipes.md says of a recipe."""
    text = (Path(__file__).parents[2] / "docs" / "paper-recipes.md").read_text()
    return text.partition(f"## `{name}`")[2].partition("\n## ")[0]


def overrides_of(words: list[str]) -> list[str]:
    return [value for word, value in pairwise(words) if word == "--set"]


@pytest.mark.parametrize("name", NAMES)
def test_its_numbers_are_the_papers(name: str) -> None:
    recipe = load_recipe(name)
    for key, number in PAPER[name].items():
        expected = pytest.approx(number, rel=1e-12) if isinstance(number, float) else number
        assert value_of(recipe, key) == expected, key


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_updated_when_the_papers_are(name: str) -> None:
    stage = load_recipe(name).synthesis.label_stage
    found = update_steps(
        stage.iterations, start=stage.start, stop=stage.stop, updates=stage.updates
    )
    # YOLOv5: every 50 iterations from 800 on, the last of 2500 being number 2499.
    yolov5 = [*range(800, 2500, 50), 2499]
    assert sorted(found) == (yolov5 if "yolov5" in name else list(range(800, 2801, 100)))


@pytest.mark.parametrize("name", NAMES)
def test_its_notes_name_every_width_and_set_of_the_paper(name: str) -> None:
    lines = [shlex.split(line) for line in re.findall(r"^dfq .*", notes(name), re.MULTILINE)]
    recipes = [load_recipe(name, overrides_of(words)).quantization for words in lines]
    assert {(one.weight_bits, one.activation_bits) for one in recipes} == WIDTHS
    measured = [load_recipe(name, overrides_of(words)).evaluation.data for words in lines]
    assert "VOCdevkit/VOC2012" in measured
    if name == "paper-mask-rcnn-swin":
        assert {"swin-t", "swin-s"} <= set(re.findall(r"swin-[ts]", notes(name)))


def said_beside_commands(name: str) -> list[str]:
    """The `--set` texts of the prose."""
    text = " ".join(line for line in notes(name).splitlines() if not line.startswith("dfq "))
    said = re.findall(r'--set (?:"(.+?)"|([^\s);,"`]+))', text)
    return [quoted or bare for quoted, bare in said]


@pytest.mark.parametrize("name", NAMES)
def test_what_its_notes_say_to_set_changes_something(name: str) -> None:
    changes = said_beside_commands(name)
    assert "distillation.select_on=SET" in changes
    for change in changes:
        key = change.partition("=")[0]
        assert value_of(load_recipe(name, [change]), key) != value_of(load_recipe(name), key)


# Which layers the public code leaves in float, which its paper quantizes.
@pytest.mark.parametrize(
    ("name", "kind", "in_float"),
    [
        ("paper-yolo11", "yolo11n.yaml", r"model\.0\.conv|model\.23\..*"),
        ("paper-mask-rcnn-r50", "mask-rcnn-resnet", r"backbone\.conv1|(rpn|roi)_head\..*"),
        ("paper-mask-rcnn-swin", "mask-rcnn-swin", r"(neck|r.._head)\..*|.*\.(scores|mix)"),
    ],
)
def test_the_codes_layers_are_what_the_notes_say(
    name: str, kind: str, in_float: str, tmp_path: Path
) -> None:
    keys = ("quantization.overrides", "quantization.scope", "quantization.first_last_bits")
    changes = [text for text in said_beside_commands(name) if text.startswith(keys)]
    source = kind if kind.endswith(".yaml") else write_config(tmp_path, kind)
    student = insert_quantizers(
        load_detector(source), load_recipe(name, changes).quantization.policy()
    )
    rows = list_layers(student, 64)
    found = {row.name for row in rows if not row.quantized}
    assert found == {row.name for row in rows if re.fullmatch(in_float, row.name)}
    assert 0 < len(found) < len(rows)


# ---- training


def tiny_words(place: Path, model: Path) -> tuple[str | Path, ...]:
    return "--model", model


def yolo11_words(place: Path, model: Path) -> tuple[str | Path, ...]:
    return "--model", "yolo11n.yaml"


def mmdet_words(kind: str) -> Callable[[Path, Path], tuple[str | Path, ...]]:
    def words(place: Path, model: Path) -> tuple[str | Path, ...]:
        config = write_config(place, kind)
        detector = enliven(load_detector(config))
        torch.save({"meta": {}, "state_dict": detector.module.state_dict()}, place / "w.pth")
        return "--model", config, "--checkpoint", "w.pth"

    return words


FAMILIES = {
    "paper-yolov5": (tiny_words, (8, 8)),
    "paper-yolo11": (yolo11_words, (6, 6)),
    "paper-mask-rcnn-r50": (mmdet_words("mask-rcnn-resnet"), (5, 5)),
    "paper-mask-rcnn-swin": (mmdet_words("mask-rcnn-swin"), (4, 4)),
}
"""A small network of each recipe's family, and the widths that are asked for."""


@pytest.fixture
def synthesized(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> set[str]:
    """Names of the terms that synthesis minimises: each of its steps is checked to go down their
    sum, weighted as the table says."""
    numbers = PAPER[request.getfixturevalue("name")]
    weights = {
        key.rpartition(".")[2]: value
        for key, value in numbers.items()
        if key.startswith("synthesis.weights.")
    }
    seen: set[str] = set()
    combine, smooth, spread = (
        FixedWeighting.__call__,
        FixedWeighting.smoothed,
        PatchSimilarity.entropy,
    )

    def checked(self: FixedWeighting, parts: Iterator[Any], step: int) -> Any:
        parts = list(parts)
        expected = []
        for terms, view in parts:
            seen.update(name for name in terms if weights[name])
            total = torch.zeros_like(view)
            for name, term in terms.items():
                total += weights[name] * torch.autograd.grad(term, view, retain_graph=True)[0]
            expected.append(total)
        gradient, logged = combine(self, iter(parts), step)
        torch.testing.assert_close(gradient, torch.cat(expected), rtol=1e-3, atol=1e-5)
        return gradient, logged

    def smoothed(self: FixedWeighting, gradient: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        leaf = pixels.detach().requires_grad_()
        with torch.enable_grad():
            (own,) = torch.autograd.grad(total_variation(leaf), leaf)
        expected = gradient + weights["tv"] * own
        seen.add("tv")
        found, term = smooth(self, gradient, pixels)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        return found, term

    def entropy(self: PatchSimilarity, *, summed: bool = False) -> Tensor:
        each = torch.stack(list(self._seen.values()))
        found = spread(self, summed=summed)
        torch.testing.assert_close(found, each.sum())
        return found

    monkeypatch.setattr(FixedWeighting, "__call__", checked)
    monkeypatch.setattr(FixedWeighting, "smoothed", smoothed)
    monkeypatch.setattr(PatchSimilarity, "entropy", entropy)
    return seen


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> set[str]:
    """Names of the terms that training minimises, each checked to be weighted as the table says."""
    numbers = PAPER[request.getfixturevalue("name")]
    seen: set[str] = set()
    inner = trainer.training_terms

    def checked(*given: Any, **options: Any) -> dict[str, Tensor]:
        student, teacher, images, targets, settings, *rest = given
        alone = settings.model_copy(deep=True)
        alone.weights.kl = alone.weights.feature = alone.weights.task = 1.0
        once = inner(student, teacher, images, targets, alone, *rest, **options)
        terms = inner(*given, **options)
        for name, term in terms.items():
            expected = numbers[f"distillation.weights.{name}"] * once[name].detach()
            torch.testing.assert_close(term.detach(), expected, rtol=1e-4, atol=1e-7)
        seen.update(terms)
        return terms

    monkeypatch.setattr(trainer, "training_terms", checked)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_its_family_by_its_numbers(
    name: str, place: Path, model: Path, synthesized: set[str], trained_on: set[str]
) -> None:
    words_of, (weight_bits, activation_bits) = FAMILIES[name]
    network = words_of(place, model)
    (place / f"{name}.yaml").write_text(as_shipped(name))
    recipe = ("--recipe", f"{name}.yaml")
    made = command("synthesize", *network, *recipe, "--out", "set", "--workers", "1")
    assert made.exit_code == 0, made.output
    expected = {"task", "bn", "first_bn", "tv"}
    if "mask-rcnn" in name:
        expected = {"task", "tv", "entropy" if "swin" in name else "bn"}
    assert synthesized == expected
    asked = [f"quantization.weight_bits={weight_bits}"]
    asked += [f"quantization.activation_bits={activation_bits}"]
    trained = command(
        "qat", *network, *recipe, "--data", "set", "--out", "run",
        *(word for change in asked for word in ("--set", change)),
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert trained_on == {"kl", "feature", "task"}
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    assert metrics["selected"].startswith(f"qat: {load_recipe(name).distillation.selection}")
    for epoch in metrics["history"]:
        parts = sum(epoch[term] for term in ("kl", "feature", "task"))
        assert epoch["loss"] == pytest.approx(parts, rel=1e-4)
    rows = dfq.inspect(place / "run").layers
    in_float = {row.name for row in rows if not row.quantized}
    edge = dfq.load_detector(place / "run" / "model.safetensors").boundary_layers()
    products = {row.name for row in rows if row.kind == "matmul"}
    assert in_float == {*edge.first, *edge.last, *products}
    assert {(row.weight_bits, row.activation_bits) for row in rows if row.quantized} == {
        (weight_bits, activation_bits)
    }
