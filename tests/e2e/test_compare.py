"""`dfq compare`, `eval --interval`, curves of `qat`, classes, help, photos."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import pytest
from PIL import Image
from support.cli_parts import real_set
from support.harness import command, has_one_error

import dfq
from dfq.cli.main import cli
from dfq.recipe import Recipe


@pytest.fixture(scope="module")
def measured(model: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, measured on one real set, and that set."""
    place = tmp_path_factory.mktemp("measured")
    data = real_set(place / "real")
    for name, bits in (("four", 4), ("eight", 8)):
        dfq.quantize(
            Recipe(),
            model=model,
            data=made,
            out=place / name,
            overrides={
                "method": "ptq" if name == "eight" else "qat",
                "quantization.weight_bits": bits,
                "quantization.calibration_images": 4,
                "distillation.epochs": 1,
                # One epoch at a loss: what is compared is the training all the same.
                "distillation.keep_worse": True,
                "evaluation": {"data": str(data), "image_size": 64},
            },
        )
    return place


def rewrite_metrics(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what a run measured, as if it had been written so."""
    path, manifest = run / "metrics.json", run / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "metrics_sha256": digest}))


def test_compare(place: Path, measured: Path, model: Path) -> None:
    runs = [measured / "four", measured / "eight"]
    result = command("compare", *runs, "--csv", "a.csv", "--json", "a.json")
    assert result.exit_code == 0, result.output
    with (place / "a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    rows = json.loads((place / "a.json").read_text())
    assert [row["run"] for row in table] == [row["run"] for row in rows] == [*map(str, runs)]
    assert [row["bits"] for row in rows] == ["w4a8", "w8a8"]
    assert [row["method"] for row in rows] == ["qat", "ptq"]
    assert {row["model"] for row in rows} == {str(model)}
    assert {row["images"] for row in rows} == {4}
    for row, run in zip(rows, runs, strict=True):
        metrics = json.loads((run / "metrics.json").read_text())
        before, after = (metrics["evaluation"][key]["AP"] for key in ("float", "quantized"))
        assert (row["AP_float"], row["AP_quantized"]) == (before, after)
        assert row["AP_kept"] == pytest.approx(after / before)
        assert row["kept"] == metrics["selected"]
        assert row["measured_on"] == str(measured / "real")
        layers = dfq.inspect(run).layers
        numbers = [math.prod(layer.weight_shape) for layer in layers]
        bits = [layer.weight_bits for layer in layers]
        expected = sum(n * b for n, b in zip(numbers, bits, strict=True)) / 8
        assert row["weight_bytes"] == pytest.approx(expected, abs=1)
        assert row["float_weight_bytes"] == 4 * sum(numbers)
    assert rows[0]["weight_bytes"] < rows[1]["weight_bytes"]
    divergence = json.loads((runs[0] / "metrics.json").read_text())["teacher_divergence"]
    assert rows[0]["divergence_start"] == divergence["start"]
    assert rows[0]["divergence"] == divergence["ema"]
    assert (rows[1]["divergence_start"], rows[1]["divergence"]) == (None, None)
    for word in ("w4a8", "w8a8", "qat", "ptq", f"{rows[0]['AP_quantized']:.4f}", "MiB"):
        assert word in result.stdout


def test_runs_of_other_sets_are_told_apart(place: Path, measured: Path) -> None:
    shutil.copytree(measured / "four", place / "other")
    rewrite_metrics(
        place / "other",
        lambda found: {**found, "evaluation": {**found["evaluation"], "data": "elsewhere"}},
    )
    result = command("compare", measured / "four", "other")
    assert "measured on different sets" in result.stdout
    result = command("compare", measured / "four", measured / "eight")
    assert "measured on different sets" not in result.stdout


DAMAGE: dict[str, tuple[str, bytes | None, str]] = {
    "no metrics": ("metrics.json", None, "metrics.json: missing"),
    "broken metrics": ("metrics.json", b"{", "metrics.json: damaged or altered"),
    "a list of metrics": ("metrics.json", b"[]", "metrics.json: damaged or altered"),
    "no model": ("model.safetensors", None, "model.safetensors"),
    "no manifest": ("manifest.json", None, "unfinished"),
    "no recipe": ("recipe.yaml", None, "recipe.yaml"),
    "broken recipe": ("recipe.yaml", b"{", "recipe.yaml"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_not_compared(place: Path, measured: Path, case: str) -> None:
    shutil.copytree(measured / "four", place / "run")
    name, data, message = DAMAGE[case]
    if data is None:
        (place / "run" / name).unlink()
    else:
        (place / "run" / name).write_bytes(data)
    line = has_one_error(command("compare", measured / "eight", "run", "--csv", "a.csv"))
    assert message in line
    assert not (place / "a.csv").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"selected": "qat"}'])
def test_an_older_run_of_broken_metrics_is_not_compared(
    place: Path, measured: Path, text: str
) -> None:
    """Runs of format 1 have no sum of their metrics."""
    shutil.copytree(measured / "four", place / "run")
    (place / "run" / "metrics.json").write_text(text)
    path = place / "run" / "manifest.json"
    manifest = {**json.loads(path.read_text()), "format": 1}
    del manifest["metrics_sha256"]
    path.write_text(json.dumps(manifest))
    line = has_one_error(command("compare", "run"))
    assert "metrics.json: " in line
    assert "restore" in line


@pytest.mark.parametrize("values", ["[1, 2]", '{"AP": "high"}', "null", "3", '{"AP": true}'])
def test_metrics_of_odd_kinds_show_as_nothing(place: Path, measured: Path, values: str) -> None:
    shutil.copytree(measured / "four", place / "run")
    measured_as = {"float": json.loads(values), "quantized": json.loads(values)}
    odd = {"images": "many", "teacher_divergence": [3], "evaluation": measured_as}
    rewrite_metrics(place / "run", lambda found: {**found, **odd})
    result = command("compare", "run", "--json", "a.json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads((place / "a.json").read_text())
    assert (row["AP_float"], row["AP_kept"], row["images"], row["divergence"]) == (None,) * 4


@pytest.mark.parametrize(
    "text", ["synthesis: 3\nquantization: 4\n", "[", "nothing: 1\n", None, "a: 1\na: 2\n"]
)
def test_a_damaged_recipe_of_a_run_says_which(
    place: Path, measured: Path, text: str | None
) -> None:
    shutil.copytree(measured / "four", place / "run")
    (place / "run" / "recipe.yaml").unlink()
    if text is not None:
        (place / "run" / "recipe.yaml").write_text(text)
    line = has_one_error(command("compare", measured / "eight", "run"))
    assert "run/recipe.yaml: damaged (" in line
    assert line.count("run/recipe.yaml") == 1 or text is None
    assert line.endswith("; restore it")


@pytest.mark.parametrize("value", [10**400, float("nan"), float("-inf"), 1e308])
def test_figures_that_are_none_show_as_nothing(place: Path, measured: Path, value: Any) -> None:
    shutil.copytree(measured / "four", place / "run")
    odd = {
        "images": value, "weight_bits": value, "teacher_divergence": {"start": value},
        "evaluation": {"float": {"AP": value}},
    }  # fmt: skip
    rewrite_metrics(place / "run", lambda found: {**found, **odd})
    result = command("compare", "run", "--json", "a.json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads((place / "a.json").read_text())
    keys = ("images", "bits", "divergence_start", "AP_float")
    assert [row[key] for key in keys] == [None] * len(keys)


@pytest.mark.parametrize("values", [None, [1, 2], {"AP": "high"}, 3, {"AP": None, "masks": [3]}])
def test_a_finished_run_of_odd_accuracies_is_told(
    place: Path, run: Path, model: Path, made: Path, values: Any
) -> None:
    """AP is none where a set has nothing that counts, too."""
    shutil.copytree(run, place / "run")
    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out", "run")
    for measured in (values, {"data": "x", "float": values, "quantized": values}):
        rewrite_metrics(place / "run", lambda found, to=measured: {**found, "evaluation": to})
        result = command(*words)
        assert result.exit_code == 0, result.output
        assert result.stdout.endswith("run\n")
    for odd in ({"quantized_share_of_macs": [0.5]}, {"quantized_share_of_macs": "1"},
                {"selected": 3}, {"quantized_share_of_macs": float("nan")}):  # fmt: skip
        rewrite_metrics(place / "run", lambda found, to=odd: {**found, **to})
        assert "metrics.json: not as dfq wrote it" in has_one_error(command(*words))


def test_names_that_a_table_would_take_for_markup(place: Path, model: Path, made: Path) -> None:
    # A folder whose name ends in a bracket: with what is in it, the end of a style.
    (place / "[").mkdir()
    shutil.copy(model, place / "[" / "b][red].safetensors")
    words = ("--model", "[/b][red].safetensors")
    for command_words in (
        ("inspect", *words),
        ("sensitivity", *words, "--data", made, "--images", "1", "--set",
         "quantization.mixed.candidates=[4, 8]"),
    ):  # fmt: skip
        result = command(*command_words)
        assert result.exit_code == 0, result.output
        assert "[red]" in result.stdout


def test_the_interval_of_an_evaluation(place: Path, model: Path) -> None:
    data = real_set(place / "real", count=6)
    words = ("eval", "--model", model, "--data", data, "--json", "a.json")
    result = command(*words, "--interval")
    assert result.exit_code == 0, result.output
    found = json.loads((place / "a.json").read_text())
    low, high = found["AP_interval"]
    assert 0 <= low <= found["AP"] <= high <= 1
    assert low < high
    assert f"AP between {low:.4f} and {high:.4f} (95 %" in result.stdout
    from dfq.data.readers import open_set
    from dfq.evaluation.coco import bootstrap_ap, predict

    detector, images = dfq.load_detector(model), open_set(data)
    expected = bootstrap_ap(images, predict(detector, images), detector.names)
    assert (low, high) == pytest.approx(expected)
    result = command(*words)
    assert "between" not in result.stdout
    assert json.loads((place / "a.json").read_text())["AP_interval"] is None


def test_one_image_has_no_interval(place: Path, model: Path) -> None:
    data = real_set(place / "real", count=1)
    result = command("eval", "--model", model, "--data", data, "--interval", "--json", "a.json")
    assert result.exit_code == 0, result.output
    assert json.loads((place / "a.json").read_text())["AP_interval"] is None
    assert "between" not in result.stdout


def test_an_interval_of_nothing(place: Path, model: Path) -> None:
    data = real_set(place / "real")
    path = data / "annotations.json"
    document = {**json.loads(path.read_text()), "annotations": []}
    path.write_text(json.dumps(document))
    result = command("eval", "--model", model, "--data", data, "--interval", "--json", "a.json")
    assert result.exit_code == 0, result.output
    assert json.loads((place / "a.json").read_text())["AP_interval"] in (None, [None, None])


def curve(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {point.step: point.value for point in found.Scalars(tag)}


@pytest.mark.usefixtures("event_files")
def test_curves_of_training(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "qat", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out", "run",
        "--set", "distillation.epochs=3", "--tensorboard", "curves",
    )  # fmt: skip
    from dfq.qat.trainer import Trainer

    plain = Trainer._epoch

    def epoch(self: Trainer, number: int, *more: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return plain(self, number, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", epoch)
        assert command(*words).exit_code == 130
    assert command(*words).exit_code == 0
    history = json.loads((place / "run" / "metrics.json").read_text())["history"]
    for name in history[0]:
        found = curve(place / "curves" / "training", f"qat/{name}")
        # The epochs before the break are there as well.
        assert found == pytest.approx(
            {number: terms[name] for number, terms in enumerate(history, 1)}, rel=1e-5
        )


def test_curves_of_a_set_that_qat_makes(place: Path, model: Path) -> None:
    pytest.importorskip("tensorboard")
    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--out", "run")
    assert command(*words, "--tensorboard", "curves").exit_code == 0
    names = {path.name for path in (place / "curves").iterdir()}
    assert {"shard-000000", "shard-000001", "training"} <= names


def test_inspect_lists_the_classes(place: Path, model: Path) -> None:
    result = command("inspect", "--model", model, "--json", "a.json")
    assert "3 categories: a, b, c" in result.stdout
    assert json.loads((place / "a.json").read_text())["categories"] == ["a", "b", "c"]


# --- photos without labels


@pytest.fixture
def photos(place: Path) -> Path:
    (place / "photos" / "june").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, shape in (("a.jpg", (48, 64)), ("b.png", (64, 48)), ("june/c.jpeg", (48, 64))):
        pixels = draw.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "photos" / name)
    return place / "photos"


def test_photos_are_shown(place: Path, photos: Path) -> None:
    result = command("data", "show", photos, "--json", "a.json", "--grid", "grid.png")
    assert result.exit_code == 0, result.output
    assert "none: photos only" in result.stdout
    assert "64 x 48 (2 of 3; 2 sizes)" in result.stdout
    assert "objects" not in result.stdout
    found = json.loads((place / "a.json").read_text())
    assert (found["images"], found["labelled"], found["objects"]) == (3, False, 0)
    grid = cv2.imread(str(place / "grid.png"))
    # Squares of 320 px, as wide as there are images, with four pixels of border.
    assert grid.shape == (320 + 8, 3 * (320 + 4) + 4, 3)
    assert grid[4 + 40 : 4 + 280, 4 : 4 + 320].std() > 10


def test_photos_train(place: Path, photos: Path, model: Path) -> None:
    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", photos, "--out", "run")
    result = command(*words, "--image-size", "96")
    assert result.exit_code == 0, result.output
    resolved = dfq.load_recipe(place / "run" / "recipe.yaml")
    assert resolved.synthesis.image_size == 96
    line = has_one_error(command(*words[:-1], "other", "--image-size", "100"))
    assert "100 is no multiple of the model's stride" in line


def test_image_size_of_a_set_that_qat_makes(place: Path, model: Path) -> None:
    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--out", "run")
    assert command(*words, "--image-size", "96").exit_code == 0
    (made,) = (place / "home").iterdir()
    assert Image.open(made / "images" / "00000000.png").size == (96, 96)


def test_real_sets_are_shown(place: Path) -> None:
    data = real_set(place / "real")
    result = command("data", "show", data, "--json", "a.json", "--grid", "grid.png")
    assert result.exit_code == 0, result.output
    assert json.loads((place / "a.json").read_text())["objects"] == 4
    assert cv2.imread(str(place / "grid.png")) is not None
    assert "score" not in result.stdout


def test_photos_are_named_in_the_help() -> None:
    assert "a folder of photos will do" in command("--help").stdout.replace("\n  ", " ")
    assert "folder of photos" in command("data", "show", "--help").stdout.replace("\n  ", " ")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert "folder of photos" in " ".join(readme.split())


# --- help


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, one in group.commands.items():
        here = (*path, name)
        found += leaves(one, here) if isinstance(one, click.Group) else [(here, one)]
    return found


def test_no_summary_is_cut() -> None:
    for words in (("--help",), ("data", "--help")):
        assert "..." not in command(*words).stdout.replace("ARGS]...", "")


# What is off, or is nothing, unless it is given: there is no default to tell.
WITHOUT_DEFAULT = {"checkpoint", "overrides", "json_file", "csv_file", "grid"}


@pytest.mark.parametrize(
    ("words", "one"), leaves(cli), ids=[" ".join(words) for words, _ in leaves(cli)]
)
def test_help_says_what_is_taken_by_default(words: tuple[str, ...], one: click.Command) -> None:
    shown = " ".join(command(*words, "--help").stdout.split())
    for option in one.params:
        if not isinstance(option, click.Option) or option.required or option.is_flag:
            continue
        if option.name in WITHOUT_DEFAULT:
            continue
        assert option.show_default, option.name
        assert re.search(rf"{re.escape(option.opts[0])} .*?\[default: ", shown)


def test_defaults_in_the_help_are_the_recipes() -> None:
    recipe = Recipe()
    for name, section in (("synthesize", recipe.synthesis), ("sensitivity", recipe.quantization)):
        options = {option.name: option for option in cli.commands[name].params}
        values = section.mixed if name == "sensitivity" else section
        for key in ("images", "iterations", "batch_size", "labels", "init", "cost"):
            if key in options and hasattr(values, key):
                shown = str(options[key].show_default)  # type: ignore[attr-defined]
                assert shown == f"{getattr(values, key)}, or the recipe's"
