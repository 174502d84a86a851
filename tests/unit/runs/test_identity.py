"""What tells a run on real images from one on others in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dfq.api.quantize import tell_unmeasured
from dfq.data.class_set import open_photo_set
from dfq.data.readers import open_set
from dfq.errors import UserError
from dfq.recipe import load_recipe
from dfq.runs.deployment import DeploymentFolder, folder_for
from dfq.runs.folder import AnotherRunError, Run, next_folder
from dfq.runs.identity import contents
from dfq.runtime.files import write_json
from dfq.runtime.progress import Silent


def fill(folder: Path, seed: int, count: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(seed)
    for number in range(count):
        # Files of one size, whatever is on them.
        pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.bmp")
    return folder


def identity(folder: Path) -> dict:
    photos = open_set(folder)
    return {"photos": [str(folder), len(photos)], **contents(photos=photos)}


def test_other_photos_under_the_same_names_are_another_run(tmp_path: Path) -> None:
    photos = fill(tmp_path / "photos", 0)
    before = identity(photos)
    Run(tmp_path / "runs" / "run-1", before)
    with DeploymentFolder(tmp_path / "made-1", before).lock():
        pass
    fill(photos, 1)
    now = identity(photos)
    assert before["photos"] == now["photos"]
    with pytest.raises(AnotherRunError, match=r"another photos: content; choose another --out"):
        Run(tmp_path / "runs" / "run-1", now)
    assert next_folder(tmp_path / "runs", "run", now) == tmp_path / "runs" / "run-2"
    with pytest.raises(UserError, match=r"a deployment of another photos: content"):
        DeploymentFolder(tmp_path / "made-1", now)
    assert folder_for(tmp_path, "made", now) == tmp_path / "made-2"
    fill(photos, 0)
    assert not Run(tmp_path / "runs" / "run-1", identity(photos)).finished
    DeploymentFolder(tmp_path / "made-1", identity(photos))


def test_what_an_earlier_version_did_not_record_is_not_asked_for(tmp_path: Path) -> None:
    photos = fill(tmp_path / "photos", 0)
    now = identity(photos)
    recorded = {"photos": now["photos"]}
    Run(tmp_path / "runs" / "run-1", recorded)
    assert not Run(tmp_path / "runs" / "run-1", now).finished
    assert next_folder(tmp_path / "runs", "run", now) == tmp_path / "runs" / "run-1"
    # Whether there are photos at all was recorded.
    with pytest.raises(AnotherRunError, match="another photos"):
        Run(tmp_path / "runs" / "run-1", {})


def test_content_is_that_of_images_and_labels(tmp_path: Path) -> None:
    photos = fill(tmp_path / "photos", 0)
    (told,) = contents(photos=open_set(photos)).values()
    moved = photos.rename(tmp_path / "moved")
    (moved / "0.bmp").rename(moved / "00.bmp")
    assert contents(data=open_set(moved)) == {"data: content": told}
    assert contents(data=None, photos=object()) == {}
    classes = tmp_path / "classes"
    for seed, name in enumerate(("cat", "dog")):
        classes.mkdir(exist_ok=True)
        fill(classes / name, seed)
    (before,) = contents(data=open_photo_set(classes)).values()
    (classes / "cat" / "0.bmp").write_bytes((classes / "cat" / "1.bmp").read_bytes())
    (after,) = contents(data=open_photo_set(classes)).values()
    assert before != after


def test_other_labels_are_other_content(tmp_path: Path) -> None:
    fill(tmp_path / "images", 0, count=1)
    (tmp_path / "data.yaml").write_text("val: images\nnames: [a, b]\n")
    (tmp_path / "labels").mkdir()
    digests = set()
    for line in ("0 0.5 0.5 0.5 0.5", "1 0.5 0.5 0.5 0.5", "1 0.5 0.5 0.5 0.25"):
        (tmp_path / "labels" / "0.txt").write_text(f"{line}\n")
        digests |= set(contents(data=open_set(tmp_path / "data.yaml")).values())
    assert len(digests) == 3


def test_a_finished_run_says_that_it_was_not_measured_on_what_is_asked_for(tmp_path: Path) -> None:
    told: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            told.append(text)

    def tell(*overrides: str, **measured: Any) -> list[str]:
        told.clear()
        metrics = {"selected": "ptq", "quantized_share_of_macs": 1.0, **measured}
        write_json(tmp_path / "metrics.json", metrics)
        tell_unmeasured(tmp_path, load_recipe(None, overrides), Notes())
        return told

    asked = "evaluation.data=my val"
    (line,) = tell(asked)
    assert line.endswith(f"dfq eval --model {tmp_path} --data 'my val' does")
    assert len(tell(asked, evaluation={"data": "other"})) == 1
    assert tell(asked, evaluation={"data": "my val"}) == []
    assert tell() == []
