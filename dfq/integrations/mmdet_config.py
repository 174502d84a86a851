"""Writing the config with which mmdet's own training script runs a recipe."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from ..errors import UserError
from ..ptq.pipeline import reconstructs_blocks
from ..recipe import Recipe, changed_recipe

_TEMPLATE = """\
# Quantization-aware training of {title}
# ({bits}), by mmdet's own Runner.
#
#   python tools/train.py {name}
#
# Written by `dfq mmdet-config`; the data are a calibration set:
#
#   dfq synthesize --recipe {recipe_comment} --model {config} \\
#     --checkpoint {weights} --out {data}
_base_ = [{base}]

custom_imports = dict(imports=["dfq.integrations.mmdet"], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type="DFQDistiller",
    # The detector's own config, and its float weights.
    config={config_text},
    checkpoint={checkpoint},
    # Whose quantization and distillation sections count.
    recipe={recipe},
    overrides={overrides},
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob={flip}),
    dict(type="PackDetInputs"),
]
train_dataloader = dict({replace[train_dataloader]}
    # Of each process.
    batch_size={batch},
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="DFQCalibrationSet",
        data_root={data_text},
        pipeline=train_pipeline,
    ),
)

train_cfg = dict({replace[train_cfg]}
    type="EpochBasedTrainLoop",
    max_epochs={epochs},
    val_interval={epochs},
)
optim_wrapper = dict({replace[optim_wrapper]}
    type="OptimWrapper",
    optimizer=dict(type="Adam", lr={lr}),
    # Step sizes live on a scale of their own.
    paramwise_cfg=dict(custom_keys=dict(quantizer=dict(lr_mult={scale_mult:.6g}))),
    clip_grad=dict(max_norm={clip}),
)
# DFQCalibrationHook sets the rates: rising over the recipe's warm-up, then a cosine to zero.
param_scheduler = []
randomness = dict(seed={seed})
custom_hooks = [
    dict(type="DFQCalibrationHook", priority="VERY_HIGH"),{average}
]
model_wrapper_cfg = dict(
    type="DFQDistributed",
    broadcast_buffers=False,
    find_unused_parameters=True,
)
# The base's is for its own learning rate.
auto_scale_lr = dict(enable=False, base_batch_size={batch})
load_from = None
{validation}"""

_NO_VALIDATION = """\
# The detector's own validation set is not here: {missing}
val_dataloader = None
val_cfg = None
val_evaluator = None
"""

_AVERAGE = """
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum={momentum:.6g}, gamma=100),"""

TRAINED = ("method=qat", "distillation.keep_worse=true")
"""Settings that replace `method: auto`, whose fallback to the calibrated start needs a comparison
that the Runner does not make."""


def compares(recipe: Recipe) -> str | None:
    """What of a recipe asks for that comparison; None where nothing does."""
    if recipe.method == "auto":
        return "method: auto"
    if recipe.method == "qat" and not recipe.distillation.keep_worse:
        return "distillation.keep_worse: false"
    return None


def require_supported(recipe: Recipe) -> None:
    """Raise a `UserError` for what takes dfq's own training."""
    section, settings = recipe.quantization, recipe.distillation
    unknown = {
        f"method: {recipe.method}": recipe.method != "qat",
        "distillation.keep_worse: false": not settings.keep_worse,
        "evaluation.data": recipe.evaluation.data is not None,
        "quantization.mixed.budget": section.mixed.budget is not None,
        f"quantization.reconstruction: {section.reconstruction}": reconstructs_blocks(section),
        "distillation.zero_lr": settings.zero_lr > 0,
        "distillation.zoom": settings.zoom > 0,
        "distillation.mosaic": settings.mosaic > 0,
        "distillation.colour": settings.colour > 0,
        "distillation.camera": settings.camera > 0,
        f"distillation.selection: {settings.selection}": settings.selection == "agreement",
        "distillation.select_on": settings.select_on is not None,
    }
    for key, asked in unknown.items():
        if asked:
            raise UserError(f"{key}: mmdet's Runner does not have it; leave it out, or use dfq qat")


REPLACED = ("train_dataloader", "train_cfg", "optim_wrapper")
"""Keys whose values in the detector's config are replaced and not merged with."""


def mmdet_config(
    recipe: Recipe,
    recipe_name: str,
    config: str,
    *,
    checkpoint: str | None,
    data: str,
    name: str,
    overrides: tuple[str, ...] = (),
    inherited: Collection[str] = REPLACED,
    base: str | None = None,
    missing: str | None = None,
) -> str:
    """The text of a config that inherits from a detector's own and trains it by a recipe.

    Args:
        recipe: its values, for what mmdet's Runner has to know.
        recipe_name: name or file, for what the model has to know.
        config: path of the detector's config.
        checkpoint: path of its float weights.
        data: folder of the calibration set.
        name: of the file this is for.
        overrides: what was changed in the recipe.
        inherited: keys that the detector's config has.
        base: what to inherit from; None: `config`.
        missing: a file of the detector's own validation set that is not there: nothing is
            measured then; None: it is kept.
    """
    if compares(recipe) is not None:
        overrides = (*overrides, *TRAINED)
        recipe = changed_recipe(recipe, TRAINED)
    require_supported(recipe)
    settings, section = recipe.distillation, recipe.quantization
    averaged = settings.ema > 0 and settings.selection != "last"
    average = _AVERAGE.format(momentum=1 - settings.ema) if averaged else ""
    return _TEMPLATE.format(
        replace={key: "\n    _delete_=True," if key in inherited else "" for key in REPLACED},
        title=_comment(Path(config).stem),
        bits=f"{section.weight_bits}-bit weights and {section.activation_bits}-bit activations",
        name=_comment(name),
        base=_text(base or config),
        config=_comment(config),
        config_text=_text(config),
        checkpoint=_text(checkpoint),
        weights=_comment(checkpoint or "WEIGHTS.pth"),
        recipe=_text(recipe_name),
        recipe_comment=_comment(recipe_name),
        seed=recipe.seed,
        overrides="[" + ", ".join(_text(text) for text in overrides) + "]",
        data=_comment(data),
        data_text=_text(data),
        flip=settings.flip,
        batch=settings.batch_size,
        epochs=settings.epochs,
        lr=settings.lr,
        scale_mult=settings.scale_lr / settings.lr,
        clip=settings.clip,
        average=average,
        validation=_NO_VALIDATION.format(missing=_comment(missing)) if missing else "",
    )


def _text(value: str | None) -> str:
    """A string, or None, as Python writes it, in double quotes."""
    if value is None:
        return "None"
    text = "".join(_ESCAPED.get(char) or _character(char) for char in value)
    # mmengine puts values of its own in the place of `{{ ... }}`, wherever it stands.
    return '"' + text.replace("{{", "{\\x7b") + '"'


_ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _character(char: str) -> str:
    if char.isprintable():
        return char
    code = ord(char)
    if code < 1 << 8:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def _comment(value: str) -> str:
    """A string in a comment: as it is where it is plain, else as in code, so that it stays on its
    line and says nothing to who reads files (`coding:`)."""
    if re.fullmatch(r"[\w./@%+,\- ]*", value):
        return value
    return _text(value).replace(":", "\\x3a").replace("=", "\\x3d")
