"""Writing the config with which mmdet's own training script runs a recipe."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from ..recipe import Recipe

_TEMPLATE = """\
# Quantization-aware training of {title}
# ({bits}), by mmdet's own Runner.
#
#   python tools/train.py {name}
#
# Written by `dfq mmdet-config`; the data are a calibration set:
#
#   dfq synthesize --model {config} \\
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
    # Step sizes and zero points live on scales of their own.
    paramwise_cfg=dict(custom_keys=dict(quantizer=dict(lr_mult={scale_mult:.6g}))),
    clip_grad=dict(max_norm={clip}),
)
param_scheduler = [
    dict(
        type="CosineAnnealingLR",
        by_epoch=True,
        begin=0,
        end={epochs},
        T_max={epochs},
        eta_min=0,
        convert_to_iter_based=True,
    ),
]
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
"""

_AVERAGE = """
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum={momentum:.6g}, gamma=100),"""

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
    """
    settings, section = recipe.distillation, recipe.quantization
    average = _AVERAGE.format(momentum=1 - settings.ema) if settings.ema > 0 else ""
    return _TEMPLATE.format(
        replace={key: "\n    _delete_=True," if key in inherited else "" for key in REPLACED},
        title=Path(config).stem,
        bits=f"{section.weight_bits}-bit weights and {section.activation_bits}-bit activations",
        name=name,
        base=_text(base or config),
        config=config,
        config_text=_text(config),
        checkpoint=_text(checkpoint),
        weights=checkpoint or "WEIGHTS.pth",
        recipe=_text(recipe_name),
        overrides="[" + ", ".join(_text(text) for text in overrides) + "]",
        data=data,
        data_text=_text(data),
        flip=settings.flip,
        batch=settings.batch_size,
        epochs=settings.epochs,
        lr=settings.lr,
        scale_mult=settings.scale_lr / settings.lr,
        clip=settings.clip,
        average=average,
    )


def _text(value: str | None) -> str:
    """A string, or None, as Python writes it, in double quotes."""
    return "None" if value is None else json.dumps(value, ensure_ascii=False)
