"""Classifiers of torchvision and timm by name: networks with random weights, and what is known of
how they want their images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import get_model_weights
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import Conv2dNormActivation

from ...errors import UserError
from ...runtime.plain import brief, one_line
from ...runtime.suggest import suggestion
from ..classifying import Preprocessing
from ..nn.decomposed import expose
from .attention import DecomposedSelfAttention

TORCHVISION, TIMM = "torchvision/", "timm/"
CLASSES = 1000
"""Of ImageNet, which the networks are made for."""


class MobileNetV1(nn.Module):
    """Depthwise separable convolutions (Howard et al., 2017), out of torchvision's parts.

    Args:
        width: of all layers, relative to the paper's.
        num_classes: outputs.
    """

    _LAYERS = (
        *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
        *(5 * ((512, 1),)),
        *((1024, 2), (1024, 1)),
    )

    def __init__(self, *, width: float = 1.0, num_classes: int = CLASSES) -> None:
        super().__init__()
        part = functools.partial(Conv2dNormActivation, activation_layer=nn.ReLU)
        channels = round(32 * width)
        layers: list[nn.Module] = [part(3, channels, 3, 2)]
        for outputs, stride in self._LAYERS:
            wide = round(outputs * width)
            depthwise = part(channels, channels, 3, stride, groups=channels)
            layers.append(nn.Sequential(depthwise, part(channels, wide, 1)))
            channels = wide
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images `(n, 3, h, w)` to logits."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def _regnet_x_600mf(**options: Any) -> nn.Module:
    # Of the paper's table; torchvision has its neighbours.
    params = BlockParams.from_init_params(depth=16, w_0=48, w_a=36.97, w_m=2.24, group_width=24)
    return RegNet(
        params, norm_layer=functools.partial(nn.BatchNorm2d, eps=1e-05, momentum=0.1), **options
    )


class _OfAnySize(VisionTransformer):
    """torchvision's, for images of any size: positions are interpolated where it is another."""

    def _process_input(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_proj(x).flatten(2).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = (side // self.patch_size for side in x.shape[2:])
        tokens = self._process_input(x)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        encoder = self.encoder
        tokens = tokens + self._positions(encoder.pos_embedding, rows, columns)
        return self.heads(encoder.ln(encoder.layers(tokens))[:, 0])

    def _positions(self, stored: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        side = self.image_size // self.patch_size
        if (rows, columns) == (side, side):
            return stored
        grid = stored[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        grid = nn.functional.interpolate(grid, (rows, columns), mode="bicubic", antialias=True)
        return torch.cat([stored[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def _of_torchvision(name: str) -> Callable[..., nn.Module]:
    def make(**options: Any) -> nn.Module:
        network = getattr(models, name)(weights=None, **options)
        if isinstance(network, VisionTransformer):
            network.__class__ = _OfAnySize
        return network

    return make


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{
        name: _of_torchvision(name)
        for name in (
            "resnet18",
            "resnet34",
            "resnet50",
            "resnet101",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "mobilenet_v3_large",
            "mnasnet0_5",
            "mnasnet1_0",
            "regnet_x_400mf",
            "regnet_x_800mf",
            "regnet_x_1_6gf",
            "regnet_x_3_2gf",
            "vit_b_16",
            "vit_b_32",
        )
    },
    "regnet_x_600mf": _regnet_x_600mf,
    "mnasnet2_0": functools.partial(models.MNASNet, 2.0),
    "mobilenet_v2_x0_5": functools.partial(models.mobilenet_v2, weights=None, width_mult=0.5),
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v1_x0_25": functools.partial(MobileNetV1, width=0.25),
    "mobilenet_v1_x0_5": functools.partial(MobileNetV1, width=0.5),
}
"""The networks by name, without the prefix `torchvision/`."""


def is_named(name: str) -> bool:
    """Whether a name is of a classifier of torchvision or timm."""
    return name.startswith(TIMM) or name.removeprefix(TORCHVISION) in NETWORKS


def build(name: str, num_classes: int) -> nn.Module:
    """A network by its whole name, with random weights, its products of activations as layers.

    Raises:
        UserError: there is none of that name, or timm is not installed.
    """
    short = name.removeprefix(TORCHVISION)
    try:
        if name.startswith(TIMM):
            return _of_timm(name.removeprefix(TIMM), num_classes)
        if short not in NETWORKS:
            known = ", ".join(NETWORKS)
            raise UserError(
                f"{TORCHVISION}{brief(short)[1:-1]}: unknown; classifiers are {known}"
                f"{suggestion(short, NETWORKS)}"
            )
        network = NETWORKS[short](num_classes=num_classes)
    except (TypeError, ValueError, LookupError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{name}: cannot be built ({one_line(error)})") from error
    expose(network)
    return network


def _of_timm(name: str, num_classes: int) -> nn.Module:
    timm = _timm()
    if not timm.is_model(name):
        raise UserError(
            f"{TIMM}{brief(name)[1:-1]}: timm has no network of that name"
            f"{suggestion(name, timm.list_models())}"
        )
    # Those with position embeddings are to take the small images that networks are looked at with.
    options = {"dynamic_img_size": True} if name.startswith(("vit_", "deit")) else {}
    try:
        network = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    except Exception as error:
        raise UserError(f"{TIMM}{name}: cannot be built ({one_line(error)})") from error
    for parent in list(network.modules()):
        for part, child in list(parent.named_children()):
            if type(child) is timm.layers.Attention and DecomposedSelfAttention.fits(child):
                setattr(parent, part, DecomposedSelfAttention(child))
    return network


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise UserError(
            "timm is not installed, whose network this is: pip install 'dfq[timm]'"
        ) from None
    return timm


def preprocessing(name: str, module: nn.Module, sha256: str | None) -> Preprocessing:
    """How a network wants its images: as timm says; as torchvision says of a released file, known
    by the digest in its published name, else as most are evaluated.

    Args:
        name: whole.
        module: the network.
        sha256: of the file of its weights; None: they are random.
    """
    if name.startswith(TIMM):
        config = module.pretrained_cfg
        bicubic = config.get("interpolation") == "bicubic"
        return Preprocessing(
            config["input_size"][-1],
            tuple(config["mean"]),
            tuple(config["std"]),
            config["crop_pct"],
            "bicubic" if bicubic else "bilinear",
        )
    usual = Preprocessing(224, crop=0.875)
    short = name.removeprefix(TORCHVISION)
    for weights in get_model_weights(short) if sha256 and hasattr(models, short) else ():
        digest = weights.url.rpartition("-")[2].removesuffix(".pth")
        if sha256 is not None and sha256.startswith(digest):
            transforms = weights.transforms()
            (size,), (resized,) = transforms.crop_size, transforms.resize_size
            return Preprocessing(
                size,
                tuple(transforms.mean),
                tuple(transforms.std),
                size / resized,
                "bicubic" if "cubic" in transforms.interpolation.value else "bilinear",
            )
    return usual


@functools.cache
def imagenet_names() -> tuple[str, ...]:
    """The 1,000 categories, each name once."""
    listed = models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    counts: dict[str, int] = {}
    names = []
    for name in listed:
        counts[name] = counts.get(name, 0) + 1
        names.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return tuple(names)


def stride(name: str, module: nn.Module) -> int:
    """Of a network: a patch's side, else 32, as of all that halve their maps five times."""
    patches = getattr(module, "patch_embed", None)
    if patches is not None:
        return int(patches.patch_size[0])
    return int(module.patch_size) if isinstance(module, VisionTransformer) else 32


def prefix_tokens(module: nn.Module) -> int:
    """Tokens before those of patches."""
    if isinstance(module, VisionTransformer):
        return 1
    return int(getattr(module, "num_prefix_tokens", 0))
