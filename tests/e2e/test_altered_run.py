"""A run is what was measured: a file of it that was altered, or is gone, is refused or made again;
and its model is loaded for inference, alone or in its folder."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.altered_run_parts import edited
from support.forks import ended, start
from support.harness import command, contents, has_one_error
from support.tiny_detector import blobs, stacked

import dfq
from dfq.errors import UserError
from dfq.models import save_detector
from dfq.runs.folder import AnotherRunError, Run, load_run, open_run


@pytest.fixture
def copy(place: Path, run: Path) -> Path:
    """A copy of the finished run, `run` in the folder to work in."""
    return Path(shutil.copytree(run, place / "run"))


def words_for(model: Path, made: Path) -> tuple[str | Path, ...]:
    """The command that made the run."""
    return ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out", "run")


def swap_weights(folder: Path) -> None:
    """Other weights in the same file format, with the same description."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("weight"))
    save_file({**tensors, name: tensors[name] + 0.01}, path, metadata=metadata)


def flip_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def manifest(**changes: Any) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        edited(folder / "manifest.json", lambda value: {**value, **changes})

    return alter


def inside(section: str, key: str, value: Any) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        edited(folder / "manifest.json", lambda whole: whole[section].update({key: value}))

    return alter


def without(key: str) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        edited(folder / "manifest.json", lambda value: {k: v for k, v in value.items() if k != key})

    return alter


def metrics(text: str | None) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        path = folder / "metrics.json"
        path.unlink() if text is None else path.write_text(text)

    return alter


ALTERED = {
    "other weights": swap_weights,
    "a flipped bit": flip_byte,
    "another sum": manifest(model_sha256="0" * 64),
    "no sum": without("model_sha256"),
    "a sum that is no text": manifest(model_sha256=3),
    "other weight bits": inside("policy", "weight_bits", 8),
    "other activation bits": inside("policy", "activation_bits", 4),
    "an override more": inside("policy", "overrides", [["model.0.*", 8]]),
    "weight bits that are none": inside("policy", "weight_bits", "many"),
    "another network": inside("spec", "image_size", 128),
    "other names": inside("spec", "names", ["x", "y", "z"]),
    "another seed": inside("identity", "data", "elsewhere"),
    "no policy": without("policy"),
    "a policy that is none": manifest(policy=[1, 2]),
    "no spec": without("spec"),
    "no identity": without("identity"),
    "an identity that is none": manifest(identity="me"),
    "no format": without("format"),
    "a format to come": manifest(format=99),
    "a format that is no number": manifest(format="3"),
    "a format that was": manifest(format=2),
    "no metrics": metrics(None),
    "truncated metrics": metrics('{"selected": '),
    "other metrics": metrics('{"selected": "qat", "quantized_share_of_macs": 1.0}'),
    "metrics that are a list": metrics("[]"),
    "no sum of the metrics": without("metrics_sha256"),
}


@pytest.mark.parametrize("how", ALTERED)
def test_an_altered_run_is_refused(place: Path, copy: Path, made: Path, how: str) -> None:
    ALTERED[how](copy)
    before = contents(copy)
    for words in (("eval", "--data", made), ("inspect",)):
        line = has_one_error(command(*words, "--model", "run"))
        assert line.startswith("error: run")
    assert contents(copy) == before


@pytest.mark.parametrize("how", ALTERED)
def test_an_altered_run_is_no_success(
    place: Path, copy: Path, model: Path, made: Path, how: str
) -> None:
    """The command that made it says so as well."""
    ALTERED[how](copy)
    before = contents(copy)
    assert has_one_error(command(*words_for(model, made))).startswith("error: run")
    assert contents(copy) == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"text"', "3", '{"recipe": 3}', '{"recipe": []}', "\xff"]
)
def test_a_broken_state_is_one_line(place: Path, model: Path, made: Path, text: str) -> None:
    (place / "run").mkdir()
    (place / "run" / "state.json").write_bytes(text.encode("latin-1"))
    before = contents(place / "run")
    assert "run" in has_one_error(command(*words_for(model, made)))
    assert contents(place / "run") == before
    # The same where the number of the run is looked for.
    (place / "runs").mkdir()
    (place / "run").rename(place / "runs" / "tiny-tiny-1")
    words = words_for(model, made)[:-2]
    result = command(*words)
    if result.exit_code == 0:
        assert (place / "runs" / "tiny-tiny-2" / "manifest.json").is_file()
    else:
        assert "state.json" in has_one_error(result)
    assert contents(place / "runs" / "tiny-tiny-1") == before


