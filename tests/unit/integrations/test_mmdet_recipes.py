"""`dfq mmdet-config` with every recipe that is shipped: the Runner trains what dfq's own training
would, or what it cannot do is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from pydantic import BaseModel
from support.small_mmdet import SIDE, write_config

from dfq.cli.main import cli
from dfq.graph.fold_batchnorm import fold
from dfq.models import load_detector
from dfq.models.mmdet.config import quiet, read_config
from dfq.ptq.pipeline import clip_strictly
from dfq.qat.frozen_integers import frozen_layers
from dfq.qat.parameter_groups import parameter_groups, require_gradients
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.quantizers import Quantizer
from dfq.recipe import Recipe, load_recipe, shipped_recipes

NAMES = sorted(shipped_recipes())

REFUSED: dict[str, tuple[Any, ...]] = {
    "method": ("ptq",),
    "evaluation.data": ("real",),
    "quantization.mixed.budget": ("w4a8",),
    "quantization.reconstruction": ("best", "brecq"),
    "distillation.zero_lr": (0.01,),
    "distillation.zoom": (0.1,),
    "distillation.mosaic": (0.5,),
    "distillation.colour": (0.1,),
    "distillation.camera": (0.5,),
    "distillation.selection": ("agreement",),
    "distillation.select_on": ("real",),
}
"""Values that the Runner has nothing for."""

WITHIN: dict[str, tuple[Any, ...]] = {
    "method": ("qat", "auto"),
    "quantization.reconstruction": ("none", "gptq"),
    "distillation.selection": ("ema", "last"),
}
"""Of these keys, the values that it does have; of the other ones, what switches them off."""

CHECKED = {
    "seed",
    *(f"distillation.{name}" for name in ("epochs", "batch_size", "lr", "scale_lr", "train_last")),
    *(f"distillation.{name}" for name in ("clip", "ema", "flip", "keep_worse")),
    *(f"distillation.weights.{name}" for name in ("kl", "feature", "task")),
}
"""Looked at by the test of every recipe."""

SHARED = {
    *(f"quantization.{name}" for name in (
        "weight_bits", "activation_bits", "first_last_bits", "weights", "weight_grid",
        "activations", "ranges", "calibration_images", "refine_images",
        "reconstruction_iterations", "rounding_images", "start", "activation_ranges", "softmax",
        "scope", "placement", "runtime", "other_worlds",
        "overrides",
    )),
    *(f"distillation.{name}" for name in (
        "weight_lr", "warmup", "kl_form", "feature_form", "temperature", "precision",
    )),
}  # fmt: skip
"""Read by what both trainings call: `Quantization.policy`, `calibrate_and_round`, `training_terms`,
`rate_at`, `frozen_layers`."""

APART = {
    "model", "distillation.checkpoint_minutes", "evaluation.image_size",
    "quantization.mixed.cost", "quantization.mixed.candidates", "quantization.mixed.images",
}  # fmt: skip
"""Say nothing about training, or nothing without what is refused."""


def keys(section: type[BaseModel], above: str = "") -> set[str]:
    found = set()
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= keys(kind, f"{above}{name}.")
        else:
            found.add(above + name)
    return found


def value_of(recipe: Any, key: str) -> Any:
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


def dfq(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs of two small networks, and a calibration set."""
    folder = tmp_path_factory.mktemp("mmdet")
    for kind in ("mask-rcnn-resnet", "mask-rcnn-swin"):
        config = write_config(folder, kind)
    done = dfq(
        *("synthesize", "--model", config, "--random-weights", "--out", folder / "set"),
        *("--images", "2", "--iterations", "1", "--batch-size", "2", "--labels", "single"),
    )
    assert done.exit_code == 0, done.output
    return folder


def test_every_knob_has_a_place_in_these_tests() -> None:
    known = {key for key in keys(Recipe) if not key.startswith("synthesis.")}
    groups = (set(REFUSED), CHECKED, SHARED, APART)
    assert set().union(*groups) == known
    assert sum(map(len, groups)) == len(known)


@pytest.mark.parametrize("key", REFUSED)
def test_what_the_runner_has_not_is_refused_by_name(key: str, place: Path, tmp_path: Path) -> None:
    config, out = place / "mask-rcnn-resnet.py", tmp_path / "out.py"
    for value in REFUSED[key]:
        result = dfq(
            *("mmdet-config", config, "--recipe", "w8a8", "--random-weights", "--out", out),
            *("--data", place / "set", "--set", f"{key}={value}"),
        )
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {key}")
        assert not out.exists()


