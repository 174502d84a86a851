"""Damaged detectors: checkpoints, files of dfq, model YAMLs."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load, save
from torch import nn

from support.mutations.cases import Case, Kind, Things, inspect, meeting_model
from support.mutations.damage import (
    CODE,
    DOTTED,
    PATHS,
    at,
    bomb_pickle,
    evil_pickle,
    flipped,
    header_of,
    mutate_bytes,
    mutate_tree,
    nested,
    odd_value,
    records,
    truncated,
    ways,
    with_header,
    with_key_twice,
    write_records,
    zip_bomb,
)
from support.small_ultralytics import NAMES, YAML, network
from support.yolov5_files import write as write_yolov5


def _checkpoint(things: Things, place: Path, draw: random.Random) -> Path:
    return Path(
        shutil.copy(draw.choice([things.yolov5, things.ultralytics]), place / "model.pt")
    ).relative_to(place)


def checkpoint_bytes(things: Things, place: Path, draw: random.Random) -> Case:
    """An archive whose bytes are others: every record has a checksum."""
    path = _checkpoint(things, place, draw)
    data = path.read_bytes()
    what = draw.choice(["flip in a record", "truncated", "anywhere", "nothing of it"])
    refused = what != "anywhere"
    if what == "flip in a record":
        # Behind the first record's name; the last record ends well before the directory.
        content = draw.choice([one for one in records(path).values() if len(one) > 16])
        start = data.index(content)
        damaged = bytearray(data)
        damaged[draw.randrange(start, start + len(content))] ^= 1 << draw.randrange(8)
        data = bytes(damaged)
    elif what == "truncated":
        data = truncated(data, draw)
    elif what == "anywhere":
        data = mutate_bytes(data, draw)
    else:
        data = draw.choice([b"", b"PK\x03\x04", draw.randbytes(500), b"\x80\x02.", b"{}"])
    path.write_bytes(data)
    return Case(what, meeting_model(things, draw, path), refused)


def checkpoint_records(things: Things, place: Path, draw: random.Random) -> Case:
    """An archive of other records, whose checksums are right."""
    path = _checkpoint(things, place, draw)
    content = records(path)
    pickled = next(name for name in content if name.endswith("data.pkl"))
    storages = [name for name in content if "/data/" in name]
    what = draw.choice(["evil", "evil", "bomb", "pickle", "short", "gone", "swapped", "zip bomb"])
    refused = what not in ("pickle", "swapped")
    if what == "evil":
        content[pickled] = evil_pickle(draw)
    elif what == "bomb":
        content[pickled] = bomb_pickle(draw)
    elif what == "pickle":
        content[pickled] = mutate_bytes(content[pickled], draw)
    elif what == "short":
        name = draw.choice(storages)
        content[name] = content[name][: len(content[name]) // 2]
    elif what == "gone":
        del content[draw.choice([pickled, *storages])]
    elif what == "swapped":
        one, other = draw.sample(storages, 2)
        content[one], content[other] = content[other], content[one]
    write_records(path, content)
    if what == "zip bomb":
        zip_bomb(path)
    return Case(what, meeting_model(things, draw, path), refused)


def bare_pickle(things: Things, place: Path, draw: random.Random) -> Case:
    """A checkpoint that is a pickle and no archive, with code in it."""
    path = Path(f"model.{draw.choice(['pt', 'pth'])}")
    what = draw.choice(["evil", "bomb", "legacy"])
    if what == "legacy":
        file = io.BytesIO()
        torch.save({"model": {"a": torch.zeros(3)}}, file, _use_new_zipfile_serialization=False)
        path.write_bytes(mutate_bytes(file.getvalue(), draw))
    else:
        path.write_bytes(evil_pickle(draw) if what == "evil" else bomb_pickle(draw))
    return Case(what, meeting_model(things, draw, path), refused=True)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(n, t) for n, t in model.state_dict().items() if t.is_floating_point() and t.numel()]


def _disturb(model: Any, draw: random.Random) -> tuple[str, bool]:
    """Change what a checkpoint's model holds; what was done, and whether it has to be refused."""
    what = draw.choice(["nan", "huge", "yaml", "names", "names", "args", "attribute", "part"])
    if what == "nan":
        name, tensor = draw.choice(_tensors(model))
        value = draw.choice([float("nan"), float("inf"), -float("inf")])
        tensor.view(-1)[draw.randrange(tensor.numel())] = value
        return f"{value} in {name}", True
    if what == "huge":
        name, tensor = draw.choice(_tensors(model))
        tensor.mul_(draw.choice([1e4, 1e30, 0.0, 1e-30]))
        return f"other values in {name}", False
    if what == "yaml":
        model.yaml, done = mutate_tree(model.yaml, draw, draw.choice([1, 3]))
        return done, False
    if what == "names":
        wrong = [["a"], {0: "a"}, {1: "a", 2: "b"}, [CODE[0]] * 9, {"a": "b"}, 7, [None] * 3]
        model.names = draw.choice([*wrong, odd_value(draw)])
        return f"names {str(model.names)[:80]}", model.names in wrong
    if what == "args":
        model.args = {"imgsz": odd_value(draw)}
        return "args", False
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    layer = draw.choice(layers)
    if what == "attribute":
        name = draw.choice(
            ["stride", "padding", "groups", "kernel_size", "dilation", "in_channels"]
        )
        setattr(layer, name, odd_value(draw))
        return f"{name} of a convolution", False
    layer.weight = nn.Parameter(torch.zeros(draw.choice([(0,), (1, 1, 1, 1), (3, 2)])))
    return "a weight of another shape", True


