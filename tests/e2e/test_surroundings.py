"""What a process finds around it: closed streams, full ones, variables that make no sense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.harness import command, has_one_error, has_one_error_after_output


def shell(line: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in which `dfq` is the command."""
    whole = f'dfq() {{ "{sys.executable}" -m dfq "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", whole], cwd=place, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "words", ["inspect --model MODEL", "--help", "data show MADE", "eval --model MODEL --data MADE"]
)
def test_standard_output_is_closed(place: Path, model: Path, made: Path, words: str) -> None:
    words = words.replace("MODEL", str(model)).replace("MADE", str(made))
    done = shell(f"dfq {words} >&-", place)
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output is closed")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in place.iterdir()) == ["tiny.yaml"]


def test_standard_error_and_input_are_closed(place: Path, model: Path) -> None:
    words = f"--model {model} --recipe tiny.yaml --out set"
    done = shell(f"dfq synthesize {words} 2>&- <&-", place)
    assert done.returncode == 0
    # Progress does not go where results go.
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["BatchNorm,", "4"]
    assert json.loads((place / "set" / "manifest.json").read_text())["images"] == 4
    done = shell("dfq inspect --model nowhere.pt 2>&-", place)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_is_full(place: Path, model: Path) -> None:
    done = shell(f"dfq inspect --model {model} > /dev/full", place)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: the disk is full")


def test_whoever_reads_the_output_has_read_enough(place: Path, model: Path) -> None:
    done = shell(
        f"dfq inspect --model {model} | head -n 1 >/dev/null; echo ${{PIPESTATUS[0]}}", place
    )
    assert "Traceback" not in done.stderr
    assert done.stdout.strip() in ("0", "1")


BAD_WORLDS: dict[str, tuple[dict[str, str], str]] = {
    "rank of letters": ({"RANK": "abc"}, "RANK=abc in the environment is no number"),
    "negative rank": ({"RANK": "-1"}, "RANK=-1 in the environment is no number"),
    "half a rank": ({"RANK": "0.5"}, "RANK=0.5 in the environment is no number"),
    "rank of many digits": ({"RANK": "9" * 5000}, "in the environment is no number"),
    "rank of other digits": ({"RANK": "²"}, "in the environment is no number"),
    "rank alone": ({"RANK": "3"}, "RANK=3 in the environment is none of WORLD_SIZE=1"),
    "size of letters": ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is no number"),
    "no size": ({"WORLD_SIZE": "0"}, "is none of WORLD_SIZE=0 processes"),
    "no rank": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set"),
    "rank beyond": ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 in the environment is none of"),
    "no master": ({"WORLD_SIZE": "2", "RANK": "0"}, "but MASTER_ADDR is not set"),
    "no port": (
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "but MASTER_PORT is not set"
    ),
    "port of letters": (
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
        "WORLD_SIZE=2, but no leading process is at 127.0.0.1:x",
    ),
    "port beyond": (
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"},
        "WORLD_SIZE=2, but no leading process is at 127.0.0.1:99999",
    ),
    "local rank of letters": ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x in the environment"),
    "local size of letters": ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE=x in the environment"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_WORLDS)
@pytest.mark.parametrize("name", ["synthesize", "qat", "sensitivity"])
def test_processes_that_nobody_started(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch, case: str, name: str
) -> None:
    variables, message = BAD_WORLDS[case]
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    words = [name, "--model", model, "--recipe", "tiny.yaml"]
    if name != "sensitivity":
        words += ["--out", "out"]
    line = has_one_error(command(*words))
    assert message in line
    assert "unset RANK and WORLD_SIZE to work in one" in line
    assert not (place / "out").exists()
    assert not (place / "home").exists()


def test_an_error_of_the_system_is_one_line(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfq.data import calibration_set as calibration

    for number in (5, 24, 36, 40, 116):
        monkeypatch.setattr(
            calibration.CalibrationSet, "load", lambda *_, number=number: _raise(number)
        )
        line = has_one_error_after_output(
            command(
                "qat", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out",
                f"out-{number}",
            )
        )  # fmt: skip
        assert "some/file: " in line
        assert "what is finished is kept" not in line


def _raise(number: int) -> None:
    raise OSError(number, os.strerror(number), "some/file")


def test_a_bug_keeps_its_traceback(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise AttributeError("a mistake of ours")

    monkeypatch.setattr("dfq.api.inspect.inspect", bug)
    with pytest.raises(AttributeError, match="a mistake of ours"):
        command("inspect", "--model", model)
