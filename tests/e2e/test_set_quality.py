"""How well a set meets the network's statistics: said when it is made, shown, recorded by runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.harness import command

import dfq
from dfq.data.calibration_set import CalibrationSet
from dfq.data.readers import open_set
from dfq.models import load_detector
from dfq.runs.inputs import WithPhotographs
from dfq.synthesis.quality import quality_of, set_quality


def test_a_set_says_how_good_it_is(made: Path, model: Path, place: Path) -> None:
    found = CalibrationSet.open(made)
    quality = quality_of(found.manifest)
    # What it says is what its images, as they are on disk, give.
    again = set_quality(load_detector(str(model)), found.load(range(len(found))))
    assert quality is not None
    assert again is not None
    for ours, theirs in zip(quality.layers, again.layers, strict=True):
        assert ours.name == theirs.name
        assert ours.shift == pytest.approx(theirs.shift, abs=5e-3)
        assert ours.log_variance == pytest.approx(theirs.log_variance, abs=5e-3)
    result = command("data", "show", made, "--json", "figures.json")
    assert result.exit_code == 0, result.output
    assert quality.summary() in result.stdout
    # Four images of a few iterations meet nothing.
    assert quality.warnings()
    for line in quality.warnings():
        assert f"warning: {line}" in result.stderr
    figures = json.loads((place / "figures.json").read_text())
    assert figures["quality"] == quality.to_dict()


def test_the_command_that_makes_a_set_says_it(model: Path, place: Path) -> None:
    result = command("synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "set")
    assert result.exit_code == 0, result.output
    quality = quality_of(CalibrationSet.open(place / "set").manifest)
    assert quality is not None
    assert quality.summary() in result.stdout


def test_a_run_records_it(run: Path, made: Path) -> None:
    quality = quality_of(CalibrationSet.open(made).manifest)
    assert quality is not None
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["set_quality"] == quality.to_dict()
    assert quality.summary() in metrics["said"]


def test_an_older_set_says_nothing(made: Path, place: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(made, place / "older"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["quality"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = command("data", "show", copy)
    assert result.exit_code == 0, result.output
    assert "BatchNorm" not in result.output


def test_photos_join_calibration_by_turns(place: Path, made: Path, model: Path) -> None:
    (place / "photos").mkdir()
    for i in range(7):
        Image.new("RGB", (64, 64), (10 * i, 0, 0)).save(place / "photos" / f"{i}.png")
    detector = load_detector(str(model))
    found = CalibrationSet.open(made)
    joined = WithPhotographs(open_set(place / "photos"), found, detector)
    assert [item.path.stem for item in joined.left.items] == ["1", "3", "5", "6"]
    assert len(joined) == len(found) + 3
    pixels = joined.load(list(range(len(joined))))
    expected = torch.stack(
        [
            image
            for turn in range(3)
            for image in (
                torch.tensor([20 * turn, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 64, 64),
                found.load([turn])[0],
            )
        ]
        + [found.load([3])[0]]
    )
    assert torch.equal(pixels, expected)


def test_ranges_are_found_on_photos_too(place: Path, tmp_path: Path) -> None:
    made = dfq.synthesize("demo", "demo", init="noise", images=8, image_size=160, out=place / "set")
    (place / "photos").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        # Stripes, of which no noise holds any.
        image = torch.zeros(160, 160, 3, dtype=torch.uint8)
        image[:, torch.rand(160, generator=generator) > 0.5] = 255
        Image.fromarray(image.numpy()).save(place / "photos" / f"{i}.png")

    def reach(**photos: Path) -> float:
        folder = dfq.quantize(
            "demo", model="demo", data=made.root, out=tmp_path / f"run{len(photos)}",
            overrides={"method": "ptq", "quantization.reconstruction": "none",
                       "quantization.activation_bits": 8}, **photos,
        )  # fmt: skip
        network = dfq.load_detector(folder / "model.safetensors")
        quantizer = network.module.model[1].conv.input_quantizer
        return float(quantizer.scale.detach() * 255)

    with_photos, without = reach(photos=place / "photos"), reach()
    assert abs(with_photos - without) > 0.01 * without
