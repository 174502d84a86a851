"""Damaged recipes and runs, places that nothing may be written in, and odd surroundings."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import yaml

from dfq.recipe import Recipe
from support.mutations.cases import (
    Case,
    Kind,
    Things,
    Words,
    evaluate,
    inspect,
    quantize,
    sensitivity,
    some_of,
)
from support.mutations.damage import (
    CODE,
    DOTTED,
    MARK,
    NUMBERS,
    ODD,
    PATHS,
    at,
    evil_pickle,
    flipped,
    header_of,
    mutate_bytes,
    mutate_tree,
    nested,
    odd_value,
    truncated,
    ways,
    with_header,
    with_key_twice,
)


def _by_recipe(things: Things, draw: random.Random, recipe: str, *more: str) -> list[Words]:
    """Commands that read a recipe; all but the first would work by it."""
    config: Words = (
        "mmdet-config", things.config, "--recipe", recipe, "--random-weights", "--data",
        things.made, "--out", "out.py", *more,
    )  # fmt: skip
    return [
        config,
        *some_of(
            draw,
            ("qat", "--recipe", recipe, "--model", things.model, "--data", things.made, *more),
            ("synthesize", "--recipe", recipe, "--model", things.model, "--out", "out", *more),
            ("sensitivity", "--recipe", recipe, "--model", things.model, *more),
            most=1,
        ),
    ]


def _scalars(document: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The way to every value that is no section."""
    return [way for way in ways(document) if not isinstance(at(document, way), dict | list)]


def recipe_file(things: Things, place: Path, draw: random.Random) -> Case:
    """A recipe that is none; one that is another is only written into a config."""
    document = Recipe().model_dump(mode="json")
    what = draw.choice(["tree", "unknown", "type", "infinite", "text", "text", "section"])
    way = draw.choice([w for w in _scalars(document) if isinstance(w[-1], str)])
    above = at(document, way[:-1])
    done = f"{what}: {'.'.join(map(str, way))}"
    text = ""
    if what == "tree":
        document, done = mutate_tree(document, draw, draw.choice([1, 3]))
    elif what == "unknown":
        above[draw.choice([f"{way[-1]}s", "__class__", "model_config", CODE[0], "a.b", ""])] = 1
    elif what == "type":
        above[way[-1]] = draw.choice([[1], {"a": 1}, nested(9), [None], {"x": {}}])
    elif what == "infinite":
        numbers = [w for w in _scalars(document) if type(at(document, w)) in (int, float)]
        way = draw.choice(numbers)
        at(document, way[:-1])[way[-1]] = draw.choice([n for n in NUMBERS if not 0 <= n <= 1e308])
        done = f"{'.'.join(map(str, way))}: {at(document, way)!r}"[:99]
    elif what == "section":
        name = draw.choice([key for key, value in document.items() if isinstance(value, dict)])
        document[name] = draw.choice([*CODE, [], [1], 3, "x"])
    else:
        form = draw.choice(["twice", "tag", "deep", "alias", "cut", "list", "bytes", "long"])
        plain = yaml.safe_dump(document)
        done, text = form, {
            "twice": f"{plain}seed: 1\n",
            "tag": f"{plain}evil: {draw.choice(CODE[5:6])}\n",
            "deep": f"synthesis: {json.dumps(nested(500))}\n",
            "alias": "a: &a [x, x]\nb: &b [*a, *a]\n",
            "cut": "synthesis: {images: [",
            "list": "- 1\n",
            "bytes": "seed: 1\n\x02",
            "long": "# " + "x" * (5 << 20),
        }[form]  # fmt: skip
    Path("bad.yaml").write_text(text or yaml.safe_dump(document), errors="surrogatepass")
    commands = _by_recipe(things, draw, "bad.yaml")
    # Another recipe may ask for much work.
    refused = what != "tree"
    return Case(done, commands if refused else commands[:1], refused)