def checkpoint_content(things: Things, place: Path, draw: random.Random) -> Case:
    """A checkpoint that torch wrote of a network that is none."""
    done: list[tuple[str, bool]] = []
    path = Path("model.pt")
    if draw.random() < 0.5:
        write_yolov5(path, lambda model, _: done.append(_disturb(model, draw)))
    else:
        model = network()
        with torch.no_grad():
            done.append(_disturb(model, draw))
        torch.save({"model": model}, path)
    what, refused = done[0]
    return Case(what, meeting_model(things, draw, path), refused)


def saved_bytes(things: Things, place: Path, draw: random.Random) -> Case:
    """A `.safetensors` file whose bytes are others. Payload has no checksum."""
    path = Path("model.safetensors")
    data = draw.choice([things.model, *things.models.values()]).read_bytes()
    size = int.from_bytes(data[:8], "little")
    what = draw.choice(["truncated", "longer", "length", "header", "payload"])
    if what == "truncated":
        data = truncated(data, draw)
    elif what == "longer":
        data += draw.randbytes(draw.randrange(1, 99))
    elif what == "length":
        data = draw.choice([2**63, 2**64 - 1, 10**9, 0, size - 1]).to_bytes(8, "little") + data[8:]
    elif what == "header":
        data = data[:8] + mutate_bytes(data[8 : 8 + size], draw) + data[8 + size :]
    else:
        data = flipped(data, draw, start=8 + size)
    path.write_bytes(data)
    refused = what in ("truncated", "longer", "length")
    return Case(what, meeting_model(things, draw, path), refused)


def saved_header(things: Things, place: Path, draw: random.Random) -> Case:
    """A `.safetensors` file of another header: names, shapes and places of tensors."""
    path = Path("model.safetensors")
    header, payload = header_of(draw.choice([things.model, *things.models.values()]).read_bytes())
    names = [name for name in header if name != "__metadata__" and "num_batches" not in name]
    name = draw.choice(names)
    what = draw.choice(
        ["tree", "gone", "dtype", "offsets", "twice", "renamed", "deep", "described"]
    )
    text = ""
    if what == "tree":
        header[name], _ = mutate_tree(header[name], draw)
    elif what == "gone":
        del header[name]
    elif what == "dtype":
        header[name]["dtype"] = draw.choice(["F8_E4M3", "I32", "F64", "BOOL", "X", 3, None])
    elif what == "offsets":
        header[name]["data_offsets"] = draw.choice([[0, 2**63], [-1, 4], [8, 4], [0], "0", None])
    elif what == "twice":
        text = with_key_twice(json.dumps(header), draw)
    elif what == "renamed":
        header[f"{name}{draw.choice(['x', '.', '/../x', chr(0)])}"] = header.pop(name)
    elif what == "deep":
        text = json.dumps(header)[:-1] + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}"
    else:
        header["__metadata__"] = draw.choice([{}, {"dfq": ""}, {"dfq": 3}, {"dfq": "null"}, [], 1])
    path.write_bytes(with_header(text or header, payload))
    refused = what not in ("tree", "twice")
    return Case(f"{what}: {name}", meeting_model(things, draw, path), refused)


