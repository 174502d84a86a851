"""Where outputs may be written: new files and regular ones, no inputs, nothing through a link."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.cli_parts import real_set
from support.data_cases_parts import small
from support.harness import command, contents, has_one_error
from support.outputs_parts import everything

Words = Sequence[str | Path]


def writers(model: Path, made: Path, run: Path, out: Path) -> dict[str, Words]:
    """Every command that writes a file, with `out` as the file."""
    return {
        "eval": ("eval", "--model", model, "--data", made, "--json", out),
        "inspect": ("inspect", "--model", model, "--json", out),
        "cost": ("cost", "--model", model, "--json", out),
        "sensitivity": (
            "sensitivity", "--model", model, "--data", made, "--set",
            "quantization.mixed.candidates=[4, 8]", "--images", "1", "--json", out,
        ),
        "show": ("data", "show", made, "--json", out),
        "grid": ("data", "show", made, "--grid", out.with_suffix(".png")),
        "compare json": ("compare", run, "--json", out),
        "compare csv": ("compare", run, "--csv", out),
        "report": ("report", run, "--out", out.with_suffix(".html")),
    }  # fmt: skip


COMMANDS = [
    *("eval", "inspect", "cost", "sensitivity", "show", "grid"),
    *("compare json", "compare csv", "report"),
]  # fmt: skip


ENDINGS = {"grid": "out.png", "report": "out.html"}
"""Names that commands insist on; others write `out.json`."""


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    # Its address has a hundred bytes at most.
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def a_link(path: Path) -> None:
    path.with_name("target").write_text("mine")
    path.symlink_to("target")


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def a_looping_link(path: Path) -> None:
    path.symlink_to(path.name)


def a_link_to_a_device(path: Path) -> None:
    path.symlink_to(os.devnull)


def a_read_only_file(path: Path) -> None:
    path.write_text("mine")


IN_THE_WAY: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (a_fifo, "is a device or a pipe"),
    "socket": (a_socket, "is a device or a pipe"),
    "link": (a_link, "is a link, which is not followed"),
    "link to nothing": (a_link_to_nothing, "is a link, which is not followed"),
    "looping link": (a_looping_link, "is a link, which is not followed"),
    "link to a device": (a_link_to_a_device, "is a link, which is not followed"),
    "folder": (Path.mkdir, "is a folder"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_what_is_no_regular_file_stays(
    place: Path, model: Path, made: Path, run: Path, name: str, kind: str
) -> None:
    make, message = IN_THE_WAY[kind]
    words = writers(model, made, run, place / "out.json")[name]
    make(place / ENDINGS.get(name, "out.json"))
    before = everything(place)
    assert message in has_one_error(command(*words))
    assert everything(place) == before


def test_a_device_stays(place: Path, model: Path) -> None:
    # A terminal, in whose folder nothing can be made: one that could be replaced would be lost.
    for end in (ends := os.openpty()):
        os.set_inheritable(end, False)
    device = os.ttyname(ends[1])
    line = has_one_error(command("inspect", "--model", model, "--json", device))
    assert "is a device or a pipe" in line
    assert stat.S_ISCHR(os.stat(device).st_mode)
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("end", ["/", "/."])
@pytest.mark.parametrize("name", [*COMMANDS, "export", "predict"])
def test_a_file_is_not_written_where_a_folder_was_meant(
    place: Path, model: Path, made: Path, run: Path, name: str, end: str
) -> None:
    out = place / ENDINGS.get(name, "out.json")
    out.write_text("mine")
    words: Words = (
        {
            "export": ("export", "--model", run, "--format", "onnx", "--out", out),
            "predict": ("predict", "--model", model, made / "images", "--json", out),
        }
        | writers(model, made, run, place / "out.json")
    )[name]
    before = contents(place)
    line = has_one_error(command(*words[:-1], f"{words[-1]}{end}"))
    assert f"{words[-1]}{end}: is how a folder is named" in line
    assert contents(place) == before
    # Neither where there is nothing yet.
    out.unlink()
    has_one_error(command(*words[:-1], f"{words[-1]}{end}"))
    assert not out.exists()


def test_a_file_that_is_read_only_stays(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place / "out.json"
    out.write_text("mine")
    access = os.access
    # The superuser, as whom containers run tests, may write everything.
    monkeypatch.setattr(
        os, "access", lambda path, mode: (path, mode) != (out, os.W_OK) and access(path, mode)
    )
    line = has_one_error(command("inspect", "--model", model, "--json", out))
    assert "permission denied" in line
    assert out.read_text() == "mine"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_mode_of_a_file_is_kept(
    place: Path, model: Path, made: Path, run: Path, name: str
) -> None:
    words = writers(model, made, run, place / "out.json")[name]
    out = place / ENDINGS.get(name, "out.json")
    out.write_text("old")
    out.chmod(0o600)
    result = command(*words)
    assert result.exit_code == 0, result.output
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert len(out.read_bytes()) > 10
    # A new file has the mode that the user's mask leaves.
    out.unlink()
    before = os.umask(0o027)
    try:
        assert command(*words).exit_code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o640


def by_its_name(path: Path, _: Path) -> Path:
    return path


def by_another_path(path: Path, _: Path) -> Path:
    return path.parent / ".." / path.parent.name / path.name


def by_a_linked_folder(path: Path, place: Path) -> Path:
    (place / "way").symlink_to(path.parent)
    return place / "way" / path.name


def by_a_hard_link(path: Path, place: Path) -> Path:
    os.link(path, place / "other.json")
    return place / "other.json"


WAYS = [by_its_name, by_another_path, by_a_linked_folder, by_a_hard_link]


@pytest.mark.parametrize("way", WAYS)
def test_no_output_replaces_an_input(
    place: Path, model: Path, made: Path, run: Path, way: Callable[[Path, Path], Path]
) -> None:
    (place / "in").mkdir()
    own_model = Path(shutil.copy(model, place / "in" / "tiny.safetensors"))
    data = real_set(place / "in" / "real")
    own_run = Path(shutil.copytree(run, place / "in" / "run"))
    recipe = Path(shutil.copy(place / "tiny.yaml", place / "in" / "tiny.yaml"))
    annotations = data / "annotations.json"
    cases: list[tuple[Words, Path]] = [
        (("inspect", "--model", own_model), own_model),
        (("inspect", "--model", own_run), own_run / "manifest.json"),
        (("inspect", "--model", own_run), own_run / "model.safetensors"),
        (("cost", "--model", own_run), own_run / "model.safetensors"),
        (("eval", "--model", own_model, "--data", data), own_model),
        (("eval", "--model", own_model, "--data", data), annotations),
        (("eval", "--model", own_model, "--data", data), data / "images" / "0.png"),
        (("eval", "--model", own_model, "--data", annotations), annotations),
        (("eval", "--model", own_model, "--data", annotations), data / "images" / "0.png"),
        (("sensitivity", "--model", own_model, "--data", data), annotations),
        (("sensitivity", "--model", own_model, "--recipe", recipe), recipe),
        (("data", "show", data), annotations),
        (("compare", own_run), own_run / "metrics.json"),
    ]
    for words, target in cases:
        before = everything(place / "in")
        out = way(target, place)
        line = has_one_error(command(*words, "--json", out))
        assert "is one of the inputs" in line or "is a link" in line, line
        assert everything(place / "in") == before
        if out.parent == place:
            out.unlink()
        elif out.parent.is_symlink():
            out.parent.unlink()


def test_no_picture_replaces_an_image(place: Path, made: Path) -> None:
    data = real_set(place / "real")
    shutil.copytree(made, place / "set")
    for source, image in (
        (data, data / "images" / "1.png"),
        (data / "annotations.json", data / "images" / "1.png"),
        (place / "set", place / "set" / "images" / "00000000.png"),
    ):
        before = everything(place)
        line = has_one_error(command("data", "show", source, "--grid", image))
        assert "is one of the inputs" in line
        assert everything(place) == before


def test_no_picture_joins_the_photos(place: Path) -> None:
    (place / "photos").mkdir()
    shutil.copy(real_set(place / "real") / "images" / "0.png", place / "photos")
    line = has_one_error(command("data", "show", "photos", "--grid", "photos/grid.png"))
    assert "would be one of the photos" in line
    assert [path.name for path in (place / "photos").iterdir()] == ["0.png"]


def test_two_outputs_of_one_name(place: Path, made: Path, run: Path) -> None:
    line = has_one_error(command("compare", run, "--csv", "a.txt", "--json", "./a.txt"))
    assert "is what --csv names too" in line
    line = has_one_error(command("data", "show", made, "--grid", "a.png", "--json", "a.png"))
    assert "is what --grid names too" in line


def test_results_may_be_replaced_in_the_folders_of_runs_and_sets(
    place: Path, model: Path, run: Path
) -> None:
    shutil.copytree(run, place / "run")
    data = real_set(place / "real")
    for out in (place / "run" / "eval.json", data / "eval.json"):
        for _ in range(2):
            result = command("eval", "--model", "run", "--data", data, "--json", out)
            assert result.exit_code == 0, result.output
        assert json.loads(out.read_text())["images"] == 4


def test_an_mmdet_config_replaces_no_input(place: Path, made: Path) -> None:
    pytest.importorskip("mmengine")
    base, data = place / "c.py", place / "set"
    base.write_text("model = dict(type='X')\n")
    weights = place / "w.pth"
    weights.write_text("weights")
    shutil.copytree(made, data)
    before = contents(place)
    words = ("mmdet-config", base, "--recipe", "tiny.yaml", "--checkpoint", weights)
    for out in (base, place / "tiny.yaml", weights, data / "manifest.json"):
        line = has_one_error(command(*words, "--data", data, "--out", out))
        assert "is one of the inputs" in line
        assert contents(place) == before


FOLDERS: dict[str, Words] = {
    "synthesize": ("synthesize", "--recipe", "tiny.yaml", "--out"),
    "qat": ("qat", "--recipe", "tiny.yaml", "--out"),
    "demo": ("demo", "--out"),
    "export": ("data", "export"),
    "tensorboard": ("synthesize", "--recipe", "tiny.yaml", "--tensorboard"),
    "tensorboard of qat": ("qat", "--recipe", "tiny.yaml", "--tensorboard"),
    "a file": ("inspect", "--json"),
    "DFQ_HOME": ("synthesize", "--recipe", "tiny.yaml"),
}


NOWHERE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a long name": (lambda place: place / ("x" * 256), "the name is too long"),
    "a long name on the way": (lambda place: place / ("x" * 300) / "y", "the name is too long"),
    "a long name in other letters": (lambda place: place / ("ä" * 128), "the name is too long"),
    "a home of nobody": (lambda _: Path("~nobody-here/x"), "no home folder of that user"),
    "below proc": (lambda _: Path("/proc/x/y"), "nothing can be written in /proc"),
    "a looping link": (lambda place: linked(place / "loop", "loop"), " a link"),
    "below a looping link": (lambda place: linked(place / "loop", "loop") / "x", "loop"),
    "a link to nothing": (lambda place: linked(place / "link", "nowhere"), " a link"),
    "below a link to nothing": (
        lambda place: linked(place / "link", "nowhere") / "x", "a link that leads nowhere"
    ),
    "below a file": (lambda place: place / "tiny.yaml" / "x", "a file is in the way"),
    "a pipe": (lambda place: piped(place / "pipe"), ""),
}  # fmt: skip


def linked(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


def piped(path: Path) -> Path:
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("what", FOLDERS)
@pytest.mark.parametrize("where", NOWHERE)
def test_places_that_cannot_be(
    place: Path,
    model: Path,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    where: str,
) -> None:
    if "proc" in where and not Path("/proc/self").exists():
        pytest.skip("no /proc on this system")
    make, message = NOWHERE[where]
    out = make(place)
    words = [*FOLDERS[what]]
    if what == "export":
        words += [made, "--out"]
    elif what != "demo":
        words[1:1] = ["--model", model]
    if what == "DFQ_HOME":
        monkeypatch.setenv("DFQ_HOME", str(out))
    else:
        words.append(out)
    before = everything(place)
    line = has_one_error(command(*words))
    assert message in line
    assert "what is finished is kept" not in line
    assert everything(place) == before
    assert ("DFQ_HOME" in line) == (what == "DFQ_HOME")


def test_a_file_for_the_cache(place: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").write_text("mine")
    monkeypatch.setenv("DFQ_HOME", str(place / "file"))
    line = has_one_error(command("synthesize", "--model", model, "--recipe", "tiny.yaml"))
    assert f"DFQ_HOME={place / 'file'}: a file is in the way" in line
    assert "set DFQ_HOME to a folder, or give --out" in line
    assert "what is finished is kept" not in line
    assert (place / "file").read_text() == "mine"


def test_a_file_for_the_demo(place: Path) -> None:
    (place / "file").write_text("mine")
    line = has_one_error(command("demo", "--out", "file"))
    assert "--out file: a file is in the way" in line


def test_the_longest_names_that_can_be(place: Path, model: Path, made: Path) -> None:
    name = "x" * 250
    assert command("inspect", "--model", model, "--json", f"{name}.json").exit_code == 0
    result = command("data", "export", made, "--out", name)
    assert result.exit_code == 0, result.output
    # What is made of such a name is cut.
    shutil.copy(model, place / f"{'m' * 240}.safetensors")
    shutil.copy("tiny.yaml", f"{'r' * 240}.yaml")
    result = command("qat", "--recipe", f"{'r' * 240}.yaml", "--model", f"{'m' * 240}.safetensors")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in place.glob(".*")) == []


@pytest.mark.parametrize("option", ["--model", "--data", "--recipe"])
@pytest.mark.parametrize("name", ["x" * 300, "~nobody-here/x", "loop"])
def test_inputs_that_cannot_be(place: Path, model: Path, option: str, name: str) -> None:
    (place / "loop").symlink_to("loop")
    words = {"--model": str(model), "--recipe": "tiny.yaml", "--data": "nowhere", option: name}
    flat = [word for pair in words.items() for word in pair]
    line = has_one_error(command("qat", *flat, "--out", "out"))
    assert name[:20] in line
    assert not (place / "out").exists()


def test_a_home_folder_is_known(place: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    shutil.copy(model, place / "m.safetensors")
    result = command("inspect", "--model", "~/m.safetensors", "--json", "~/a/b.json")
    assert result.exit_code == 0, result.output
    assert (place / "a" / "b.json").is_file()
    assert not (place / "~").exists()


def test_nothing_is_written_through_links_in_a_set(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfq.data.calibration_writer import CalibrationWriter

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    words = ("synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "set")
    with monkeypatch.context() as patch:
        patch.setattr(CalibrationWriter, "append", stop)
        assert command(*words).exit_code == 130
    (place / "elsewhere").mkdir()
    for name in ("images", "shards"):
        shutil.move(place / "set" / name, place / "kept")
        (place / "set" / name).symlink_to(place / "elsewhere")
        line = has_one_error(command(*words))
        assert f"set/{name}: is a link out of the set's folder" in line
        (place / "set" / name).unlink()
        shutil.move(place / "kept", place / "set" / name)
    # Files have new ones put in their place.
    (place / "mine").write_text("mine")
    for name in ("annotations.json", "preview.png", ".annotations.json.tmp", ".manifest.json.tmp"):
        (place / "set" / name).symlink_to(place / "mine")
    result = command(*words)
    assert result.exit_code == 0, result.output
    assert list((place / "elsewhere").iterdir()) == []
    assert (place / "mine").read_text() == "mine"


def test_nothing_is_written_through_links_in_a_run(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfq.qat.trainer import Trainer

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", made, "--out", "run")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_choose", stop)
        assert command(*words).exit_code == 130
    (place / "mine").write_text("mine")
    for name in ("metrics.json", ".checkpoint.pt.tmp", ".model.safetensors.tmp", "manifest.json"):
        (place / "run" / name).unlink(missing_ok=True)
        if name != "manifest.json":
            (place / "run" / name).symlink_to(place / "mine")
    log = (place / "run" / "log.txt").read_text()
    (place / "run" / "log.txt").unlink()
    (place / "run" / "log.txt").symlink_to(place / "mine")
    assert "log.txt: is no regular file" in has_one_error(command(*words))
    assert (place / "mine").read_text() == "mine"
    (place / "run" / "log.txt").unlink()
    (place / "run" / "log.txt").write_text(log)
    result = command(*words)
    assert result.exit_code == 0, result.output
    assert (place / "mine").read_text() == "mine"


def test_an_export_goes_through_no_link(place: Path, made: Path) -> None:
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    line = has_one_error(command("data", "export", made, "--out", "link"))
    assert "--out link: is a link; name the folder itself" in line
    assert list((place / "real").iterdir()) == []
    # Folders on the way may be links, as disks often are.
    assert command("data", "export", made, "--out", "link/deeper").exit_code == 0
    assert (place / "real" / "deeper" / "data.yaml").is_file()


def test_names_from_files_are_shown_on_one_line(place: Path, model: Path) -> None:
    data = real_set(place / "real", names=("a\n\x1b[31merror: red\ud800", "b"))
    line = has_one_error(command("eval", "--model", model, "--data", "no\nsuch\x1bfile"))
    assert r"no\nsuch\x1bfile" in line
    result = command("data", "show", data)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    file = small(place / "yolo", "0 .5 .5 .5 .5\n")
    file.write_text('val: "im\\nages\\u001b[0m"\nnames: [a]\n')
    line = has_one_error(command("eval", "--model", model, "--data", file))
    assert r"im\nages\x1b[0m" in line.replace("\\\\", "\\")
