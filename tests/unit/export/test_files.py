"""What is in a file besides the network, and what becomes of files that are wrong."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_detector import SIDE, blobs, tiny_detector

import dfq
from dfq import export
from dfq.api.export import choose
from dfq.errors import UserError
from dfq.export import writers
from dfq.export.counting_openvino import count_openvino
from dfq.export.opened import open_exported
from dfq.export.opening import OpenVinoFile
from dfq.graph.fold_batchnorm import fold
from dfq.quantization.bit_widths import parse_widths
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.settings import Quantization
from dfq.runs.folder import Run

# Files of the runtimes, which take their time.
pytestmark = pytest.mark.e2e

SUFFIXES = (".onnx", ".xml", ".pt2")


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".tflite"])
def test_a_float_file_says_what_it_is_and_gives_what_the_network_gives(
    suffix: str, tmp_path: Path
) -> None:
    detector, images = tiny_detector(), blobs(1)
    detector.source = f"{tmp_path / 'mine' / 'net.py'}@{tmp_path / 'theirs' / 'best.pt'}"
    path = export(detector, tmp_path / f"x{suffix}")
    opened = open_exported(path, trust=True)
    info = opened.info
    assert (info.names, info.image_size, info.stride) == (["a", "b", "c"], SIDE, 16)
    assert "114" in info.letterbox
    assert "[0, 1]" in info.normalisation
    assert list(info.outputs) == ["boxes", "scores"]
    assert info.source == info.spec["source"] == "net.py@best.pt"
    with torch.no_grad():
        wanted = detector.outputs(detector.raw(images), (SIDE, SIDE))
    for name, value in opened.run(images.numpy()).items():
        scale = 1 if name == "scores" else SIDE
        assert np.abs(value - wanted[name].numpy()).max() < 1e-4 * scale
    # Neither this machine's folders nor where the code lies.
    here = str(Path(dfq.__file__).parents[1]).encode()
    for file in tmp_path.iterdir():
        assert here not in file.read_bytes(), file.name
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_any_number_of_images_or_several_at_once(suffix: str, tmp_path: Path) -> None:
    detector, images = tiny_detector(), blobs(5).numpy()
    (alone, free, four) = (
        open_exported(export(detector, tmp_path / f"{batch}{suffix}", batch=batch))
        for batch in (1, None, 4)
    )
    for name, value in alone.run(images).items():
        assert len(value) == 5
        # One that takes four is given the fifth among black images.
        for other in (free, four):
            np.testing.assert_allclose(other.run(images)[name], value, rtol=0, atol=1e-3)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".tflite"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_files_are_refused_in_one_line(suffix: str, damage: str, tmp_path: Path) -> None:
    if damage == "cut" and suffix != ".tflite":
        path = export(tiny_detector(), tmp_path / f"x{suffix}")
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path = tmp_path / f"x{suffix}"
        path.write_bytes(b"" if damage == "empty" else b"no model at all" * 9)
    with pytest.raises(UserError) as error:
        open_exported(path, trust=True)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_pytorchs_files_are_run_by_their_loader_and_so_need_trust(tmp_path: Path) -> None:
    path = export(tiny_detector(), tmp_path / "x.pt2")
    with pytest.raises(UserError, match="--trust"):
        open_exported(path)
    assert open_exported(path, trust=True).names == ["a", "b", "c"]


def test_nothing_is_left_of_a_conversion_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setitem(writers._WRITERS, "onnx", fail)
    with pytest.raises(UserError, match=r"no such kernel") as error:
        export(tiny_detector(), tmp_path / "x.onnx")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("suffix", "format", "runtime"),
    [
        (".onnx", None, "litert"),
        (".xml", None, "tensorrt"),
        (".tflite", None, "openvino"),
        (".onnx", "openvino", None),
        (".bin", None, None),
        (".onnx", None, "coreml"),
    ],
)
def test_formats_and_runtimes_that_exclude_each_other(
    suffix: str, format: str | None, runtime: str | None
) -> None:
    with pytest.raises(UserError) as error:
        choose(Path(f"x{suffix}"), format, runtime)
    assert "\n" not in str(error.value)


# ---- activations of 16 bits


def test_widths_up_to_sixteen_are_of_activations_alone() -> None:
    assert parse_widths("w8a16") == (8, 16)
    assert parse_widths("w4a9") == (4, 9)
    for wrong in ("w16a16", "w8a17", 16, "w8a1"):
        with pytest.raises(ValueError, match="16"):
            parse_widths(wrong)
    section = Quantization(overrides={"model.0*": "w8a16"}, mixed={"candidates": [4, "w8a16"]})
    assert section.candidates()[1] == (8, 16)
    assert Policy(overrides=(("a", "w8a16"),)).bits_for("a", False) == (8, 16)


@pytest.mark.parametrize("runtime", ["litert", "tensorrt"])
def test_runtimes_of_eight_bits_alone_have_none(runtime: str, tmp_path: Path) -> None:
    sections: list[dict[str, Any]] = [
        {"overrides": {"a": "w8a16"}},
        {"activation_bits": 16},
        {"mixed": {"candidates": [8, "w8a16"]}},
    ]
    for section in sections:
        with pytest.raises(ValueError, match=f"{runtime} has no activations of 16 bits; 8 at most"):
            Quantization(**section, placement="qdq", runtime=runtime)
        # Another placement is no runtime's.
        Quantization(**section, runtime=runtime)
    # A run that was made for another one is refused before its ranges are found, and not after.
    student = insert_quantizers(fold(tiny_detector()), Policy(8, 16))
    calibrate(student, [blobs(2)], search="minmax")
    Run(tmp_path / "run", {"seed": 0, "checkpoint": "0" * 64}).finish(
        student, Policy(8, 16), {}, {}
    )
    suffix = ".tflite" if runtime == "litert" else ".onnx"
    with pytest.raises(UserError, match="no activations of more than 8 bits"):
        export(tmp_path / "run", tmp_path / f"x{suffix}", runtime=runtime)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_litert_has_none_of_fewer_than_eight_bits(tmp_path: Path) -> None:
    """Its converter would leave out that they are clipped."""
    for section in ({"activation_bits": 4}, {"overrides": {"a": "w8a6"}}):
        with pytest.raises(ValueError, match=r"litert has no activations of \d bits; 8 at least"):
            Quantization(**section, placement="qdq", runtime="litert")
        Quantization(**section, placement="qdq", runtime="onnxruntime")
    student = insert_quantizers(fold(tiny_detector()), Policy(4, 4))
    calibrate(student, [blobs(2)], search="minmax")
    Run(tmp_path / "run", {"seed": 0, "checkpoint": "0" * 64}).finish(student, Policy(4, 4), {}, {})
    with pytest.raises(UserError, match="no activations of fewer than 8 bits"):
        export(tmp_path / "run", tmp_path / "x.tflite")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_sixteen_bits_round_where_eight_spoil() -> None:
    quantizer = Quantizer(16, asymmetric=True)
    x = torch.linspace(-3, 100, 5000)
    from dfq.quantization.calibration import set_range

    set_range(quantizer, x, "mse")
    step = float(quantizer.scale.detach())
    assert step == pytest.approx(103 / 65535, rel=1e-3)
    assert (quantizer(x) - x).abs().max() <= 0.51 * step
    json.dumps(Policy(8, 16).to_dict())


@pytest.mark.skipif(sys.platform != "linux", reason="OpenVINO does so on Linux alone")
def test_a_runtime_leaves_the_stack_of_signals_as_it_was(tmp_path: Path) -> None:
    """Else Ctrl-C ends in a segmentation fault where OpenVINO's is too small: with AMX."""
    path = export(tiny_detector(), tmp_path / "x.xml")

    def stack() -> bytes:
        # Start, flags, size.
        found = ctypes.create_string_buffer(24)
        ctypes.CDLL(None).sigaltstack(None, found)
        return found.raw

    before = stack()
    opened = OpenVinoFile(path, None)
    assert stack() == before
    opened.run(blobs(1).numpy())
    count_openvino(opened)
    assert stack() == before
