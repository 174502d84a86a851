"""Files of classifiers: measured, verified, asked; a deployment, whose page is a classifier's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support.harness import command, has_one_error
from support.pages import Page
from support.small_classifiers import CLASSES, saved, small_resnet, write_classes

import dfq
from dfq.export import latency

pytestmark = pytest.mark.e2e

QUICK = {
    "method": "ptq", "quantization.ranges": "minmax", "quantization.rounding": "nearest",
    "quantization.reconstruction": "none", "quantization.placement": "qdq",
    "quantization.runtime": "onnxruntime",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the classifier `m.pt`, class folders `set`, `run`, `run.onnx`, `float.onnx`."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = saved(folder / "m.pt", {"state_dict": small_resnet(), "names": list(CLASSES)})
    write_classes(folder / "set", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFQ_HOME", str(folder / "home"))
        dfq.quantize(
            "w8a8", model=model, data=folder / "set", out=folder / "run",
            overrides={**QUICK, "evaluation.data": str(folder / "set")},
        )  # fmt: skip
        dfq.export(folder / "run", folder / "run.onnx")
        dfq.export(model, folder / "float.onnx")
    return folder


def test_a_file_is_measured_as_its_network(place: Path, made: Path) -> None:
    result = command(
        "eval", "--model", made / "float.onnx", "--data", made / "set", "--json", "a.json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads((place / "a.json").read_text())
    wanted = dfq.evaluate(made / "m.pt", made / "set")
    for figure in ("top1", "top5", "f1_micro", "f1_macro", "per_category"):
        assert found[figure] == getattr(wanted, figure)
    against = command(
        "eval", "--model", made / "float.onnx", "--data", made / "set", "--against", made / "m.pt"
    )
    assert "24 of 24 (100.0%)" in against.output
    assert "classifies images, and demo detects objects" in has_one_error(
        command("eval", "--model", "demo", "--data", made / "set", "--against", made / "m.pt")
    )


def test_a_good_file_is_verified(place: Path, made: Path) -> None:
    result = command(
        "verify", made / "run.onnx", "--against", made / "run", "--data", made / "set",
        "--json", "a.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((place / "a.json").read_text())
    assert found["faults"] == []
    assert found["parity"]["held"] == {"logits": "within one step"}
    assert found["integers"]["share_of_macs"] > 0.99
    file = dfq.evaluate(made / "run.onnx", made / "set")
    for figure in ("top1", "top5", "f1_micro", "f1_macro"):
        assert found["accuracy"][figure] == getattr(file, figure)
    assert found["accuracy"]["reference_top1"] == dfq.evaluate(made / "run", made / "set").top1
    # Boxes and their scores are none of a classifier's.
    assert found["threshold"] is None
    assert sum(row["images"] for row in found["moved"]["categories"].values()) == 24
    assert result.stdout.splitlines()[-1].startswith("run.onnx: good, computes what PyTorch does")


def test_a_file_that_computes_something_else_fails(place: Path, made: Path) -> None:
    model = onnx.load(str(made / "run.onnx"))
    largest = max(
        (t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8),
        key=lambda t: len(t.raw_data),
    )
    values = numpy_helper.to_array(largest)
    largest.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[::-1]), largest.name))
    onnx.save(model, "broken.onnx")
    result = command("verify", "broken.onnx", "--against", made / "run", "--data", made / "set")
    assert result.exit_code == 1, result.output
    assert "FAULT: parity: the output logits is not what PyTorch computes" in result.stdout


def nobodys(path: Path, out: str) -> str:
    """The file as if another tool had written it."""
    model = onnx.load(str(path))
    del model.metadata_props[:]
    onnx.save(model, out)
    return out


def test_anyones_file_against_its_float_network(place: Path, made: Path) -> None:
    theirs = nobodys(made / "run.onnx", "theirs.onnx")
    # Against the network itself, and against a float file that says nothing either.
    for against in (str(made / "m.pt"), nobodys(made / "float.onnx", "float.onnx")):
        result = command(
            "verify", theirs, "--against", against, "--data", made / "set", "--json", "a.json"
        )
        assert result.exit_code == 0, result.output
        found = json.loads((place / "a.json").read_text())
        assert (found["precision"], found["parity"]) == ("INT8", None)
        assert found["moved"]["same_share"] > 0.8
        assert "its input: images in [0, 1]" in " ".join(found["notes"])
        assert found["accuracy"]["float_top1"] == dfq.evaluate(made / "m.pt", made / "set").top1
    # A network that finds likeliest what this one finds least likely.
    torch.manual_seed(0)
    state = small_resnet()
    for name in ("linear.weight", "linear.bias"):
        state[name] = -state[name]
    other = saved(place / "o.pt", {"state_dict": state, "names": list(CLASSES)})
    result = command("verify", theirs, "--against", other, "--data", made / "set")
    assert result.exit_code == 1, result.output
    assert "FAULT: predictions: in " in result.stdout
    against_demo = command("verify", theirs, "--against", "demo", "--data", made / "set")
    assert "in no layout" in has_one_error(against_demo)


def test_predictions_are_those_of_the_network(place: Path, made: Path) -> None:
    images = sorted((made / "set").rglob("*.png"))
    result = command(
        "predict", "--model", made / "run.onnx", made / "set", "--compare", made / "m.pt",
        "--out", "pictures", "--json", "a.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((place / "a.json").read_text())
    assert found["kind"] == "dfq classes"
    assert json.loads((place / "pictures" / "classes.json").read_text()) == found
    assert len(list((place / "pictures").glob("*.jpg"))) == len(images) == len(found["images"])
    model = dfq.load_model(made / "m.pt")
    from PIL import Image

    for row in found["images"]:
        pixels = torch.from_numpy(np.asarray(Image.open(row["file"]).convert("RGB")).copy())
        with torch.no_grad():
            wanted = model.raw(pixels.permute(2, 0, 1)[None].float() / 255).softmax(dim=1)[0]
        said = {entry["category"]: entry["probability"] for entry in row["compare"]["float"]}
        assert [said[name] for name in CLASSES] == pytest.approx(wanted.tolist(), abs=1e-5)
        listed = [entry["probability"] for entry in row["classes"]]
        assert listed == sorted(listed, reverse=True)
        assert sum(listed) == pytest.approx(1)
    assert found["compare"]["same"] == sum(row["compare"]["same"] for row in found["images"])
    refused = command("predict", "--model", made / "run", made / "set", "--threshold", "0.5")
    assert "is for detectors" in has_one_error(refused)
    assert "classifies images" in has_one_error(
        command("predict", "--model", "demo", made / "set", "--compare", made / "m.pt")
    )


def test_a_deployment_of_a_classifier(
    place: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "ROUNDS", 1)
    defaults = latency.in_turns.__kwdefaults__ or {}
    monkeypatch.setattr(
        latency.in_turns, "__kwdefaults__", {**defaults, "rounds": 1, "seconds": 0.001}
    )
    done = command(
        "deploy", "--model", made / "m.pt", "--target", "onnxruntime-cpu", "--data", made / "set",
        "--images", made / "set", "--out", "out", "--set", "quantization.ranges=minmax",
        "--set", "quantization.reconstruction=none", "--set", "quantization.rounding=nearest",
        "--set", f"evaluation.data={made / 'set'}",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads((place / "out" / "deploy.json").read_text())
    assert found["verification"]["accuracy"]["top1"] > 0
    page = Page((place / "out" / "report.html").read_text())
    assert "The classifier m (3 categories)" in page.text
    assert "24 real images" in page.text
    assert page.rows("Top-1 accuracy")
    words = page.text.lower().replace("top-5", "").split()
    for word in ("detector", "detection", "detections", "box", "boxes", "ap", "nms", "iou"):
        assert word not in [w.strip(".,;:()") for w in words], word
    for line in done.stdout.lower().splitlines():
        assert "detect" not in line
        assert "boxes" not in line


def test_class_folders_are_shown(place: Path, made: Path) -> None:
    shown = command("data", "show", made / "set", "--json", "a.json", "--grid", "g.png")
    assert shown.exit_code == 0, shown.output
    assert "a category an image" in shown.stdout
    assert "box" not in shown.stdout
    found = json.loads((place / "a.json").read_text())
    assert {row["name"]: row["objects"] for row in found["categories"]} == dict.fromkeys(CLASSES, 8)
    assert (place / "g.png").is_file()