def saved_description(things: Things, place: Path, draw: random.Random) -> Case:
    """A `.safetensors` file that says something else of itself."""
    path = Path("model.safetensors")
    family = draw.choice(["yolov5", *things.models])
    data = (things.models.get(family) or things.model).read_bytes()
    header, payload = header_of(data)
    text = header["__metadata__"]["dfq"]
    spec = json.loads(text)
    what = draw.choice(["tree", "tree", "tree", "tree", "twice", "type", "text", "required"])
    refused = what not in ("tree", "type")
    if what == "tree":
        spec, done = mutate_tree(spec, draw, draw.choice([1, 1, 2, 4]))
        text = json.dumps(spec)
    elif what == "twice":
        text, done = with_key_twice(text, draw), "a key twice"
    elif what == "required":
        done = draw.choice(["family", "names", "image_size", "fingerprint"])
        spec[done] = draw.choice([None, {"a": 1}, [[]], float("nan"), 10**400])
        text = json.dumps(spec)
    elif what == "type":
        # Whatever names a class or a function.
        known = [way for way in ways(spec) if isinstance(at(spec, way), str)]
        way = draw.choice([w for w in known if w[-1] == "type"] or known)
        done = draw.choice([*DOTTED, *CODE, *PATHS])
        at(spec, way[:-1])[way[-1]] = done
        text = json.dumps(spec)
    else:
        done = draw.choice(["[" * 50_000, "{", "", "NaN", '"x"', "[]", text[:-9], text + "}"])
        text = done
    header["__metadata__"]["dfq"] = text
    path.write_bytes(with_header(header, payload))
    return Case(f"{family}: {done[:99]}", meeting_model(things, draw, path), refused)


def saved_tensors(things: Things, place: Path, draw: random.Random) -> Case:
    """A `.safetensors` file with other numbers."""
    path = Path("model.safetensors")
    data = draw.choice([things.model, *things.models.values()]).read_bytes()
    header, _ = header_of(data)
    tensors = {name: tensor.clone() for name, tensor in load(data).items()}
    names = [n for n, t in tensors.items() if t.is_floating_point() and t.numel() > 1]
    name = draw.choice(names)
    what = draw.choice(["nan", "inf", "huge", "zero", "shape", "whole", "swapped", "variance"])
    if what in ("nan", "inf"):
        tensors[name].view(-1)[draw.randrange(tensors[name].numel())] = float(what)
    elif what == "huge":
        tensors[name].fill_(draw.choice([1e30, -3e38, 1e-40]))
    elif what == "zero":
        tensors = {n: torch.zeros_like(t) for n, t in tensors.items()}
    elif what == "shape":
        tensors[name] = tensors[name].reshape(-1)[:-1].clone()
    elif what == "whole":
        tensors[name] = tensors[name].long()
    elif what == "swapped":
        other = draw.choice(names)
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        variances = [n for n in names if n.endswith("running_var")]
        if variances:
            tensors[draw.choice(variances)].fill_(-1.0)
        else:
            tensors[name].fill_(float("nan"))
    path.write_bytes(save(tensors, metadata=header["__metadata__"]))
    refused = what not in ("huge", "zero", "swapped")
    return Case(f"{what} in {name}", meeting_model(things, draw, path), refused)


