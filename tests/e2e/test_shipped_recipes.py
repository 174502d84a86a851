"""Every recipe as it is shipped, from synthesis to a measured run: only the size of the work is the
test's own, nothing that decides what is done. The paper's train a network of their own family each:
test_paper_recipes.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cli_parts import real_set
from support.harness import SIZES, as_shipped, command
from support.torchvision_cli_parts import write_scenes
from support.two_stage import write_mmdet, write_torchvision

from dfq.models import load_detector
from dfq.recipe import load_recipe, shipped_recipes

ULTRALYTICS = """
nc: 3
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, C3k2, [16, False, 0.25]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [[3, 4], 1, Detect, [nc]]
"""


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What of the first is not so in the second."""
    found = {}
    for key, value in one.items():
        if isinstance(value, dict) and isinstance(other[key], dict):
            if inner := differences(value, other[key]):
                found[key] = inner
        elif value != other[key]:
            found[key] = value
    return found


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_only_sizes_are_changed(name: str) -> None:
    shipped = load_recipe(name).model_dump(mode="json")
    changed = differences(yaml.safe_load(as_shipped(name)), shipped)

    def keys(values: dict[str, Any]) -> set[str]:
        nested = (keys(v) if isinstance(v, dict) else {k} for k, v in values.items())
        return set().union(*nested)

    assert keys(changed) <= keys(SIZES)
    assert keys(SIZES) == {
        "images", "image_size", "iterations", "batch_size", "updates", "epochs",
        "reconstruction_iterations",
    }  # fmt: skip


def flow(place: Path, name: str, network: tuple[str | Path, ...], *data: str | Path) -> Path:
    """From `dfq synthesize`, where the recipe is not for real images, to `dfq eval`."""
    (place / f"{name}.yaml").write_text(as_shipped(name))
    recipe = ("--recipe", f"{name}.yaml")
    if not data:
        made = command("synthesize", *network, *recipe, "--out", "set")
        assert made.exit_code == 0, made.output
        data = ("--data", "set")
    trained = command("quantize", *network, *recipe, *data, "--out", "run")
    assert trained.exit_code == 0, trained.output
    measured = command("eval", "--model", "run", "--data", "scenes", "--image-size", "64")
    assert measured.exit_code == 0, measured.output
    assert "2 images at 64 px" in measured.output
    return place / "run"


@pytest.mark.parametrize(
    "name", sorted(name for name in shipped_recipes() if not name.startswith("paper-"))
)
def test_on_a_one_stage_detector(place: Path, model: Path, name: str) -> None:
    real_set(place / "scenes", count=2)
    real_set(place / "real", count=3)
    data = ("--data", "real") if name.endswith("-real") else ()
    run = flow(place, name, ("--model", model), *data)
    metrics = json.loads((run / "metrics.json").read_text())
    recipe = load_recipe(name)
    assert metrics["method"] == recipe.method
    if recipe.method == "ptq":
        assert metrics["selected"] == "ptq"
        return
    assert len(metrics["history"]) == 2
    weights = recipe.distillation.weights.model_dump()
    assert {term for term, weight in weights.items() if weight} <= set(metrics["history"][0])
    if recipe.method == "qat" and recipe.distillation.keep_worse:
        assert metrics["selected"].startswith("qat: ")
    if recipe.quantization.mixed.budget is not None:
        assert metrics["mixed"]["spent"] <= metrics["mixed"]["budget"]


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a4"])
@pytest.mark.parametrize(
    "network", ["ultralytics", "torchvision", "mask-rcnn-resnet", "mask-rcnn-swin", "retinanet"]
)
def test_on_other_families(place: Path, network: str, name: str) -> None:
    words: tuple[str | Path, ...] = ("--model", "m.safetensors")
    if network == "ultralytics":
        (place / "net.yaml").write_text(ULTRALYTICS)
        words = ("--model", "net.yaml")
        write_scenes(place / "scenes", load_detector("net.yaml").names)
    elif network == "torchvision":
        words = write_torchvision(place)
    else:
        words = write_mmdet(place, network)
    flow(place, name, words)


def test_lsq_on_real_images_is_what_the_bench_compares_with() -> None:
    from benchmarks.accuracy.qat import COLUMNS

    column = COLUMNS["lsq-real"].settings
    assert load_recipe("lsq-real") == load_recipe("w4a8", column)
