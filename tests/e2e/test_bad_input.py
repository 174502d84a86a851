"""Mistakes of users: exit code 2, one clear line, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import command, contents, has_one_error
from support.tiny_detector import tiny_detector

from dfq.models import save_detector

Make = Callable[[Path], str]


def text_as_checkpoint(place: Path) -> str:
    (place / "notes.pt").write_text("these are no weights\n" * 50)
    return "notes.pt"


def empty_checkpoint(place: Path) -> str:
    (place / "empty.pt").touch()
    return "empty.pt"


def truncated_checkpoint(place: Path) -> str:
    torch.save({"model": torch.nn.Conv2d(3, 64, 3), "epoch": 3}, place / "cut.pt")
    data = (place / "cut.pt").read_bytes()
    (place / "cut.pt").write_bytes(data[: len(data) // 2])
    return "cut.pt"


def state_dict(place: Path) -> str:
    torch.save(torch.nn.Conv2d(3, 8, 3).state_dict(), place / "weights.pt")
    return "weights.pt"


def truncated_safetensors(place: Path) -> str:
    save_detector(tiny_detector(), place / "cut.safetensors")
    data = (place / "cut.safetensors").read_bytes()
    (place / "cut.safetensors").write_bytes(data[: len(data) // 2])
    return "cut.safetensors"


def a_folder(place: Path) -> str:
    (place / "weights").mkdir()
    return "weights"


def other_suffix(place: Path) -> str:
    (place / "photo.png").write_bytes(b"\x89PNG")
    return "photo.png"


def unfinished_run(place: Path) -> str:
    (place / "run").mkdir()
    (place / "run" / "state.json").write_text("{}")
    return "run"


MODELS: dict[str, tuple[Make, str]] = {
    "missing file": (lambda _: "no/such/file.pt", "no/such/file.pt"),
    "missing yaml": (lambda _: "nothing.yaml", "nothing.yaml"),
    "unknown name": (lambda _: "yolo99z", "there is no detector yolo99z"),
    "text": (text_as_checkpoint, "notes.pt is not a PyTorch checkpoint"),
    "empty": (empty_checkpoint, "empty.pt is empty"),
    "truncated": (truncated_checkpoint, "cut.pt is damaged, cut short"),
    "truncated safetensors": (truncated_safetensors, "cut.safetensors cannot be read"),
    "state dict": (state_dict, "weights.pt holds tensors only"),
    "classification": (lambda _: "yolo11n-cls.yaml", "classification network"),
    "folder": (a_folder, "weights is a folder"),
    "other suffix": (other_suffix, "photo.png is not a file that dfq reads"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_are_none(place: Path, case: str) -> None:
    make, message = MODELS[case]
    name = make(place)
    before = contents(place)
    for words in (
        ("synthesize", "--model", name, "--out", "out"),
        ("qat", "--recipe", "tiny.yaml", "--model", name, "--out", "out"),
        ("inspect", "--model", name, "--json", "out.json"),
    ):
        assert message in has_one_error(command(*words))
        assert contents(place) == before
    assert not (place / "out").exists()


def test_a_published_name_without_a_network(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A proxy nobody answers on: no name is looked up, no address reached.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    line = has_one_error(command("synthesize", "--model", "yolo11x", "--out", "out"))
    assert "yolo11x" in line
    assert not (place / "out").exists()
    assert not list(place.glob("*.pt"))


class Evil:
    """Unpickled the ordinary way, it makes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("name", ["evil.pt", "evil.pth"])
def test_a_pickle_that_runs_commands(place: Path, name: str) -> None:
    witness = place / "witness"
    torch.save({"model": Evil(witness)}, place / name)
    for words in (
        ("synthesize", "--model", name, "--out", "out"),
        ("qat", "--recipe", "tiny.yaml", "--model", name, "--out", "out"),
        ("eval", "--model", name, "--data", "."),
        ("inspect", "--model", name),
    ):
        result = command(*words)
        assert not witness.exists(), words
        line = has_one_error(result)
        if words[0] != "eval":
            assert name in line
            assert "system" in line
    # The file does what it says when it is read the ordinary way: the test can fail.
    pickle.loads(pickle.dumps(Evil(witness)))
    assert witness.exists()


def test_a_run_is_no_float_model(place: Path, run: Path) -> None:
    for words in (
        ("synthesize", "--model", run),
        ("qat", "--recipe", "tiny.yaml", "--model", run),
    ):
        assert "is a quantized run" in has_one_error(command(*words))
    assert not (place / "home").exists()


