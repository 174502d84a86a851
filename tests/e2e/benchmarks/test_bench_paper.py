"""The paper's tables and figures: each thing is made once, and shown as it was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image, ImageColor
from support.cli_parts import real_set, stamps

from benchmarks.paper import charts, figures, tables
from benchmarks.paper.conditions import LSQ, OURS, PAPER, Conditions
from benchmarks.paper.definitions import all_tables
from benchmarks.paper.engine import Bench
from benchmarks.paper.pictures import SIDE, labelled, sheet
from dfq.data.drawing import colour

SETTINGS = (
    "distillation.batch_size=2", "quantization.calibration_images=2",
    "synthesis.label_stage.image_size=64", "synthesis.label_stage.updates=1",
)  # fmt: skip


@pytest.fixture
def scenes(place: Path, model: Path) -> Path:
    """A folder to work in, with a set to train on and one to measure on."""
    real_set(place / "train", count=3)
    real_set(place / "val", count=3)
    return place


def words(model: Path, *more: str) -> list[str]:
    return [
        "--model", str(model), "--real", "train", "--val", "val", "--out", "out", "--size", "64",
        "--images", "2", "--iterations", "2", "--epochs", "2",
        *(word for text in SETTINGS for word in ("--set", text)), *more,
    ]  # fmt: skip


def bench(command: Any, *arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments), catch_exceptions=False)


def conditions(model: Path, **changes: Any) -> Conditions:
    values = {
        "model": str(model), "real": "train", "val": "val", "out": Path("out"), "size": 64,
        "images": 2, "iterations": None, "epochs": None, "paper": "paper-yolov5",
    }  # fmt: skip
    return Conditions(**{**values, **changes})


def test_tables_and_nothing_made_twice(scenes: Path, model: Path) -> None:
    chosen = words(model, "--tables", "methods,task", "--widths", "w4a8", "--seeds", "0,1")
    chosen += ["--rows", "lsq-real,paper,both"]
    first = bench(tables.main, *chosen)
    assert first.exit_code == 0, first.output
    rows = [
        json.loads(line) for line in (scenes / "out" / "results.jsonl").read_text().split("\n")[:-1]
    ]
    measured = {(row["row"], row.get("width"), row.get("seed")): row for row in rows}
    assert len(measured) == len(rows) == 5
    # Row "both" of one table is row "paper" of another: it was made once, and stands in both.
    lines = [text for text in first.stdout.splitlines() if text.startswith("| ")]
    titles = [text.split(" | ")[0].removeprefix("| ") for text in lines]
    assert [title for title in titles if title not in ("method", "---", "float")] == [
        "LSQ, 3 real images", "the paper's recipe",
        "in synthesis and in training (the paper's recipe)",
    ]  # fmt: skip
    assert lines[4].split(" | ")[1:] == lines[8].split(" | ")[1:]
    seeds = [measured["LSQ, 3 real images", "w4a8", seed] for seed in (0, 1)]
    columns = ("AP50", "AP50_voc", "F1", "divergence")
    means = [np.mean([row[column] for row in seeds]) for column in columns]
    assert lines[3].split(" | ")[4:] == [
        *(f"{value:.3f}" for value in means[:3]),
        f"{means[3]:.2f} |",
    ]
    assert measured["float", None, None]["divergence"] == 0
    # Conditions and command stand with the figures.
    assert "tiny.safetensors at 64 px; sets of 2 images, 2 iterations" in first.stdout
    assert "python -m benchmarks.paper.tables" in first.stdout
    # One of each seed; networks are not kept.
    assert len(list((scenes / "out" / "sets").iterdir())) == 2
    assert list((scenes / "out" / "runs").iterdir()) == []

    before = stamps(scenes / "out")
    again = bench(tables.main, *chosen)
    assert again.stdout == first.stdout
    assert stamps(scenes / "out") == before


def test_labels_and_images_of_one_stage_form_together(scenes: Path, model: Path) -> None:
    changed = conditions(model, images=3, iterations=4, overrides=("synthesis.batch_size=2",))
    row = all_tables([])["stages"].rows["one"]
    made = Bench(changed).sets.open(row, "w6a6", 0)
    assert made.load([0, 1, 2]).shape == (3, 3, 64, 64)
    assert made.verify() == []
    assert all(len(labels) for labels in made.labels)
    # Images that were begun anew once labels were found would be others.
    two = Bench(changed).sets.open(all_tables([])["stages"].rows["two"], "w6a6", 0)
    assert not np.array_equal(made.load([0]).numpy(), two.load([0]).numpy())


def test_a_table_by_epoch(scenes: Path, model: Path) -> None:
    result = bench(
        tables.main, *words(model, "--tables", "convergence", "--rows", "paper", "--seeds", "0")
    )
    assert result.exit_code == 0, result.output
    (row,) = [
        json.loads(line) for line in (scenes / "out" / "results.jsonl").read_text().splitlines()
    ]
    assert len(row["by_epoch"]) == 2
    values = " | ".join(f"{value:.3f}" for value in row["by_epoch"])
    assert f"| the paper's recipe | W4A8 | 2 | {values} |" in result.stdout


def test_every_picture_is_drawn(scenes: Path, model: Path) -> None:
    kinds = [name for name in figures.DRAWN if name != "convergence"]
    chosen = words(model, "--seeds", "0", "--count", "1", "--family", f"other={model}")
    result = bench(figures.main, *chosen, "--figures", ",".join(kinds))
    assert result.exit_code == 0, result.output
    folder = scenes / "out" / "figures"
    assert {path.name for path in folder.iterdir()} == {figures.DRAWN[name][0] for name in kinds}
    for file in folder.iterdir():
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        # Something is drawn on the paper.
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 10, file


def test_a_sheet_has_every_tile_and_its_boxes_where_they_are() -> None:
    black = torch.zeros(3, 64, 64, dtype=torch.uint8)
    label = torch.tensor([[1.0, 0.5, 0.75, 0.5, 0.25]])
    tile = labelled(black, label, ["a", "b"])
    picture = np.asarray(sheet([("first", [tile]), ("", [tile, tile])]))
    dark = (picture == 0).all(axis=2)
    # Titles are not black, and the place right of the first tile stays empty.
    height, width = picture.shape[:2]
    assert not dark[: height // 2, width // 2 :].any()
    assert dark[height // 2 :, width // 2 :].mean() > 0.8
    last = picture[-6 - SIDE : -6, -6 - SIDE : -6]
    for x, y in ((0.5, 0.875), (0.25, 0.75), (0.75, 0.75)):
        edge = last[
            round(y * SIDE) - 3 : round(y * SIDE) + 3, round(x * SIDE) - 3 : round(x * SIDE) + 3
        ]
        assert (edge == ImageColor.getrgb(colour(1))).all(axis=2).any()


def test_curves_of_all_methods_are_drawn(tmp_path: Path) -> None:
    charts.convergence(
        {"one": [[0.1, 0.2]], "two": [[0.2, 0.3], [0.3, 0.3]]}, 0.4, tmp_path / "c.png"
    )
    with Image.open(tmp_path / "c.png") as image:
        colours = {
            tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()
        }
    # The first two of matplotlib's cycle.
    assert {(31, 119, 180), (255, 127, 14)} <= colours


@pytest.mark.parametrize("name", list(all_tables([8])))
def test_every_row_has_a_recipe(scenes: Path, model: Path, name: str) -> None:
    table = all_tables([8])[name]
    made = Bench(conditions(model, iterations=5, epochs=2, size=64))
    cells = {row_name: made.name(row, table.widths[0], 0) for row_name, row in table.rows.items()}
    # No two rows of a table are made alike.
    assert len(set(cells.values())) == len(cells)
    for row in table.rows.values():
        assert made.recipe(row, "w4a8", 0).quantization.weight_bits == 4
        assert made.recipe(row, "w4a8", 0).distillation.epochs == 2


def test_recipes_are_scaled_and_the_papers_weights_with_the_batch(model: Path) -> None:
    whole = conditions(model, images=2000, size=640).recipe(PAPER, "w6a5", 3, [])
    assert (whole.synthesis.weights.task, whole.distillation.weights.task) == (32, 1.28)
    assert (whole.synthesis.iterations, whole.distillation.epochs) == (2500, 100)
    assert (whole.quantization.weight_bits, whole.quantization.activation_bits) == (6, 5)
    assert whole.seed == 3
    small = conditions(model, images=16, iterations=250, epochs=7).recipe(PAPER, "w4a8", 0, [])
    # Of a batch of 16 instead of 64 and of 32.
    assert small.synthesis.weights.task == pytest.approx(8)
    assert small.distillation.weights.task == pytest.approx(0.64)
    assert (small.synthesis.iterations, small.synthesis.label_stage.iterations) == (250, 250)
    ours = conditions(model, images=16, iterations=100).recipe(OURS, "w4a8", 0, [])
    assert (ours.synthesis.iterations, ours.synthesis.label_stage.iterations) == (100, 40)
    assert ours.synthesis.weights.task == 1
    lsq = conditions(model, epochs=7).recipe(LSQ, "w4a8", 0, [])
    assert (lsq.distillation.weights.task, lsq.distillation.epochs) == (1, 7)


def test_the_interval_is_students() -> None:
    # Three values: 4.303 standard errors, by any table of t with two degrees of freedom.
    low, high = tables.interval([1.0, 2.0, 3.0]) or (0, 0)
    assert (low, high) == (
        pytest.approx(2 - 4.303 / 3**0.5, abs=1e-3),
        pytest.approx(2 + 4.303 / 3**0.5, abs=1e-3),
    )
    assert tables.interval([1.0]) is None
    cells = [{"AP": 0.25, "other": None}, {"AP": 0.75, "other": 1.0}]
    assert tables.with_interval(cells[:1], "AP") == "0.250"
    assert tables.with_interval(cells, "AP").startswith("0.500 (-2.677 to")
    assert tables.with_interval(cells, "other") == "–"


def test_epochs_that_have_a_column() -> None:
    assert tables.some_epochs(1) == [1]
    assert tables.some_epochs(3) == [1, 2, 3]
    shown = tables.some_epochs(100)
    assert (shown[0], shown[-1], len(shown)) == (1, 100, tables.MOST_EPOCHS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tables", "none"], "--tables none: choose from methods"),
        (["--widths", "w4"], "--widths w4: write them as w4a8"),
        (["--seeds", "a"], "--seeds a: write whole numbers"),
        (["--rows", "none"], "--rows none: choose from"),
        (["--size", "60"], "--size: 60 is no multiple"),
        (["--set", "synthesis.images=x"], "synthesis.images"),
        (["--val", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(
    scenes: Path, model: Path, more: list[str], message: str
) -> None:
    result = CliRunner().invoke(tables.main, words(model, *more))
    assert result.exit_code == 2
    assert message in result.output
    assert not (scenes / "out").exists()
