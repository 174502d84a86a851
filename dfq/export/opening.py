"""Anyone's file in the runtime of its format."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from ..errors import UserError, shown
from ..runtime.files import user_path
from ..runtime.plain import one_line
from .dependencies import compile_openvino, require
from .exported import SUFFIXES, ExportInfo
from .program import input_shape
from .writers import KEY


def is_exported(path: str | Path) -> bool:
    """Whether a path is named as an exported file is."""
    return Path(path).suffix.lower() in SUFFIXES.values()


def open_file(path: str | Path, *, threads: int | None = None, trust: bool = False) -> RuntimeFile:
    """Open a file in the runtime of its format.

    Args:
        path: the file; `.onnx` opens in onnxruntime, `.xml` in OpenVINO, `.tflite` in LiteRT,
            `.pt2` in PyTorch.
        threads: that the runtime may use; None: its own choice.
        trust: run what is in a `.pt2` file: PyTorch's own loader unpickles, and evaluates, what it
            finds there.

    Raises:
        UserError: no such file, one that is broken, or whose runtime is not installed.
    """
    path = user_path(path)
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise UserError(
            f"{shown(path)}: not one of the files that dfq exports and opens: "
            f"{tuple(SUFFIXES.values())}"
        )
    if not path.is_file():
        raise UserError(f"{shown(path)}: no such file")
    if kind is TorchFile and not trust:
        raise UserError(
            f"{shown(path)}: opening a .pt2 file runs what is in it; give --trust if you trust its "
            "author, or export to .onnx"
        )
    try:
        return kind(path, threads)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{shown(path)}: cannot be opened: damaged, or of another version "
            f"({type(error).__name__}: {one_line(error)[:200]})"
        ) from error


class RuntimeFile:
    """A file in its runtime, whatever it computes.

    Attributes:
        path: of the file.
        runtime: that executes it.
        says: what it says of itself; None where dfq did not write it.
        input_shape: of its one input; None where a side is free.
        input_dtype: numpy's, of the same.
        grid: step and zero point of an input of integers; None where they are pixels.
    """

    runtime: str
    says: ExportInfo | None = None
    input_shape: tuple[int | None, ...]
    input_dtype: Any = np.float32
    grid: tuple[float, int] | None = None

    def __init__(self, path: Path, threads: int | None) -> None:
        self.path = path

    @abstractmethod
    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name, of images float32 `(n, 3, h, w)` in [0, 1]."""

    @property
    def image(self) -> np.ndarray:
        """A blank batch of the shape and dtype of the runtime's input; free sides are those that
        dfq exported for."""
        side = self.says.image_size if self.says is not None else 640
        defaults = [1, *[3 if n == 3 else side for n in self.input_shape[1:]]]
        shape = [size or default for size, default in zip(self.input_shape, defaults, strict=True)]
        return np.zeros(shape, self.input_dtype)

    def fitted(self, images: np.ndarray) -> np.ndarray:
        """Images `(n, 3, h, w)` in [0, 1] in the layout and the type that the file takes."""
        if self.input_shape[-1] == 3 and self.input_shape[1] != 3:
            images = images.transpose(0, 2, 3, 1)
        kind = np.dtype(self.input_dtype)
        if kind.kind in "ui":
            limits = np.iinfo(kind)
            # Without a grid they are pixels, which int8 holds 128 lower.
            scale, zero = self.grid or (1 / 255, 0 if kind.kind == "u" else int(limits.min))
            images = np.clip(np.round(images / np.float32(scale)) + zero, limits.min, limits.max)
        return np.ascontiguousarray(images, dtype=kind)

    def _read(self, text: str | None) -> None:
        """Take what the file says of itself."""
        if text is None:
            return
        try:
            self.says = ExportInfo.model_validate_json(text)
        except ValidationError as error:
            raise UserError(
                f"{shown(self.path)}: what it says of itself is damaged "
                f"({error.errors()[0]['msg']}); export it again"
            ) from None


_ORT_TYPES = {
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}


class OnnxFile(RuntimeFile):
    """An ONNX file in onnxruntime, on the CPU."""

    runtime = "onnxruntime"

    def __init__(self, path: Path, threads: int | None, *, optimised: Path | None = None) -> None:
        super().__init__(path, threads)
        ort = require("onnxruntime", "An .onnx file")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if optimised is not None:
            options.optimized_model_filepath = str(optimised)
        providers = ["CPUExecutionProvider"]
        self._session = ort.InferenceSession(str(path), options, providers=providers)
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise UserError(f"{shown(path)}: has {len(inputs)} inputs, and an image is one")
        self._input = inputs[0].name
        sides = inputs[0].shape
        self.input_dtype = _ORT_TYPES.get(inputs[0].type, np.float32)
        self.input_shape = tuple(side if isinstance(side, int) else None for side in sides)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._read(self._session.get_modelmeta().custom_metadata_map.get(KEY))

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        arrays = self._session.run(self._outputs, {self._input: self.fitted(images)})
        return dict(zip(self._outputs, arrays, strict=True))


