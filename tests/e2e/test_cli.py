"""Every command, on a tiny detector, as other programs call them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from PIL import Image
from support.cli_parts import real_set, stamps
from support.harness import as_shipped, command, contents, has_one_error
from support.tiny_detector import blobs

import dfq
from dfq.cli.main import cli
from dfq.demo.picture import draw_picture
from dfq.recipe import load_recipe
from dfq.synthesis.inversion import Inversion

OPTIONS = {
    "synthesize": "model out images image_size iterations batch_size labels init recipe "
    "workers tensorboard seed overrides device trust",
    "qat": "recipe model data out select_on photos overrides seed device trust",
    "eval": "model data against image_size json_file device trust",
    "inspect": "model json_file trust",
    "cost": "model image_size measure runtime json_file trust",
    "sensitivity": "model data recipe budget cost images json_file seed overrides device trust",
    "report": "run out",
    "deploy": "model target out images data image_size quick seed overrides device trust",
    "demo": "out",
}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimising an image is an error from here on."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("images were optimised again")

    monkeypatch.setattr(Inversion, "batch", forbidden)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_the_options_other_programs_rely_on(name: str) -> None:
    found = cli.commands[name].params
    # There may be more; these are promised.
    assert {p.name for p in found} >= set(OPTIONS[name].split())
    flags = {p.name: p.opts[0] for p in found if isinstance(p, click.Option)}
    assert all(
        flag == "--" + {"overrides": "set", "json_file": "json"}.get(key, key.replace("_", "-"))
        for key, flag in flags.items()
    )


def test_python_m_dfq_answers_without_loading_torch() -> None:
    code = (
        "import sys; sys.argv = ['dfq', '--help']\n"
        "try:\n    import runpy; runpy.run_module('dfq', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in OPTIONS)


def test_synthesize_into_a_folder(place: Path, model: Path) -> None:
    result = command(
        "synthesize", "--model", model, "--out", "set", "--images", "3", "--image-size", "64",
        "--iterations", "2", "--batch-size", "2", "--seed", "5", "--device", "cpu",
        "--set", "synthesis.label_stage.image_size=64", "--set", "synthesis.label_stage.updates=2",
        "--set", "synthesis.label_stage.iterations=4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads((place / "set" / "annotations.json").read_text())
    assert len(document["images"]) == 3
    assert [c["name"] for c in document["categories"]] == ["a", "b", "c"]
    objects = len(document["annotations"])
    assert objects >= 3
    quality, line = result.stdout.splitlines()
    assert quality.startswith("BatchNorm, shift in sigmas")
    assert line == f"3 images, {objects} objects: set"
    manifest = json.loads((place / "set" / "manifest.json").read_text())
    determinants = manifest["determinants"]
    assert determinants["seed"] == 5
    assert determinants["synthesis"]["iterations"] == 2
    assert determinants["synthesis"]["label_stage"]["iterations"] == 4
    assert len(manifest["shards"]) == 2
    for image in document["images"]:
        with Image.open(place / "set" / "images" / image["file_name"]) as opened:
            assert opened.size == (64, 64)
            assert opened.mode == "RGB"


def test_the_recipe_s_synthesis_counts(place: Path, model: Path, made: Path) -> None:
    result = command("synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "set")
    assert result.exit_code == 0, result.output
    # Another process of the same settings and seed gives the same bytes; here, another call.
    assert contents(place / "set") == contents(made)
    assert command(
        "synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "other", "--seed", "1"
    ).exit_code == 0  # fmt: skip
    images = [contents(folder)["images/00000000.png"] for folder in (place / "other", made)]
    assert images[0] != images[1]


def test_twice_is_once(place: Path, model: Path, request: pytest.FixtureRequest) -> None:
    words = ("synthesize", "--model", model, "--recipe", "tiny.yaml")
    first = command(*words)
    assert first.exit_code == 0, first.output
    (folder,) = (place / "home").iterdir()
    assert folder.name.startswith("tiny-4x64-")
    assert first.stdout.endswith(f": {folder}\n")
    before = stamps(place / "home")
    request.getfixturevalue("no_work")
    second = command(*words)
    assert second.exit_code == 0, second.output
    assert second.stdout == first.stdout
    assert stamps(place / "home") == before


def test_qat_makes_the_set_once(place: Path, model: Path, request: pytest.FixtureRequest) -> None:
    words = ("qat", "--recipe", "tiny.yaml", "--model", model)
    first = command(*words)
    assert first.exit_code == 0, first.output
    (made,) = (place / "home").iterdir()
    before = stamps(place / "home")
    request.getfixturevalue("no_work")
    # What `dfq synthesize` finds is the set that `dfq qat` made.
    assert str(made) in command("synthesize", "--model", model, "--recipe", "tiny.yaml").stdout
    # Another experiment on the same images: a run of its own, no new set.
    second = command(*words, "--set", "quantization.weight_bits=8")
    assert second.exit_code == 0, second.output
    assert stamps(place / "home") == before
    assert {p.name for p in (place / "runs").iterdir()} == {"tiny-tiny-1", "tiny-tiny-2"}
    assert first.stdout.splitlines()[-1] == "runs/tiny-tiny-1"
    bits = [
        json.loads((place / "runs" / f"tiny-tiny-{n}" / "metrics.json").read_text())["weight_bits"]
        for n in (1, 2)
    ]
    assert bits == [4, 8]


def test_a_shipped_recipe_without_a_file(place: Path, model: Path, made: Path) -> None:
    for name, folder in (("w4a8", "w4a8-tiny-1"), ("w4a8.yaml", "w4a8-tiny-2")):
        result = command(
            "qat", "--recipe", name, "--model", model, "--data", made,
            "--set", "distillation.epochs=1", "--set", "quantization.calibration_images=2",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        resolved = load_recipe(place / "runs" / folder / "recipe.yaml")
        assert (
            resolved.quantization
            == load_recipe("w4a8", ["quantization.calibration_images=2"]).quantization
        )
        assert resolved.distillation.epochs == 1
        assert resolved.model == str(model)


def test_a_run_folder(run: Path, made: Path, model: Path) -> None:
    assert {p.name for p in run.iterdir()} == {
        "recipe.yaml",
        "metrics.json",
        "model.safetensors",
        "manifest.json",
        "report.html",
        "log.txt",
    }
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["method"] == "qat"
    assert metrics["selected"] == "qat: ema weights"
    assert (metrics["weight_bits"], metrics["activation_bits"]) == (4, 8)
    assert metrics["quantized_share_of_macs"] == pytest.approx(1)
    assert len(metrics["history"]) == 2
    assert set(metrics["teacher_divergence"]) == {"start", "last", "ema"}
    assert all(value > 0 for value in metrics["teacher_divergence"].values())
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["identity"]["checkpoint"] == dfq.load_detector(model).fingerprint
    assert manifest["spec"]["family"] == "yolov5"
    log = (run / "log.txt").read_text()
    assert "epoch 2/2" in log
    assert str(made) in log
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert resolved["distillation"]["lr"] == load_recipe(None).distillation.lr


def test_a_finished_run_is_not_trained_again(
    run: Path, made: Path, model: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfq.qat.trainer import Trainer

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(Trainer, "train", forbidden)
    before = stamps(run)
    result = command("qat", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out", run)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(run)
    assert stamps(run) == before


def test_the_same_seed_gives_the_same_run(run: Path, made: Path, model: Path, place: Path) -> None:
    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", made)
    assert command(*words, "--out", "again").exit_code == 0
    assert contents(place / "again") == contents(run)
    assert command(*words, "--out", "other", "--seed", "1").exit_code == 0
    assert contents(place / "other")["model.safetensors"] != contents(run)["model.safetensors"]


def test_ptq(place: Path, model: Path, made: Path) -> None:
    result = command(
        "qat", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out", "ptq",
        "--set", "method=ptq",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    metrics = json.loads((place / "ptq" / "metrics.json").read_text())
    assert metrics["selected"] == "ptq"
    assert "history" not in metrics
    assert dfq.load_run(place / "ptq").raw(blobs(1))[0].isfinite().all()


def test_real_images_train_too(place: Path, model: Path) -> None:
    data = real_set(place / "real")
    result = command(
        "qat", "--recipe", "tiny.yaml", "--model", model, "--data", data, "--out", "run",
        "--set", "distillation.weights.task=0.1",
        "--set", f"evaluation.data={data}", "--set", "evaluation.image_size=64",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    assert "task" in metrics["history"][0]
    assert set(metrics["evaluation"]) == {"data", "float", "quantized"}
    assert metrics["evaluation"]["quantized"]["images"] == 4
    assert "quantized: AP 0.0" in result.stdout


def test_a_reloaded_run_gives_the_same_bits(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfq.runs.folder import Run

    kept: list[Any] = []
    plain = Run.finish

    def finish(self: Any, detector: Any, *rest: Any) -> None:
        kept.append(detector)
        plain(self, detector, *rest)

    monkeypatch.setattr(Run, "finish", finish)
    folder = dfq.quantize("tiny.yaml", model=model, data=made, out="run", device="cpu")
    images = blobs(3, seed=9)
    with torch.no_grad():
        trained, loaded = (d.raw(images) for d in (kept[0], dfq.load_run(folder)))
        original = dfq.load_detector(model).raw(images)
    assert all(torch.equal(a, b) for a, b in zip(trained, loaded, strict=True))
    assert not torch.equal(loaded[0], original[0])


def test_eval(place: Path, model: Path, run: Path, made: Path) -> None:
    for source in (model, run):
        result = command("eval", "--model", source, "--data", made, "--json", "deep/er/a.json")
        assert result.exit_code == 0, result.output
        found = json.loads((place / "deep" / "er" / "a.json").read_text())
        assert found["images"] == 4
        assert found["image_size"] == 64
        for key in ("AP", "AP50"):
            assert 0 <= found[key] <= 1
            assert f"{key:<10} {found[key]:.4f}" in result.stdout
        assert "4 images at 64 px" in result.stdout
    bigger = command("eval", "--model", model, "--data", made, "--image-size", "128")
    assert "4 images at 128 px" in bigger.stdout


def test_eval_gives_what_python_gives(place: Path, model: Path) -> None:
    data = real_set(place / "real", names=("b", "unheard of"))
    result = command("eval", "--model", model, "--data", data, "--json", "a.json")
    assert result.exit_code == 0, result.output
    found = json.loads((place / "a.json").read_text())
    expected = dfq.evaluate(dfq.load_detector(model), data)
    assert (found["AP"], found["AP50"]) == (expected.AP, expected.AP50)
    assert set(found["per_category"]) == {"b"}
    assert "not measured, unknown to the model: unheard of" in result.stdout


def test_inspect(place: Path, model: Path, run: Path) -> None:
    result = command("inspect", "--model", model, "--json", "float.json")
    assert result.exit_code == 0, result.output
    before = json.loads((place / "float.json").read_text())
    assert before["quantized_share_of_macs"] == 0
    assert {row["weight_bits"] for row in before["layers"]} == {32}
    # The first layer by hand: 8 filters of 3 x 3 x 3 at 32 x 32 places.
    first = before["layers"][0]
    assert first["weight_shape"][:2] == [8, 3]
    assert first["output_shape"] == [8, 32, 32]
    assert first["macs"] == 8 * 32 * 32 * 3 * 3 * 3
    assert first["name"] in result.stdout
    assert before["macs"] == sum(row["macs"] for row in before["layers"])

    # One residual sum; two blocks, a pooling and the neck concatenate.
    assert before["sums_and_concatenations"] == {"quantized": 0, "all": 5}
    assert "sums and concatenations quantized: 0 of 5" in result.stdout

    result = command("inspect", "--model", run, "--json", "run.json")
    after = json.loads((place / "run.json").read_text())
    count = len(after["layers"])
    assert f"{count} of {count} layers quantized: 100.0% of" in result.stdout
    assert [row["name"] for row in after["layers"]] == [row["name"] for row in before["layers"]]
    assert after["macs"] == before["macs"]
    bits = [row["weight_bits"] for row in after["layers"]]
    # The first layer and both levels' last ones stay at 8 bits.
    assert bits[0] == 8
    assert bits.count(8) == 3
    assert set(bits) == {4, 8}
    assert after["bit_operations"] == sum(
        row["macs"] * row["weight_bits"] * row["activation_bits"] for row in after["layers"]
    )


def test_cost(place: Path, model: Path, run: Path) -> None:
    before, after = Path("float.json"), Path("run.json")
    assert command("cost", "--model", model, "--json", before).exit_code == 0
    result = command("cost", "--model", run, "--json", after)
    assert result.exit_code == 0, result.output
    as_float, found = json.loads(before.read_text()), json.loads(after.read_text())
    inspected = dfq.inspect(run)
    assert [row["name"] for row in found["layers"]] == [row.name for row in inspected.layers]
    assert all(row["name"] in result.stdout for row in found["layers"])
    assert found["total"]["macs"] == inspected.to_dict()["macs"]
    assert found["total"]["bit_operations"] == inspected.to_dict()["bit_operations"]
    # What the run would be without quantizers is what it was made from.
    assert found["float"] == as_float["total"] == as_float["float"]
    assert set(as_float["ratio"].values()) == {1.0}
    assert found["ratio"]["memory_bytes"] == 0.25
    assert 0.125 < found["ratio"]["disk_bytes"] < 0.25
    # The weights are what most of the file is.
    assert found["total"]["disk_bytes"] < (run / "model.safetensors").stat().st_size
    assert "Horowitz" in result.stdout
    assert dfq.cost(run).to_dict() == found
    larger = command("cost", "--model", run, "--image-size", "128")
    assert "128 px" in larger.stdout


def test_cost_of_an_exported_file(place: Path) -> None:
    (place / "a.onnx").write_bytes(b"x" * 2_340_000)
    result = command("cost", "--model", "a.onnx", "--json", "a.json")
    assert result.exit_code == 0, result.output
    assert "a.onnx: 2.34 MB on disk" in result.stdout
    assert "layers are listed for models and runs" in result.stdout
    assert json.loads(Path("a.json").read_text()) == {"model": "a.onnx", "disk_bytes": 2_340_000}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none.onnx",), "none.onnx: there is no such file"),
        (("none.pt",), "none.pt"),
        (("MODEL", "--image-size", "100"), "--image-size: 100 is no multiple"),
        (("MODEL", "--image-size", "0"), "--image-size: 0 is no multiple"),
        (("MODEL", "--image-size", "16400"), "--image-size: 16400 is too large"),
        (("SET",), "is a calibration set and no detector"),
        (("tiny.yaml",), "tiny.yaml"),
    ],
)
def test_cost_of_what_it_cannot_count(
    place: Path, model: Path, made: Path, words: tuple[str, ...], message: str
) -> None:
    real = {"MODEL": str(model), "SET": str(made)}
    name, *more = (real.get(word, word) for word in words)
    assert message in has_one_error(command("cost", "--model", name, *more, "--json", "a.json"))
    assert not (place / "a.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)",
        "CUDA out of memory. Tried to allocate 64.00 GiB",
    ],
)
def test_an_image_that_memory_is_too_small_for(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """As torch says it of the CPU and of a GPU."""
    from dfq.models.yolov5.detector import YOLOv5

    def full(*_: Any) -> None:
        raise RuntimeError(text)

    with monkeypatch.context() as patch:
        patch.setattr(YOLOv5, "raw", full)
        line = has_one_error(command("cost", "--model", model, "--image-size", "16384"))
    assert "out of memory" in line
    assert "lower the batch size or the image size" in line


def test_an_ultralytics_model_of_yaml(place: Path) -> None:
    # Random weights: the whole way, through the other family's head and a shipped YAML.
    network = yaml.safe_load(
        """
        nc: 3
        backbone:
          - [-1, 1, Conv, [8, 3, 2]]
          - [-1, 1, Conv, [8, 3, 2]]
          - [-1, 1, C3k2, [16, False, 0.25]]
          - [-1, 1, Conv, [16, 3, 2]]
          - [-1, 1, Conv, [16, 3, 2]]
        head:
          - [[3, 4], 1, Detect, [nc]]
        """
    )
    (place / "net.yaml").write_text(yaml.safe_dump(network))
    words = ("qat", "--recipe", "tiny.yaml", "--model", "net.yaml", "--out", "run")
    result = command(*words)
    assert result.exit_code == 0, result.output
    (made,) = (place / "home").iterdir()
    # Loading it again draws the same weights, so the set is found.
    again = command("synthesize", "--model", "net.yaml", "--recipe", "tiny.yaml")
    assert again.stdout.endswith(f"{made}\n")
    assert command("eval", "--model", "run", "--data", made, "--image-size", "64").exit_code == 0
    assert "detector.safetensors" not in os.listdir(place)
    layers = dfq.inspect(place / "run").layers
    assert {layer.kind for layer in layers} == {"conv"}
    assert all(layer.quantized for layer in layers)


def test_the_verbs_in_python(place: Path, model: Path) -> None:
    recipe = dfq.load_recipe("tiny.yaml")
    made = dfq.synthesize(str(model), recipe, out=place / "set", device="cpu")
    assert len(made) == 4
    assert made.verify() == []
    # A loaded detector serves as well as its file, and is still of use afterwards.
    detector = dfq.load_detector(model)
    before = detector.raw(blobs(1))
    assert dfq.synthesize(detector, recipe, out=place / "set").root == place / "set"
    cached = dfq.synthesize(detector, recipe)
    assert cached.root.parent == place / "home"
    assert contents(cached.root) == contents(place / "set")
    assert all(torch.equal(a, b) for a, b in zip(detector.raw(blobs(1)), before, strict=True))
    run = dfq.quantize(recipe, model=model, data=made.root, out=place / "run")
    assert run == place / "run"
    assert 0 <= dfq.evaluate(run, made.root).AP <= 1
    assert dfq.inspect(run).quantized_share == pytest.approx(1)
    with pytest.raises(dfq.UserError):
        dfq.synthesize(place / "nothing.pt")


def test_progress_is_told(place: Path, model: Path) -> None:
    result = command("synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "set")
    assert "synthesis: 4/4 images" in result.stderr
    assert "synthesis:" not in result.stdout


def test_demo(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The flow and the recipe as they are, but for the size of the work.
    (place / "recipes").mkdir()
    (place / "recipes" / "w8a8.yaml").write_text(as_shipped("w8a8"))
    monkeypatch.setattr(
        "dfq.recipe.shipped_recipes", lambda: {"w8a8": place / "recipes" / "w8a8.yaml"}
    )
    work = {"synthesis.images": 16, "synthesis.iterations": 0, "quantization.rounding_images": 4}
    monkeypatch.setattr("dfq.api.demo.SMALL", {**work, "synthesis.image_size": 160})
    monkeypatch.setattr("dfq.api.demo.SCENES", 6)
    columns: list[Any] = []

    def drawn(scenes: Any, chosen: Any, both: Any, made: Any) -> Image.Image:
        columns[:] = both
        assert len(scenes) == 6
        return draw_picture(scenes, chosen, both, made)

    monkeypatch.setattr("dfq.api.demo.draw_picture", drawn)
    result = command(
        "demo",
        "--out",
        "demo",
    )
    assert result.exit_code == 0, result.output
    found = json.loads((place / "demo" / "results.json").read_text())
    assert found["float"]["AP"] > 0.3
    assert found["float"]["kept"] == 1
    assert len(found) == 3  # float, naive, this
    (this,) = (name for name in found if "this" in name)
    # The picture says of which network its sides are, and how good they are.
    left, right = columns
    assert "float" in left.title
    assert "INT8" in right.title
    assert f"AP {found['float']['AP']:.3f}" in left.figure
    assert f"AP {found[this]['AP']:.3f}" in right.figure
    # What was measured is the file, and it is a good one.
    scenes = place / "demo" / "validation"
    assert found[this]["AP"] == dfq.evaluate(place / "demo" / "demo-int8.onnx", scenes).AP
    assert json.loads((place / "demo" / "deploy.json").read_text())["faults"] == []
    assert found["float"]["AP"] == dfq.evaluate("demo", place / "demo" / "validation").AP
    with Image.open(place / "demo" / "images.png") as grid:
        assert grid.size[0] > 4 * 320
    page = (place / "demo" / "report.html").read_text()
    for row in found.values():
        assert f"<td>{row['AP']:.3f}" in page.replace(' class="this"', "")
    assert "6 scenes that none of them ever saw" in page
    # The naive ones have its bits, and so cost the same.
    (costs,) = re.findall(r"Bit operations an image<small>.*?</tr>", page)[:1]
    assert len(set(re.findall(r"<td[^>]*>(.*?)</td>", costs)[1:])) == 1
    assert "–" not in costs
    again = stamps(place / "demo")
    assert command("demo", "--out", "demo").exit_code == 0
    changed = {Path(p).name for p, t in stamps(place / "demo").items() if again[p] != t}
    assert not changed
