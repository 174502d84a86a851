"""`dfq deploy`: one command, from a detector to a checked file; stopped, it goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from support.forks import ended, killed, start, wait_for
from support.harness import command, contents, has_one_error

import dfq
from dfq.api import deployment_steps
from dfq.export import latency
from dfq.runs.deployment import identity_of
from dfq.synthesis.inversion import Inversion

SMALL = [
    "--set", "synthesis.images=4", "--set", "synthesis.image_size=64",
    "--set", "synthesis.iterations=3", "--set", "synthesis.batch_size=2",
    "--set", "synthesis.label_stage.image_size=64", "--set", "synthesis.label_stage.iterations=4",
    "--set", "synthesis.label_stage.updates=2", "--set", "quantization.calibration_images=4",
    "--set", "quantization.ranges=minmax", "--set", "quantization.reconstruction=none",
]  # fmt: skip


def words_for(model: Path, *more: str, target: str = "onnxruntime-cpu") -> list[str]:
    return ["deploy", "--model", str(model), "--target", target, *SMALL, *more]


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a file takes is no test's business, and takes its time to be found out."""
    monkeypatch.setattr(latency, "ROUNDS", 1)
    defaults = latency.in_turns.__kwdefaults__ or {}
    quick = {**defaults, "rounds": 1, "seconds": 0.001}
    monkeypatch.setattr(latency.in_turns, "__kwdefaults__", quick)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an unbroken `dfq deploy` makes; not to be changed."""
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFQ_HOME", str(place / "home"))
        patch.chdir(place)
        done = command(*words_for(model, "--out", "out"))
    assert done.exit_code in (0, 1), done.output
    return place / "out"


def figures(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "deploy.json").read_text())
    assert isinstance(found, dict)
    return found


def without_times(folder: Path) -> dict[str, bytes]:
    """What is to be the same whenever it is made: all but what is measured of time, and the page
    that shows it."""
    found = contents(folder)
    for name in [name for name in found if name.endswith((".html", ".verify.json", "deploy.json"))]:
        del found[name]
    return found


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_everything_is_there(model: Path, whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        "tiny-int8.onnx", "tiny-float.onnx", "run", "report.html", "deploy.json",
    }  # fmt: skip
    found = figures(whole)
    assert found["finished"] is True
    opened = [whole / name for name in ("tiny-int8.onnx", "tiny-float.onnx")]
    assert found["size"]["bytes"] == opened[0].stat().st_size < opened[1].stat().st_size
    rows = found["speed"]["latency"]
    assert [row["threads"] for row in rows] == [1, None]
    assert all(row["ratio"] > 0 and row["image_size"] == 64 for row in rows)
    # Whatever has a figure has the command that repeats it.
    for part in ("speed", "verification", "cost", "closeness"):
        assert found[part]["command"].startswith("dfq ")
    assert found["cost"]["total"]["disk_bytes"] < found["cost"]["float"]["disk_bytes"]
    policy = json.loads((whole / "run" / "manifest.json").read_text())["policy"]
    assert (policy["placement"], policy["runtime"]) == ("qdq", "onnxruntime")
    assert (policy["weight_bits"], policy["activation_bits"]) == (8, 8)
    page = (whole / "report.html").read_text()
    assert "tiny-int8.onnx" in page


def test_finished_it_says_so_and_changes_nothing(
    place: Path, model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done again")

    monkeypatch.setattr(Inversion, "batch", forbidden)
    monkeypatch.setattr(deployment_steps, "quantize", forbidden)
    before = stamps(whole)
    # As of a process that was killed before it dropped its lock.
    (whole / ".lock").touch()
    done = command(*words_for(model, "--out", str(whole)))
    assert done.exit_code == (1 if figures(whole)["faults"] else 0)
    assert "finished already" in done.stdout
    assert done.stdout.splitlines()[-1] == str(whole / "tiny-int8.onnx")
    assert stamps(whole) == before


def test_without_out_the_same_is_found_again(place: Path, model: Path) -> None:
    first = command(*words_for(model))
    assert (place / "deploy" / "tiny-onnxruntime-cpu-1" / "deploy.json").is_file(), first.output
    assert "finished already" in command(*words_for(model)).stdout
    command(*words_for(model, "--seed", "1"))
    assert len(list((place / "deploy").iterdir())) == 2


@pytest.mark.parametrize("after", ["set", "begun", "run", "float file", "file", "checked"])
def test_killed_it_goes_on_and_ends_in_the_same_files(
    place: Path, model: Path, whole: Path, after: str
) -> None:
    out = place / "out"
    words = words_for(model, "--out", "out")
    there = {
        "set": lambda: bool(list((place / "home").glob("*/shards/0*.json"))),
        "begun": lambda: (out / "run" / "state.json").exists(),
        "run": lambda: (out / "run" / "manifest.json").exists(),
        "float file": lambda: (out / "tiny-float.onnx").exists(),
        "file": lambda: (out / "tiny-int8.onnx").exists(),
        "checked": lambda: (out / "run" / "exports" / "tiny-int8.onnx.verify.json").exists(),
    }
    process = start(words)
    wait_for(there[after], process)
    killed(process)
    assert after in ("set", "checked") or figures(out)["finished"] is False
    process = start(words)
    assert ended(process) in (0, 1)
    assert without_times(out) == without_times(whole)
    ours, theirs = figures(out), figures(whole)
    for key in ("files", "faults", "size", "cost", "identity"):
        if key != "cost":
            assert ours[key] == theirs[key], key
    assert not list(out.glob(".*"))


def test_another_model_or_target_in_the_same_folder_is_refused(
    place: Path, model: Path, whole: Path
) -> None:
    before = stamps(whole)
    for more, target, what in (
        ([], "openvino-cpu", "recipe, target"),
        (["--seed", "5"], "onnxruntime-cpu", "recipe"),
    ):
        line = has_one_error(command(*words_for(model, "--out", str(whole), *more, target=target)))
        assert f"holds a deployment of another {what}; choose another --out" in line
    line = has_one_error(
        command("deploy", "--model", "demo", "--target", "onnxruntime-cpu", "--out", whole)
    )
    assert "another checkpoint" in line
    assert stamps(whole) == before


def test_a_folder_of_something_else_is_refused(place: Path, model: Path, made: Path) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("all of it")
    for folder in (place / "mine", made):
        line = has_one_error(command(*words_for(model, "--out", str(folder))))
        assert "not empty and no deployment" in line
    assert [path.name for path in (place / "mine").iterdir()] == ["thesis.txt"]


def test_an_altered_file_is_refused_and_a_missing_one_made_again(place: Path, model: Path) -> None:
    words = words_for(model, "--out", "out")
    command(*words)
    file = place / "out" / "tiny-int8.onnx"
    good = file.read_bytes()
    file.write_bytes(good + b"\0")
    line = has_one_error(command(*words))
    assert "tiny-int8.onnx: altered" in line
    file.unlink()
    again = command(*words)
    assert again.exit_code in (0, 1), again.output
    assert file.read_bytes() == good


class _Failing:
    def to_dict(self) -> dict[str, Any]:
        return {
            "faults": ["parity: the output scores is not what PyTorch computes"],
            "runtime": "onnxruntime",
            "integers": {"share_of_macs": 1.0},
            "command": "dfq verify",
        }


class _Passing(_Failing):
    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "faults": []}


@pytest.mark.parametrize(("verdict", "code"), [(_Failing, 1), (_Passing, 0)])
def test_the_exit_code_is_that_of_the_verification(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch, verdict: type, code: int
) -> None:
    def verify(*_: Any, **__: Any) -> Any:
        (place / "out" / "run" / "exports").mkdir(exist_ok=True)
        return verdict()

    monkeypatch.setattr("dfq.api.verify.verify", verify)
    for _ in range(2):
        # A file that is not right is not right the second time either.
        done = command(*words_for(model, "--out", "out"))
        assert done.exit_code == code, done.output
        assert ("is not what PyTorch computes" in done.stdout) == (code == 1)
        assert ("is not right" in done.stderr) == (code == 1)
    assert dfq.deploy(model, "onnxruntime-cpu", out="out", overrides=overrides()).ok == (code == 0)


def overrides() -> Sequence[str]:
    return [word for word in SMALL if word != "--set"]


def test_photos_join(place: Path, model: Path) -> None:
    draw = np.random.default_rng(0)
    (place / "photos").mkdir()
    for index in range(5):
        pixels = draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "photos" / f"{index}.png")
    done = command(*words_for(model, "--images", "photos", "--out", "out"))
    assert done.exit_code in (0, 1), done.output
    assert "2 of 5 real photos joined calibration and rounding" in done.stdout
    found = figures(place / "out")
    assert found["photos"].startswith("2 of 5 real photos")
    assert found["identity"]["images"] == ["photos", 5]
    assert "photos" in found["closeness"]
    assert found["closeness"]["command"].endswith(" --photos photos")
    # As many others in their place are others.
    pixels = draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(place / "photos" / "3.png")
    line = has_one_error(command(*words_for(model, "--images", "photos", "--out", "out")))
    assert "a deployment of another images: content; choose another --out" in line
    line = has_one_error(command(*words_for(model, "--out", "out")))
    assert "another images" in line


def test_a_set_is_named_in_the_command_that_repeats_it(place: Path, model: Path) -> None:
    (place / "my set").mkdir()
    for index in range(2):
        Image.new("RGB", (64, 64), (90 * index, 120, 60)).save(place / "my set" / f"{index}.png")
    done = command(*words_for(model, "--data", "my set", "--out", "out"))
    assert done.exit_code in (0, 1), done.output
    assert figures(place / "out")["closeness"]["command"].endswith(" --data 'my set'")


@pytest.mark.parametrize(
    ("more", "target", "said"),
    [
        ([], "tensor-rt", "--target tensor-rt: no such file"),
        ([], "bad.yaml", "bad.yaml: wieght_bits: unknown key; did you mean weight_bits?"),
        ([], "no-layer.yaml", "float_operations: this network has no layer 'modle.9'"),
        (["--set", "quantization.weight_bits=4"], "onnxruntime-cpu", "onnxruntime-cpu says 8"),
        (["--image-size", "65"], "onnxruntime-cpu", "--image-size"),
        (["--images", "nowhere"], "onnxruntime-cpu", "--images: nowhere"),
        (["--data", "nowhere"], "onnxruntime-cpu", "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    place: Path, model: Path, more: list[str], target: str, said: str
) -> None:
    good = {"title": "Mine", "runtime": "onnxruntime", "format": "onnx"}
    (place / "bad.yaml").write_text(yaml.safe_dump({**good, "wieght_bits": 4}))
    (place / "no-layer.yaml").write_text(yaml.safe_dump({**good, "float_operations": ["modle.9"]}))
    line = has_one_error(command(*words_for(model, *more, "--out", "out", target=target)))
    assert said in line
    assert not (place / "out").exists()
    assert not (place / "home").exists()


def test_a_target_of_ones_own_keeps_layers_in_float(place: Path, model: Path) -> None:
    target = {
        "title": "Mine", "runtime": "onnxruntime", "format": "onnx", "latency": False,
        "float_operations": ["model.0.*", "matmul"], "first_last_bits": "same",
        "next": ["look at {file}"],
    }  # fmt: skip
    (place / "mine.yaml").write_text(yaml.safe_dump(target))
    done = command(*words_for(model, "--out", "out", target="mine.yaml"))
    assert done.exit_code in (0, 1), done.output
    layers = dfq.inspect(place / "out" / "run").layers
    assert {row.name.startswith("model.0.") for row in layers if not row.quantized} == {True}
    assert figures(place / "out")["speed"] is None
    assert "next: look at out/tiny-int8.onnx" in done.stdout


def test_what_a_vendors_compiler_needs(place: Path, model: Path) -> None:
    done = command(*words_for(model, "--out", "out", target="hailo8"))
    assert done.exit_code == 0, done.output
    out = place / "out"
    assert np.load(out / "calibration" / "calibration.npy").shape == (4, 64, 64, 3)
    assert (out / "tiny-float.onnx").is_file()
    assert not list(out.glob("*int8*"))
    notes = (out / "precision.txt").read_text().splitlines()
    names = {row.name for row in dfq.inspect(model).layers}
    listed = [line.split()[0] for line in notes if not line.startswith("#")]
    assert set(listed) == names
    assert done.stdout.count("--calib-set-path out/calibration/calibration.npy") == 1


@pytest.mark.parametrize(
    ("target", "suffixes"),
    [
        ("openvino-cpu", [".xml", ".bin"]),
        ("openvino-npu", [".xml", ".bin"]),
        ("tensorrt", [".onnx"]),
        ("litert-xnnpack", [".tflite"]),
    ],
)
def test_the_other_targets(place: Path, model: Path, target: str, suffixes: list[str]) -> None:
    done = command(*words_for(model, "--out", "out", target=target))
    assert done.exit_code in (0, 1), done.output
    out = place / "out"
    names = {f"tiny-{what}{suffix}" for what in ("int8", "float") for suffix in suffixes}
    assert names <= {path.name for path in out.iterdir()}
    found = figures(out)
    assert set(found["files"]) == names
    assert (found["speed"] is None) == (target in ("openvino-npu", "tensorrt"))
    if target == "openvino-cpu":
        assert [row["threads"] for row in found["speed"]["float_in_bfloat16"]] == [1, None]
    if target == "tensorrt":
        assert not any("grid" in fault for fault in found["faults"])
        assert "trtexec --onnx=out/tiny-int8.onnx" in done.stdout


def test_the_targets_are_listed() -> None:
    done = command("deploy", "--list-targets")
    assert done.exit_code == 0, done.output
    assert all(name in done.stdout for name in ("onnxruntime-cpu", "tensorrt", "hailo8"))


def test_an_identity_of_another_version_is_refused(place: Path, model: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "deploy.json").write_text('{"kind": "dfq deployment", "format": 2}')
    assert "reads 1" in has_one_error(command(*words_for(model, "--out", "out")))
    with pytest.raises(dfq.UserError):
        identity_of(place / "out")


def test_a_run_and_a_file_are_timed_beside_float(place: Path, whole: Path) -> None:
    for model in (whole / "run", whole / "tiny-int8.onnx"):
        done = command("cost", "--model", model, "--measure", "--json", "a.json")
        assert done.exit_code == 0, done.output
        speed = json.loads((place / "a.json").read_text())["speed"]
        assert [row["threads"] for row in speed["latency"]] == [1, None]
        assert "onnxruntime, 1 thread, 64 px: " in done.stdout


@pytest.mark.parametrize(
    ("named", "more", "said"),
    [
        ("demo", ["--measure"], "--measure takes a run or an exported file"),
        ("tiny-float.onnx", ["--measure"], "is a float file, and nothing to compare with"),
        ("run", ["--measure", "--runtime", "tensorrt"], "tensorrt: is not run here"),
        ("tiny-int8.onnx", ["--measure", "--runtime", "litert"], "litert: does not open"),
        ("run", ["--runtime", "litert"], "--runtime: is for --measure"),
    ],
)
def test_what_cannot_be_timed(
    place: Path, whole: Path, named: str, more: list[str], said: str
) -> None:
    given = named if named == "demo" else str(whole / named)
    line = has_one_error(command("cost", "--model", given, *more))
    assert said in line
