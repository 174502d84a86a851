"""`dfq verify` on files of the demo detector: good ones, and ones broken on purpose."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.harness import command, contents, has_one_error
from support.tiny_detector import tiny_detector
from support.verify_files import (
    QUICK,
    as_ultralytics,
    changed,
    float_layers,
    missing_sigmoid,
    nobodys,
    on_grid,
    permuted_weight,
    wrong_scale,
)

import dfq
from dfq.demo.scenes import write_coco
from dfq.errors import UserError
from dfq.export.counting import count
from dfq.export.layouts import ForeignModel
from dfq.export.opening import open_file
from dfq.export.ranges_onnx import _ancestors
from dfq.models import save_detector
from dfq.runs.folder import check_run

# Files of the runtimes, which take their time.
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve labelled scenes that the demo detector knows."""
    folder = tmp_path_factory.mktemp("verify") / "scenes"
    write_coco(folder, 12, 160)
    return folder


@pytest.fixture(scope="module")
def made(scenes: Path) -> Path:
    """A folder with `run`, placed for onnxruntime, its export `run.onnx`, and `float.onnx`."""
    folder = scenes.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFQ_HOME", str(folder / "home"))
        dfq.quantize(
            "w8a8",
            model="demo",
            data=scenes,
            out=folder / "run",
            overrides={**QUICK, "quantization.runtime": "onnxruntime"},
        )
        dfq.export(folder / "run", folder / "run.onnx")
        dfq.export("demo", folder / "float.onnx")
    return folder


@pytest.fixture
def other(place: Path) -> Path:
    """A file of another detector, of three categories."""
    save_detector(tiny_detector(), place / "tiny.safetensors")
    return place / "tiny.safetensors"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DFQ_HOME", str(tmp_path / "home"))
    return tmp_path