def test_a_run_that_lost_its_model_is_made_again(
    place: Path, copy: Path, model: Path, made: Path
) -> None:
    whole = contents(copy)
    (copy / "model.safetensors").unlink()
    line = has_one_error(command("eval", "--model", "run", "--data", made))
    assert "run the command that made it again" in line
    again = command(*words_for(model, made))
    assert again.exit_code == 0, again.output
    assert contents(copy) == whole


def test_a_numbered_run_that_lost_its_model_is_made_again(
    place: Path, model: Path, made: Path
) -> None:
    words = words_for(model, made)[:-2]
    assert command(*words).exit_code == 0
    whole = contents(place / "runs")
    (place / "runs" / "tiny-tiny-1" / "model.safetensors").unlink()
    assert command(*words).exit_code == 0
    assert contents(place / "runs") == whole


def test_what_the_line_says_about_an_altered_run_helps(
    place: Path, copy: Path, model: Path, made: Path
) -> None:
    whole = contents(copy)
    flip_byte(copy)
    line = has_one_error(command(*words_for(model, made)))
    assert "delete run/model.safetensors" in line
    (copy / "model.safetensors").unlink()
    assert command(*words_for(model, made)).exit_code == 0
    assert contents(copy) == whole


def test_an_unfinished_run_without_its_state(place: Path, copy: Path) -> None:
    """Nothing says any more which command would finish it: none is promised to."""
    (copy / "manifest.json").unlink()
    line = has_one_error(command("inspect", "--model", "run"))
    assert "this run is unfinished" in line
    assert "same command" not in line