def quantizers(module: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    return {
        name: (one.bits, one.asymmetric, one.unsigned, one.strict)
        for name, one in module.named_modules()
        if isinstance(one, Quantizer)
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_trains_as_it_says_or_is_refused(
    name: str, place: Path, tmp_path: Path
) -> None:
    import dfq.integrations.mmdet.runner as integration

    from mmengine.optim import build_optim_wrapper  # isort: skip

    recipe, out = load_recipe(name), tmp_path / "out.py"
    config = place / ("mask-rcnn-swin.py" if "swin" in name else "mask-rcnn-resnet.py")
    result = dfq(
        *("mmdet-config", config, "--recipe", name, "--random-weights", "--out", out),
        *("--data", place / "set"),
    )
    missing = [
        key for key in REFUSED
        if (value := value_of(recipe, key)) and value not in WITHIN.get(key, ())
    ]  # fmt: skip
    if missing:
        assert result.exit_code == 2
        assert any(result.stderr.startswith(f"error: {key}") for key in missing)
        assert not out.exists()
        return
    assert result.exit_code == 0, result.output
    # What the Runner does not compare in the end is said.
    falls_back = recipe.method == "auto" or not recipe.distillation.keep_worse
    assert ("compares in the end" in result.stderr) is falls_back
    written, settings = read_config(out), recipe.distillation
    options = {key: value for key, value in written["model"].items() if key != "type"}
    with quiet():
        model = integration.DFQDistiller(**options)
    assert model.recipe.quantization == recipe.quantization
    assert model.recipe.distillation.weights == settings.weights

    # The very parameters, at the very rates.
    own = insert_quantizers(fold(load_detector(config)).clone(), recipe.quantization.policy())
    if recipe.quantization.ranges == "lsq":
        clip_strictly(own.module)
    assert quantizers(model.student) == quantizers(own.module)
    require_gradients(own.module, frozen_layers(own, settings), zero_points=settings.zero_lr > 0)
    names = {parameter: key for key, parameter in own.module.named_parameters()}
    rates = {
        f"student.{names[parameter]}": group["peak"]
        for group in parameter_groups(own.module, settings)
        for parameter in group["params"]
    }
    optimizer = build_optim_wrapper(model, dict(written["optim_wrapper"])).optimizer
    names = {parameter: key for key, parameter in model.named_parameters()}
    found = {
        names[parameter]: group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    }
    assert found == pytest.approx(rates, rel=1e-4)
    assert type(optimizer) is torch.optim.Adam

    # How long, on what, and what is kept.
    loader = written["train_dataloader"]
    flips = [one["prob"] for one in loader["dataset"]["pipeline"] if one["type"] == "RandomFlip"]
    assert flips == [settings.flip]
    assert loader["batch_size"] == settings.batch_size
    assert written["train_cfg"]["max_epochs"] == settings.epochs
    assert written["optim_wrapper"]["clip_grad"] == {"max_norm": settings.clip}
    assert written["randomness"]["seed"] == recipe.seed
    averages = [one for one in written["custom_hooks"] if one["type"] == "EMAHook"]
    averaged = settings.ema > 0 and settings.selection == "ema"
    assert [1 - one["momentum"] for one in averages] == pytest.approx([settings.ema] * averaged)
    # The set is to be one of this recipe.
    assert f"dfq synthesize --recipe {name} " in out.read_text()

    # What is minimised, each term with its weight.
    images = torch.rand(2, 3, SIDE, SIDE)
    calibrate(model._student, [images], search="minmax")
    terms = model(images, samples(), mode="loss")
    weights = {key: value for key, value in settings.weights.model_dump().items() if value}
    assert terms.keys() == {f"loss_{key}" for key in weights}
    for key in weights:
        setattr(model.recipe.distillation.weights, key, 1.0)
    once = model(images, samples(), mode="loss")
    for key, weight in weights.items():
        expected = weight * once[f"loss_{key}"].detach()
        torch.testing.assert_close(terms[f"loss_{key}"].detach(), expected, rtol=1e-4, atol=1e-7)


def samples() -> list[Any]:
    """Labels of two images as mmdet has them."""
    from mmengine.structures import InstanceData

    class Sample:
        gt_instances = InstanceData(
            bboxes=torch.tensor([[16.0, 0.0, 48.0, 32.0]]), labels=torch.tensor([3])
        )

    return [Sample(), Sample()]
