"""`dfq report`: one page of a run that says what its files say, whatever they say."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.altered_run_parts import edited
from support.cli_parts import real_set
from support.exports_parts import WHOLE, written
from support.harness import command, contents, has_one_error
from support.pages import Page, check
from support.tiny_detector import DESCRIPTION, SIDE, blobs, tiny_detector

import dfq
from dfq.models import save_detector
from dfq.models.yolov5.detector import YOLOv5

QAT = ("qat", "--recipe", "tiny.yaml")


def read(run: Path, name: str = "metrics.json") -> dict[str, Any]:
    return dict(json.loads((run / name).read_text()))


def page_of(run: Path, name: str = "report.html") -> Page:
    return check((run / name).read_text())


def redrawn(run: Path) -> Page:
    """The page of a run as it is now."""
    result = command("report", run)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{run / 'report.html'}\n"
    return page_of(run)


COLUMNS = 6
"""Of the table of layers, without their names and where no sensitivity was measured."""


def value_of(cell: str) -> float:
    """The number that a figure with a prefix stands for."""
    number, _, unit = cell.partition(" ")
    factors = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "KiB": 2**10, "MiB": 2**20}
    return float(number) * factors[unit]


def resealed(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Other metrics in a run whose manifest agrees with them."""
    from dfq.models.checkpoint import sha256_of

    edited(run / "metrics.json", change)
    digest = sha256_of(run / "metrics.json")
    edited(run / "manifest.json", lambda value: value.update(metrics_sha256=digest))


@pytest.fixture
def copy(place: Path, run: Path) -> Path:
    """A copy of the finished run, `run` in the folder to work in."""
    return Path(shutil.copytree(run, place / "run"))


def test_a_run_ends_with_its_page_and_report_draws_the_same(copy: Path) -> None:
    before = (copy / "report.html").read_bytes()
    page = check(before.decode())
    assert "No real image was used to make it." in page.text
    assert "Not on this page" not in page.text
    (copy / "report.html").unlink()
    for _ in range(2):
        redrawn(copy)
        assert (copy / "report.html").read_bytes() == before
    assert dfq.report(copy, copy.parent / "other.html") == copy.parent / "other.html"
    assert (copy.parent / "other.html").read_bytes() == before


def test_the_page_does_not_hang_on_where_its_run_is(copy: Path) -> None:
    before = contents(copy)["report.html"]
    copy.rename(copy.parent / "elsewhere")
    redrawn(copy.parent / "elsewhere")
    assert contents(copy.parent / "elsewhere")["report.html"] == before