def test_a_good_file_passes_and_is_described(place: Path, made: Path, scenes: Path) -> None:
    before = contents(made / "run")
    result = command(
        "verify", made / "run.onnx", "--against", made / "run", "--data", scenes,
        "--json", "a.json", "--max-drop", "0.01", "--threads", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert last.startswith("run.onnx: good, computes what PyTorch does, ")
    found = json.loads((place / "a.json").read_text())
    assert found["faults"] == []
    assert (found["format"], found["runtime"], found["precision"]) == (
        "onnx", "onnxruntime", "W8A8",
    )  # fmt: skip
    assert found["size_bytes"] == (made / "run.onnx").stat().st_size
    assert set(found["parity"]["outputs"]) == {"boxes", "scores"}
    assert set(found["parity"]["held"].values()) == {"within one step"}
    assert found["integers"]["share_of_macs"] > 0.98
    for row in found["integers"]["float_operations"]:
        assert row["name"]
        assert row["reason"]
    accuracy = found["accuracy"]
    wanted = dfq.evaluate(made / "run.onnx", scenes).AP
    assert accuracy["AP"] == pytest.approx(wanted)
    assert accuracy["reference_AP"] == pytest.approx(
        dfq.evaluate(made / "run", scenes).AP, abs=0.01
    )
    words = shlex.split(found["command"])
    assert words[:2] == ["dfq", "verify"]
    assert words[-6:] == ["--data", str(scenes), "--max-drop", "0.01", "--threads", "1"]
    # What was found stays beside the run, which is as sound as before.
    beside = made / "run" / "exports" / "run.onnx.verify.json"
    assert json.loads(beside.read_text()) == found
    check_run(made / "run")
    after = contents(made / "run")
    assert {name: data for name, data in after.items() if "exports" not in name} == before


@pytest.mark.parametrize("change", [wrong_scale, permuted_weight, missing_sigmoid])
def test_a_file_that_computes_something_else_fails(
    place: Path, made: Path, scenes: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    path = changed(made / "run.onnx", place / "broken.onnx", change)
    result = command("verify", path, "--against", made / "run", "--data", scenes)
    assert result.exit_code == 1, result.output
    assert "FAULT: parity: the output " in result.stdout
    assert "broken.onnx: " in result.stdout.splitlines()[-1]


def test_layers_left_in_float_are_named(place: Path, made: Path, scenes: Path) -> None:
    path = changed(made / "run.onnx", place / "slow.onnx", float_layers)
    found = dfq.verify(path, made / "run", data=scenes)
    assert any(fault.startswith("integers: ") for fault in found.faults)
    reasons = {one.reason for one in found.integers.operations if not one.integers}
    assert any(reason and reason.startswith("no quantize directly on its") for reason in reasons)


def test_multiply_accumulates_are_those_of_the_network(made: Path) -> None:
    wanted = sum(layer.macs for layer in dfq.inspect("demo").layers)
    for name in ("float.onnx", "run.onnx"):
        total = sum(one.macs for one in count(open_file(made / name)).operations)
        # The products of attention and of the distances are no layers.
        assert wanted <= total <= 1.03 * wanted


def test_one_scale_for_boxes_and_scores(place: Path, made: Path, scenes: Path) -> None:
    path = changed(made / "float.onnx", place / "u.onnx", lambda m: as_ultralytics(m, high=170.0))
    result = command("verify", path, "--against", "demo", "--data", scenes)
    assert result.exit_code == 1, result.output
    assert "FAULT: one scale for boxes and scores: " in result.stdout


def test_a_missing_range_of_the_distances(place: Path, made: Path, scenes: Path) -> None:
    def without_range(model: onnx.ModelProto) -> None:
        as_ultralytics(model)
        makers = {name: node for node in model.graph.node for name in node.output}
        only = _ancestors(["boxes"], makers) - _ancestors(["scores"], makers)
        softmax = [n for n in model.graph.node if n.op_type == "Softmax"]
        name = next(n.input[0] for n in softmax if n.input[0] in only)
        on_grid(model, name, -0.05, 0.05)

    path = changed(made / "float.onnx", place / "d.onnx", without_range)
    result = command("verify", path, "--against", "demo", "--data", scenes)
    assert result.exit_code == 1, result.output
    assert "FAULT: missing or too small range in the box branch (DFL)" in result.stdout
    assert "one scale" not in result.stdout


def test_ranges_found_on_something_else(place: Path, made: Path, scenes: Path) -> None:
    def narrow(model: onnx.ModelProto) -> None:
        nobodys(model)
        convolution = [n for n in model.graph.node if n.op_type == "Conv"][1]
        on_grid(model, convolution.output[0], -0.3, 0.3)

    path = changed(made / "float.onnx", place / "n.onnx", narrow)
    result = command("verify", path, "--against", "demo", "--data", scenes)
    assert result.exit_code == 1, result.output
    assert "FAULT: calibrated on noise, or ranges too small: " in result.stdout


def test_anyones_file_in_the_usual_layout(place: Path, made: Path, scenes: Path) -> None:
    path = changed(made / "float.onnx", place / "u.onnx", as_ultralytics)
    other = changed(made / "float.onnx", place / "other.onnx", as_ultralytics)
    for against in (other, made / "float.onnx", "demo"):
        found = dfq.verify(path, against, data=scenes)
        assert found.faults == []
        assert found.moved is not None
        assert found.moved.all.detections > 20
        assert found.moved.all.share == 1
        assert found.moved.all.box_iou == pytest.approx(1, abs=1e-3)
        assert found.threshold == pytest.approx(0.25, abs=0.01)
    assert found.accuracy is not None
    measured, wanted = found.accuracy.AP, dfq.evaluate("demo", scenes).AP
    assert measured == pytest.approx(wanted, abs=2e-3)


def test_anyones_file_of_another_network(place: Path, made: Path, scenes: Path) -> None:
    """With the layout and the categories of the float model, and other weights."""
    stranger = dfq.load_detector("demo")
    generator = torch.Generator().manual_seed(0)
    for parameter in stranger.module.parameters():
        if parameter.ndim == 4:
            order = torch.randperm(len(parameter), generator=generator)
            parameter.data = parameter.data[order]
    save_detector(stranger, place / "stranger.safetensors")
    dfq.export(place / "stranger.safetensors", place / "stranger.onnx")
    path = changed(place / "stranger.onnx", place / "u.onnx", as_ultralytics)
    for data in (scenes, scenes / "images"):
        (fault,) = dfq.verify(path, "demo", data=data).faults
        assert "of another network" in fault


def test_images_without_labels_tell_how_much_agrees(made: Path, scenes: Path) -> None:
    found = dfq.verify(made / "run.onnx", "demo", data=scenes / "images")
    assert found.accuracy is not None
    assert found.accuracy.AP is None
    assert found.accuracy.agreement is not None
    assert found.accuracy.agreement["AP"] > 0.7
    assert found.parity is None


def test_a_drop_of_accuracy_counts(made: Path, scenes: Path) -> None:
    from dfq.export import faults
    from dfq.export.verify import DetectionAccuracy

    def of_accuracy(
        file: float, reference: float, most: float, between: tuple[float, float] | None = None
    ) -> list[str]:
        return faults.of_accuracy(
            DetectionAccuracy("set", 8, file, reference, difference=between), most
        )

    assert of_accuracy(0.5, 0.5031, 0.003)
    assert not of_accuracy(0.5, 0.5029, 0.003)
    assert not of_accuracy(0.6, 0.5, 0.003)
    # What another draw of images might turn round is no fault.
    assert not of_accuracy(0.5, 0.51, 0.003, (-0.03, 0.01))
    assert of_accuracy(0.5, 0.51, 0.003, (-0.03, -0.002))


def test_without_a_set_shapes_are_drawn_and_it_is_said(made: Path) -> None:
    found = dfq.verify(made / "float.onnx", "demo")
    assert "drawn" in found.images
    assert found.faults == []
    assert found.parity is not None
    assert found.parity.holds
    assert found.integers.share_of_macs == 0


def test_a_run_for_another_runtime(place: Path, made: Path, scenes: Path) -> None:
    """Its ranges are found anew, and found again, on the images that it was made on."""
    dfq.export(made / "run", place / "run.xml")
    found = dfq.verify(place / "run.xml", made / "run")
    assert found.images.endswith("scenes, which the run was made on")
    assert found.parity is not None
    assert found.faults == []
    assert found.integers.share_of_macs > 0.98
    assert "OpenVINO" in found.integers.counted_from
    # On other images they are others.
    write_coco(place / "others", 4, 160, first_seed=99)
    dfq.export(made / "run", place / "other.xml", data=place / "others")
    other = dfq.verify(place / "other.xml", made / "run")
    assert other.parity is None
    assert any("parity: not measured" in note for note in other.notes)


def test_a_run_whose_images_are_gone_asks_for_others(place: Path, made: Path) -> None:
    shutil.copytree(made / "run", place / "run")
    manifest = json.loads((place / "run" / "manifest.json").read_text())
    manifest["data_path"] = str(place / "gone")
    (place / "run" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was made on is not where it was"):
        dfq.export("run", "run.xml")
    assert not (place / "run.xml").exists()


def test_what_does_not_belong_together_is_refused(place: Path, made: Path, other: Path) -> None:
    line = has_one_error(command("verify", made / "run.onnx", "--against", other))
    assert "was made from another network" in line
    line = has_one_error(command("verify", made / "float.onnx", "--against", made / "run"))
    assert "another run of this network" in line
    line = has_one_error(command("verify", made / "float.onnx", "--against", made / "run.onnx"))
    assert "is quantized" in line
    line = has_one_error(command("verify", "none.onnx", "--against", "demo"))
    assert "none.onnx: no such file" in line
    (place / "odd.onnx").write_bytes(b"odd")
    assert "cannot be opened" in has_one_error(command("verify", "odd.onnx", "--against", "demo"))


def test_a_file_of_other_categories_is_refused(place: Path, made: Path, other: Path) -> None:
    path = changed(made / "float.onnx", place / "u.onnx", as_ultralytics)
    line = has_one_error(command("verify", path, "--against", other))
    assert "in no layout of 3 categories" in line


def test_a_runtime_that_is_not_installed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    line = has_one_error(command("verify", made / "run.onnx", "--against", made / "run"))
    assert "pip install 'dfq[export]'" in line


def test_the_kit_calibrated_on_noise(
    place: Path, kit: Path, yolov5n: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What onnxruntime's own quantizer makes of noise is named, and the score that it advises
    brings as many detections as the float network has, within 3 %."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    preprocess = pytest.importorskip("onnxruntime.quantization.shape_inference")
    dfq.export(yolov5n, "float.onnx", image_size=320)
    preprocess.quant_pre_process("float.onnx", "ready.onnx", skip_symbolic_shape=True)
    generator = np.random.default_rng(0)
    noise = [{"images": generator.random((1, 3, 320, 320), np.float32)} for _ in range(8)]

    class Noise(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def get_next(self) -> dict[str, np.ndarray] | None:
            return noise.pop() if noise else None

    quantization.quantize_static(
        "ready.onnx", "noise.onnx", Noise(), per_channel=True,
        quant_format=quantization.QuantFormat.QDQ,
    )  # fmt: skip
    found = dfq.verify("noise.onnx", yolov5n, data=kit / "coco-val")
    assert any(fault.startswith("calibrated on noise") for fault in found.faults)
    assert found.threshold is not None
    assert found.threshold < 0.15
    images = kit / "coco-val" / "images"
    wanted = dfq.predict(yolov5n, images, image_size=320, threshold=0.25)
    own = ForeignModel(open_file("noise.onnx"), wanted[0].names, None)
    given = dfq.predict(own, images, threshold=found.threshold)
    total = sum(map(len, wanted))
    assert total > 500
    assert abs(sum(map(len, given)) - total) <= 0.03 * total
