"""The layers a model YAML of Ultralytics may name, and what each may be given.

Ultralytics looks up the names of a YAML among everything its module holds (models, that read files
and fetch weights, among them) and evaluates its texts as Python. What is not in this list does not
get there, and no text does but the modes of an upsampling.
"""

from __future__ import annotations

import math
import re
from typing import Any

from ...errors import UserError
from ...runtime.limits import LARGEST_MULTIPLE, MOST_CLASSES, MOST_REPEATS, MOST_ROWS, WIDEST
from ...runtime.plain import brief
from .. import activations

# One letter an argument: w width, i whole number or a few of them, f number, b truth value,
# l list of whole numbers, c number of classes, m mode. Fewer may be given; None stands for "as
# usual" anywhere but for a width.
LAYERS: dict[str, str] = {
    "A2C2f": "wbibffib",
    "AConv": "w",
    "ADown": "w",
    "AIFI": "wif",
    "Bottleneck": "wbiif",
    "BottleneckCSP": "wbif",
    "C1": "w",
    "C2": "wbif",
    "C2PSA": "wf",
    "C2f": "wbif",
    "C2fCIB": "wbbif",
    "C2fPSA": "wf",
    "C3": "wbif",
    "C3Ghost": "wbif",
    "C3TR": "wbif",
    "C3k2": "wbfbib",
    "C3x": "wbif",
    "CBFuse": "l",
    "CBLinear": "liiii",
    "Concat": "i",
    "Conv": "wiiiiib",
    "Conv2": "wwiiiiib",
    "ConvTranspose": "wiiibb",
    "DWConv": "wiiib",
    "DWConvTranspose2d": "wiiii",
    "Detect": "c",
    "ELAN1": "www",
    "Focus": "wiiiib",
    "GhostBottleneck": "wii",
    "GhostConv": "wiiib",
    "HGBlock": "wwibb",
    "HGStem": "ww",
    "PSA": "wf",
    "RepC3": "wf",
    "RepConv": "wwiiiiibbb",
    "RepNCSPELAN4": "wwwi",
    "RepVGGDW": "w",
    "ResNetLayer": "wwibii",
    "SCDown": "wii",
    "SPP": "wl",
    "SPPELAN": "wwi",
    "SPPF": "wiib",
    "nn.AvgPool2d": "iiibb",
    "nn.BatchNorm2d": "w",
    "nn.Conv2d": "wwiiiiib",
    "nn.ConvTranspose2d": "wiiiibi",
    "nn.Dropout": "f",
    "nn.Identity": "",
    "nn.MaxPool2d": "iiiibb",
    "nn.Upsample": "ifmb",
    "nn.ZeroPad2d": "i",
    "v10Detect": "c",
}
MODES = ("nearest", "nearest-exact", "bilinear", "bicubic", "area")

KEYS = (
    *("nc", "names", "scale", "scales", "depth_multiple", "width_multiple", "activation"),
    *("end2end", "reg_max", "ch", "channels", "inplace", "yaml_file", "backbone", "head"),
)
"""What Ultralytics reads of a YAML; the rest is left out."""

_NUMBER = re.compile(r"[-+]?(\d{1,9}(\.\d{0,9})?|\.\d{1,9})([eE][-+]?\d{1,2})?")
_WORDS = {"None": None, "True": True, "False": False}


def is_known(layer: str) -> bool:
    """Whether a row may name it."""
    return layer in LAYERS or (layer.startswith("nn.") and _activation(layer) is not None)


def _activation(layer: str) -> str | None:
    name = layer.removeprefix("nn.")
    return name if name != "Identity" and activations.is_name(name) else None


def checked_rows(yaml: dict[str, Any], source: str) -> None:
    """Check the rows and numbers of a YAML, and put its texts into numbers, in place.

    Args:
        yaml: of `plain.plain_tree`; `nc`, `backbone` and `head` are there and of the right types.
        source: what to call it in messages.

    Raises:
        UserError: a row is none, has arguments that its layer does not take, or asks for too much.
    """
    if not 1 <= yaml["nc"] <= MOST_CLASSES:
        raise UserError(f"{source}: nc is {yaml['nc']}: from 1 to {MOST_CLASSES} are possible")
    _check_multiples(yaml, source)
    rows = [*yaml["backbone"], *yaml["head"]]
    if len(rows) > MOST_ROWS:
        raise UserError(f"{source}: has {len(rows)} layers; up to {MOST_ROWS} are possible")
    for index, row in enumerate(rows):
        where = f"{source}: layer {index}"
        origin, repeats, layer, arguments = row
        origins = origin if isinstance(origin, list) else [origin]
        if not origins or not all(_whole(o) and -index - 1 <= o < index for o in origins):
            raise UserError(f"{where} ({layer}) takes its input from {brief(origin)}")
        if not _whole(repeats) or not 1 <= repeats <= MOST_REPEATS:
            raise UserError(
                f"{where} ({layer}) is repeated {brief(repeats)} times; 1 to {MOST_REPEATS} are "
                "possible"
            )
        row[3] = _arguments(layer, arguments, yaml["nc"], where)


