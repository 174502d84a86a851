"""A calibration set that was altered, or leads out of its folder, is refused by all that use it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.harness import command, contents, has_one_error
from support.outputs_parts import everything

import dfq
from dfq.data import integrity
from dfq.data.calibration_set import CalibrationSet
from dfq.data.calibration_writer import CalibrationWriter

IMAGES = "images/00000000.png", "images/00000001.png"


@pytest.fixture
def copy(made: Path, place: Path) -> Path:
    """A copy of a finished set, to alter."""
    return Path(shutil.copytree(made, place / "set"))


def uses(model: Path, source: str = "set") -> dict[str, tuple[str, ...]]:
    """Every command that reads a set."""
    qat = ("qat", "--recipe", "tiny.yaml", "--model", str(model), "--out", "out")
    return {
        "qat": (*qat, "--data", source),
        "select": (*qat, "--select-on", source),
        "measure": (*qat, "--set", f"evaluation.data={source}"),
        "sensitivity": ("sensitivity", "--model", str(model), "--data", source),
        "eval": ("eval", "--model", str(model), "--data", source),
        "eval of the file": ("eval", "--model", str(model), "--data", f"{source}/annotations.json"),
        "labels": (
            "synthesize", "--model", str(model), "--recipe", "tiny.yaml", "--out", "out",
            "--labels", f"real:{source}",
        ),
        "found": ("synthesize", "--model", str(model), "--recipe", "tiny.yaml", "--out", source),
        "show": ("data", "show", source, "--grid", "grid.png"),
        "export": ("data", "export", source, "--out", "out"),
    }  # fmt: skip


USES = [*uses(Path())]


def edit(change: Callable[[dict[str, Any]], object], honest: bool = True) -> Callable[[Path], None]:
    """Change the annotations; `honest`: and what the manifest says of them, as attackers do."""

    def damage(root: Path) -> None:
        document = json.loads((root / "annotations.json").read_text())
        change(document)
        (root / "annotations.json").write_text(json.dumps(document))
        if honest:
            digest = hashlib.sha256((root / "annotations.json").read_bytes()).hexdigest()
            manifest = json.loads((root / "manifest.json").read_text())
            (root / "manifest.json").write_text(
                json.dumps({**manifest, "annotations_sha256": digest})
            )

    return damage


def file_name(name: str) -> Callable[[Path], None]:
    """Rename the first image, in all files that name it."""

    def damage(root: Path) -> None:
        edit(lambda d: d["images"][0].update(file_name=name))(root)
        manifest = json.loads((root / "manifest.json").read_text())
        manifest["shards"][0]["files"][0] = name
        (root / "manifest.json").write_text(json.dumps(manifest))

    return damage


def bbox(*values: Any) -> Callable[[Path], None]:
    return edit(lambda d: d["annotations"][0].update(bbox=list(values)))


def swap(root: Path) -> None:
    first, second = (root / name for name in IMAGES)
    first.rename(root / "between")
    second.rename(first)
    (root / "between").rename(second)


def another_image(root: Path) -> None:
    Image.new("RGB", (64, 64), (1, 2, 3)).save(root / IMAGES[0])


def replaced(make: Callable[[Path, Path], None], name: str = IMAGES[0]) -> Callable[[Path], None]:
    """Move a file out of the set and put something that leads there in its place."""

    def damage(root: Path) -> None:
        outside = root.parent / "outside"
        shutil.move(root / name, outside)
        make(outside, root / name)

    return damage


def linked_images(root: Path) -> None:
    shutil.move(root / "images", root.parent / "outside")
    (root / "images").symlink_to(root.parent / "outside")


def twice(root: Path) -> None:
    edit(lambda d: d["images"][1].update(file_name=d["images"][0]["file_name"]))(root)


def one_stem(root: Path) -> None:
    file_name("00000001.PNG")(root)
    shutil.copy(root / IMAGES[0], root / "images" / "00000001.PNG")


ALTERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "swapped images": (swap, "shard 0 (images/00000000.png to 00000001.png): its images are not"),
    "another image": (another_image, "shard 0 (images/00000000.png"),
    "a missing image": (
        lambda root: (root / IMAGES[1]).unlink(), "1 of 4 images are missing, the first is images/"
    ),
    "a nan box": (bbox(float("nan"), 0, 5, 5), "not finite or has a negative side"),
    "an infinite box": (bbox(0, 0, float("inf"), 5), "not finite or has a negative side"),
    "a negative box": (bbox(9, 9, -5, 5), "not finite or has a negative side"),
    "a box outside": (bbox(60, 60, 30, 5), "a box leaves the image"),
    "a box of text": (bbox("1", 2, 3, 4), "annotations.json: not as dfq wrote it"),
    "a box of three": (bbox(1, 2, 3), "annotations.json: not as dfq wrote it"),
    "a huge box": (bbox(10**400, 2, 3, 4), "annotations.json: not as dfq wrote it"),
    "an unknown category": (
        edit(lambda d: d["annotations"][0].update(category_id=99)), "a category is out of range"
    ),
    "category 0": (
        edit(lambda d: d["annotations"][0].update(category_id=0)), "a category is out of range"
    ),
    "half a category": (
        edit(lambda d: d["annotations"][0].update(category_id=1.5)), "a category is out of range"
    ),
    "no category": (
        edit(lambda d: d["annotations"][0].update(category_id=None)), "not as dfq wrote it"
    ),
    "renumbered categories": (
        edit(lambda d: d["categories"][0].update(id=7)), "categories are not numbered"
    ),
    "a category without a name": (
        edit(lambda d: d["categories"][0].update(name=3)), "a category without a name"
    ),
    "a score of two": (
        edit(lambda d: d["annotations"][0].update(score=2.0)), "a score is not from 0 to 1"
    ),
    "no score": (edit(lambda d: d["annotations"][0].pop("score")), "not as dfq wrote it"),
    "no width": (edit(lambda d: d["images"][0].update(width=0)), "not finite or has a negative"),
    "two images of one id": (
        edit(lambda d: d["images"][1].update(id=d["images"][0]["id"])), "not as dfq wrote it"
    ),
    "other names of categories": (
        edit(lambda d: d["categories"][0].update(name="other"), honest=False),
        "annotations.json: not what the manifest records",
    ),
    "an image left out": (
        edit(lambda d: (d["images"].pop(), d["annotations"].clear())),
        "its images are not those that the manifest records",
    ),
    "a way up": (file_name("../../outside.png"), "is no name of a file in images/"),
    "a way up of windows": (file_name("..\\outside.png"), "is no name of a file in images/"),
    "an absolute path": (file_name("/etc/hostname"), "is no name of a file in images/"),
    "a drive": (file_name("C:outside.png"), "is no name of a file in images/"),
    "a subfolder": (file_name("sub/0.png"), "is no name of a file in images/"),
    "no name": (file_name(""), "is no name of a file in images/"),
    "a hidden name": (file_name(".png"), "is no name of a file in images/"),
    "a name of two lines": (file_name("a\nb.png"), "is no name of a file in images/"),
    "a long name": (file_name("x" * 300), "is no name of a file in images/"),
    "one name twice": (twice, "has the same name as '00000000.png'"),
    "one name with two endings": (one_stem, "has the same name as '00000001.PNG'"),
    "a link for an image": (
        replaced(lambda old, new: new.symlink_to(old)), "00000000.png: is a link"
    ),
    "a hard link for an image": (
        replaced(lambda old, new: os.link(old, new)), "00000000.png: is a hard link"
    ),
    "a pipe for an image": (replaced(lambda _, new: os.mkfifo(new)), ".png: is no regular file"),
    "a folder for an image": (replaced(lambda _, new: new.mkdir()), ".png: is no regular file"),
    "a link for the annotations": (
        replaced(lambda old, new: new.symlink_to(old), "annotations.json"),
        "annotations.json: is a link",
    ),
    "a hard link for the annotations": (
        replaced(lambda old, new: os.link(old, new), "annotations.json"),
        "annotations.json: is a hard link",
    ),
    "a link for the images": (linked_images, "images: is a link out of the set's folder"),
    "a manifest of other things": (
        lambda root: _manifest(root, shards=[{"index": 0, "files": [], "sha256": ""}]),
        "manifest.json: not as dfq wrote it",
    ),
    "a manifest that leads out": (
        lambda root: _manifest(root, shards=[{"index": 0, "files": ["../a"], "sha256": ""}]),
        "manifest.json: '../a' is no name of a file",
    ),
    "a manifest of another format": (
        lambda root: _manifest(root, format=2), "manifest.json: of the format 2; this version"
    ),
    "a manifest of more images": (
        lambda root: _manifest(root, images=5), "manifest.json: not as dfq wrote it"
    ),
    "a manifest without a hash": (
        lambda root: _manifest(root, annotations_sha256=None), "manifest.json: not as dfq wrote it"
    ),
    "annotations nested deeply": (
        lambda root: _write(root / "annotations.json", "[" * 10**5), "nested too deeply"
    ),
    "annotations with an endless number": (
        lambda root: _write(root / "annotations.json", f"[{'9' * 5000}]"), "broken or truncated"
    ),
}  # fmt: skip


def _manifest(root: Path, **changes: Any) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def test_a_manifest_without_determinants(place: Path, model: Path, copy: Path) -> None:
    _manifest(copy, determinants="all of them")
    line = has_one_error(command(*uses(model)["found"]))
    assert "damaged (what determines the set is lost)" in line
    for use in ("qat", "eval", "show", "export"):
        line = has_one_error(command(*uses(model)[use]))
        assert "manifest.json: not as dfq wrote it" in line


@pytest.mark.parametrize("case", ALTERED)
@pytest.mark.parametrize("use", USES)
def test_an_altered_set_is_not_used(
    place: Path, model: Path, copy: Path, case: str, use: str
) -> None:
    damage, message = ALTERED[case]
    # What was right once is not taken to be so for ever.
    CalibrationSet.open(copy).require_intact()
    damage(copy)
    before = everything(place)
    line = has_one_error(command(*uses(model)[use]))
    assert message in line, line
    assert everything(place) == before


@pytest.mark.parametrize("case", ALTERED)
def test_verify_finds_it_too(place: Path, copy: Path, case: str) -> None:
    damage, _ = ALTERED[case]
    damage(copy)
    result = command("data", "verify", copy)
    assert result.exit_code == 2, result.output
    assert all(line.startswith("error: ") for line in result.stderr.splitlines())


def test_images_are_hashed_once(
    place: Path, model: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    plain = integrity.shard_digest

    def counted(root: Path, files: list[str]) -> str:
        hashed.append(root)
        return plain(root, files)

    monkeypatch.setattr(integrity, "shard_digest", counted)
    before = everything(copy)
    words = uses(model)["eval"]
    assert command(*words).exit_code == 0
    assert len(hashed) == 2
    assert command(*words).exit_code == 0
    assert command(*uses(model)["show"]).exit_code == 0
    assert len(hashed) == 2
    # The set itself knows nothing of that.
    assert everything(copy) == before
    # Touched, it is looked at again, and another set is another.
    os.utime(copy / IMAGES[0])
    assert command(*words).exit_code == 0
    assert len(hashed) == 4
    shutil.copytree(copy, place / "other")
    assert command(*uses(model, "other")["eval"]).exit_code == 0
    assert len(hashed) == 6


def test_a_swap_that_keeps_sizes_and_times_is_found(place: Path, model: Path, copy: Path) -> None:
    words = uses(model)["eval"]
    assert command(*words).exit_code == 0
    path = copy / IMAGES[0]
    status = path.stat()
    another_image(copy)
    with path.open("ab") as file:
        file.write(bytes(status.st_size - path.stat().st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert "its images are not those" in has_one_error(command(*words))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"set": 3}'])
def test_a_broken_memory_costs_only_time(
    place: Path, model: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(place / "state"))
    words = uses(model)["eval"]
    assert command(*words).exit_code == 0
    (memory,) = (path for path in (place / "state").rglob("*") if path.is_file())
    memory.write_text(text)
    assert command(*words).exit_code == 0
    another_image(copy)
    assert command(*words).exit_code == 2
    # Nor does a place that cannot be written matter.
    shutil.rmtree(place / "state")
    (place / "state").write_text("mine")
    assert "its images are not those" in has_one_error(command(*words))
    assert (place / "state").read_text() == "mine"


def test_a_set_that_is_begun_is_checked_when_it_goes_on(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "set")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationWriter, "finish", stop)
        assert command(*words).exit_code == 130
    root = place / "set"
    swap(root)
    record = json.loads((root / "shards" / "000001.json").read_text())
    record["images"][0]["file_name"] = "../../outside.png"
    (root / "shards" / "000001.json").write_text(json.dumps(record))
    result = command(*words)
    assert result.exit_code == 0, result.output
    # Both shards were made again, as they are.
    assert everything(root) == everything(made)


def test_a_set_is_no_detector_and_no_run(place: Path, model: Path, made: Path, run: Path) -> None:
    for words in (
        ("synthesize", "--model", made),
        ("qat", "--recipe", "tiny.yaml", "--model", made),
        ("sensitivity", "--model", made),
        ("eval", "--model", made, "--data", made),
        ("inspect", "--model", made),
    ):
        line = has_one_error(command(*words))
        assert "is a calibration set and no detector" in line
        assert "quantized run" not in line
    for words in (("eval", "--model", model, "--data", run), ("data", "show", run)):
        assert "is a quantized run and no set" in has_one_error(command(*words))
    assert "holds no quantized model" in has_one_error(command("compare", made))
    assert "is no run" in has_one_error(command("compare", place))


def test_a_set_of_other_sizes_is_refused(place: Path, model: Path) -> None:
    import torch

    def write(side: int) -> Path:
        identity = {"checkpoint": dfq.load_detector(model).fingerprint}
        root = place / f"set-{side}"
        writer = CalibrationWriter(root, identity, ["a", "b", "c"], 1)
        pixels = torch.zeros(2, 3, side, side, dtype=torch.uint8)
        writer.append(0, 0, pixels, [torch.zeros(0, 5)] * 2, [torch.zeros(0)] * 2)
        writer.finish({})
        return root

    words = ("qat", "--recipe", "tiny.yaml", "--model", model, "--out", "out", "--data")
    line = has_one_error(command(*words, write(50)))
    assert "50 is no multiple of the model's stride" in line
    line = has_one_error(command(*words, write(96), "--image-size", "64"))
    assert "--image-size 64: the images of" in line
    assert "are 96 x 96" in line
    assert not (place / "out").exists()


# --- real sets


LEADS_OUT = [
    "../secret.png",
    "a/../../../secret.png",
    "..\\secret.png",
    "/etc/hostname",
    "\\\\server\\share\\a.png",
    "C:\\secret.png",
    "c:/secret.png",
]


@pytest.mark.parametrize("name", LEADS_OUT)
def test_a_real_coco_set_stays_in_its_folder(place: Path, model: Path, name: str) -> None:
    from support.data_cases_parts import small_coco

    small_coco(place / "deep" / "set", images={"file_name": name})
    for target in (place / "secret.png", place / "deep" / "secret.png"):
        Image.new("RGB", (64, 48)).save(target)
    line = has_one_error(command("eval", "--model", model, "--data", "deep/set"))
    assert "leads out of the set's folder" in line
    assert repr(name) in line


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["identity.json", "000000.json"])
def test_a_pipe_in_a_set_that_was_begun_is_not_waited_for(
    place: Path, model: Path, made: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from dfq.synthesis.inversion import Inversion

    plain = Inversion.batch

    def batch(self: Any, count: int, seed: int, shard: int, report: Any = None) -> Any:
        if shard == 1:
            raise KeyboardInterrupt
        return plain(self, count, seed, shard, report)

    words = ("synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "set")
    with monkeypatch.context() as patch:
        patch.setattr(Inversion, "batch", batch)
        assert command(*words).exit_code == 130
    path = place / "set" / "shards" / name
    path.unlink()
    os.mkfifo(path)
    result = command(*words)
    if name == "identity.json":
        assert f"{name}: is no regular file" in has_one_error(result)
    else:
        # The shard is made again.
        assert result.exit_code == 0, result.output
        assert contents(place / "set") == contents(made)