def test_a_model_without_batchnorm(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    from dfq.runs import loading as models

    plain = models._load

    def load(*words: Any, **more: Any) -> Any:
        detector = plain(*words, **more)
        for parent in list(detector.module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, nn.Identity())
        return detector

    monkeypatch.setattr(models, "_load", load)
    words = ("synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "out")
    line = has_one_error(command(*words))
    assert "no BatchNorm statistics" in line
    assert "--set synthesis.weights.bn=0" in line
    assert not (place / "out").exists()
    # The line's advice works.
    advised = ("--set", "synthesis.weights.bn=0", "--set", "synthesis.weights.first_bn=0")
    assert command(*words, *advised).exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "0"], "synthesis.images: "),
        (["--images", "-3"], "got -3"),
        (["--batch-size", "0"], "synthesis.batch_size: "),
        (["--iterations", "-1"], "synthesis.iterations: "),
        (["--image-size", "100"], "synthesis.image_size: 100 is no multiple of the model's stride"),
        (["--image-size", "16"], "synthesis.image_size: "),
        (["--set", "synthesis.label_stage.image_size=72"], "synthesis.label_stage.image_size: 72"),
        (["--seed", "-1"], "seed: "),
        (["--recipe", "unheard-of"], "recipe 'unheard-of': no such file"),
        (["--recipe", "."], "recipe '.': no such file"),
        (["--set", "synthesis.images"], "--set synthesis.images: write section.key=value"),
        (["--set", "synthesis.images=[1"], "is not a YAML value"),
        (["--set", "synthesis.imagse=4"], "synthesis.imagse: unknown key"),
        (["--device", "cuda:99"], "--device cuda:99: there is no such device"),
        (["--device", "toaster"], "--device toaster: there is no such device"),
        (["--device", "meta"], "--device meta"),
        (
            [f"--set=synthesis.weights.{name}=0" for name in ("task", "bn", "first_bn", "tv")],
            "nothing to optimise",
        ),
    ],
)
def test_settings_of_synthesis(place: Path, model: Path, words: list[str], message: str) -> None:
    before = contents(place)
    base = [] if "--recipe" in words else ["--recipe", "tiny.yaml"]
    line = has_one_error(command("synthesize", "--model", model, "--out", "out", *base, *words))
    assert message in line
    assert contents(place) == before
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "quantization.weight_bits=1"], "quantization.weight_bits: "),
        (["--set", "quantization.weight_bits=16"], "quantization.weight_bits: "),
        (["--set", "quantization.overrides={nowhere.*: 8}"], "no layer is called 'nowhere.*'"),
        (["--set", "quantization.overrides={model.0.*: 99}"], "asks for 99 bits"),
        (["--set", "distillation.epochs=0"], "distillation.epochs: "),
        (["--set", "evaluation.data=nowhere"], "nowhere: no such file or folder"),
        (["--set", "evaluation.image_size=70"], "evaluation.image_size: "),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--recipe", "w5a99"], "recipe 'w5a99': no such file"),
        (["--device", "cuda:99"], "--device cuda:99: there is no such device"),
    ],
)
def test_settings_of_qat(place: Path, model: Path, words: list[str], message: str) -> None:
    # An evaluation size needs a set to be of any use.
    if "evaluation.image_size" in message:
        images(place / "real")
        words = [*words, "--set", "evaluation.data=real"]
    before = contents(place)
    line = has_one_error(
        command("qat", "--recipe", "tiny.yaml", "--model", model, "--out", "out", *words)
    )
    assert message in line
    # Found before hours go into a set.
    assert contents(place) == before
    assert not (place / "out").exists()


def test_qat_without_a_model(place: Path) -> None:
    assert "give --model" in has_one_error(command("qat", "--recipe", "tiny.yaml"))


def images(folder: Path, **changes: Any) -> Path:
    """A labelled COCO set of one image; `changes` replace parts of its document."""
    import numpy as np
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "images" / "a.png")
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 24, 24], "area": 576}
        ],
        "categories": [{"id": 1, "name": "a"}],
        **changes,
    }
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder


def empty_folder(folder: Path) -> None:
    folder.mkdir()


def missing_images(folder: Path) -> None:
    images(folder, images=[{"id": 1, "file_name": "gone.png", "width": 64, "height": 64}])


def broken_json(folder: Path) -> None:
    images(folder)
    (folder / "annotations.json").write_text('{"images": [')


def broken_image(folder: Path) -> None:
    images(folder)
    (folder / "images" / "a.png").write_bytes(b"\x89PNG\r\n not really")


def unknown_image(folder: Path) -> None:
    row = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81}
    images(folder, annotations=[row])


def foreign_names(folder: Path) -> None:
    images(folder, categories=[{"id": 1, "name": "zeppelin"}])


def labels_lost(folder: Path) -> None:
    images(folder)
    (folder / "annotations.json").unlink()


DATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda _: None, "data: no such file or folder"),
    "empty": (empty_folder, "data: holds no images"),
    "missing images": (missing_images, "gone.png"),
    "broken json": (broken_json, "broken JSON"),
    "broken image": (broken_image, "a.png"),
    "unknown image id": (unknown_image, "image_id 7"),
    "no shared category": (foreign_names, "zeppelin"),
}


@pytest.mark.parametrize("case", [*DATA, "unlabelled"])
def test_data_for_eval(place: Path, model: Path, case: str) -> None:
    fill, message = {**DATA, "unlabelled": (labels_lost, "no labels")}[case]
    fill(place / "data")
    words = ("eval", "--model", model, "--data", "data", "--json", "out.json")
    assert message in has_one_error(command(*words))
    assert not (place / "out.json").exists()


@pytest.mark.parametrize("case", DATA)
def test_data_for_qat(place: Path, model: Path, case: str) -> None:
    fill, message = DATA[case]
    fill(place / "data")
    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", "data", "--out", "out")
    assert message in has_one_error(command(*words))
    if case != "broken image":  # found when it is read, which is when training starts
        assert not (place / "out").exists()


def test_data_of_qat_without_labels(place: Path, model: Path) -> None:
    labels_lost(place / "data")
    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", "data", "--out", "out")
    line = has_one_error(command(*words, "--set", "distillation.weights.task=1"))
    assert "has no labels for the task loss" in line
    assert not (place / "out").exists()
    # The line's advice works.
    assert command(*words, "--set", "distillation.weights.task=0").exit_code == 0


def test_sizes_that_do_not_fit_real_images(place: Path, model: Path) -> None:
    images(place / "data")
    line = has_one_error(command("eval", "--model", model, "--data", "data", "--image-size", "100"))
    assert "100" in line
    assert "stride" in line
    line = has_one_error(
        command(
            "qat", "--recipe", "tiny.yaml", "--model", model, "--data", "data", "--out", "out",
            "--set", "synthesis.image_size=100",
        )
    )  # fmt: skip
    assert "100 is no multiple of the model's stride" in line
    assert not (place / "out").exists()
