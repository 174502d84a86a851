"""Targets are data: those that are shipped hold together, and what is wrong in one is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dfq.errors import UserError
from dfq.export.targets import PLACES, load_target, shipped_targets
from dfq.recipe import load_recipe

GOOD = {"title": "Mine", "runtime": "onnxruntime", "format": "onnx"}


def written(folder: Path, **values: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **values}))
    return path


def test_those_that_come_with_the_package() -> None:
    assert set(shipped_targets()) == {
        "onnxruntime-cpu", "openvino-cpu", "openvino-npu", "tensorrt", "litert-xnnpack", "rknn",
        "hailo8",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(shipped_targets()))
def test_a_shipped_target_is_a_recipe(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    section = load_recipe("w8a8", target.overrides()).quantization
    assert (section.placement, section.runtime) == ("qdq", target.runtime)
    assert target.notes
    assert all("\n" not in line for line in (*target.notes, *target.next))
    commands = target.commands(dict.fromkeys(PLACES, "a b"))
    assert len(commands) == len(target.next) > 0
    # For a shell, whatever the files are called.
    assert any("'a b'" in command for command in commands)


def test_a_users_own_file(tmp_path: Path) -> None:
    found = load_target(written(tmp_path, weight_bits=4, float_operations=["matmul"]))
    assert (found.name, found.precision) == ("mine", "W4A8")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"wieght_bits": 4}, "wieght_bits: unknown key; did you mean weight_bits?"),
        ({"weight_bits": 1}, "weight_bits: input should be greater than or equal to 2, got 1"),
        ({"runtime": "tvm"}, "runtime: input should be"),
        ({"format": "litert"}, "format: onnxruntime executes no litert files; onnx, torch"),
        ({"power_of_two_scales": True}, "power_of_two_scales: dfq makes no scales"),
        ({"runtime": "tensorrt"}, "symmetric: tensorrt takes activations without a zero point"),
        ({"calibration": "hailoo"}, "calibration: no such tool as 'hailoo'"),
        (
            {"calibration": "rknn", "format": "openvino", "runtime": "openvino"},
            "format: a compiler that quantizes by itself (calibration) is given",
        ),
        ({"next": ["run {fil}"]}, "next: no file is called {fil}"),
        ({"next": ["run {file.__class__}"], "name": "a/b"}, "name: 'a/b' cannot be part"),
        ({"notes": "one"}, "notes: input should be a valid list"),
        ({"per_channel": 2}, "per_channel: "),
    ],
)
def test_what_is_wrong_in_one_is_said_in_a_line(
    tmp_path: Path, values: dict[str, object], said: str
) -> None:
    path = written(tmp_path, **values)
    with pytest.raises(UserError) as caught:
        load_target(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: ")
    assert said in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "a target is a mapping of keys, not a list of 2"),
        ("", "a target is a mapping of keys, not None"),
        ("title: x\ntitle: y\n", "the key 'title' is there twice"),
        ("a: !!python/object/apply:os.system [touch ran]", "not valid YAML"),
        ("a: &a [*a]", "stands within"),
    ],
)
def test_a_file_that_is_no_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        load_target("mine.yaml")
    assert not Path("ran").exists()


def test_a_name_that_none_has() -> None:
    with pytest.raises(UserError, match="did you mean openvino-cpu"):
        load_target("openvino-cpi")