class OpenVinoFile(RuntimeFile):
    """An OpenVINO IR on the CPU, with float parts in float32."""

    runtime = "openvino"

    def __init__(self, path: Path, threads: int | None, *, precision: str = "f32") -> None:
        super().__init__(path, threads)
        openvino = require("openvino", "An OpenVINO file")
        core = openvino.Core()
        model = core.read_model(str(path))
        if len(model.inputs) != 1:
            raise UserError(f"{shown(path)}: has {len(model.inputs)} inputs, and an image is one")
        streams = {} if threads is None else {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        self.compiled = compile_openvino(core, model, precision, **streams)
        shape = model.inputs[0].partial_shape
        self.input_dtype = model.inputs[0].element_type.to_dtype()
        self.input_shape = tuple(side.get_length() if side.is_static else None for side in shape)
        self._outputs = [_ov_name(output, i) for i, output in enumerate(self.compiled.outputs)]
        if model.has_rt_info([KEY]):
            self._read(str(model.get_rt_info([KEY]).value))

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        arrays = self.compiled([self.fitted(images)])
        return {name: arrays[index].copy() for index, name in enumerate(self._outputs)}


def _ov_name(output: Any, index: int) -> str:
    names = sorted(output.get_names())
    return names[0] if names else f"output{index}"


class LiteRtFile(RuntimeFile):
    """A LiteRT file on the CPU, by XNNPACK."""

    runtime = "litert"

    def __init__(self, path: Path, threads: int | None) -> None:
        super().__init__(path, threads)
        litert = require("ai_edge_litert.interpreter", "A .tflite file")
        self.interpreter = litert.Interpreter(str(path), num_threads=threads)
        self.interpreter.allocate_tensors()
        inputs = self.interpreter.get_input_details()
        if len(inputs) != 1:
            raise UserError(f"{shown(path)}: has {len(inputs)} inputs, and an image is one")
        self._input = inputs[0]
        self.input_shape = tuple(int(side) for side in inputs[0]["shape"])
        self.input_dtype = inputs[0]["dtype"]
        scale, zero = inputs[0]["quantization"]
        self.grid = (scale, zero) if scale else None
        self._outputs = self.interpreter.get_output_details()
        self._read(_litert_metadata(path))

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        rows = [self._run_one(image[None]) for image in images]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _run_one(self, image: np.ndarray) -> dict[str, np.ndarray]:
        self.interpreter.set_tensor(self._input["index"], self.fitted(image))
        self.interpreter.invoke()
        names = (
            list(self.says.outputs) if self.says else [output["name"] for output in self._outputs]
        )
        outputs = {}
        for name, output in zip(names, self._outputs, strict=True):
            value = self.interpreter.get_tensor(output["index"])
            scale, zero = output["quantization"]
            outputs[name] = (
                (value.astype(np.float32) - zero) * np.float32(scale) if scale else value
            )
        return outputs


def _litert_metadata(path: Path) -> str | None:
    schema = require("ai_edge_litert.schema_py_generated", "A .tflite file")
    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    for index in range(model.MetadataLength()):
        entry = model.Metadata(index)
        if entry.Name() == KEY.encode():
            return bytes(model.Buffers(entry.Buffer()).DataAsNumpy()).decode()
    return None


class TorchFile(RuntimeFile):
    """PyTorch's own exported program."""

    runtime = "torch"

    def __init__(self, path: Path, threads: int | None) -> None:
        super().__init__(path, threads)
        extra = {f"{KEY}.json": ""}
        # Registers the quantize and dequantize operations.
        import torch.ao.quantization.fx._decomposed

        program = torch.export.load(path, extra_files=extra)
        self._module = program.module()
        self._read(extra[f"{KEY}.json"] or None)
        self.input_shape = input_shape(program)

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = self._module(torch.from_numpy(images))
        names = list(self.says.outputs) if self.says else map(str, range(len(outputs)))
        return {name: tensor.numpy() for name, tensor in zip(names, outputs, strict=True)}


_KINDS: dict[str, type[Any]] = {
    ".onnx": OnnxFile,
    ".xml": OpenVinoFile,
    ".tflite": LiteRtFile,
    ".pt2": TorchFile,
}
