"""Models that real users have, each rebuilt small, and what is right for each.

Two tables: what has to be read, and to compute what its own network computes; and what has to be
refused, in a line that says which.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_ultralytics, yolov5_files
from support.small_mmdet import enliven, write_config
from support.small_ultralytics import raw_of, raw_of_detector
from support.tiny_detector import stacked, tiny_detector
from torch import Tensor, nn

import dfq
from dfq.errors import UserError
from dfq.models import load_detector, save_detector
from dfq.models.coco_categories import match_names
from dfq.models.torchvision.base import from_name

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))

ACTIVATIONS: list[nn.Module] = [
    nn.LeakyReLU(0.01),
    nn.LeakyReLU(0.3),
    nn.ReLU(),
    nn.ReLU6(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.ELU(0.7),
    nn.CELU(0.7),
    nn.SELU(),
    nn.Mish(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.Hardtanh(-0.5, 2.0),
    nn.Softplus(2.0, 5.0),
    nn.Softshrink(0.2),
    nn.Hardshrink(0.2),
    nn.Threshold(0.1, -0.3),
    nn.RReLU(0.2, 0.4),
    nn.PReLU(init=0.4),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Softsign(),
    nn.Tanhshrink(),
    nn.LogSigmoid(),
    nn.Identity(),
]


# ---- silent wrong results


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_an_activation_set_in_code_is_the_networks_own(
    activation: nn.Module, tmp_path: Path
) -> None:
    """`Conv.default_act` edited before training: the YAML says nothing of it."""
    model = small_ultralytics.network(copy.deepcopy(activation).eval())
    own = raw_of(model, IMAGES)
    plain = raw_of(small_ultralytics.network(), IMAGES)
    assert not torch.allclose(own, plain, atol=1e-3)
    detector = load_detector(small_ultralytics.save(model, tmp_path / "own.pt"))
    torch.testing.assert_close(raw_of_detector(detector, IMAGES), own)
    # What a run of it, or the detector saved, is rebuilt from.
    save_detector(detector, tmp_path / "saved.safetensors")
    again = load_detector(tmp_path / "saved.safetensors")
    assert torch.equal(raw_of_detector(again, IMAGES), raw_of_detector(detector, IMAGES))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_an_activation_of_yolov5_keeps_its_arguments(activation: nn.Module, tmp_path: Path) -> None:
    ours = tiny_detector()

    def give(module: nn.Module) -> None:
        for part in module.modules():
            if hasattr(part, "act"):
                part.act = copy.deepcopy(activation).eval()

    give(ours.module)
    with torch.no_grad():
        own = stacked(ours.raw(IMAGES))
        assert not torch.allclose(own, stacked(tiny_detector().raw(IMAGES)), atol=1e-3)
        path = yolov5_files.write(tmp_path / "own.pt", lambda model, _: give(model))
        detector = load_detector(path)
        torch.testing.assert_close(stacked(detector.raw(IMAGES)), own)
        save_detector(detector, tmp_path / "saved.safetensors")
        again = load_detector(tmp_path / "saved.safetensors")
        assert torch.equal(stacked(again.raw(IMAGES)), stacked(detector.raw(IMAGES)))


def test_one_activation_may_differ_from_the_others(tmp_path: Path) -> None:
    model = small_ultralytics.network()
    model.model[1].act = nn.LeakyReLU(0.25)
    model.model[2].cv1.act = nn.Identity()
    detector = load_detector(small_ultralytics.save(model, tmp_path / "own.pt"))
    torch.testing.assert_close(raw_of_detector(detector, IMAGES), raw_of(model, IMAGES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.model[0], "act", nn.Softmax(1)), r"activation\.Softmax in model\.0"),
        (lambda m: setattr(m.model[0], "act", nn.Flatten()), r"Flatten in model\.0\.act"),
        (lambda m: delattr(m.model[0], "act"), r"no activation in model\.0\.act"),
        (
            lambda m: setattr(m.model[0].conv, "stride", (1, 1)),
            r"stride \(1, 1\) in model\.0\.conv",
        ),
        (lambda m: setattr(m.model[0].conv, "dilation", (2, 2)), r"dilation"),
        (lambda m: setattr(m.model[0].conv, "padding_mode", "reflect"), r"padding_mode 'reflect'"),
        (lambda m: setattr(m.model[2].m[0], "add", False), r"add False in model\.2\.m\.0"),
        (lambda m: setattr(m.model[4], "m", nn.MaxPool2d(7, 1, 3)), r"kernel_size 7 in model\.4"),
        (lambda m: setattr(m.model[4], "m", nn.AvgPool2d(5, 1, 2)), r"AvgPool2d in model\.4\.m"),
        (lambda m: setattr(m.model[5], "mode", "bilinear"), r"mode 'bilinear' in model\.5"),
        (lambda m: setattr(m.model[6], "f", [-1, 1]), r"f \(-1, 1\) in model\.6"),
        (lambda m: setattr(m.model[0].bn, "eps", 1e-5), r"1e-05 in model\.0\.bn"),
    ],
)
def test_what_else_was_changed_past_the_yaml(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    model = small_ultralytics.network()
    change(model)
    path = small_ultralytics.save(model, tmp_path / "own.pt")
    with pytest.raises(UserError, match=message) as refused:
        load_detector(path)
    assert "\n" not in str(refused.value)
    assert "own.pt" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(m.model[0].conv, "stride", (1, 1)),
            r"stride \(1, 1\) in model\.0\.conv",
        ),
        (lambda m: setattr(m.model[3].m[0], "add", False), r"add False in model\.3\.m\.0"),
        (lambda m: setattr(m.model[5].m, "kernel_size", 5), r"kernel_size 5 in model\.5\.m"),
        (lambda m: setattr(m.model[0], "act", nn.Softmax(1)), r"activations SiLU, Softmax"),
        (lambda m: setattr(m.model[0], "act", nn.LeakyReLU(0.2)), r"LeakyReLU\(.*0\.2\), SiLU"),
    ],
)
def test_what_else_was_changed_past_the_description(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    path = yolov5_files.write(tmp_path / "own.pt", lambda model, _: change(model))
    with pytest.raises(UserError, match=message) as refused:
        load_detector(path)
    assert "\n" not in str(refused.value)


def test_constants_of_batchnorm_are_kept_when_a_detector_is_saved(tmp_path: Path) -> None:
    def change(model: Any, _: Any) -> None:
        model.model[0].bn.eps = 0.5

    detector = load_detector(yolov5_files.write(tmp_path / "own.pt", change))
    with torch.no_grad():
        own = stacked(detector.raw(IMAGES))
        assert not torch.allclose(own, stacked(tiny_detector().raw(IMAGES)), atol=1e-3)
        save_detector(detector, tmp_path / "saved.safetensors")
        again = load_detector(tmp_path / "saved.safetensors")
        assert torch.equal(stacked(again.raw(IMAGES)), own)


@pytest.mark.parametrize(
    ("set_names", "model_names", "expected"),
    [
        # A detector of digits whose training numbered them 1, 2, ..., 9, 0.
        ("0123456789", "1234567890", [9, 0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("0123456789", "0123456789", list(range(10))),
        ("9876543210", "0123456789", [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        ("0123", "1234", [None, 0, 1, 2]),
        # No name is shared: numbers in the place of names.
        ("012", "abc", [0, 1, 2]),
        (("00", "01", "02"), "abc", [0, 1, 2]),
    ],
)
def test_digits_are_names_before_they_are_positions(
    set_names: Any, model_names: Any, expected: list[int | None]
) -> None:
    assert match_names(list(set_names), list(model_names), "set") == expected


# ---- the same results, however it is written


def counted(module: nn.Module) -> None:
    """What thop leaves behind in every module it looks at."""
    for part in module.modules():
        part.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        part.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))


def without_momentum(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None


def wrapped(name: str) -> Callable[[Any, Any], Any]:
    """The model in one of the original's wrappers, or in two."""

    def wrap(model: Any, made: Any) -> Any:
        for kind in name.split("+"):
            outer = made[kind]()
            outer.model = model
            # As it copies them.
            outer.yaml, outer.names, outer.stride = {}, ["x"], torch.tensor([1.0])
            model = outer
        return model

    return wrap