def test_broken_findings_of_mixed_precision_are_one_line(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfq.qat.trainer import Trainer

    words = [*words_for(model, made), "--set", "quantization.mixed.budget=w4a8"]
    words += ["--set", "quantization.mixed.images=2"]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_choose", stop)
        assert command(*words).exit_code == 130
    path = place / "run" / "sensitivity.json"
    sound = path.read_text()
    for text in ("{}", "[]", '{"overrides": 3}', '{"overrides": {"model.0.conv": []}}', "{"):
        path.write_text(text)
        assert "sensitivity.json" in has_one_error(command(*words))
    path.write_text(sound)
    assert command(*words).exit_code == 0


def as_floats(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's model as files held them before they held integers."""
    tensors = load_run(folder).module.state_dict()
    # They were where training had left them, on the grid or beside it.
    for name, tensor in tensors.items():
        if name.endswith("conv.weight"):
            scale = tensors[f"{name}_quantizer.log_scale"].exp().view(-1, 1, 1, 1)
            tensors[name] = tensor + 0.2 * scale
    return tensors


def test_a_run_of_format_2_is_still_read(place: Path, copy: Path, model: Path, made: Path) -> None:
    """Its weights are floats, and its model does not say its format."""
    expected = stacked(load_run(copy).raw(blobs(1)))
    path = copy / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["dfq"])
    assert described.pop("format") == 3
    assert described.pop("tensors_sha256")
    assert load_file(path)["model.0.conv.weight"].dtype == torch.int8
    save_file(as_floats(copy), path, metadata={"dfq": json.dumps(described)})
    old = {"format": 2, "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edited(copy / "manifest.json", lambda value: {**value, **old})
    assert torch.equal(stacked(load_run(copy).raw(blobs(1))), expected)
    assert command("inspect", "--model", "run").exit_code == 0
    assert command(*words_for(model, made)).exit_code == 0
    path.rename(place / "alone.safetensors")
    alone = dfq.load_detector(place / "alone.safetensors")
    assert torch.equal(stacked(alone.raw(blobs(1))), expected)


def test_a_run_of_format_1_is_still_read(place: Path, copy: Path, model: Path, made: Path) -> None:
    """Its model says nothing of itself, and nobody summed up its metrics."""
    expected = stacked(load_run(copy).raw(blobs(1)))
    path = copy / "model.safetensors"
    save_file(as_floats(copy), path, metadata={"kind": "dfq quantized detector"})
    old = {"format": 1, "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edited(copy / "manifest.json", lambda value: {**value, **old})
    without("metrics_sha256")(copy)
    assert torch.equal(stacked(load_run(copy).raw(blobs(1))), expected)
    assert torch.equal(stacked(dfq.load_detector(path).raw(blobs(1))), expected)
    assert command(*words_for(model, made)).exit_code == 0
    flip_byte(copy)
    assert "damaged" in has_one_error(command("inspect", "--model", "run"))
    flip_byte(copy)
    path.rename(place / "alone.safetensors")
    assert "give the run" in has_one_error(command("inspect", "--model", "alone.safetensors"))


def test_the_model_of_a_run_is_loaded_by_its_file(place: Path, copy: Path, model: Path) -> None:
    expected = stacked(load_run(copy).raw(blobs(2)))
    inside = dfq.load_detector(copy / "model.safetensors")
    assert inside.source == str(copy / "model.safetensors")
    assert torch.equal(stacked(inside.raw(blobs(2))), expected)
    assert len(inside.detect(blobs(2))) == 2
    # Elsewhere under another name, without the folder around it.
    moved = place / "elsewhere" / "small.safetensors"
    moved.parent.mkdir()
    shutil.copy(copy / "model.safetensors", moved)
    alone = dfq.load_detector(moved)
    assert torch.equal(stacked(alone.raw(blobs(2))), expected)
    assert alone.names == dfq.load_detector(model).names
    # Beside a manifest of something else.
    (moved.parent / "manifest.json").write_text("{}")
    moved.rename(moved.parent / "model.safetensors")
    again = dfq.load_detector(moved.parent / "model.safetensors")
    assert torch.equal(stacked(again.raw(blobs(2))), expected)


def test_a_flipped_bit_of_a_file_alone_is_noticed(place: Path, copy: Path, model: Path) -> None:
    """Of a run's model without its manifest, and of a float detector, of weights or steps."""
    shutil.copy(copy / "model.safetensors", place / "alone.safetensors")
    float_file = place / "float.safetensors"
    save_detector(dfq.load_detector(model), float_file)
    for path in (place / "alone.safetensors", float_file):
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        # Counters of BatchNorm, which nothing is computed with, come first.
        quarter = (len(whole) - start) // 4
        for place_of in (start + quarter, start + 2 * quarter, len(whole) - 1):
            data = bytearray(whole)
            data[place_of] ^= 1
            path.write_bytes(data)
            line = has_one_error(command("inspect", "--model", path))
            assert str(path) in line
            assert "damaged" in line
        path.write_bytes(whole)
        assert command("inspect", "--model", path).exit_code == 0


def wide(described: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
    described["spec"]["description"]["backbone"][4] = [-1, 1, "Conv", [1 << 15, 3, 2]]


def of_a_policy_that_is_none(described: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
    described["policy"] = {"weight_bits": "four", "run": "a program"}


def of_a_text_for_a_spec(described: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
    described["spec"] = "a program"


def with_nan(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("bias"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))


def of_floats(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    name = "model.1.conv.weight"
    tensors[name] = tensors[name].float()


def of_a_shorter_weight(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    name = "model.1.conv.weight"
    tensors[name] = tensors[name][:-1].clone()


def of_other_bits(described: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
    described["policy"]["weight_bits"] = 5


def of_a_format_to_come(described: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
    described["format"] = 9


def of_a_format_that_is_none(described: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
    described["format"] = [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_floats, "the tensor model.1.conv.weight holds float32"),
        (of_a_shorter_weight, "the tensor model.1.conv.weight holds uint8"),
        (of_other_bits, "integers of 5 bits take"),
        (of_a_format_to_come, "of format 9, and this dfq reads 1 to 3"),
        (of_a_format_that_is_none, "of format a list of 1"),
        (wide, "asks for a network of more than"),
        (of_a_policy_that_is_none, "alone.safetensors"),
        (of_a_text_for_a_spec, "the description is of the family None"),
        (with_nan, "NaN"),
    ],
)
def test_a_model_alone_is_read_within_bounds(
    place: Path,
    copy: Path,
    change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    """Nothing but the file itself says what it is: it has no sums to go by."""
    path, tensors = place / "alone.safetensors", load_file(copy / "model.safetensors")
    with safe_open(copy / "model.safetensors", framework="pt") as file:
        described = json.loads(file.metadata()["dfq"])
    change(described, tensors)
    save_file(tensors, path, metadata={"dfq": json.dumps(described)})
    line = has_one_error(command("inspect", "--model", "alone.safetensors"))
    assert "alone.safetensors" in line
    assert message in line


def test_the_file_of_an_altered_run_is_refused_as_well(place: Path, copy: Path) -> None:
    flip_byte(copy)
    with pytest.raises(UserError, match="damaged or altered"):
        dfq.load_detector(copy / "model.safetensors")


def test_a_quantized_model_is_no_float_one(place: Path, copy: Path, made: Path) -> None:
    file = copy / "model.safetensors"
    for words in (
        ("qat", "--recipe", "tiny.yaml", "--data", made, "--out", "out"),
        ("synthesize", "--recipe", "tiny.yaml", "--out", "out"),
        ("sensitivity", "--recipe", "tiny.yaml", "--data", made),
    ):
        line = has_one_error(command(*words, "--model", file))
        assert "is quantized already" in line
    with pytest.raises(UserError, match="is quantized already"):
        dfq.synthesize(dfq.load_detector(file), out=place / "out")
    assert not (place / "out").exists()
    result = command("eval", "--model", file, "--data", made)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("what", ["synthesize", "qat"])
def test_two_that_start_at_once(place: Path, model: Path, made: Path, what: str) -> None:
    """Both of them, neither ahead: one works, the other is through as well or told in a line."""
    words = list(map(str, words_for(model, made)))
    if what == "synthesize":
        words = ["synthesize", "--model", str(model), "--recipe", "tiny.yaml", "--out", "out"]
    outputs = [place / f"{index}.txt" for index in range(3)]
    processes = [start(words, output) for output in outputs]
    for process in processes:
        ended(process)
    codes = [process.exitcode for process in processes]
    assert 0 in codes
    assert set(codes) <= {0, 2}
    for code, output in zip(codes, outputs, strict=True):
        text = output.read_text()
        assert "Traceback" not in text
        if code == 2:
            assert re.fullmatch(r"error: [^\n]*another process is [^\n]*\n", text)
    assert command(*words).exit_code == 0


def test_a_number_that_is_taken_in_between(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another experiment begins in the folder that was free a moment ago."""
    from dfq.runs import folder as module

    plain = module.next_folder
    taken: list[Path] = []

    def next_folder(parent: Path, stem: str, identity: dict[str, Any]) -> Path:
        folder = plain(parent, stem, identity)
        if not taken:
            taken.append(folder)
            Run(folder, {"seed": 1})
        return folder

    monkeypatch.setattr(module, "next_folder", next_folder)
    assert open_run(None, place / "runs", "a", {"seed": 2}).folder == place / "runs" / "a-2"
    assert taken == [place / "runs" / "a-1"]
    with pytest.raises(AnotherRunError, match="another seed"):
        open_run(place / "runs" / "a-1", place / "runs", "a", {"seed": 2})


def test_a_run_that_is_begun_in_between_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one holds the folder while it notes what the run is of."""
    first, second = {"seed": 1}, {"seed": 2}
    from dfq.runs import folder as module

    plain = module.write_json
    lines: list[str] = []

    def write_json(path: Path, value: Any) -> None:
        if not lines:
            lines.append("")
            with pytest.raises(UserError) as caught:
                Run(place / "run", second)
            lines[0] = str(caught.value)
        plain(path, value)

    monkeypatch.setattr(module, "write_json", write_json)
    assert Run(place / "run", first).identity == first
    assert lines == [f"{place / 'run'}: another process is working on this run"]
    assert json.loads((place / "run" / "state.json").read_text()) == first
