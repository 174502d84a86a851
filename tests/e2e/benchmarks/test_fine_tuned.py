"""Fine-tuned detectors have the categories they are said to have, and begin alike each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dfq.models import load_detector
from scripts import fine_tuned, own_world
from scripts.fine_tuned import with_categories


@pytest.mark.parametrize("family", ["ultralytics", "yolov5"])
def test_other_categories_keep_the_rest_and_begin_alike(
    family: str, request: pytest.FixtureRequest
) -> None:
    source = "demo" if family == "ultralytics" else str(request.getfixturevalue("yolov5n"))
    detector = load_detector(source)
    torch.manual_seed(1)
    first = with_categories(detector, ["a", "b"])
    torch.manual_seed(2)
    second = with_categories(detector, ["a", "b"])
    assert first.names == ["a", "b"]
    found = first.detect(torch.rand(1, 3, 160, 160), score_threshold=0.0)[0]
    assert set(found.labels.tolist()) <= {0, 1}
    old, new = detector.module.state_dict(), first.module.state_dict()
    changed = {name for name in new if new[name].shape != old[name].shape}
    # Weights and biases of the last convolution of each of three levels.
    assert len(changed) == 6
    assert all(torch.equal(new[name], old[name]) for name in set(new) - changed)
    again = second.module.state_dict()
    assert all(torch.equal(new[name], again[name]) for name in new)


def test_unknown_variants_and_missing_photographs(tmp_path: Path) -> None:
    for words, message in (
        (["--only", "fog"], "--only fog: choose from demo-dark"),
        (["--only", "yolov5n-dark"], "needs --yolov5n and --photos"),
    ):
        result = CliRunner().invoke(fine_tuned.main, [*words, "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert message in result.output
    assert not (tmp_path / "out").exists()


def test_photographs_of_a_grey_world_are_grey(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "grey"
    photos.mkdir()
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (24, 16), colour).save(photos / f"{number}.png")
    words = ["--of", "yolov5n-grey", "--photos", str(photos), "--out", str(out)]
    result = CliRunner().invoke(own_world.main, words)
    assert result.exit_code == 0, result.output
    for path in sorted(out.iterdir()):
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == (16, 24, 3)
        # The mean of a pure colour, in each of the three.
        assert np.abs(pixels.astype(int) - 85).max() <= 1
    assert len(list(out.iterdir())) == 2