def test_every_figure_is_that_of_the_files(place: Path, model: Path, made: Path) -> None:
    scenes, photos = real_set(place / "scenes"), real_set(place / "photos", 6) / "images"
    result = command(
        *QAT, "--model", model, "--data", made, "--out", "run", "--photos", photos,
        "--set", f"evaluation.data={scenes}",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    run = place / "run"
    metrics, manifest, page = read(run), read(run, "manifest.json"), page_of(run)
    # A tiny network of random weights detects next to nothing: figures are told apart like this.
    resealed(
        run,
        lambda value: value.update(
            evaluation={
                "data": str(scenes),
                "float": {"AP": 0.6123, "AP50": 0.8234},
                "quantized": {"AP": 0.5987, "AP50": 0.8011},
            },
            closeness={
                "synthetic": {
                    "objects": 431, "kept": 417, "kept_above": 399, "images": 16, "held_out": False,
                },
                "photos": {
                    "objects": 281, "kept": 263, "kept_above": 251, "images": 3, "AP": 0.8766,
                    "data": str(photos),
                },
            },
            bit_operations=metrics["bit_operations"],
        ),
    )  # fmt: skip
    page = redrawn(run)
    assert page.rows("AP on")[0] == ["0.612", "0.599 97.8%"]
    assert page.rows("AP50")[0] == ["0.823", "0.801 97.3%"]
    kept, kept_on_photos = page.rows("Detections kept on")
    assert kept == ["431", "417 96.8%"]
    assert kept_on_photos == ["281", "263 93.6%"]
    assert page.rows("… with a score above 0.3 again") == [
        ["431", "399 92.6%"],
        ["281", "251 89.3%"],
    ]
    assert page.rows("Agreement AP") == [["1.000", "0.877"]]
    assert "AP 0.599, and the float network 0.612: 97.8%" in page.text
    # Training.
    first, last = metrics["history"][0], metrics["history"][-1]
    for name in first:
        assert page.rows(name)[0] == [f"{first[name]:.4g}", f"{last[name]:.4g}"]
    for name, value in metrics["teacher_divergence"].items():
        assert [f"{value:.4g}"] in page.rows(name)
    # The set.
    worst = max(
        metrics["set_quality"]["layers"],
        key=lambda row: max(row["shift"], abs(row["log_variance"])),
    )
    figures = [f"{worst['shift']:.2f}", f"{worst['log_variance']:+.2f}"]
    assert figures in page.rows(worst["name"])
    shown = command("data", "show", made, "--json", "set.json")
    assert shown.exit_code == 0, shown.output
    data = read(place, "set.json")
    assert page.terms["Images"] == str(data["images"])
    assert page.terms["Objects"] == str(data["objects"])
    for row in data["categories"]:
        assert [str(row["objects"]), ""] in page.rows(row["name"])
    # Provenance.
    assert page.terms["Its sha256"] == manifest["identity"]["checkpoint"]
    assert page.terms["sha256 of model.safetensors"] == manifest["model_sha256"]
    assert page.terms["Photos that joined calibration"] == "3"
    assert page.terms["Measured against labels"] == str(scenes)
    for line in metrics["said"]:
        assert " ".join(line.split()) in page.text
    assert "Real images had a part in it." in page.text
    assert "mind who sees this page" in page.text


def test_ranges_and_costs_are_those_of_the_network(run: Path) -> None:
    detector, page = dfq.load_run(run), page_of(run)
    found = dfq.inspect(run)
    total = sum(layer.macs for layer in found.layers)
    for layer in found.layers:
        quantizer = detector.module.get_submodule(layer.name).input_quantizer
        # What comes out for values far beyond either end.
        ends = quantizer(blobs(1).new_tensor([-1e9, 1e9])).tolist()
        (row,) = (row for row in page.rows(f"{layer.name} {layer.kind}") if len(row) == COLUMNS)
        assert row[0] == f"{layer.weight_bits} / {layer.activation_bits}"
        assert [float(end) for end in row[1].split(" … ")] == pytest.approx(ends, rel=5e-3)
        assert float(row[2]) == pytest.approx(quantizer.scale.item(), rel=5e-3)
        assert row[5] == f"{layer.macs / total:.1%}"
    bits = sum(one.weight_bits * one.activation_bits * one.macs for one in found.layers)
    assert bits == read(run)["bit_operations"]
    operations, weights = page.rows("Bit operations an image"), page.rows("Weights at their bits")
    for rows, before, after in (
        (operations, 1024 * total, bits),
        (
            weights,
            sum(4 * math.prod(one.weight_shape) for one in found.layers),
            sum(one.weight_bits / 8 * math.prod(one.weight_shape) for one in found.layers),
        ),
    ):
        # In the first table, and in the one of costs.
        assert len(rows) == 2
        assert [value_of(cell) for cell in rows[0]] == pytest.approx([before, after], rel=5e-3)
        assert [value_of(cell) for cell in rows[1][:2]] == pytest.approx([before, after], rel=5e-3)
        assert rows[1][2] == f"{before / after:.1f} ×"


def test_exported_files_are_shown_where_they_were_verified(copy: Path) -> None:
    before = page_of(copy)
    assert "Exported files" not in before.text
    written(copy, "w8a8", WHOLE)
    written(copy, "bare", {"file": "bare.tflite"})
    written(copy, "broken", "{")
    page = redrawn(copy)
    assert page.rows("boxes") == [["0.5", "2", "0.25", "99.0%"]]
    assert page.rows("320") == [["1", "40.5", "20.25", "0.5"]]
    assert page.terms["MACs in integers"] == "87.5%"
    assert page.terms["Size on disk"] == "2.00 MiB"
    assert page.rows("Size on disk, w8a8.onnx") == [["–", "2.00 MiB"]]
    assert page.terms["AP on my/val"] == "0.271 float: 0.274"
    assert "at a score of 0.3, cut those of this file at 0.27" in page.text
    assert "boxes: more than one step off" in page.text
    assert "/head/Softmax Softmax: no kernel" in page.text
    assert "dfq verify w8a8.onnx" in page.text
    assert "bare.tflite" in page.text
    assert "exports/broken.verify.json: broken or truncated JSON" in page.text


def test_sensitivity_is_shown_where_it_was_measured(place: Path, model: Path, made: Path) -> None:
    result = command(
        *QAT, "--model", model, "--data", made, "--out", "run", "--set",
        "quantization.mixed.budget=w4a8", "--set", "quantization.mixed.candidates=[4, 8]",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found, page = read(place / "run", "sensitivity.json"), page_of(place / "run")
    assert "spread over the layers by a budget" in page.text
    chosen = found["overrides"]
    assert chosen
    for row in found["layers"]:
        if row["name"] in chosen:
            (cells,) = (one for one in page.rows(f"{row['name']} conv") if len(one) == COLUMNS + 1)
            assert cells[-1] == f"{row['divergence'][chosen[row['name']]]:.3g}"
    (place / "run" / "sensitivity.json").write_text("{")
    assert "sensitivity.json: broken or truncated JSON" in redrawn(place / "run").text


# --- what is gone, or was never there


def test_without_set_and_float_network_there_is_a_page_that_says_so(
    place: Path, model: Path
) -> None:
    shutil.copy(model, place / "own.safetensors")
    made = command(
        "synthesize", "--model", "own.safetensors", "--recipe", "tiny.yaml", "--out", "set"
    )
    assert made.exit_code == 0, made.output
    photos = real_set(place / "photos", 6)
    result = command(
        *QAT, "--model", "own.safetensors", "--data", "set", "--out", "run", "--photos", photos
    )
    assert result.exit_code == 0, result.output
    whole = page_of(place / "run")
    assert "Not on this page" not in whole.text
    assert "image" in whole.tags
    for gone in ("set", "own.safetensors", "photos"):
        (place / gone).rename(place / "gone")
        page = redrawn(place / "run")
        assert "Not on this page" in page.text
        assert gone in page.text[page.text.index("Not on this page") :][:400]
        # What the run says itself is there all the same.
        assert page.rows("loss") == whole.rows("loss")
        (place / "gone").rename(place / gone)
    assert redrawn(place / "run").text == whole.text
    # Another set, or network, of that name is none.
    (place / "set").rename(place / "gone")
    again = command(
        "synthesize", "--model", model, "--recipe", "tiny.yaml", "--seed", "7", "--out", "set"
    )
    assert again.exit_code == 0, again.output
    save_detector(tiny_detector(seed=1), place / "own.safetensors")
    page = redrawn(place / "run")
    assert "the set: not found, or changed since (set)" in page.text
    assert "the float network: not found, or changed since (own.safetensors)" in page.text
    assert "image" not in page.tags


def test_what_is_named_by_a_relative_path_is_found_from_elsewhere(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, place / "set")
    result = command(*QAT, "--model", model, "--data", "set", "--out", "runs/one")
    assert result.exit_code == 0, result.output
    before = (place / "runs" / "one" / "report.html").read_bytes()
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    page = redrawn(place / "runs" / "one")
    assert "Not on this page" not in page.text
    assert len(page.text) > 0.9 * len(check(before.decode()).text)


def test_a_set_of_the_cache_is_found_there(place: Path, model: Path) -> None:
    result = command(*QAT, "--model", model, "--out", "run")
    assert result.exit_code == 0, result.output
    before = (place / "run" / "report.html").read_bytes()
    assert "Not on this page" not in check(before.decode()).text
    redrawn(place / "run")
    assert (place / "run" / "report.html").read_bytes() == before


def test_a_run_on_a_real_set_says_so(place: Path, model: Path) -> None:
    data = real_set(place / "real")
    result = command(
        *QAT, "--model", model, "--data", data, "--out", "run", "--set", "synthesis.image_size=64"
    )
    assert result.exit_code == 0, result.output
    before = page_of(place / "run").text
    assert "a set of 4 real images" in before
    assert "No real image was used" not in before
    assert "mind who sees this page" in before
    assert redrawn(place / "run").text == before


def test_what_a_set_was_made_by_is_what_the_set_says(place: Path, model: Path) -> None:
    labels = real_set(place / "real")
    for name, options, sentence, row in (
        ("own", (), "No real image was used to make it. What", "its labels are the network's own"),
        (
            "labels", ("--labels", f"real:{labels}"),
            "No real image was used to make it, but the labels of a real set were.",
            "its labels were taken from a real set",
        ),
        ("noise", ("--init", "noise"), "a set of 4 images of noise", "noise; without labels"),
    ):  # fmt: skip
        made = command(
            "synthesize", "--model", model, "--set", "synthesis.images=4", "--set",
            "synthesis.image_size=64", "--set", "synthesis.label_stage.image_size=64",
            *(() if name == "noise" else ("--iterations", "2")), "--out", name, *options,
        )  # fmt: skip
        assert made.exit_code == 0, made.output
        # The run's own recipe says something else of sets.
        result = command(*QAT, "--model", model, "--data", name, "--out", f"run-{name}")
        assert result.exit_code == 0, result.output
        page = page_of(place / f"run-{name}")
        assert sentence in page.text
        assert row in page.terms["Calibration and training"]
    shutil.rmtree(place / "labels")
    assert "is not known, as the set is gone" in redrawn(place / "run-labels").text


def test_epochs_that_were_not_chosen_on_real_images(place: Path, model: Path, made: Path) -> None:
    scenes = real_set(place / "scenes")
    for method, sentence in (("ptq", "No real image was used"), ("qat", "Real images had a part")):
        result = command(
            *QAT, "--model", model, "--data", made, "--out", method, "--select-on", scenes,
            "--set", f"method={method}",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert sentence in page_of(place / method).text


def test_nothing_is_fetched_and_no_program_run_for_a_page(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfq.models.ultralytics import resolve as ultralytics_resolve

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a network was fetched")

    monkeypatch.setattr(ultralytics_resolve, "fetch", forbidden)
    config = copy.parent / "config.py"
    config.write_text(f"open({str(copy.parent / 'ran')!r}, 'w')\n")
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    for name in ("yolo11n", str(config), f"{config}@random", "config.py"):
        (copy / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model": name}))
        # The set names the very file of the network.
        assert "Not on this page" not in redrawn(copy).text
    assert not (copy.parent / "ran").exists()


def test_a_page_that_cannot_be_drawn_loses_no_run(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no <ink>")

    with monkeypatch.context() as patch:
        patch.setattr("dfq.api.report.sections", broken)
        result = command(*QAT, "--model", model, "--data", made, "--out", "run")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "run"
    assert not (place / "run" / "report.html").exists()
    assert "warning: report.html could not be drawn" in (place / "run" / "log.txt").read_text()
    assert "could not be drawn (RuntimeError: no <ink>)" in result.stderr
    dfq.load_run(place / "run")
    redrawn(place / "run")


def test_a_page_of_a_run_that_lost_its_model_is_not_left(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*QAT, "--model", model, "--data", made, "--out", "run")
    assert command(*words).exit_code == 0
    (place / "run" / "model.safetensors").unlink()
    (place / "run" / "report.html").write_text("of before")
    monkeypatch.setattr("dfq.api.report.draw", lambda _: 1 / 0)
    result = command(*words)
    assert result.exit_code == 0, result.output
    assert not (place / "run" / "report.html").exists()


# --- hostile input

MANY = (
    "--set", "synthesis.images=30", "--set", "synthesis.batch_size=30",
    "--set", "synthesis.iterations=1", "--set", "distillation.batch_size=15",
)  # fmt: skip
"""Images enough for labels of many categories."""

NAMES = [
    "<script>alert(1)</script>",
    '"><img src=http://example.org/x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %} &amp; $\\frac{1}{0}$ " + "long" * 120,
]


def written_detector(path: Path, names: list[str]) -> Path:
    """A file of an untrained detector of these categories."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        description = {**DESCRIPTION, "nc": len(names)}
        detector = YOLOv5.from_yaml(description, names=names, image_size=SIDE)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_detector(detector, path)
    return path


def finished(place: Path, model: Path, *options: str | Path) -> Page:
    """The page of a run of a network, on a set of single labels."""
    result = command(
        *QAT, "--model", model, "--set", "synthesis.labels=single", "--out", "run", *options
    )
    assert result.exit_code == 0, result.output
    return page_of(place / "run")


def test_names_and_paths_are_text_and_nothing_else(place: Path) -> None:
    folder = place / "<b onmouseover='x'>&\"'"
    model = written_detector(folder / "</title><script>.safetensors", NAMES)
    photos = real_set(folder / "photos", 6)
    finished(place, model, *MANY, "--photos", photos)
    resealed(
        place / "run",
        lambda value: value.update(
            selected="</code><script>alert(2)</script>",
            said=["<svg onload=alert(3)>", "</li>" * 40, 7, None],
            method={"<i>": 1},
            history=[{"</th><script>": 1.0, "kl": 2.0}, {"</th><script>": 0.5, "kl": 1e299}],
            teacher_divergence={"<u>": 3.0},
        ),
    )
    hostile = json.loads(json.dumps(WHOLE).replace("boxes", "<script>").replace("onnx", "'><b>"))
    written(place / "run", "<img src=x>", hostile)
    page = redrawn(place / "run")
    source = (place / "run" / "report.html").read_text()
    for text in ("<script>alert(2)</script>", "<svg onload=alert(3)>", "</title><script>"):
        assert text in page.text
        assert text not in source
    # Names of categories, where there are labels to show them.
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert html.escape(NAMES[0]) in source


@pytest.mark.parametrize("count", [1, 80, 1200])
def test_networks_of_any_number_of_categories(place: Path, count: int) -> None:
    names = [f"category {index}" for index in range(count)]
    model = written_detector(place / "own.safetensors", names)
    # Each label of another category.
    page = finished(place, model, *MANY)
    assert page.terms["Categories"] == f"{count}"
    words = "1 category" if count == 1 else f"{count} categories"
    assert f"({words})" in page.text
    assert len(page.rows("category ")) <= 20
    listed = sum(int(row[0]) for row in page.rows("category "))
    others = re.search(r"other categories with (\d+) objects", page.text)
    assert listed + (int(others[1]) if others else 0) == int(page.terms["Objects"])
    assert bool(others) == (count > 20)


FAR_OFF = {"name": "x", "shift": 1e300, "log_variance": -1e9}
NEEDED = ("selected", "quantized_share_of_macs")

METRICS: list[Callable[[dict[str, Any]], Any]] = [
    lambda value: value.update(history=7, said={}, closeness=[], evaluation="x", set_quality=[]),
    lambda value: value.update(history=[7, None, {}], teacher_divergence=[1]),
    lambda value: value.update(closeness={"synthetic": {"objects": None}, "photos": 3}),
    lambda value: value.update(evaluation={"float": {"AP": None}, "quantized": {"AP": "x"}}),
    lambda value: value.update(evaluation={"float": {"AP": 0}, "quantized": {"AP": 0}}),
    lambda value: value.update(weight_bits="4", activation_bits=None, images=[3], mixed=1),
    lambda value: value.update(history=[{"kl": 1e200}, {"kl": -1e200}]),
    lambda value: value.update(set_quality={"images": 1, "layers": [FAR_OFF] * 3}),
    lambda value: [value.pop(key) for key in list(value) if key not in NEEDED],
]


@pytest.mark.parametrize("number", range(len(METRICS)))
def test_metrics_of_another_form_leave_out_what_they_are_of(copy: Path, number: int) -> None:
    resealed(copy, lambda value: (METRICS[number](value), value)[1])
    page = redrawn(copy)
    assert page.rows("Bit operations")
    assert "Layer by layer" in page.text


# --- the command


def test_what_is_no_run_is_refused(place: Path, made: Path, model: Path, copy: Path) -> None:
    for wrong in (made, model, place, place / "nothing"):
        assert re.search("no run|no quantized model", has_one_error(command("report", wrong)))
    for wrong in ("page.txt", "page", "metrics.json"):
        assert "end its name in .html" in has_one_error(command("report", copy, "--out", wrong))
    (copy / "recipe.yaml").write_text("seed: [")
    assert f"{copy / 'recipe.yaml'}: damaged" in has_one_error(command("report", copy))
    (copy / "manifest.json").unlink()
    assert "unfinished" in has_one_error(command("report", copy))


def test_drawing_is_not_loaded_before_it_is_asked_for() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from dfq.cli.main import cli; import dfq\n"
        "assert not {'torch', 'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "assert callable(dfq.report), dfq.report\n"
        "import dfq.api.report; assert callable(dfq.report)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
