"""How close a low-bit network is to its float one: `dfq eval --against`, `dfq qat --photos`, and
what a run says of synthetic images that it was made without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.cli_parts import real_set
from support.harness import command, has_one_error
from support.keep_worse_parts import SPOILT

import dfq
from dfq.data.readers import open_set
from dfq.demo.scenes import write_coco
from dfq.evaluation.agreement import Agreement, on_squares

QAT = ("qat", "--recipe", "tiny.yaml")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled images on which the demo detector finds something."""
    folder = tmp_path_factory.mktemp("scenes") / "set"
    write_coco(folder, 6, 160)
    return folder


@pytest.fixture(scope="session")
def photos(scenes: Path) -> Path:
    """The same images, as a folder of photos."""
    return scenes / "images"


@pytest.fixture(scope="session")
def low(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo detector: all its weights of few bits, on few noisy images."""
    folder = tmp_path_factory.mktemp("low")
    made = dfq.synthesize(
        "demo", "demo", init="noise", images=16, image_size=160, out=folder / "set"
    )
    return dfq.quantize(
        "demo", model="demo", data=made.root, out=folder / "run",
        overrides={"method": "ptq", "quantization.reconstruction": "none"},
    )  # fmt: skip


def metrics_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "metrics.json").read_text()))


def test_a_network_against_itself_agrees(place: Path, photos: Path) -> None:
    words = ("eval", "--model", "demo", "--against", "demo", "--data", photos)
    result = command(*words, "--json", "a.json")
    assert result.exit_code == 0, result.output
    found = json.loads((place / "a.json").read_text())
    assert (found["AP"], found["AP50"], found["score_shift"]) == (1, 1, 0)
    assert found["objects"] == found["kept"] == found["kept_above"] > 6
    assert "AP         1.0000" in result.stdout
    assert f"{found['kept']} are kept" in result.stdout
    assert "shifted by +0.000" in result.stdout


def test_a_run_against_its_float_network(
    place: Path, low: Path, scenes: Path, photos: Path
) -> None:
    result = command(
        "eval", "--model", low, "--against", "demo", "--data", photos, "--interval",
        "--json", "a.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((place / "a.json").read_text())
    assert 0 < found["AP"] < 1
    assert 0 < found["kept"] <= found["objects"]
    assert found["score_shift"] != 0
    assert found["AP_interval"][0] <= found["AP"] <= found["AP_interval"][1]
    assert "no label was used" in result.stdout
    # From Python, and on a labelled set, whose labels do not count.
    again = dfq.evaluate(low, scenes, against="demo", interval=True)
    assert isinstance(again, Agreement)
    assert again.to_dict() == found
    assert pytest.approx(found["AP"], abs=1e-4) != dfq.evaluate(low, scenes).AP


def test_labels_of_other_categories_do_not_matter(place: Path, low: Path, scenes: Path) -> None:
    shutil.copytree(scenes, place / "stranger")
    path = place / "stranger" / "annotations.json"
    document = json.loads(path.read_text())
    for category in document["categories"]:
        category["name"] += " of another kind"
    path.write_text(json.dumps(document))
    with pytest.raises(dfq.UserError, match="no category name is shared"):
        dfq.evaluate(low, place / "stranger")
    found = dfq.evaluate(low, place / "stranger", against="demo")
    assert found == dfq.evaluate(low, scenes, against="demo")


def test_mistakes_of_against(
    place: Path, model: Path, run: Path, low: Path, photos: Path, made: Path
) -> None:
    words = ("eval", "--data", photos, "--model")
    line = has_one_error(command(*words, low, "--against", model))
    assert "its categories are not those of the model" in line
    assert "give the float network" in line
    line = has_one_error(command(*words, low, "--against", low))
    assert "is a quantized run" in line
    assert "absent" in has_one_error(command(*words, low, "--against", "absent.pt"))
    line = has_one_error(command(*words, low, "--against", made))
    assert "is a calibration set" in line
    Image.new("RGB", (64, 64)).save(place / "black.png")
    (place / "black").mkdir()
    (place / "black.png").rename(place / "black" / "0.png")
    words = ("eval", "--model", low, "--against", "demo", "--data", "black", "--json", "a.json")
    line = _last_error(command(*words))
    assert "black: demo" in line
    assert "detects nothing with a score above 0.3" in line
    assert not (place / "a.json").exists()
    # Without a network to compare with, photos have nothing to be measured against.
    result = command("eval", "--model", low, "--data", "black")
    assert "no labels to measure against" in has_one_error(result)


def _last_error(result: Any) -> str:
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return str(line)


def test_a_run_says_what_was_kept_and_how_close_it_is(place: Path, model: Path, made: Path) -> None:
    words = (*QAT, "--model", model, "--data", made)
    result = command(*words, "--out", "start", *SPOILT, "--set", "method=auto")
    assert result.exit_code == 0, result.output
    first, far, close, *_ = result.stdout.splitlines()
    assert first.startswith("kept: the network as it was calibrated and rounded")
    assert "complete result and no failure" in first
    assert "times as far from it as it began" in first
    metrics = metrics_of(place / "start")
    begun, ended = (metrics["teacher_divergence"][name] for name in ("start", "last"))
    assert far.startswith(f"teacher_divergence: {begun:.4g} before training, {ended:.4g} after")
    assert "0 is equal" in far
    assert metrics["said"][:3] == [first, far, close]
    log = (place / "start" / "log.txt").read_text()
    assert all(line in log for line in (first, far, close))
    result = command(*words, "--out", "trained")
    assert result.stdout.startswith("kept: the trained network (qat: ema weights)\n")
    result = command(*words, "--out", "ptq", "--set", "method=ptq")
    assert result.stdout.startswith("kept: the network as it was calibrated and rounded; no train")


def test_training_that_diverged_is_explained(place: Path, model: Path, made: Path) -> None:
    words = (*QAT, "--model", model, "--data", made, "--out", "run", *SPOILT)
    result = command(*words, "--set", "distillation.lr=1e30", "--set", "method=auto")
    assert result.exit_code == 0, result.output
    assert "because training diverged" in result.stdout.splitlines()[0]


def test_synthetic_images_are_held_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfq.qat.trainer import Trainer
    from dfq.runs.phases import Noise

    made = dfq.synthesize("demo", "demo", init="noise", images=24, image_size=160, out="set")
    trained: list[int] = []
    plain = Trainer.__init__

    def seen(self: Trainer, student: Any, teacher: Any, data: Any, *rest: Any, **more: Any) -> None:
        # What is timed beforehand is noise.
        if not isinstance(data, Noise):
            trained.append(len(data))
            assert not set(data.files) & set(made.files[-3:])
        plain(self, student, teacher, data, *rest, **more)

    monkeypatch.setattr(Trainer, "__init__", seen)
    result = command(
        "qat", "--recipe", "demo", "--model", "demo", "--data", "set", "--out", "run",
        "--set", "distillation.epochs=1", "--set", "quantization.reconstruction=none",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert trained == [21]
    metrics = metrics_of(place / "run")
    close = metrics["closeness"]["synthetic"]
    assert (close["images"], close["held_out"]) == (3, True)
    assert metrics["images"] == 24
    assert "on 3 held-out synthetic images" in result.stdout


def test_squares_are_looked_at_as_they_are(low: Path, photos: Path) -> None:
    pictures = open_set(photos)
    pixels = torch.stack(
        [torch.from_numpy(pictures.load_image(i)).permute(2, 0, 1) for i in range(len(pictures))]
    )
    network, reference = dfq.load_run(low), dfq.load_detector("demo")
    same = on_squares(reference, reference, pixels)
    assert same.objects == same.kept == same.kept_above > 6
    other = on_squares(network, reference, pixels)
    assert other.objects == same.objects
    # The photos are squares of the size that the networks take: nothing is made of them first.
    found = dfq.evaluate(network, photos, against=reference, image_size=160)
    assert other.kept == found.kept
    assert other.score_shift == pytest.approx(found.score_shift, abs=1e-4)


def test_few_or_real_images_are_not_held_out(place: Path, model: Path, made: Path) -> None:
    result = command(*QAT, "--model", model, "--data", made, "--out", "few")
    assert "on 4 of the synthetic images it was made on" in result.stdout
    assert metrics_of(place / "few")["closeness"]["synthetic"]["held_out"] is False
    data = real_set(place / "real", count=9)
    result = command(*QAT, "--model", model, "--data", data, "--out", "real-run")
    assert "on 9 of the images it was made on" in result.stdout


def test_photos_are_measured_and_recorded(place: Path, photos: Path, low: Path) -> None:
    words = (
        "qat", "--recipe", "demo", "--model", "demo", "--data", low.parent / "set",
        "--set", "method=ptq", "--set", "quantization.reconstruction=none", "--out",
    )  # fmt: skip
    result = command(*words, "run", "--photos", photos)
    assert result.exit_code == 0, result.output
    found = metrics_of(place / "run")["closeness"]["photos"]
    assert found["data"] == str(photos)
    # What eval says of the same run, on those that calibration did not take: every second one.
    (place / "left").mkdir()
    for path in sorted(photos.iterdir())[1::2]:
        shutil.copy(path, place / "left")
    again = dfq.evaluate(place / "run", place / "left", against="demo").to_dict()
    for key in ("objects", "kept", "kept_above", "images", "image_size"):
        assert found[key] == again[key]
    for key in ("AP", "AP50", "score_shift"):
        assert found[key] == pytest.approx(again[key], abs=1e-3)
    assert f"on the 3 photos it was made without, {found['kept']} are kept" in result.stdout
    assert f"agreement AP {found['AP']:.3f}" in result.stdout
    # From Python; and a finished run is not silently taken for one that was measured.
    made = dfq.quantize(
        "demo", model="demo", data=low.parent / "set", photos=photos, out="python",
        overrides={"method": "ptq", "quantization.reconstruction": "none"},
    )  # fmt: skip
    assert metrics_of(made)["closeness"]["photos"] == found
    line = has_one_error(command(*words, "run"))
    assert "another photos" in line


def test_bad_photos_are_refused_before_any_work(
    place: Path, model: Path, made: Path, photos: Path
) -> None:
    (place / "broken").mkdir()
    data = (photos / "000001.png").read_bytes()
    (place / "broken" / "0.png").write_bytes(data)
    (place / "broken" / "1.png").write_bytes(data[: len(data) // 2])
    (place / "empty").mkdir()
    np.save(place / "array.npy", np.zeros(3))
    words = (*QAT, "--model", model, "--data", made, "--out", "run", "--photos")
    for name, what in (
        ("absent", "no such file or folder"),
        ("empty", "holds no images"),
        ("array.npy", "not an image set"),
        ("broken", "1.png"),
    ):
        line = has_one_error(command(*words, name))
        assert "--photos" in line
        assert name in line
        assert what in line
        assert not (place / "run").exists()
    with pytest.raises(dfq.UserError, match="'photos'"):
        dfq.quantize("tiny.yaml", model=model, data=made, photos=place / "absent", out="run")