def model_yaml(things: Things, place: Path, draw: random.Random) -> Case:
    """A model YAML that describes no network, or another."""
    path = Path("model.yaml")
    document = {**YAML, "names": dict(NAMES)}
    what = draw.choice(["tree", "tree", "tree", "layer", "layer", "text", "number"])
    refused = what in ("layer", "text")
    rows = [*document["backbone"], *document["head"]]
    if what == "tree":
        document, done = mutate_tree(document, draw, draw.choice([1, 2, 4]))
        text = yaml.safe_dump(document)
    elif what == "layer":
        document, _ = mutate_tree(document, random.Random(0), 0)
        row = draw.choice([*document["backbone"], *document["head"]])
        row[2] = draw.choice([*DOTTED, *CODE, "other.yaml", None, 3, [], {"type": "Conv"}])
        done, text = f"layer {row[2]}", yaml.safe_dump(document)
    elif what == "number":
        document, _ = mutate_tree(document, random.Random(0), 0)
        row = draw.choice([*document["backbone"], *document["head"]])
        place_of = draw.choice([0, 1])
        row[place_of] = draw.choice([-5, 99, 10**9, 2.5, "x", None, [], [[0]], True, "9" * 30])
        done, text = f"row {rows.index(row) if row in rows else ''} {row}", yaml.safe_dump(document)
    else:
        text = yaml.safe_dump(document)
        done = draw.choice(["twice", "tag", "alias", "deep", "cut", "bytes", "loop"])
        text = {
            "twice": f"{text}nc: 3\n",
            "tag": f"{text}x: {CODE[5]}\n",
            "alias": f"{text}a: &a [x, x]\n" + "".join(
                f"a{n}: &b{n} [{', '.join(['*a' if n == 0 else f'*b{n - 1}'] * 9)}]\n"
                for n in range(9)
            ),
            "deep": f"{text}x: {json.dumps(nested(100))}\n",
            "cut": text[: text.index("head")] + "head: [",
            "bytes": text + "\x01",
            "loop": f"{text}x: &x [*x]\n",
        }[done]  # fmt: skip
    path.write_text(text, errors="surrogatepass")
    commands = [inspect(path), *meeting_model(things, draw, f"{path}@random")[1:]]
    return Case(done, commands, refused)


def weights_apart(things: Things, place: Path, draw: random.Random) -> Case:
    """A state dict for a network that is named beside it."""
    path = Path(f"w.{draw.choice(['pth', 'safetensors'])}")
    state = torch.load(things.weights, weights_only=True)["state_dict"]
    names = [name for name, tensor in state.items() if tensor.is_floating_point()]
    name = draw.choice(names)
    what = draw.choice(["gone", "more", "shape", "nan", "odd", "evil", "bytes", "prefix"])
    if what == "gone":
        del state[name]
    elif what == "more":
        state[draw.choice([f"{name}x", "x.y", "", "backbone", CODE[0]])] = torch.zeros(2)
    elif what == "shape":
        state[name] = torch.zeros(draw.choice([(0,), (1, 2), (3, 3, 3, 3, 3)]))
    elif what == "nan":
        state[name].view(-1)[0] = draw.choice([float("nan"), float("inf")])
    elif what == "odd":
        state[name] = draw.choice([None, 3, "x", [1.0], {}, state[name].cfloat()])
    elif what == "prefix":
        state = {f"{draw.choice(['a.', 'b.'])}{key}": value for key, value in state.items()}
    if path.suffix == ".pth":
        torch.save({"state_dict": state}, path)
    else:
        kept = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        path.write_bytes(save({key: value.contiguous() for key, value in kept.items()}))
    if what == "evil":
        path.write_bytes(evil_pickle(draw))
    elif what == "bytes":
        path.write_bytes(truncated(path.read_bytes()[:-1], draw))
    words = ("inspect", "--model", things.config, "--checkpoint", path)
    # What else a state dict holds may be left out (the names of other packages' counters, say).
    refused = what in ("gone", "shape", "nan", "evil", "bytes", "prefix")
    return Case(f"{what}: {name} in {path}", [words], refused)


KINDS: dict[str, Kind] = {
    "weights apart": weights_apart,
    "bytes of a checkpoint": checkpoint_bytes,
    "records of a checkpoint": checkpoint_records,
    "a bare pickle": bare_pickle,
    "content of a checkpoint": checkpoint_content,
    "bytes of a saved detector": saved_bytes,
    "header of a saved detector": saved_header,
    "description of a saved detector": saved_description,
    "tensors of a saved detector": saved_tensors,
    "a model yaml": model_yaml,
}
