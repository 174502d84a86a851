"""Vision transformers built of `nn.TransformerEncoderLayer`s, known by their tensors.

What the tensors do not tell has to be said: the number of attention heads; and where they are not
PyTorch's defaults, whether layers normalise first, and their activation function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ...runtime.limits import MOST_REPEATS, WIDEST
from ...runtime.plain import brief
from ..classifying import Preprocessing
from ..nn.decomposed import DecomposedAttention

KIND = "vit"
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
TOLD = ("heads", "norm_first", "activation")
"""What tensors do not tell."""

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

_LAYER = re.compile(r"transformer\.layers\.(\d{1,4})\.norm1\.weight")
_ALIASES = (
    ("encoder.layers.", "transformer.layers."),
    ("transformer.encoder.layers.", "transformer.layers."),
    ("pos_embedding", "pos_embed"),
    ("class_token", "cls_token"),
    ("patch_embed.weight", "patch_embed.proj.weight"),
    ("patch_embed.bias", "patch_embed.proj.bias"),
    ("norm.", "mlp_head.0."),
    ("head.", "mlp_head.1."),
)
"""Beginnings of names that others use, and ours."""


class EncoderLayer(nn.Module):
    """`nn.TransformerEncoderLayer` in evaluation, with its products of activations as layers.

    PyTorch's own computes all at once then, past the layers it is made of.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, *, norm_first: bool, activation: str
    ) -> None:
        super().__init__()
        self.self_attn = DecomposedAttention(nn.MultiheadAttention(width, heads, batch_first=True))
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.activation = ACTIVATIONS[activation]()
        self.norm_first = norm_first

    def _attend(self, x: Tensor) -> Tensor:
        return self.self_attn(x, x, x)[0]

    def _feed(self, x: Tensor) -> Tensor:
        return self.linear2(self.activation(self.linear1(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(n, tokens, width)` to the same."""
        if self.norm_first:
            x = x + self._attend(self.norm1(x))
            return x + self._feed(self.norm2(x))
        x = self.norm1(x + self._attend(x))
        return self.norm2(x + self._feed(x))


class PatchEmbedding(nn.Module):
    """A convolution whose patches do not overlap; one token a patch."""

    def __init__(self, patch: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 3, h, w)` to `(n, tokens, width)`."""
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Patches, position embeddings, encoder layers, and a head on the class token, or on the mean
    of all tokens where there is none.

    Images of another size than the network was trained for have their positions interpolated.

    Args:
        patch: side of a patch, pixels.
        grid: patches in a row and in a column.
        width: channels of a token.
        depth, heads, hidden: encoder layers, their attention heads, channels within.
        class_token: whether there is one.
        patch_bias: whether the convolution of the patches has one.
        norm_first, activation: of the encoder layers.
        num_classes: outputs.
    """

    def __init__(
        self,
        *,
        patch: int,
        grid: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        class_token: bool,
        patch_bias: bool,
        norm_first: bool,
        activation: str,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.patch, self.grid = patch, grid
        self.patch_embed = PatchEmbedding(patch, width, bias=patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, grid**2 + class_token, width))
        layers = [
            EncoderLayer(width, heads, hidden, norm_first=norm_first, activation=activation)
            for _ in range(depth)
        ]
        self.transformer = nn.ModuleDict({"layers": nn.Sequential(*layers)})
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))

    def _positions(self, rows: int, columns: int) -> Tensor:
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        before = self.pos_embed.shape[1] - self.grid**2
        of_patches = self.pos_embed[:, before:].transpose(1, 2).unflatten(2, (self.grid, -1))
        resized = F.interpolate(of_patches, (rows, columns), mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[:, :before], resized.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `(n, 3, h, w)` to logits."""
        positions = self._positions(x.shape[2] // self.patch, x.shape[3] // self.patch)
        tokens = self.patch_embed(x)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = self.transformer["layers"](tokens + positions)
        return self.mlp_head(tokens[:, 0] if self.cls_token is not None else tokens.mean(dim=1))


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that `VisionTransformer` has."""
    result = {}
    for name, tensor in tensors.items():
        for theirs, ours in _ALIASES:
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        result[name] = tensor
    return result


def described(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Of the network whose tensors these are, under our names, the arguments of `VisionTransformer`
    that they tell, but for the classes; None where they are of another kind."""
    patches, positions = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    layers = {int(match[1]) for name in tensors if (match := _LAYER.fullmatch(name))}
    first = tensors.get("transformer.layers.0.linear1.weight")
    if patches is None or positions is None or first is None or first.ndim != 2:
        return None
    if patches.ndim != 4 or patches.shape[1] != 3 or patches.shape[2] != patches.shape[3]:
        return None
    if positions.ndim != 3 or layers != set(range(len(layers))):
        return None
    class_token = "cls_token" in tensors
    grid = math.isqrt(max(0, positions.shape[1] - class_token))
    if not grid or grid**2 != positions.shape[1] - class_token:
        return None
    return {
        "patch": patches.shape[2],
        "grid": grid,
        "width": len(patches),
        "depth": len(layers),
        "hidden": len(first),
        "class_token": class_token,
        "patch_bias": "patch_embed.proj.bias" in tensors,
    }


def completed(arguments: dict[str, Any], told: Mapping[str, Any], source: str) -> dict[str, Any]:
    """All arguments of `VisionTransformer`, but for the classes.

    Args:
        arguments: what `described` gave.
        told: `heads`, and where need be `norm_first` and `activation`.
        source: for messages.

    Raises:
        UserError: the heads are not told, or something that cannot be.
    """
    heads = told.get("heads")
    if heads is None:
        raise UserError(
            f"{source}: is a vision transformer, and its tensors do not tell the number of its "
            "attention heads; say it in a YAML file (classifier: vit, heads: N), and name both: "
            "--model FILE.yaml --checkpoint WEIGHTS"
        )
    if type(heads) is not int or heads < 1 or arguments["width"] % heads:
        raise UserError(
            f"{source}: heads is {brief(heads)}, and should divide the {arguments['width']} "
            "channels of a token"
        )
    norm_first, activation = told.get("norm_first", False), told.get("activation", "relu")
    if not isinstance(norm_first, bool):
        raise UserError(f"{source}: norm_first is {brief(norm_first)}, and should be true or false")
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{source}: activation is {brief(activation)}, and should be {' or '.join(ACTIVATIONS)}"
        )
    return {**arguments, "heads": heads, "norm_first": norm_first, "activation": activation}


def build(arguments: dict[str, Any], num_classes: int, source: str) -> nn.Module:
    """The network of a description.

    Raises:
        UserError: the description is none of `completed`'s.
    """
    sizes = {"patch": 1024, "grid": 1024, "width": WIDEST, "depth": MOST_REPEATS, "hidden": WIDEST}
    fits = (
        set(arguments) == {*sizes, *TOLD, "class_token", "patch_bias"}
        and all(type(arguments[k]) is int and 1 <= arguments[k] <= m for k, m in sizes.items())
        and all(isinstance(arguments[k], bool) for k in ("class_token", "patch_bias"))
    )
    if not fits:
        raise UserError(f"the description of {source} is damaged (at 'network')")
    completed(arguments, arguments, source)
    return VisionTransformer(**arguments, num_classes=num_classes)


def preprocessing(arguments: dict[str, Any]) -> Preprocessing:
    """Images as large as the positions are for; small ones normalised as CIFAR's."""
    size = arguments["patch"] * arguments["grid"]
    if size <= 64:
        return Preprocessing(size, CIFAR_MEAN, CIFAR_STD)
    return Preprocessing(size)
