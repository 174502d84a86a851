"""Where a detector is to run, as data: what `dfq deploy` exports, checks and recommends as next
steps.

A target is a YAML file: one of `dfq/targets`, or a user's own. It is read as plain values.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ..errors import UserError, shown
from ..quantization.placement import PLACEMENTS, Runtime
from ..runtime.files import plain_name, user_path
from ..runtime.plain import brief, parse_yaml, read_small
from ..runtime.settings import Section
from ..runtime.suggest import suggestion

FOLDER = Path(__file__).resolve().parent.parent / "targets"

KINDS = ("conv", "linear", "matmul")
"""Kinds of layers, as `dfq inspect` names them, that a target may keep in float."""

PLACES = ("file", "float", "stem", "calibration")
"""What a command to go on with may name in braces: the model file, the float one, the former's name
without suffix, and the folder of a vendor's calibration set."""

_BRACES = re.compile(r"\{(\w+)\}")


class Target(Section):
    """Where a detector is to run."""

    name: str = ""
    """What names it; that of the file, where it does not say."""
    title: str = Field(max_length=200)
    """In words."""
    runtime: Runtime
    """That executes the file, and whose placement of grids counts."""
    format: Literal["onnx", "openvino", "litert"]
    weight_bits: int = Field(8, ge=2, le=8)
    activation_bits: int = Field(8, ge=2, le=8)
    first_last_bits: Literal["float", "same", 8] = 8
    """Of the layers that see the image and those that give the predictions."""
    per_channel: bool = True
    """Whether weights have a scale a channel, and not one a layer."""
    symmetric: bool = False
    """Whether grids of activations have no zero point."""
    power_of_two_scales: bool = False
    """Whether all scales have to be powers of two; dfq makes no such ones yet."""
    float_operations: list[str] = Field([])
    """What stays in float: kinds of layers (`KINDS`), or names of layers, also as wildcards."""
    method: Literal["ptq", "auto"] = "ptq"
    """As in a recipe: ptq calibrates and rounds; auto trains as well, which takes long."""
    verify: Literal["run", "structure"] = "run"
    """Whether the file is run here, or can only be looked at."""
    latency: bool = True
    """Whether this machine's times say anything of it."""
    calibration: str | None = None
    """The tool, as of `dfq data export --for`, that quantizes by itself: it is given the float
    network and images."""
    notes: list[str] = Field([])
    """What a user should know, a line each."""
    next: list[str] = Field([])
    """Commands to go on with; `PLACES` in braces stand for files."""

    def overrides(self) -> dict[str, Any]:
        """Values of a recipe that make a network for this target; without `float_operations`,
        which are the network's."""
        return {
            "method": self.method,
            "quantization.weight_bits": self.weight_bits,
            "quantization.activation_bits": self.activation_bits,
            "quantization.first_last_bits": self.first_last_bits,
            "quantization.weights": "per_channel" if self.per_channel else "per_tensor",
            "quantization.activations": "symmetric" if self.symmetric else "asymmetric",
            "quantization.placement": "qdq",
            "quantization.runtime": self.runtime,
        }

    def commands(self, places: dict[str, str]) -> list[str]:
        """The commands to go on with, for a shell.

        Args:
            places: by name of `PLACES` the path that stands for it; a command that names another
                one is left out.
        """
        quoted = {name: shlex.quote(path) for name, path in places.items()}
        return [
            _BRACES.sub(lambda match: quoted[match[1]], command)
            for command in self.next
            if quoted.keys() >= set(_BRACES.findall(command))
        ]

    @property
    def precision(self) -> str:
        """As "W8A8"."""
        return f"W{self.weight_bits}A{self.activation_bits}"


def shipped_targets() -> dict[str, Path]:
    """Targets that come with the package, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load_target(name: str | Path) -> Target:
    """A target by the name of a shipped one, or from a file.

    Raises:
        UserError: there is none, or what it asks for cannot be; a line for each fault.
    """
    path = user_path(name, "--target")
    shipped = shipped_targets()
    if path.suffix.lower() not in (".yaml", ".yml") and str(name) in shipped:
        path = shipped[str(name)]
    elif not path.is_file():
        raise UserError(
            f"--target {shown(name)}: no such file, and none is shipped under that name (shipped: "
            f"{', '.join(shipped)}){suggestion(str(name), shipped)}"
        )
    data = parse_yaml(read_small(path), shown(path))
    if not isinstance(data, dict):
        raise UserError(f"{shown(path)}: a target is a mapping of keys, not {brief(data)}")
    try:
        target = Target.model_validate(data)
    except ValidationError as error:
        lines = [f"{shown(path)}: {_explain(problem)}" for problem in error.errors()]
        raise UserError(*dict.fromkeys(lines)) from None
    if not target.name:
        target.name = path.stem
    _check(target, shown(path))
    return target


def _explain(problem: Any) -> str:
    where = shown(".".join(str(part) for part in problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{suggestion(where, Target.model_fields)}"
    if problem["type"] == "missing":
        return f"{where}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    received = problem.get("input")
    ending = f", got {brief(received)}" if not isinstance(received, dict | list) else ""
    return f"{where}: {message[:1].lower()}{message[1:]}{ending}"


def _check(target: Target, where: str) -> None:
    """Refuse what each key allows and all together do not."""
    from .calibration_files import TOOLS
    from .exported import RUNTIMES

    if not plain_name(target.name):
        raise UserError(f"{where}: name: {brief(target.name)} cannot be part of a file's name")
    if target.power_of_two_scales:
        raise UserError(
            f"{where}: power_of_two_scales: dfq makes no scales that are powers of two; "
            "say false, where the target can do without"
        )
    if target.runtime not in RUNTIMES[target.format]:
        formats = ", ".join(name for name, runs in RUNTIMES.items() if target.runtime in runs)
        raise UserError(
            f"{where}: format: {target.runtime} executes no {target.format} files; {formats}"
        )
    if PLACEMENTS[target.runtime].symmetric and not target.symmetric:
        raise UserError(
            f"{where}: symmetric: {target.runtime} takes activations without a zero point alone; "
            "say true"
        )
    if target.calibration is not None and target.calibration not in TOOLS:
        raise UserError(
            f"{where}: calibration: no such tool as {brief(target.calibration)}; "
            f"{', '.join(TOOLS)}{suggestion(target.calibration, TOOLS)}"
        )
    if target.calibration is not None and target.format != "onnx":
        raise UserError(
            f"{where}: format: a compiler that quantizes by itself (calibration) is given the "
            "network as onnx; say onnx, with a runtime that executes it"
        )
    for command in target.next:
        for name in _BRACES.findall(command):
            if name not in PLACES:
                known = ", ".join(f"{{{place}}}" for place in PLACES)
                raise UserError(
                    f"{where}: next: no file is called {{{shown(name)}}}; {known}"
                    f"{suggestion(name, PLACES)}"
                )
