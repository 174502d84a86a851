"""`dfq data`, and the label and start options of `dfq synthesize`, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import pytest
import torch
from support.cli_parts import real_set
from support.harness import command, contents, has_one_error

from dfq.data.calibration_set import CalibrationSet
from dfq.data.calibration_writer import CalibrationWriter
from dfq.data.readers import open_set


@pytest.fixture
def copy(made: Path, place: Path) -> Path:
    """A copy of a finished set, to damage."""
    return Path(shutil.copytree(made, place / "copy"))


def test_show(made: Path, place: Path) -> None:
    before = contents(made)
    result = command("data", "show", made, "--json", "out/figures.json", "--grid", "out/grid.png")
    assert result.exit_code == 0, result.output
    found = CalibrationSet.open(made)
    objects = sum(len(label) for label in found.labels)
    figures = json.loads((place / "out/figures.json").read_text())
    assert (figures["images"], figures["objects"]) == (4, objects)
    assert sum(figures["by_size"].values()) == objects
    assert figures["image_sizes"] == [{"width": 64, "height": 64, "images": 4}]
    for word in ("64 x 64", "teacher's score, mean", "objects in an image", "category", "quantile"):
        assert word in result.stdout
    image = cv2.imread(str(place / "out/grid.png"))
    assert image is not None
    assert image.shape[1] > image.shape[0] / 2
    assert contents(made) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "grid.jpg"], "end its name in .png"),
        (["--grid", "."], "--grid .: is a folder"),
        (["--json", "tiny.yaml/x.json"], "tiny.yaml is a file, not a folder"),
    ],
)
def test_show_refuses_before_it_reads(
    made: Path, place: Path, words: list[str], message: str
) -> None:
    assert message in has_one_error(command("data", "show", made, *words))


def test_show_sums_up_what_is_rare(place: Path) -> None:
    names = [f"kind{i}" for i in range(30)]
    writer = CalibrationWriter(place / "set", {}, names, 1)
    every = torch.tensor([[float(i), 0.5, 0.5, 0.5, 0.5] for i in range(25)])
    labels = [every, every[:20], torch.zeros(0, 5)]
    scores = [torch.zeros(len(label)) for label in labels]
    writer.append(0, 0, torch.zeros(3, 3, 32, 32, dtype=torch.uint8), labels, scores)
    writer.finish({})
    lines = command("data", "show", "set").stdout.splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    rows = {row[0]: row[1] for row in cells if len(row) > 1}
    assert (rows["more than 20"], rows["20"], rows["0"]) == ("1", "1", "1")
    # Twenty categories occur twice; the five that occur once are summed up.
    assert rows["kind0"] == "2"
    assert rows["(5 others)"] == "5"
    assert "kind20" not in rows


def test_verify(made: Path) -> None:
    objects = sum(len(label) for label in CalibrationSet.open(made).labels)
    result = command("data", "verify", made)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"ok: 4 images, {objects} objects\n"


def test_verify_names_every_problem(copy: Path) -> None:
    (copy / "images/00000000.png").unlink()
    (copy / "images/00000003.png").write_bytes(b"no image")
    result = command("data", "verify", copy)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert any("00000000.png: missing" in line for line in lines)
    assert any("00000003.png: missing or not a readable" in line for line in lines)
    assert sum("shard" in line for line in lines) == 2
    assert result.stdout == ""


def test_verify_of_a_manifest_that_someone_edited(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"] = [{"index": 0}]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json: not as dfq wrote it" in has_one_error(command("data", "verify", copy))


@pytest.mark.parametrize("verb", ["show", "verify", "export"])
def test_an_unfinished_set(verb: str, place: Path) -> None:
    (place / "set/shards").mkdir(parents=True)
    (place / "set/shards/identity.json").write_text("{}")
    (place / "set/shards/000000.json").write_text("{}")
    words = ["--out", "out"] if verb == "export" else []
    line = has_one_error(command("data", verb, "set", *words))
    assert "set: this set is unfinished (1 shards so far)" in line
    assert not (place / "out").exists()


@pytest.mark.parametrize("verb", ["show", "verify", "export"])
def test_no_set_at_all(verb: str, place: Path) -> None:
    words = ["--out", "out"] if verb == "export" else []
    assert "no calibration set here" in has_one_error(command("data", verb, "nowhere", *words))


def test_export(made: Path, place: Path) -> None:
    result = command("data", "export", made, "--format", "yolo", "--out", "yolo")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("4 images: ")
    found, original = open_set(place / "yolo"), open_set(made)
    assert found.names == original.names
    for ours, theirs in zip(found.items, original.items, strict=True):
        assert ours.boxes == pytest.approx(theirs.boxes, abs=1e-3)
        assert ours.labels.tolist() == theirs.labels.tolist()
    assert "not empty" in has_one_error(command("data", "export", made, "--out", "yolo"))


def synthesize(model: Path, *words: str | Path) -> CalibrationSet:
    result = command(
        "synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "set", *words
    )
    assert result.exit_code == 0, result.output
    return CalibrationSet.open("set")


def test_labels_by_name(place: Path, model: Path) -> None:
    made = synthesize(model, "--labels", "tile", "--init", "gaussian")
    assert {len(label) for label in made.labels} <= {4, 9}
    settings = made.manifest["determinants"]["synthesis"]
    assert (settings["labels"], settings["init"]) == ("tile", "gaussian")


def test_labels_of_a_real_set(place: Path, model: Path) -> None:
    real_set(place / "real", names=("c", "unknown", "a", "b"))
    made = synthesize(model, "--labels", "real:real")
    # Batches of two of the three usable images; 64 x 48 px with a border of 8 px above.
    rows = [label.tolist() for label in made.labels]
    assert all(len(row) == 1 for row in rows)
    assert {row[0][0] for row in rows} <= {2.0, 0.0, 1.0}
    assert rows[0] != rows[1]
    for row in rows:
        assert row[0][1:] == pytest.approx([23 / 64, 28 / 64, 30 / 64, 24 / 64], abs=1e-4)


def test_noise(place: Path, model: Path) -> None:
    made = synthesize(model, "--init", "noise", "--image-size", "128")
    assert all(len(label) == 0 for label in made.labels)
    pixels = made.load(range(4)).float() / 255
    # Gaussian, as the paper's baseline: 1/2 and 1/4, cut at two deviations, where uniform noise
    # would have a deviation of the root of 1/12. A twentieth is cut: of z^2 over all, within two
    # deviations lie 0.7385, and the cut ones count 4 each.
    assert float(pixels.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(pixels.std()) == pytest.approx(0.25 * (0.7385 + 0.0455 * 4) ** 0.5, abs=0.002)
    assert float(((pixels - 0.5).abs() < 0.25).float().mean()) == pytest.approx(0.6827, abs=0.01)


@pytest.mark.parametrize("words", [["--labels", "multi"], ["--set", "synthesis.labels=multi"]])
def test_noise_with_labels(place: Path, model: Path, words: list[str]) -> None:
    made = synthesize(model, "--init", "noise", *words)
    assert all(1 <= len(label) <= 25 for label in made.labels)
    settings = made.manifest["determinants"]["synthesis"]
    assert (settings["labels"], settings["iterations"]) == ("multi", 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "some"], "synthesis.labels: should be 'adaptive', 'single', 'multi'"),
        (["--labels", "real:"], "or 'real:SET', got 'real:'"),
        (["--labels", "real:nowhere"], "synthesis.labels: nowhere: no such file or folder"),
        (["--labels", "multi:"], "or 'real:SET', got 'multi:'"),
        (["--labels", "tile:nowhere"], "synthesis.labels: nowhere: no such file or folder"),
        (["--labels", "multi:bare"], "synthesis.labels: bare: the set has no labels"),
        (["--labels", "real:other"], "other/annotations.json: no category name is shared"),
        (["--labels", "real:bare"], "synthesis.labels: bare: the set has no labels"),
        (["--init", "noise", "--iterations", "3"], "--init noise stays as it is"),
        (["--init", "noise", "--set", "synthesis.iterations=3"], "--init noise stays as it is"),
    ],
)
def test_bad_labels(place: Path, model: Path, words: list[str], message: str) -> None:
    real_set(place / "other", names=("x", "y"))
    (place / "bare").mkdir()
    cv2.imwrite(str(place / "bare/a.png"), cv2.UMat(32, 32, cv2.CV_8UC3).get())
    result = command(
        "synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "set", *words
    )
    assert message in has_one_error(result)
    assert not (place / "set").exists()


def test_a_zip_file_is_no_set_for_other_tools(place: Path) -> None:
    (place / "photos.zip").write_bytes(b"PK\5\6" + bytes(18))
    words = ("data", "export", "photos.zip", "--for", "onnxruntime", "--image-size", "64")
    line = has_one_error(command(*words, "--out", "out"))
    assert "photos.zip: a ZIP file is read as a classifier's set alone; unpack it" in line
    assert not (place / "out").exists()
