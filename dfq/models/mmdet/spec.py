"""Which descriptions of a network are given to mmdet's registries.

A registry imports and calls whatever dotted name stands under `type`, some of mmdet's networks read
configs, weights and text models that a description names, and some of its code evaluates texts. A
config is a program that its owner chose to run; a description out of a saved detector or a run is
data. Only what passes here is built from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...errors import UserError
from ...runtime.plain import brief
from ...runtime.suggest import suggestion

# Of mmdet and what it stands on, the modules whose classes make up a detector.
_PACKAGES = ("mmdet", "mmcv", "mmengine")
_MODULES = (
    "mmcv.cnn.",
    "mmcv.ops.",
    "mmengine.model.base_m",
    "mmengine.model.weight_init",
    "mmengine.utils.dl_utils.",
    "mmdet.models.backbones.",
    "mmdet.models.data_preprocessors.",
    "mmdet.models.dense_heads.",
    "mmdet.models.detectors.",
    "mmdet.models.layers.",
    "mmdet.models.losses.",
    "mmdet.models.necks.",
    "mmdet.models.roi_heads.",
    "mmdet.models.seg_heads.",
    "mmdet.models.task_modules.assigners.",
    "mmdet.models.task_modules.coders.",
    "mmdet.models.task_modules.prior_generators.",
    "mmdet.models.task_modules.samplers.",
)
# Of these, those that hold other models, or read files.
_OTHER_MODELS = {
    "Detectron2Wrapper",
    "GLIP",
    "GroundingDINO",
    "KnowledgeDistillationSingleStageDetector",
    "LAD",
    "Pretrained",
    "SemiBaseDetector",
    "SoftTeacher",
}
# What is looked up elsewhere than in a registry: among mmcv's operations, or in a layer's own code.
_UNREGISTERED = {
    *("RoIAlign", "RoIPool", "SimpleRoIAlign", "DeformRoIPoolPack", "ModulatedDeformRoIPoolPack"),
    *("nms", "soft_nms", "conv", "interpolation_conv", "last_conv", "dilation", "offset"),
}
_FILES = ("pretrained", "checkpoint", "weights", "teacher_config", "teacher_ckpt")
# Names and modes; a point between digits (`regnetx_1.6gf`), but no path, address or expression.
_TEXT = re.compile(r"(?:[\w\- ]|(?<=\d)\.(?=\d))*", re.ASCII)
_LARGEST = 1_000_000


def registered() -> dict[str, Any]:
    """Every name that mmdet's registries for parts of networks know, and what it stands for."""
    import mmdet.models  # noqa: F401  registers them
    from mmdet.registry import MODELS, TASK_UTILS
    from mmengine.registry import MODELS as ROOT
    from mmengine.registry import WEIGHT_INITIALIZERS

    entries: dict[str, Any] = {}
    for registry in (WEIGHT_INITIALIZERS, ROOT, TASK_UTILS, MODELS):
        entries.update(registry.module_dict)
    return entries


def undotted(name: str) -> str:
    """A `type` as a registry has it: without the scope (`mmdet.ResNet`) or the module of a class
    that is registered. Other names with dots are left as they are."""
    scope, _, last = name.rpartition(".")
    kind = registered().get(last) if scope else None
    if kind is not None and scope in (*_PACKAGES, getattr(kind, "__module__", None)):
        return last
    return name


def check_spec(model: Any, source: str) -> None:
    """Refuse a description that is more than a network of registered parts.

    Args:
        model: of a config, as `mmdet_config.plain` gives it; a tree of plain values.
        source: what to call it in messages.

    Raises:
        UserError: a `type` is no registered name, or one of a network that reads files or holds
            another; a text may be a path or an expression; a number is out of all proportion.
    """
    if not isinstance(model, dict):
        raise UserError(f"{source}: its config is {brief(model)}, not a mapping")
    known = registered()
    for key, value in _entries(model):
        if key == "_scope_" and value in (None, *_PACKAGES):
            # Of a config that inherits from a package: whose registry is asked first.
            continue
        if not re.fullmatch(r"[A-Za-z][\w\-]*|\(\)", key, re.ASCII):
            raise UserError(f"{source}: the key {brief(key)} is not one of a network's config")
        if value is None:
            continue
        if key == "type":
            _check_type(value, known, source)
        elif key in _FILES:
            raise UserError(f"{source}: {key} names a file ({brief(value)}): refused")
        elif isinstance(value, str) and not _TEXT.fullmatch(value):
            raise UserError(
                f"{source}: {key} is {brief(value)}, which may be a path or an expression: refused"
            )
        elif isinstance(value, int) and abs(value) > _LARGEST:
            raise UserError(f"{source}: {key} is {brief(value)}; up to {_LARGEST} is possible")


def _entries(value: Any, key: str = "config") -> Iterator[tuple[str, Any]]:
    """Every key with its value; what is in a list counts as a value of the list's key."""
    if isinstance(value, dict):
        for name, part in value.items():
            # What holds others is a name as well.
            yield name, None
            yield from _entries(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _entries(part, key)
    else:
        yield key, value


def _check_type(value: Any, known: dict[str, Any], source: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{source}: a type is {brief(value)}, not a name")
    if value in _UNREGISTERED:
        return
    kind = known.get(value)
    if kind is None:
        near = suggestion(value, known)
        raise UserError(
            f"{source}: mmdet cannot build it: the type {brief(value)} is none that it registers "
            f"under that name{near}"
        )
    module = str(getattr(kind, "__module__", ""))
    foreign = not module.startswith(tuple(f"{package}." for package in (*_PACKAGES, "dfq")))
    if value in _OTHER_MODELS or not (foreign or module.startswith(_MODULES)):
        raise UserError(
            f"{source}: the type {value} reads files, holds another model or is no part of a "
            "detector: refused"
        )