def _check_multiples(yaml: dict[str, Any], source: str) -> None:
    scales = yaml.get("scales") or {}
    if not isinstance(scales, dict):
        raise UserError(f"{source}: scales is {brief(scales)}, not a mapping")
    keys = ("depth_multiple", "width_multiple")
    multiples: list[tuple[str, list[Any]]] = [(key, [yaml[key]]) for key in keys if key in yaml]
    for name, scale in scales.items():
        if not isinstance(scale, list) or len(scale) != 3:
            raise UserError(f"{source}: scales.{name} is {brief(scale)}, not three numbers")
        multiples.append((f"scales.{name}", scale[:2]))
        if not _number(scale[2]) or not 1 <= scale[2] <= WIDEST:
            raise UserError(f"{source}: scales.{name} has the width {brief(scale[2])}")
    for name, values in multiples:
        for value in values:
            if not _number(value) or not 0 < value <= LARGEST_MULTIPLE:
                raise UserError(
                    f"{source}: {name} is {brief(value)}; above 0 and up to "
                    f"{LARGEST_MULTIPLE:g} is possible"
                )
    bins = yaml.get("reg_max", 1)
    if not _whole(bins) or not 1 <= bins <= 256:
        raise UserError(f"{source}: reg_max is {brief(bins)}; 1 to 256 is possible")
    for key in ("end2end", "inplace"):
        if not isinstance(yaml.get(key), bool | None):
            raise UserError(f"{source}: {key} is {brief(yaml[key])}, not true or false")
    if not isinstance(yaml.get("scale"), str | None) or not isinstance(
        yaml.get("yaml_file"), str | None
    ):
        raise UserError(f"{source}: scale and yaml_file are texts")


def _arguments(layer: str, arguments: Any, classes: int, where: str) -> list[Any]:
    if not isinstance(arguments, list):
        raise UserError(f"{where} ({layer}) has {brief(arguments)} for its arguments, not a list")
    if layer not in LAYERS:
        return _of_activation(layer, arguments, where)
    kinds = LAYERS[layer]
    if len(arguments) > len(kinds):
        raise UserError(
            f"{where}: {layer} takes up to {len(kinds)} arguments, not {len(arguments)}"
        )
    result = []
    for place, (kind, value) in enumerate(zip(kinds, arguments, strict=False)):
        value = _of_text(value)
        if kind == "c" and value == "nc":
            value = classes
        if not _fits(kind, value):
            raise UserError(
                f"{where}: {layer} has {brief(value)} for its argument {place + 1}, which is no "
                f"{_WHAT[kind]}"
            )
        result.append(value)
    return result


_WHAT = {
    "w": f"width (1 to {WIDEST})",
    "i": "whole number",
    "f": "number",
    "b": "truth value",
    "l": "list of whole numbers",
    "c": f"number of classes (1 to {MOST_CLASSES}, or nc)",
    "m": "mode (nearest, bilinear, ...)",
}


def _of_text(value: Any) -> Any:
    """YAML 1.1 leaves `None` and `1e-3` as texts, which Ultralytics then evaluates."""
    if isinstance(value, list):
        return [_of_text(part) if isinstance(part, str) else part for part in value]
    if not isinstance(value, str):
        return value
    if value in _WORDS:
        return _WORDS[value]
    if _NUMBER.fullmatch(value):
        number = float(value)
        return int(number) if re.fullmatch(r"[-+]?\d+", value) else number
    return value


def _fits(kind: str, value: Any) -> bool:
    if kind == "w":
        return _whole(value) and 1 <= value <= WIDEST
    if kind == "c":
        return _whole(value) and 1 <= value <= MOST_CLASSES
    if kind == "m":
        return value in MODES if isinstance(value, str) else value is None
    if value is None:
        return True
    if kind == "f":
        return _number(value) and abs(value) <= WIDEST
    if kind == "b":
        # Written as 0 and 1 by some.
        return isinstance(value, bool) or (_whole(value) and value in (0, 1))
    if kind == "l":
        parts = value if isinstance(value, list) else [value]
        parts = parts[0] if len(parts) == 1 and isinstance(parts[0], list) else parts
        return len(parts) <= 64 and all(_whole(part) and abs(part) <= WIDEST for part in parts)
    parts = value if isinstance(value, list) else [value]
    # A factor of C3k2 may be given in the place of a number of groups, and truth values anywhere.
    return 1 <= len(parts) <= 8 and all(
        isinstance(part, int) and abs(part) <= WIDEST for part in parts
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _of_activation(layer: str, arguments: list[Any], where: str) -> list[Any]:
    arguments = [_of_text(value) for value in arguments]
    try:
        activations.parse(f"{layer}({', '.join(repr(value) for value in arguments)})")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return arguments
