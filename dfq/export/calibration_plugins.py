"""A set of images as the calibration set of the tool that quantizes: an adapter for each.

    import dfq.export.calibration_plugins as calibration
    quantize_static("model.onnx", "int8.onnx", calibration.onnxruntime_reader("my-set", "images"))

Each takes a calibration set (what `dfq synthesize` makes, by its folder or opened) or real images
as `open_set` reads them, and gives every image once, in the set's order, one in a batch: RGB,
float32 in [0, 1], NCHW, unless it is asked for another layout. Real images are letterboxed to
`image_size`. `dfq data export SET --for TOOL` writes the same as files, for where dfq is not
installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ..errors import UserError, for_python
from .calibration_images import CalibrationImages, Layout, Source, Values

__all__ = [
    "CalibrationImages",
    "ai_edge_quantizer_data",
    "mct_representative_data_gen",
    "modelopt_forward_loop",
    "nncf_dataset",
    "onnxruntime_reader",
]


@for_python
def onnxruntime_reader(
    data: Source,
    input_name: str,
    image_size: int | None = None,
    *,
    layout: Layout = "nchw",
    values: Values = "float32",
) -> Any:
    """For onnxruntime: a `CalibrationDataReader`.

        from onnxruntime.quantization import quantize_static
        quantize_static("model.onnx", "int8.onnx", onnxruntime_reader("my-set", "images"))

    Args:
        data, image_size, layout, values: see `CalibrationImages.open`.
        input_name: of the graph's input that takes the images.
    """
    base = _tool("onnxruntime.quantization", "onnxruntime").CalibrationDataReader
    images = CalibrationImages.open(data, image_size, layout=layout, values=values)

    class Reader(base):  # type: ignore[misc, valid-type]
        """Every image once; `rewind` begins anew. Percentile and entropy calibration hold what they
        collect of all images in memory, for which `set_range` splits them up."""

        def __init__(self) -> None:
            self.set_range(0, len(images))

        def __len__(self) -> int:
            return len(images)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.indices = range(start_index, min(end_index, len(images)))
            self.rewind()

        def rewind(self) -> None:
            self.remaining = iter(self.indices)

        def get_next(self) -> dict[str, np.ndarray] | None:
            index = next(self.remaining, None)
            return None if index is None else {input_name: images[index]}

    return Reader()


@for_python
def nncf_dataset(
    data: Source,
    image_size: int | None = None,
    *,
    layout: Layout = "nchw",
    values: Values = "float32",
    input_name: str | None = None,
    tensors: bool = False,
) -> Any:
    """For NNCF, and for OpenVINO, which quantizes by NNCF: an `nncf.Dataset`.

        model = openvino.Core().read_model("model.xml")
        images = nncf_dataset("my-set")
        model = nncf.quantize(model, images, subset_size=images.get_length())
        openvino.save_model(model, "int8.xml")

    NNCF looks at 300 images unless `subset_size` says more.

    Args:
        data, image_size, layout, values: see `CalibrationImages.open`.
        input_name: of the graph's input; an ONNX model needs it, an OpenVINO model does not.
        tensors: give PyTorch tensors, for a PyTorch model.
    """
    images = CalibrationImages.open(data, image_size, layout=layout, values=values)

    def fed(image: np.ndarray) -> Any:
        value = torch.from_numpy(image) if tensors else image
        return value if input_name is None else {input_name: value}

    return _tool("nncf").Dataset(images, fed)


@for_python
def ai_edge_quantizer_data(
    data: Source,
    input_name: str = "args_0",
    image_size: int | None = None,
    *,
    signature: str = "serving_default",
    layout: Layout = "nchw",
    values: Values = "float32",
) -> dict[str, Any]:
    """For ai-edge-quantizer (LiteRT): what `Quantizer.calibrate` takes.

        quantizer = ai_edge_quantizer.quantizer.Quantizer("model.tflite")
        quantizer.load_quantization_recipe(ai_edge_quantizer.recipe.static_wi8_ai8())
        ranges = quantizer.calibrate(ai_edge_quantizer_data("my-set"))
        quantizer.quantize(ranges).export_model("int8.tflite")

    Args:
        data, image_size, values: see `CalibrationImages.open`.
        input_name, signature: of the model; what they are here is what litert-torch calls them.
        layout: models that litert-torch makes of PyTorch keep "nchw"; those of TensorFlow, or made
            by onnx2tf, take "nhwc".
    """
    images = CalibrationImages.open(data, image_size, layout=layout, values=values)
    return {signature: _Feeds(images, input_name)}


class _Feeds:
    """Feeds of one input, read as they are asked for, as often as they are."""

    def __init__(self, images: CalibrationImages, name: str) -> None:
        self._images, self._name = images, name

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return ({self._name: image} for image in self._images)


@for_python
def mct_representative_data_gen(
    data: Source, image_size: int | None = None, *, layout: Layout = "nchw"
) -> Callable[[], Iterator[list[np.ndarray]]]:
    """For MCT (Sony's Model Compression Toolkit): a `representative_data_gen`.

        model, _ = model_compression_toolkit.ptq.pytorch_post_training_quantization(
            network, mct_representative_data_gen("my-set"))

    Args:
        data, image_size: see `CalibrationImages.open`.
        layout: "nhwc" for Keras.
    """
    images = CalibrationImages.open(data, image_size, layout=layout)
    return lambda: ([image] for image in images)


@for_python
def modelopt_forward_loop(
    data: Source, image_size: int | None = None
) -> Callable[[torch.nn.Module], None]:
    """For ModelOpt (NVIDIA's Model Optimizer, TensorRT) on a PyTorch model: a forward loop.

        from modelopt.torch import quantization
        quantization.quantize(
            network, quantization.INT8_DEFAULT_CFG, modelopt_forward_loop("my-set"))

    Images go to the device of the network's weights.

    Args:
        data, image_size: see `CalibrationImages.open`.
    """
    images = CalibrationImages.open(data, image_size)

    def forward_loop(network: torch.nn.Module) -> None:
        device = next((weight.device for weight in network.parameters()), None)
        with torch.no_grad():
            for image in images:
                network(torch.from_numpy(image).to(device))

    return forward_loop


def _tool(module: str, package: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        name = package or module
        raise UserError(f"{name} is not installed; pip install {name}") from None
