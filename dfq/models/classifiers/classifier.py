"""The one adapter of all classifiers: a network, and a description that it is rebuilt from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...runtime.plain import brief
from ..base import Boundary
from ..classifying import Classifier, Preprocessing
from ..metadata import source_of, stated
from . import resnet, structure, vit, zoo

_OWN: dict[str, Any] = {resnet.KIND: resnet, vit.KIND: vit}


class NetworkClassifier(Classifier):
    """A network whose forward pass gives logits.

    Args:
        module: it, with random weights or trained ones.
        network: what `build` makes such a module from.
        names, preprocessing, fingerprint, source: as of `Classifier`.
    """

    family = "classifier"

    def __init__(
        self,
        module: nn.Module,
        network: dict[str, Any],
        names: Sequence[str],
        preprocessing: Preprocessing,
        *,
        fingerprint: str,
        source: str,
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.names = list(names)
        self.preprocessing = preprocessing
        self.image_size = preprocessing.image_size
        self.fingerprint, self.source = fingerprint, source
        self._network = network
        kind = network["kind"]
        if kind == vit.KIND:
            self.stride = int(network["arguments"]["patch"])
            self.prefix_tokens = int(network["arguments"]["class_token"])
        elif kind == resnet.KIND:
            self.stride = resnet.stride(network["arguments"])
        else:
            self.stride = zoo.stride(kind, module)
            self.prefix_tokens = zoo.prefix_tokens(module)
        self._blocks = structure.blocks(module)
        self._features = structure.features(module)
        self._attention = structure.attention(module)
        self._boundary = structure.boundary(module)

    def raw(self, images: Tensor) -> Tensor:
        """Logits `(n, classes)` for images `(n, 3, h, w)`, RGB in [0, 1], h and w multiples of
        `stride`."""
        self.check_sides(images)
        logits: Tensor = self.module(self.normalize(images))
        return logits

    def feature_layers(self) -> list[str]:
        """The blocks but for the head."""
        return list(self._features)

    def attention_layers(self) -> list[str]:
        """The projections that attention ends with."""
        return list(self._attention)

    def blocks(self) -> list[str]:
        """Residual blocks and transformer layers, and layers beside them."""
        return list(self._blocks)

    def boundary_layers(self) -> Boundary:
        """The convolution that sees the image; the layer that gives the logits."""
        return self._boundary

    def spec(self) -> dict[str, Any]:
        """See `Model.spec`; also holds `network` and `preprocessing`."""
        return {
            "family": self.family,
            "network": self._network,
            "preprocessing": self.preprocessing.to_dict(),
            **self.stated(),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> NetworkClassifier:
        source = source_of(spec)
        names, size, digest = stated(spec, source)
        network, settings = spec.get("network"), spec.get("preprocessing")
        if not isinstance(network, dict) or not isinstance(settings, dict):
            raise UserError(f"the description of {source} is damaged (at 'network')")
        preprocessing = Preprocessing(size).changed(settings, source)
        module = build(network, len(names), source)
        return cls(module, network, names, preprocessing, fingerprint=digest, source=source)


def build(network: dict[str, Any], num_classes: int, source: str) -> nn.Module:
    """The module of a description, with random weights (seed 0).

    Args:
        network: `kind`, "resnet" or "vit" with `arguments`, or a name of torchvision or timm.
        num_classes: outputs.
        source: for messages.

    Raises:
        UserError: the description is of no network.
    """
    kind, arguments = network.get("kind"), network.get("arguments")
    # An embedding's side would be none: such a network has no category.
    if num_classes < 1:
        raise UserError(f"{source}: has no category")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(kind, str) and kind in _OWN and isinstance(arguments, dict):
            module: nn.Module = _OWN[kind].build(arguments, num_classes, source)
        elif isinstance(kind, str) and zoo.is_named(kind):
            module = zoo.build(kind, num_classes)
        else:
            raise UserError(f"the description of {source} is of the network {brief(kind)}")
    return module.eval().requires_grad_(False)