def recipe_set(things: Things, place: Path, draw: random.Random) -> Case:
    """`--set` of what no recipe has."""
    document = Recipe().model_dump(mode="json")
    key = ".".join(map(str, draw.choice(_scalars(document))))
    forms = [
        f"{key}={draw.choice(CODE)}", f"{key}=[1, 2", f"{key}={{a: 1}}", f"{key}=!!bool x",
        f"{key}.x.y=1", f"{key}s=1", key, "=1", "", "__class__=1", f"{key}={'[' * 3000}",
        f"{key}={{a: 1, a: 2}}", "seed=nan", "seed=1e400", f"seed={'9' * 5000}", "synthesis=3",
        "synthesis.images=-1", "quantization.weight_bits=9", "quantization.overrides.x=3.5",
        "distillation.lr=.inf", "quantization.mixed.candidates=[]", "a" * 5000 + "=1",
        "synthesis.images=\x00", "quantization.mixed.budget=../..", "distillation.epochs=10**9",
        "\x1b[31m=1", "seed=\n1\n2: 3",
    ]  # fmt: skip
    text = draw.choice(forms)
    # Some are none because of their key, and some of their value; a text may be any text.
    free = key in ("model", "evaluation.data", "distillation.select_on") or "labels" in key
    commands = _by_recipe(things, draw, "tiny.yaml", "--set", text)
    return Case(text[:120], commands[:1] if free else commands, refused=not free)


def _copy(things: Things, place: Path) -> Path:
    return Path(shutil.copytree(things.run, place / "run")).relative_to(place)


def meeting_run(things: Things, draw: random.Random, run: Path) -> list[Words]:
    again: Words = (
        "qat", "--recipe", "tiny.yaml", "--model", things.model, "--data", things.made,
        "--out", run,
    )  # fmt: skip
    return some_of(
        draw, inspect(run), evaluate(run, things.made), again,
        ("compare", run, "--csv", "out.csv"), ("report", run, "--out", "out.html"),
    )  # fmt: skip


def run_files(things: Things, place: Path, draw: random.Random) -> Case:
    """A run that is not what it was measured as."""
    run = _copy(things, place)
    name = draw.choice(["model.safetensors", "metrics.json", "manifest.json"])
    path = run / name
    data = path.read_bytes()
    what = draw.choice(["flip", "cut", "tree", "twice", "link", "swapped", "pipe", "folder"])
    if what in ("tree", "twice") and name == "model.safetensors":
        what = "flip"
    if what == "flip":
        path.write_bytes(flipped(data, draw))
    elif what == "cut":
        # More than the last line's end.
        path.write_bytes(truncated(data[:-3], draw))
    elif what == "tree":
        document, _ = mutate_tree(json.loads(data), draw)
        path.write_text(json.dumps(document))
    elif what == "twice":
        path.write_text(with_key_twice(data.decode(), draw))
    elif what == "swapped":
        other = draw.choice(sorted(p for p in run.iterdir() if p.is_file() and p.name != name))
        path.write_bytes(other.read_bytes())
    else:
        path.unlink()
        if what == "link":
            path.symlink_to(draw.choice(["nowhere", name, "/dev/zero", "."]))
        elif what == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
    # A flipped bit of the manifest may be in what it only tells (versions).
    refused = name != "manifest.json" or what in ("cut", "twice", "swapped")
    commands = [c for c in meeting_run(things, draw, run) if c[0] != "qat" or refused]
    # A run without its model or its manifest is made again by the command that made it.
    gone = what in ("link", "pipe", "folder")
    commands = [c for c in commands if c[0] != "qat" or not gone] or [inspect(run)]
    return Case(f"{what}: {name}", commands, refused)


