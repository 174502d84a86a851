"""Whether the grids of a quantized file hold what its tensors have, in files that can be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .dependencies import compile_openvino
from .opening import LiteRtFile, OnnxFile, OpenVinoFile, RuntimeFile


@dataclass(frozen=True)
class Fit:
    """How a grid fits what was seen of its tensor.

    Attributes:
        name: of the tensor.
        low, high: least and largest value on the grid.
        least, most: of the tensor.
        clipped: share of its values that lie more than a step outside the grid.
        lost: share of its energy that clipping takes away.
        sqnr: energy of the tensor over that of its quantization error, dB; None where the file
            does not hold the values themselves.
        branch: "boxes" or "scores" where it leads to these alone; None else, or where unknown.
    """

    name: str
    low: float
    high: float
    least: float
    most: float
    clipped: float
    lost: float
    sqnr: float | None
    branch: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class GridObserver:
    """What was seen of a tensor so far, on a grid from `low` to `high` in steps."""

    def __init__(self, name: str, low: float, high: float, step: float, branch: str | None) -> None:
        self.name, self.low, self.high, self.step, self.branch = name, low, high, step, branch
        self.count = self.outside = 0
        self.energy = self.lost = self.error = 0.0
        self.least, self.most = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        """Record a tensor of any shape."""
        x = values.astype(np.float64).ravel()
        if not x.size:
            return
        if self.low == 0:
            # Such a grid is the ReLU as well, which files leave out before it.
            x = np.maximum(x, 0)
        inside = np.clip(x, self.low, self.high)
        on_grid = self.low + np.round((inside - self.low) / self.step) * self.step
        self.count += x.size
        self.outside += int((np.abs(x - inside) > self.step).sum())
        self.energy += float((x**2).sum())
        self.lost += float(((x - inside) ** 2).sum())
        self.error += float(((x - on_grid) ** 2).sum())
        self.least, self.most = min(self.least, float(x.min())), max(self.most, float(x.max()))

    def fit(self) -> Fit:
        """The figures."""
        energy = self.energy or 1e-30
        sqnr = 10 * math.log10(energy / self.error) if self.error else 120.0
        return Fit(
            self.name,
            self.low,
            self.high,
            self.least,
            self.most,
            self.outside / max(self.count, 1),
            self.lost / energy,
            round(sqnr, 2),
            self.branch,
        )


def fits(file: RuntimeFile, images: Iterable[np.ndarray]) -> list[Fit] | None:
    """How the grids of a file's activations fit, in order of execution; None where it cannot be
    read from the file.

    Args:
        file: opened.
        images: float32 `(1, 3, h, w)` in [0, 1], one by one.
    """
    readers: list[tuple[type, Callable[[Any, Iterator[np.ndarray]], list[Fit] | None]]] = [
        (OnnxFile, _of_onnx),
        (OpenVinoFile, _of_openvino),
        (LiteRtFile, _of_litert),
    ]
    for kind, reader in readers:
        if isinstance(file, kind):
            return reader(file, (file.fitted(image) for image in images)) or None
    return None


def _of_onnx(file: OnnxFile, images: Iterator[np.ndarray]) -> list[Fit] | None:
    from .ranges_onnx import without_grids

    opened = without_grids(file.path)
    if opened is None:
        return None
    session, observers = opened
    input_name = session.get_inputs()[0].name
    names = list(observers)
    for image in images:
        for name, value in zip(names, session.run(names, {input_name: image}), strict=True):
            for observer in observers[name]:
                observer.add(value)
    return [observer.fit() for name in names for observer in observers[name]]


def _of_openvino(file: OpenVinoFile, images: Iterator[np.ndarray]) -> list[Fit] | None:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(file.path))
    model.reshape(list(file.image.shape))
    observers = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize":
            continue
        sources = [value.get_node() for value in node.input_values()]
        kinds = [source.get_type_name() for source in sources]
        if kinds[0] in ("Constant", "Convert") or set(kinds[1:3]) != {"Constant"}:
            continue
        low, high = (float(np.ravel(source.get_data())[0]) for source in sources[1:3])
        step = (high - low) / (int(node.get_attributes()["levels"]) - 1)
        model.add_outputs([node.input_value(0)])
        observers.append(GridObserver(node.get_friendly_name(), low, high, step or 1e-30, None))
    if not observers:
        return None
    compiled = compile_openvino(core, model)
    first_output = len(compiled.outputs) - len(observers)
    for image in images:
        outputs = compiled([image])
        for index, observer in enumerate(observers):
            observer.add(outputs[first_output + index])
    return [observer.fit() for observer in observers]


def _of_litert(file: LiteRtFile, images: Iterator[np.ndarray]) -> list[Fit] | None:
    """Integers alone are in the file: what was clipped stands at the largest one."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        str(file.path),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    tensors = []
    for operation in interpreter._get_ops_details():
        if operation["op_name"] in ("LOGISTIC", "SOFTMAX", "TANH", "QUANTIZE"):
            continue
        for index in operation["outputs"]:
            detail = interpreter._get_tensor_details(int(index), 0)
            if detail["dtype"] in (np.int8, np.uint8) and detail["quantization"][0]:
                tensors.append((int(index), detail))
    if not tensors:
        return None
    counts: dict[int, list[float]] = {index: [0, 0, math.inf, -math.inf] for index, _ in tensors}
    for image in images:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
        interpreter.invoke()
        for index, detail in tensors:
            values, row = interpreter.get_tensor(index), counts[index]
            row[0] += values.size
            row[1] += int((values == np.iinfo(detail["dtype"]).max).sum())
            row[2], row[3] = min(row[2], values.min()), max(row[3], values.max())
    tensor_fits = []
    for index, detail in tensors:
        (scale, zero), limits = detail["quantization"], np.iinfo(detail["dtype"])
        low, high, least, most = (
            float(scale * (float(n) - zero)) for n in (limits.min, limits.max, *counts[index][2:])
        )
        share = counts[index][1] / max(counts[index][0], 1)
        tensor_fits.append(Fit(detail["name"], low, high, least, most, share, 0.0, None))
    return tensor_fits
