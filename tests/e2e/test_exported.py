"""Exported files where a detector is named: `dfq eval --model FILE`, `dfq predict --model FILE`."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from support.exported_double import ExportedDouble
from support.harness import command, has_one_error

import dfq
from dfq.demo.scenes import write_coco
from dfq.errors import UserError
from dfq.export.latency import in_turns


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "set"
    write_coco(folder, 6, 160)
    return folder


@pytest.fixture
def exported(place: Path, monkeypatch: pytest.MonkeyPatch) -> ExportedDouble:
    """`demo.onnx`: the demo detector at 160 px, four images at a time."""
    path = place / "demo.onnx"
    path.write_bytes(b"")
    double = ExportedDouble(path, dfq.load_detector("demo"), batch=4)

    def opened(given: str | Path, **_: object) -> ExportedDouble:
        if not Path(given).is_file():
            raise UserError(f"{given}: no such file")
        return double

    monkeypatch.setattr("dfq.runs.loading.open_exported", opened)
    return double


def test_an_exported_file_is_measured(place: Path, exported: ExportedDouble, scenes: Path) -> None:
    result = command("eval", "--model", "demo.onnx", "--data", scenes, "--json", "a.json")
    assert result.exit_code == 0, result.output
    found = json.loads((place / "a.json").read_text())
    wanted = dfq.evaluate("demo", scenes).to_dict()
    for key in ("AP", "AP50", "AR100", "images", "image_size", "per_category"):
        assert found[key] == pytest.approx(wanted[key])
    assert found["AP"] > 0.3
    # Six images, where four are taken at a time.
    assert exported.batches == [4, 4]


def test_an_exported_file_against_its_float_network(
    place: Path, exported: ExportedDouble, scenes: Path
) -> None:
    words = ("eval", "--model", "demo.onnx", "--data", scenes / "images", "--against")
    result = command(*words, "demo", "--json", "a.json")
    assert result.exit_code == 0, result.output
    found = json.loads((place / "a.json").read_text())
    assert found["AP"] == 1
    assert found["objects"] == found["kept"] > 6
    assert dfq.evaluate(exported, scenes, against="demo").kept == found["kept"]


def test_another_size_than_the_files_own_is_refused(
    place: Path, exported: ExportedDouble, scenes: Path
) -> None:
    for words in (
        ("eval", "--model", "demo.onnx", "--data", scenes),
        ("eval", "--model", "demo.onnx", "--data", scenes, "--against", "demo"),
        ("predict", "--model", "demo.onnx", scenes / "images", "--out", "pictures"),
    ):
        line = has_one_error(command(*words, "--image-size", "192"))
        assert "192 is not what" in line
        assert "demo.onnx was exported for, which is 160 alone" in line
    assert not (place / "pictures").exists()
    # Its own may be said.
    words = ("eval", "--model", "demo.onnx", "--data", scenes, "--image-size", "160")
    assert command(*words).exit_code == 0


def test_a_file_of_any_size_takes_multiples_of_its_stride(
    exported: ExportedDouble, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = ExportedDouble(exported.path, exported.detector, dynamic=True)
    monkeypatch.setattr("dfq.runs.loading.open_exported", lambda given, **_: free)
    words = ("eval", "--model", "demo.onnx", "--data", scenes, "--image-size")
    assert "no multiple of the model's stride" in has_one_error(command(*words, "170"))
    assert command(*words, "192").exit_code == 0
    assert free.batches == [6]


def test_a_missing_file_is_said(place: Path, exported: ExportedDouble, scenes: Path) -> None:
    line = has_one_error(command("eval", "--model", "absent.onnx", "--data", scenes))
    assert "absent.onnx: no such file" in line


def test_an_exported_file_predicts(place: Path, exported: ExportedDouble, scenes: Path) -> None:
    result = command("predict", "--model", "demo.onnx", scenes / "images", "--compare", "demo")
    assert result.exit_code == 0, result.output
    found = dfq.predict(exported, scenes / "images")
    wanted = dfq.predict("demo", scenes / "images")
    for one, other in zip(found, wanted, strict=True):
        assert one.to_dict() == other.to_dict()
    kept = sum(map(len, wanted))
    assert f"in all {kept} agree (float network: {kept}, this one: {kept})" in result.stdout


def test_what_takes_files_of_pytorch_opens_them_with_trust_alone(
    place: Path, model: Path, made: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their loader runs what is in them."""
    monkeypatch.setattr("dfq.api.speed.in_turns", functools.partial(in_turns, rounds=1, seconds=0))
    dfq.export(run, "run.pt2")
    dfq.export(model, "float.pt2")
    commands = [
        ("cost", "--model", "run.pt2", "--measure"),
        ("eval", "--model", "run.pt2", "--data", made),
        ("predict", "--model", "run.pt2", made / "images"),
        ("verify", "run.pt2", "--against", "float.pt2", "--data", made),
    ]
    for words in commands:
        assert "give --trust" in has_one_error(command(*words)), words
        result = command(*words, "--trust")
        # A verification may find faults: that it looked is what counts.
        assert result.exit_code in ((0, 1) if words[0] == "verify" else (0,)), result.output
        assert "trust" not in result.output, words