def run_sealed(things: Things, place: Path, draw: random.Random) -> Case:
    """A run that somebody wrote anew: sums are right, what they are of is not."""
    run = _copy(things, place)
    model, metrics, file = (
        run / name for name in ("model.safetensors", "metrics.json", "manifest.json")
    )
    manifest = json.loads(file.read_text())
    what = draw.choice(["metrics", "metrics", "description", "description", "tensors", "recipe"])
    if what == "metrics":
        document, done = mutate_tree(json.loads(metrics.read_text()), draw, draw.choice([1, 3]))
        metrics.write_text(json.dumps(document))
    elif what == "recipe":
        text = (run / "recipe.yaml").read_text()
        document, done = mutate_tree(yaml.safe_load(text), draw, 2)
        (run / "recipe.yaml").write_text(yaml.safe_dump(document), errors="surrogatepass")
    elif what == "description":
        header, payload = header_of(model.read_bytes())
        described = json.loads(header["__metadata__"]["dfq"])
        part = draw.choice(["identity", "spec", "policy"])
        described[part], done = mutate_tree(described[part], draw, draw.choice([1, 1, 2]))
        header["__metadata__"]["dfq"] = json.dumps(described)
        model.write_bytes(with_header(header, payload))
        manifest[part] = described[part]
        done = f"{part}: {done}"
    else:
        header, payload = header_of(model.read_bytes())
        changed = bytearray(payload)
        place_of = draw.randrange(len(changed) // 4) * 4
        changed[place_of : place_of + 4] = draw.choice(
            [
                b"\xff\xff\xff\x7f",
                b"\0\0\x80\x7f",
                b"\0\0\x80\xff",
                b"\0\0\0\0",
                b"\xff\xff\x7f\x7f",
            ]
        )
        done = f"payload at {place_of}"
        model.write_bytes(with_header(header, bytes(changed)))
    manifest["model_sha256"] = hashlib.sha256(model.read_bytes()).hexdigest()
    manifest["metrics_sha256"] = hashlib.sha256(metrics.read_bytes()).hexdigest()
    file.write_text(json.dumps(manifest))
    alone = inspect(run / "model.safetensors")
    return Case(f"{what}: {done}"[:200], [*meeting_run(things, draw, run), alone])


def run_begun(things: Things, place: Path, draw: random.Random) -> Case:
    """A run that was interrupted, and then damaged."""
    run = Path(shutil.copytree(things.begun_run, place / "out")).relative_to(place)
    name = draw.choice(["state.json", "checkpoint.pt", "checkpoint.pt"])
    path = run / name
    data = path.read_bytes()
    what = draw.choice(["cut", "tree", "evil", "link", "bytes"])
    if name == "state.json":
        what = draw.choice(["cut", "tree", "twice"])
    elif what == "tree":
        what = "evil"
    if what == "cut":
        path.write_bytes(data[: draw.randrange(1, len(data) - 2)])
    elif what == "tree":
        document, _ = mutate_tree(json.loads(data), draw)
        path.write_text(json.dumps(document))
    elif what == "twice":
        path.write_text(with_key_twice(data.decode(), draw))
    elif what == "bytes":
        path.write_bytes(mutate_bytes(data, draw))
    elif what == "evil":
        path.write_bytes(evil_pickle(draw))
    else:
        path.unlink()
        path.symlink_to("checkpoint.pt")
    command: Words = (
        "qat", "--recipe", "tiny.yaml", "--model", things.model, "--data", things.made,
        "--out", run,
    )  # fmt: skip
    refused = what in ("cut", "evil", "twice")
    return Case(f"{what}: {name}", [inspect(run), command][draw.randrange(2) :], refused)


def output(things: Things, place: Path, draw: random.Random) -> Case:
    """A place where nothing may be written."""
    what = draw.choice(
        ["link", "loop", "pipe", "device", "folder", "long", "deep", "inside", "input", "odd"]
    )
    data = Path(shutil.copytree(things.made, place / "set")).relative_to(place)
    model = Path(shutil.copy(things.model, place / "m.safetensors")).relative_to(place)
    path = Path(draw.choice(["bad.json", "bad/x/bad.json"] if what == "link" else ["bad.json"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    (place / "kept").write_text("mine")
    if what == "link":
        path.symlink_to(draw.choice(["kept", "nowhere", "/dev/null", place / "kept", data]))
    elif what == "loop":
        path.symlink_to("bad.json")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path = Path(draw.choice(["/dev/null", "/dev/full", "/dev/zero"]))
    elif what == "folder":
        path.mkdir()
    elif what == "long":
        path = Path(draw.choice(["x" * 300, "é" * 200, "x/" * 3000 + "x"]))
    elif what == "deep":
        path = Path("/proc/self/x.json")
    elif what == "inside":
        path = Path("kept/x.json")
    elif what == "input":
        path = draw.choice([model, data / "annotations.json", data / "manifest.json"])
    else:
        path = Path(draw.choice(["~no-such-user/x.json", "/proc/x/y", "kept/x", "set", "/"]))
    evaluated: Words = ("eval", "--model", model, "--data", data, "--json", path)
    commands: list[Words] = [evaluated]
    if path != model:
        commands.append(("data", "show", data, "--json", path))
    if path.parent.name != "set":
        commands.append(("inspect", "--model", model, "--json", path))
        commands.append((
            "mmdet-config", things.config, "--recipe", "tiny.yaml", "--random-weights", "--data",
            data, "--out", path if path != model else "set",
        ))  # fmt: skip
        commands.append(("compare", things.run, "--csv", path if path != model else "set"))
    sensed = sensitivity(model, data)
    commands.append((*sensed[:-1], path))
    if what not in ("folder", "input", "odd") and not (what == "link" and path.is_dir()):
        # A place that is no folder either.
        commands += [
            ("synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", path),
            ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", data, "--out", path),
            ("data", "export", data, "--out", path),
            ("demo", "--out", path),
            (*quantize(model, data), "--tensorboard", path),
        ]
    if what == "long":
        commands = [c for c in commands if c[0] != "demo"]
    return Case(f"{what}: {str(path)[:60]}", some_of(draw, *commands, most=3), refused=True)


def demo(things: Things, place: Path, draw: random.Random) -> Case:
    """A folder of the demo, or of a deployment, in which something else is."""
    out = place / "out"
    what = draw.choice(["file", "link", "set", "run", "broken", "other", "foreign"])
    if what == "file":
        out.write_text("mine")
    elif what == "link":
        out.symlink_to(draw.choice(["out", "nowhere"]))
    elif what == "set":
        shutil.copytree(things.made, out)
    elif what == "run":
        shutil.copytree(things.run, out)
    elif what == "broken":
        out.mkdir()
        (out / "deploy.json").write_text(draw.choice(["{", "[]", "", '{"kind": 1}']))
    elif what == "other":
        out.mkdir()
        other = {"kind": "dfq deployment", "format": draw.choice([1, 2, "1"]), "identity": {}}
        (out / "deploy.json").write_text(json.dumps(other))
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    words = [
        ("demo", "--out", "out"),
        ("deploy", "--model", things.model, "--target", "onnxruntime-cpu", "--out", "out"),
    ]
    return Case(what, words, refused=True)


def environment(things: Things, place: Path, draw: random.Random) -> Case:
    """Variables that make no sense."""
    texts = [
        *("-1", "x", "1e3", "9" * 30, "nan", " ", "0x1", "1.0", "٣", "1\n2", "None", "[0]"),
        *(one for one in (*CODE, *DOTTED, *PATHS) if "\0" not in one),
    ]
    text = draw.choice(texts)
    (place / "a-file").write_text("mine")
    os.mkfifo(place / "a-pipe")
    (place / "a-loop").symlink_to("a-loop")
    name = draw.choice(["RANK", "WORLD_SIZE", "LOCAL_RANK", "DFQ_HOME", "CC", "MASTER", "STATE"])
    work = quantize(things.model, things.made)
    if name in ("RANK", "WORLD_SIZE"):
        text = draw.choice([t for t in texts if t.strip()])
        return Case(f"{name}={text!r}"[:99], [work], refused=True, environment={name: text})
    if name == "LOCAL_RANK":
        return Case(f"{name}={text!r}"[:99], [work], environment={name: text})
    if name == "MASTER":
        given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        given |= draw.choice([{"MASTER_PORT": p} for p in ("x", "-1", "99999999", "", "1.5")])
        return Case(f"{given}", [work], refused=True, environment=given)
    if name == "CC":
        text = draw.choice(["'", "nothing-here", "/", "a-pipe", "a-file", "false", "true", "\\"])
        made: Words = (
            "synthesize",
            "--model",
            things.model,
            "--recipe",
            "tiny.yaml",
            "--out",
            "out",
        )
        return Case(f"CC={text}", [(*made, "--workers", "1")], environment={"CC": text})
    if name == "STATE":
        text = str(place / draw.choice(["a-file", "a-pipe", "a-loop", "x" * 300]))
        return Case(f"state: {text}", [work], environment={"XDG_STATE_HOME": text})
    folders = ["a-file", "a-pipe", "a-loop", "a-file/x", "x" * 300, "~no-such-user/x"]
    text = draw.choice([*folders, "/proc/x", "/dev/null"])
    cached: list[Words] = [
        ("synthesize", "--model", things.model, "--recipe", "tiny.yaml"),
        ("qat", "--recipe", "tiny.yaml", "--model", things.model, "--set", "method=ptq"),
        ("qat", "--recipe", "tiny.yaml"),
        ("sensitivity", "--model", things.model),
    ]
    return Case(f"DFQ_HOME={text}"[:99], some_of(draw, *cached), True, {"DFQ_HOME": text})


def names(things: Things, place: Path, draw: random.Random) -> Case:
    """Names of things that are none."""
    odd = [value for value in (*PATHS, *DOTTED, *CODE, *ODD) if isinstance(value, str)]
    # What no command line can hold.
    text = draw.choice([one for one in odd if "\0" not in one and one not in ("", ".", "/", "*")])
    text = text.replace("\ud800", "\udc80")
    out: Words = ("--out", "out")
    commands: list[Words] = [
        ("inspect", f"--model={text}"),
        ("eval", f"--model={text}", "--data", things.made),
        ("eval", "--model", things.model, f"--data={text}"),
        ("synthesize", f"--model={text}", *out),
        ("synthesize", "--model", things.model, f"--labels=real:{text}", *out),
        ("synthesize", "--model", things.model, f"--recipe={text}", *out),
        ("qat", f"--recipe={text}", "--model", things.model),
        ("qat", "--recipe", "tiny.yaml", "--model", things.model, f"--data={text}", *out),
        ("qat", "--recipe", "tiny.yaml", "--model", things.model, f"--select-on={text}", *out),
        ("sensitivity", "--model", things.model, "--data", things.made, f"--budget={text}"),
        ("data", "show", "--", text),
        ("data", "verify", "--", text),
        ("data", "export", *out, "--", text),
        ("compare", "--", text),
        ("mmdet-config", "--recipe", "tiny.yaml", "--random-weights", "--", text),
        ("inspect", "--model", "torchvision/fasterrcnn_mobilenet_v2", f"--checkpoint={text}"),
        ("inspect", f"--model={MARK}@{text}"),
        ("eval", "--model", things.model, "--data", things.made, f"--device={text}"),
    ]
    return Case(text[:99], some_of(draw, *commands, most=4), refused=True)


def mixed_bits(things: Things, place: Path, draw: random.Random) -> Case:
    """What a run that was interrupted had measured of its layers."""
    run = Path(shutil.copytree(things.begun_run, place / "out")).relative_to(place)
    words = (
        "qat", "--recipe", "tiny.yaml", "--model", things.model, "--data", things.made,
        "--out", run, "--set", "quantization.mixed.budget=w4a8", "--set", "method=ptq",
        "--set", "quantization.mixed.candidates=[4, 8]",
    )  # fmt: skip
    identity = json.loads((run / "state.json").read_text())
    identity["recipe"]["quantization"]["mixed"].update(budget="w4a8", candidates=[4, 8])
    identity["recipe"]["method"] = "ptq"
    (run / "state.json").write_text(json.dumps(identity))
    (run / "checkpoint.pt").unlink()
    found = {"cost": "bytes", "budget": 1.0, "spent": 1.0, "divergence": 0.1, "overrides": {}}
    what = draw.choice(["tree", "text", "overrides", "overrides"])
    text = draw.choice(["{", "[]", "null", "", "NaN", '{"overrides": {}}', "[" * 50_000])
    if what == "tree":
        found, text = mutate_tree(found, draw, 1)
        text = json.dumps(found)
    elif what == "overrides":
        found["overrides"] = draw.choice(
            [{"*": "w99a9"}, {"*": [4]}, {"no-layer": 4}, [1], "x", None, {"*": CODE[0]},
             {"*": float("nan")}, {"*": odd_value(draw)}]
        )  # fmt: skip
        text = json.dumps(found)
    (run / "sensitivity.json").write_text(mutate_bytes(text.encode(), draw).decode("latin-1")
                                          if draw.random() < 0.2 else text)  # fmt: skip
    return Case(f"{what}: {text[:120]}", [words], refused=False)


KINDS: dict[str, Kind] = {
    "a recipe": recipe_file,
    "--set": recipe_set,
    "files of a run": run_files,
    "a run sealed anew": run_sealed,
    "a run that was begun": run_begun,
    "bits of a mixed run": mixed_bits,
    "an output": output,
    "a folder of the demo": demo,
    "the environment": environment,
    "names": names,
}
