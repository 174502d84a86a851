"""Classifiers: known by their tensors or by name, and what they are behind the door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.small_classifiers import CLASSES, PlainViT, saved, small_resnet
from torch import Tensor

from dfq.errors import UserError
from dfq.graph.fold_batchnorm import fold
from dfq.graph.outline import outline
from dfq.models import Classifier, Targets, from_spec, load_detector, load_model, save_detector
from dfq.models.classifiers import zoo
from dfq.models.classifying import whole_image
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.layers import QUANTIZED_LAYERS, QuantMatmul
from dfq.quantization.policy import Policy
from dfq.synthesis.losses.patch_entropy import PatchSimilarity, patch_similarity_entropy

HEADS = "classifier: vit\nheads: 4\nmean: [0.5, 0.5, 0.5]\nstd: [0.25, 0.25, 0.25]\n"


@pytest.fixture
def vit(tmp_path: Path) -> str:
    (tmp_path / "vit.yaml").write_text(HEADS + "names: [cat, dog, emu]\n")
    return f"{tmp_path / 'vit.yaml'}@{saved(tmp_path / 'w.pth', PlainViT().eval().state_dict())}"


def classifier(name: str | Path) -> Classifier:
    found = load_model(name)
    assert isinstance(found, Classifier)
    return found


@pytest.mark.parametrize(
    ("wrap", "suffix"),
    [
        (lambda tensors: tensors, ".pt"),
        (lambda tensors: {"state_dict": tensors, "best_prec1": 91.0}, ".th"),
        (lambda tensors: {"state_dict": {f"module.{k}": v for k, v in tensors.items()}}, ".pth"),
    ],
)
def test_a_resnet_is_known_by_its_tensors(
    wrap: Callable[[dict[str, Tensor]], Any], suffix: str, tmp_path: Path
) -> None:
    found = classifier(saved(tmp_path / f"some{suffix}", wrap(small_resnet())))
    assert (found.num_classes, found.image_size, found.stride) == (3, 32, 4)
    assert found.raw(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    assert found.blocks() == ["conv1", "layer1.0", "layer2.0", "layer3.0", "linear"]
    assert found.boundary_layers().first == ("conv1",)
    assert found.boundary_layers().last == ("linear",)


def test_a_shortcut_without_weights_takes_every_second_pixel(tmp_path: Path) -> None:
    tensors = small_resnet()
    for name in tensors:
        if ".bn2." in name and name.endswith(("weight", "bias")):
            tensors[name].zero_()
    found = classifier(saved(tmp_path / "m.pt", tensors))
    images = torch.rand(1, 3, 32, 32)
    module = found.module
    stem = module.relu(module.bn1(module.conv1(found.normalize(images))))
    # Without the branches, what is left is the stem: two times subsampled, its 8 channels in the
    # middle of 24.
    kept = torch.zeros(1, 24)
    kept[:, 8:16] = stem[:, :, ::4, ::4].mean(dim=(2, 3))
    assert torch.allclose(found.raw(images), module.linear(kept), atol=1e-5)


@pytest.mark.parametrize("projection", ["shortcut", "downsample"])
def test_projections_are_found_under_either_name(projection: str, tmp_path: Path) -> None:
    found = classifier(saved(tmp_path / "m.pt", small_resnet(projection, projected=True)))
    assert f"layer2.0.{projection}.0.weight" in found.module.state_dict()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_vit_computes_what_pytorchs_encoder_does(
    norm_first: bool, activation: str, tmp_path: Path
) -> None:
    network = PlainViT(norm_first=norm_first, activation=activation).eval()
    told = f"{HEADS}norm_first: {str(norm_first).lower()}\nactivation: {activation}\n"
    (tmp_path / "vit.yaml").write_text(told)
    weights = saved(tmp_path / "w.pth", network.state_dict())
    found = classifier(f"{tmp_path / 'vit.yaml'}@{weights}")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        wanted = network((images - 0.5) / 0.25)
        assert torch.allclose(found.raw(images), wanted, atol=1e-5)


def test_a_vits_products_are_quantized(vit: str) -> None:
    found = classifier(vit)
    layers = [row.name for row in outline(found).layers]
    assert "transformer.layers.0.self_attn.scores" in layers
    student = insert_quantizers(fold(found.clone()), Policy(weight_bits=8, activation_bits=8))
    quantized = {
        name: layer
        for name, layer in student.module.named_modules()
        if isinstance(layer, (*QUANTIZED_LAYERS, QuantMatmul))
    }
    assert set(quantized) == set(layers)
    seen: list[str] = []
    for name, layer in quantized.items():
        layer.register_forward_hook(lambda _m, _i, _o, name=name: seen.append(name))
    with torch.no_grad():
        student.raw(torch.rand(1, 3, 32, 32))
    # In evaluation, where PyTorch's own layer takes a path past its parts.
    assert sorted(seen) == sorted(quantized)


def test_the_class_token_is_no_patch(vit: str) -> None:
    found = classifier(vit)
    assert found.prefix_tokens == 1
    name = found.attention_layers()[0]
    seen: list[Tensor] = []
    layer = found.module.get_submodule(name)
    with PatchSimilarity(found.module, [name], found.prefix_tokens) as watched, torch.no_grad():
        handle = layer.register_forward_hook(lambda _m, _i, out: seen.append(out))
        found.raw(torch.rand(1, 3, 32, 32))
        handle.remove()
        assert seen[0].shape == (1, 17, 16)
        assert torch.equal(watched.entropy(), patch_similarity_entropy(seen[0][:, 1:]))


def test_the_loss_is_cross_entropy(tmp_path: Path) -> None:
    found = classifier(saved(tmp_path / "m.pt", small_resnet()))
    raw, wanted = torch.randn(4, 3), torch.tensor([2, 0, 1, 1])
    targets = Targets.from_per_image(list(whole_image(wanted).split(1)))
    loss = found.task_loss(raw, targets, (32, 32))["class"]
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(raw, wanted))
    assert found.task_loss(raw, Targets.empty(), (32, 32))["class"] == 0
    quarters = torch.tensor([[0.0, c, 0.5, 0.5, 0.5, 0.5] for c in (0, 0, 1, 2)])
    shares = torch.tensor([[0.5, 0.25, 0.25]])
    assert torch.allclose(
        found.task_loss(raw[:1], Targets(quarters), (32, 32))["class"],
        torch.nn.functional.cross_entropy(raw[:1], shares),
    )


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_saved_classifier_comes_back(kind: str, vit: str, tmp_path: Path) -> None:
    named = vit if kind == "vit" else saved(tmp_path / "m.pt", small_resnet())
    found = classifier(named)
    save_detector(found, tmp_path / "m.safetensors")
    images = torch.rand(1, 3, 32, 32)
    again = classifier(tmp_path / "m.safetensors")
    assert torch.equal(again.raw(images), found.raw(images))
    assert (again.names, again.preprocessing) == (found.names, found.preprocessing)
    rebuilt = from_spec(json.loads(json.dumps(found.spec())))
    assert rebuilt.blocks() == found.blocks()


def test_metadata_of_safetensors_describe(tmp_path: Path) -> None:
    metadata = {"heads": "4", "names": '["cat", "dog", "emu"]', "mean": "[0.5, 0.5, 0.5]"}
    save_file(PlainViT().state_dict(), tmp_path / "w.safetensors", metadata=metadata)
    found = classifier(tmp_path / "w.safetensors")
    assert (found.names, found.preprocessing.mean) == (list(CLASSES), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("torchvision/resnet18", 11_689_512),
        ("torchvision/mobilenet_v2_x0_5", 1_968_680),
        ("torchvision/mobilenet_v1_x0_25", 470_072),
        ("torchvision/regnet_x_600mf", 6_196_040),
        ("timm/mnasnet_050", 2_218_512),
        ("timm/deit_tiny_patch16_224", 5_717_416),
    ],
)
def test_networks_by_name(name: str, parameters: int) -> None:
    if name.startswith(zoo.TIMM):
        pytest.importorskip("timm")
    found = classifier(name)
    assert found.random_weights
    assert sum(one.numel() for one in found.module.parameters()) == parameters
    assert found.names[0] == "tench"
    small = outline(found, 2 * found.stride)
    assert small.layers[0].name in small.boundary.first
    assert small.layers[-1].name in small.boundary.last
    assert not set(found.feature_layers()) & set(small.boundary.last)


def test_timms_attention_computes_the_same() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    wanted = timm.create_model("deit_tiny_patch16_224").eval()
    found = classifier("timm/deit_tiny_patch16_224")
    found.module.load_state_dict(wanted.state_dict())
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(found.raw(images), wanted(found.normalize(images)), atol=1e-4)


def test_as_many_categories_as_the_weights_have(tmp_path: Path) -> None:
    module = zoo.build("torchvision/mobilenet_v1_x0_25", 5)
    weights = saved(tmp_path / "w.pth", module.state_dict())
    found = classifier(f"torchvision/mobilenet_v1_x0_25@{weights}")
    assert found.names == [f"class{index}" for index in range(5)]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (None, "do not tell the number of its attention heads"),
        ("classifier: vit\nheads: 5\n", "heads is 5"),
        ("classifier: vit\nheads: 4\nmean: 0.5\n", "mean is 0.5"),
        ("classifier: vit\nheads: 4\nstd: [1, 1, 0]\n", "std is"),
        ("classifier: vit\nheads: 4\nnames: [a, b]\n", "2 category names and 3 categories"),
        ("classifier: vit\nheads: 4\nimage_size: 30\n", "image_size: 30"),
        ("classifier: vit\nhead: 4\n", "unknown key 'head'"),
        ("classifier: vgg\n", "classifier is 'vgg'"),
        ("classifier: resnet\n", "holds no weights of a resnet"),
        ("classifier: torchvision/resnet18\n", "holds no weights of torchvision/resnet18"),
    ],
)
def test_what_is_told_wrongly(told: str | None, message: str, tmp_path: Path) -> None:
    weights = saved(tmp_path / "w.pth", PlainViT().state_dict())
    (tmp_path / "m.yaml").write_text(told or "")
    with pytest.raises(UserError, match=message) as error:
        load_model(weights if told is None else f"{tmp_path / 'm.yaml'}@{weights}")
    assert "\n" not in str(error.value)


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in small_resnet().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda: without("layer2.0.bn1.weight"), "layer2.0.bn1.weight is missing"),
        (lambda: {**small_resnet(), "extra.weight": torch.ones(1)}, "extra.weight is unknown"),
        (lambda: {**small_resnet(), "linear.weight": torch.ones(0, 24)}, "no weights of resnet"),
        (lambda: {**small_resnet(), "linear.weight": torch.ones(3, 7)}, "does not fit"),
        (lambda: {**small_resnet(), "bn1.bias": torch.full((8,), torch.nan)}, "holds NaN"),
        (lambda: without("layer1.0.conv1.weight"), "holds tensors only"),
        (lambda: {"linear.weight": torch.ones(3, 7)}, "holds tensors only"),
    ],
)
def test_damaged_weights(
    tensors: Callable[[], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_model(saved(tmp_path / "m.pt", tensors()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "vgg"},
        {"kind": "resnet", "arguments": {}},
        {"kind": "resnet", "arguments": {"stem": 1 << 40}},
        {"kind": "vit", "arguments": {"patch": 4}},
        [],
    ],
)
def test_a_damaged_description_is_refused(change: Any, tmp_path: Path) -> None:
    found = classifier(saved(tmp_path / "m.pt", small_resnet()))
    with pytest.raises(UserError):
        from_spec({**found.spec(), "network": change})


def test_what_is_for_detectors_refuses_classifiers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="classifies images; this is for detectors alone"):
        load_detector(saved(tmp_path / "m.pt", small_resnet()))