@dataclass(frozen=True)
class Written:
    """A change to a YOLOv5 checkpoint that changes nothing of what it computes."""

    change: Callable[[Any, Any], Any]
    package: str = ""


WRITTEN = {
    "as it is": Written(lambda *_: None),
    "counted": Written(lambda model, _: counted(model)),
    "package of pip": Written(lambda *_: None, "yolov5."),
    "AutoShape": Written(wrapped("AutoShape")),
    "AutoShape of a backend": Written(wrapped("DetectMultiBackend+AutoShape")),
    "AutoShape of pip": Written(wrapped("AutoShape"), "yolov5."),
    "DataParallel": Written(lambda model, _: nn.DataParallel(model)),
    "momentum None": Written(lambda model, _: without_momentum(model)),
    "names by number": Written(lambda model, _: setattr(model, "names", dict(enumerate("abc")))),
    "names by digits": Written(
        lambda model, _: setattr(model, "names", {"2": "c", "0": "a", "1": "b"})
    ),
    "with its count": Written(lambda model, _: (model, 12)),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_yolov5_is_read_as_it_is_written(case: str, tmp_path: Path) -> None:
    written = WRITTEN[case]
    path = yolov5_files.write(tmp_path / "own.pt", written.change, package=written.package)
    detector = load_detector(path)
    assert detector.family == "yolov5"
    assert detector.names == ["a", "b", "c"]
    with torch.no_grad():
        given, own = (stacked(one.raw(IMAGES)) for one in (detector, tiny_detector()))
    assert torch.equal(given, own)


def test_names_by_digits_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    model = small_ultralytics.network(nc=12)
    model.names = {str(index): f"thing {index}" for index in (3, 11, 10, 9, 0, 1, 2, 4, 5, 6, 7, 8)}
    detector = load_detector(small_ultralytics.save(model, tmp_path / "own.pt"))
    assert detector.names == [f"thing {index}" for index in range(12)]


@pytest.mark.parametrize(
    "change",
    [
        counted,
        without_momentum,
        lambda model: setattr(model, "names", ["ball", "ring"]),
        lambda model: setattr(model, "criterion", None),
    ],
)
def test_ultralytics_is_read_as_it_is_written(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    model = small_ultralytics.network()
    own = raw_of(model, IMAGES)
    change(model)
    detector = load_detector(small_ultralytics.save(model, tmp_path / "own.pt"))
    assert detector.names == ["ball", "ring"]
    torch.testing.assert_close(raw_of_detector(detector, IMAGES), own)


def test_ultralytics_wrapped_in_its_own_class(tmp_path: Path) -> None:
    from ultralytics import YOLO

    model = small_ultralytics.network()
    outer = YOLO.__new__(YOLO)
    nn.Module.__init__(outer)
    outer.model = model
    torch.save(outer, tmp_path / "own.pt")
    detector = load_detector(tmp_path / "own.pt")
    torch.testing.assert_close(raw_of_detector(detector, IMAGES), raw_of(model, IMAGES))


PREFIXES = ["", "model.", "module.", "_orig_mod.", "module._orig_mod.", "model.model.", "net.x."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_state_dicts_of_torchvision(prefix: str, suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    tensors = from_name(name).module.state_dict()
    changed = {
        f"{prefix}{key}": value + 0.5 if key.endswith("cls_score.bias") else value.clone()
        for key, value in tensors.items()
    }
    changed[f"{prefix}total_ops"] = torch.zeros(1)
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": changed}, path)
    else:
        save_file(changed, path)
    read = load_detector(f"torchvision/{name}@{path}").module.state_dict()
    assert read.keys() == tensors.keys()
    bias = "roi_heads.box_predictor.cls_score.bias"
    assert torch.equal(read[bias], tensors[bias] + 0.5)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_state_dicts_of_mmdet(prefix: str, suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = write_config(tmp_path, "retinanet")
    tensors = enliven(load_detector(config)).module.state_dict()
    changed = {f"{prefix}{key}": value.clone() for key, value in tensors.items()}
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"meta": {}, "state_dict": changed}, path)
    else:
        save_file(changed, path)
    read = load_detector(f"{config}@{path}").module.state_dict()
    assert all(torch.equal(read[key], value) for key, value in tensors.items())


# ---- refused, in one line


def refused(path: Path | str, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_detector(path)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line


POISON = {"NaN": float("nan"), "an infinity": float("inf"), "minus": float("-inf")}


def poisoned(module: nn.Module, name: str, value: float) -> None:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors[name].data.view(-1)[-1] = value


@pytest.mark.parametrize("kind", POISON)
@pytest.mark.parametrize(
    "tensor",
    ["model.0.conv.weight", "model.1.bn.weight", "model.1.bn.running_mean",
     "model.2.cv1.bn.running_var", "model.8.cv3.1.2.bias"],
)  # fmt: skip
def test_numbers_that_are_none_in_ultralytics(tensor: str, kind: str, tmp_path: Path) -> None:
    model = small_ultralytics.network()
    poisoned(model, tensor, POISON[kind])
    path = small_ultralytics.save(model, tmp_path / "own.pt")
    refused(path, "own.pt", tensor, kind.replace("minus", "an infinity"))


@pytest.mark.parametrize("kind", POISON)
@pytest.mark.parametrize(
    "tensor",
    ["model.0.conv.weight", "model.1.bn.running_var", "model.9.anchors", "model.9.m.0.bias"],
)
def test_numbers_that_are_none_in_yolov5(tensor: str, kind: str, tmp_path: Path) -> None:
    path = yolov5_files.write(
        tmp_path / "own.pt", lambda model, _: poisoned(model, tensor, POISON[kind])
    )
    refused(path, "own.pt", tensor.rpartition(".")[2], kind.replace("minus", "an infinity"))


@pytest.mark.parametrize("kind", POISON)
@pytest.mark.parametrize("tensor", ["model.0.conv.weight", "model.1.bn.running_var"])
def test_numbers_that_are_none_in_what_dfq_saved(tensor: str, kind: str, tmp_path: Path) -> None:
    detector = tiny_detector()
    poisoned(detector.module, tensor, POISON[kind])
    save_detector(detector, tmp_path / "own.safetensors")
    refused(tmp_path / "own.safetensors", "own.safetensors", tensor)


@pytest.mark.parametrize("kind", POISON)
def test_numbers_that_are_none_in_apart_weights(kind: str, tmp_path: Path) -> None:
    name, tensor = "fasterrcnn_mobilenet_v3_large_320_fpn", "backbone.body.1.block.0.1.running_var"
    module = from_name(name).module
    poisoned(module, tensor, POISON[kind])
    torch.save(module.state_dict(), tmp_path / "w.pth")
    refused(f"torchvision/{name}@{tmp_path / 'w.pth'}", "w.pth", tensor)
    config = write_config(tmp_path, "retinanet")
    network = load_detector(config).module
    poisoned(network, "backbone.bn1.running_mean", POISON[kind])
    torch.save({"state_dict": network.state_dict()}, tmp_path / "w.pth")
    refused(f"{config}@{tmp_path / 'w.pth'}", "w.pth", "backbone.bn1.running_mean")


@pytest.mark.parametrize("value", [-1e-3, -5.0])
def test_variances_below_zero(value: float, tmp_path: Path) -> None:
    model = small_ultralytics.network()
    poisoned(model, "model.1.bn.running_var", value)
    path = small_ultralytics.save(model, tmp_path / "own.pt")
    refused(path, "model.1.bn.running_var", "below zero")


@pytest.mark.parametrize("eps", [float("nan"), float("inf"), -1.0, "1e-3", None, [1e-3], 10**400])
def test_constants_of_batchnorm_that_are_none(eps: Any, tmp_path: Path) -> None:
    def change(model: Any, *_: Any) -> None:
        model.model[1].bn.eps = eps

    refused(yolov5_files.write(tmp_path / "v5.pt", change), "v5.pt", "model.1.bn", "eps")
    model = small_ultralytics.network()
    change(model)
    refused(small_ultralytics.save(model, tmp_path / "u.pt"), "u.pt", "model.1.bn")


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_anchors_that_are_none(value: float, tmp_path: Path) -> None:
    path = yolov5_files.write(
        tmp_path / "own.pt", lambda model, _: poisoned(model, "model.9.anchors", value)
    )
    refused(path, "own.pt", "anchors")
    spec = tiny_detector().spec()
    spec["anchors"][0][0][0] = value
    with pytest.raises(UserError, match="anchors"):
        dfq.models.from_spec(spec)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (torch.float8_e4m3fn, "float8_e4m3fn"),
        (torch.float8_e5m2, "float8_e5m2"),
        (torch.int8, "int8"),
        (torch.int64, "int64"),
        (torch.bool, "bool"),
        (torch.complex64, "complex64"),
    ],
)
def test_weights_of_other_kinds(kind: torch.dtype, word: str, tmp_path: Path) -> None:
    """Converted without their scales they would be other numbers."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    name, tensor = "fasterrcnn_mobilenet_v3_large_320_fpn", "rpn.head.cls_logits.weight"
    state = {key: value.clone() for key, value in from_name(name).module.state_dict().items()}
    state[tensor] = state[tensor].to(kind)
    torch.save(state, tmp_path / "w.pth")
    refused(f"torchvision/{name}@{tmp_path / 'w.pth'}", "w.pth", tensor, word)
    path = tmp_path / "own.safetensors"
    save_detector(tiny_detector(), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["model.0.conv.weight"] = tensors["model.0.conv.weight"].to(kind)
    save_file(tensors, path, metadata)
    refused(path, "own.safetensors", "model.0.conv.weight", word)


@pytest.mark.parametrize("count", [1, 3])
def test_more_or_fewer_names_than_categories(count: int, tmp_path: Path) -> None:
    names = [f"thing {index}" for index in range(count)]
    words = (f"{count} category names", "2 categories")
    model = small_ultralytics.network()
    for given in (names, dict(enumerate(names))):
        model.names = given
        refused(small_ultralytics.save(model, tmp_path / "own.pt"), "own.pt", *words)
    (tmp_path / "own.yaml").write_text(json.dumps({**small_ultralytics.YAML, "names": names}))
    refused(tmp_path / "own.yaml", "own.yaml", *words)
    path = yolov5_files.write(
        tmp_path / "v5.pt", lambda model, _: setattr(model, "names", [*names, "one more"])
    )
    if count + 1 != 3:
        refused(path, "v5.pt", f"{count + 1} category names", "3 categories")
    spec = tiny_detector().spec()
    for more in (["a"], ["a", "b", "c", "d"]):
        with pytest.raises(UserError, match=f"{len(more)} category names"):
            dfq.models.from_spec({**spec, "names": more})


@pytest.mark.parametrize("channels", [1, 4, 0, "3", True, [3]])
def test_images_of_other_channels(channels: Any, tmp_path: Path) -> None:
    line = "channels: only RGB detectors work"
    changed = small_ultralytics.yaml_with(channels=channels)
    (tmp_path / "own.yaml").write_text(json.dumps(changed))
    refused(tmp_path / "own.yaml", "own.yaml", line)
    model = small_ultralytics.network()
    model.yaml = changed
    refused(small_ultralytics.save(model, tmp_path / "own.pt"), "own.pt", line)

    def change(model: Any, _: Any) -> None:
        model.yaml["ch"] = channels
        if channels in (1, 4) and channels is not True:
            model.model[0].conv = nn.Conv2d(channels, 8, 3, 2, 1, bias=False)

    refused(yolov5_files.write(tmp_path / "v5.pt", change), "v5.pt", line)


# ---- against the reference: eight images of COCO, a YOLOv5n, 320 px

REFERENCE = (139, 632, 776, 802, 885, 1268, 1353, 1490)


@pytest.fixture(scope="module")
def eight(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The eight images as a set of COCO."""
    folder = tmp_path_factory.mktemp("eight")
    document = json.loads((kit / "coco-val" / "annotations.json").read_text())
    document["images"] = [info for info in document["images"] if info["id"] in REFERENCE]
    document["annotations"] = [
        row for row in document["annotations"] if row["image_id"] in REFERENCE
    ]
    (folder / "annotations.json").write_text(json.dumps(document))
    (folder / "images").mkdir()
    for info in document["images"]:
        shutil.copy(kit / "coco-val" / "images" / info["file_name"], folder / "images")
    return folder


REAL = {name: WRITTEN[name] for name in WRITTEN if not name.startswith("names")}


@pytest.mark.parametrize("case", REAL)
def test_accuracy_of_a_real_checkpoint(
    case: str, eight: Path, yolov5n: Path, tmp_path: Path
) -> None:
    written = REAL[case]
    path = yolov5_files.rewrite(
        yolov5n, tmp_path / "own.pt", written.change, package=written.package
    )
    found = dfq.evaluate(path, eight, image_size=320, device="cpu")
    assert pytest.approx(0.2872, abs=5e-5) == found.AP


def test_accuracy_with_another_slope(eight: Path, yolov5n: Path, tmp_path: Path) -> None:
    """Not the reference's: a network of this slope gives other predictions than one of 0.1."""

    def sloped(slope: float) -> Tensor:
        def change(model: Any, _: Any) -> None:
            for part in model.modules():
                if hasattr(part, "act"):
                    part.act = nn.LeakyReLU(slope)

        path = yolov5_files.rewrite(yolov5n, tmp_path / "own.pt", change)
        detector = load_detector(path)
        acts = [part for part in detector.module.modules() if isinstance(part, nn.LeakyReLU)]
        assert {act.negative_slope for act in acts} == {slope}
        with torch.no_grad():
            return stacked(detector.raw(IMAGES))

    assert not torch.allclose(sloped(0.01), sloped(0.1), atol=0.1)
