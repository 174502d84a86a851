"""From names, descriptions and tensors to classifiers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import UserError, shown
from ...runtime.plain import ODD, brief, one_line, parse_yaml, plain_tree, read_small
from ..bounded import bounded, most_for
from ..checkpoint import Checkpoint, tensors_of
from ..classifying import Preprocessing
from ..metadata import listed_names, require_names
from ..tensors import check_kinds
from . import resnet, structure, vit, zoo
from .classifier import NetworkClassifier, build

NETWORK = "classifier"
"""Key of a description that says what network it is of, and by which it is known."""

_PREPROCESSING = ("image_size", "mean", "std", "crop", "interpolation")
KEYS = (NETWORK, "names", *_PREPROCESSING, *vit.TOLD)
"""Of a description."""


def read_description(path: Path) -> dict[str, Any] | None:
    """What a YAML file says of a classifier; None where it is of something else.

    Raises:
        UserError: it is of a classifier and has an unknown key, or is no YAML.
    """
    description = parse_yaml(read_small(path), str(path))
    if not isinstance(description, dict) or NETWORK not in description:
        return None
    return _checked(plain_tree(description, str(path)), str(path))


def described_by(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    """The same of what the metadata of a `.safetensors` file say; other keys do not count."""
    description = {}
    for key in KEYS:
        if key in metadata:
            text = metadata[key]
            try:
                description[key] = plain_tree(json.loads(text), source)
            except (ValueError, RecursionError):
                description[key] = text
    return description


def _checked(values: dict[str, Any], source: str) -> dict[str, Any]:
    for key in values:
        if key not in KEYS:
            raise UserError(f"{source}: unknown key {brief(key)}; known are {', '.join(KEYS)}")
    kind = values[NETWORK]
    if not isinstance(kind, str) or not (kind in (resnet.KIND, vit.KIND) or zoo.is_named(kind)):
        raise UserError(
            f"{source}: {NETWORK} is {brief(kind)}; known are {resnet.KIND}, {vit.KIND}, "
            f"timm/NAME and torchvision/NAME ({', '.join(zoo.NETWORKS)})"
        )
    return values


def from_description(told: dict[str, Any], source: str) -> NetworkClassifier:
    """The network of torchvision or timm that a description names, with random weights (seed 0).

    Raises:
        UserError: it names none of these, whose tensors alone say how large they are.
    """
    kind = told[NETWORK]
    if not zoo.is_named(kind):
        raise UserError(
            f"{source}: describes a {kind} without its weights; name both: "
            "--model FILE.yaml --checkpoint WEIGHTS"
        )
    names = told.get("names")
    count = zoo.CLASSES if names is None else len(listed_names(names, source))
    with bounded(source):
        module = build({"kind": kind}, count, source)
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    preprocessing = zoo.preprocessing(kind, module, None)
    return _made(module, {"kind": kind}, count, preprocessing, told, source, digest.hexdigest())


def recognised(checkpoint: Checkpoint, told: dict[str, Any]) -> NetworkClassifier | None:
    """The classifier whose tensors a checkpoint holds, by their names and shapes; None where they
    are of none that is known so.

    Args:
        checkpoint: a state dict, bare or under the name that trainers put it under.
        told: of a description; may name the kind.

    Raises:
        UserError: it is one, and something is wrong with it.
    """
    source = str(checkpoint.path)
    tensors = tensors_of(checkpoint)
    renamed = vit.renamed(tensors)
    requested_kind = told.get(NETWORK)
    for kind, architecture, weights in ((resnet.KIND, resnet, tensors), (vit.KIND, vit, renamed)):
        arguments = architecture.described(weights) if requested_kind in (None, kind) else None
        if arguments is None:
            continue
        if kind == vit.KIND:
            arguments = vit.completed(arguments, told, source)
            preprocessing = vit.preprocessing(arguments)
        else:
            preprocessing = resnet.PREPROCESSING
        network = {"kind": kind, "arguments": arguments}
        return _filled(network, weights, preprocessing, told, checkpoint)
    return None


def from_checkpoint(checkpoint: Checkpoint, told: dict[str, Any]) -> NetworkClassifier:
    """The classifier of a description, with the weights of a checkpoint.

    Args:
        checkpoint: see `recognised`.
        told: of a description, which names the kind.

    Raises:
        UserError: the weights are of another network.
    """
    kind, source = told[NETWORK], str(checkpoint.path)
    if not zoo.is_named(kind):
        classifier = recognised(checkpoint, told)
        if classifier is None:
            raise UserError(f"{source}: holds no weights of a {kind}: check the description")
        return classifier
    tensors = tensors_of(checkpoint)
    with bounded(source, most=_most(checkpoint)):
        module = build({"kind": kind}, zoo.CLASSES, source)
    preprocessing = zoo.preprocessing(kind, module, checkpoint.sha256)
    return _filled({"kind": kind}, tensors, preprocessing, told, checkpoint, module)


def _most(checkpoint: Checkpoint) -> int:
    return most_for(checkpoint.path.stat().st_size)


def _filled(
    network: dict[str, Any],
    tensors: Mapping[str, Tensor],
    preprocessing: Preprocessing,
    told: dict[str, Any],
    checkpoint: Checkpoint,
    module: nn.Module | None = None,
) -> NetworkClassifier:
    """A network with as many categories as the tensors have, and these in it."""
    source = str(checkpoint.path)
    with bounded(source, most=2 * _most(checkpoint)):
        module = module or build(network, 1, source)
        head = tensors.get(f"{structure.boundary(module).last[-1]}.weight")
        count = len(head) if head is not None and head.ndim else 0
        if not count:
            raise UserError(f"{source}: holds no weights of {network['kind']}: check --model")
        if count != module.get_submodule(structure.boundary(module).last[-1]).out_features:
            module = build(network, count, source)
    _fill(module, tensors, source)
    fingerprint = checkpoint.sha256
    values = {key: value for key, value in told.items() if key != NETWORK}
    if values:
        # What is told makes another network of the same weights.
        text = json.dumps([fingerprint, values], sort_keys=True)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
    names = checkpoint.root.get("names") if isinstance(checkpoint.root, dict) else None
    if names is not None and not isinstance(names, Tensor):
        told = {"names": names, **told}
    return _made(module, network, count, preprocessing, told, source, fingerprint)


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    check_kinds(module.state_dict(), tensors, source)
    # The fill takes joint projections apart, and says what is missing by other names then.
    try:
        missing, unknown = module.load_state_dict(dict(tensors), strict=False)
    except (RuntimeError, *ODD) as error:
        reason = one_line(RuntimeError(str(error).partition("\n")[2] or error))
        raise UserError(f"{source} does not fit the network: {reason}") from error
    wrong = [name for name in missing if not name.endswith("num_batches_tracked")]
    if wrong or unknown:
        problem = f"{wrong[0]} is missing" if wrong else f"{shown(unknown[0])} is unknown"
        raise UserError(f"{source} does not fit the network: {problem}; check --model")


def _made(
    module: nn.Module,
    network: dict[str, Any],
    count: int,
    preprocessing: Preprocessing,
    told: dict[str, Any],
    source: str,
    fingerprint: str,
) -> NetworkClassifier:
    names = told.get("names")
    if names is None:
        usual = zoo.imagenet_names()
        names = usual if count == len(usual) else [f"class{index}" for index in range(count)]
    names = listed_names(list(names) if isinstance(names, tuple) else names, source)
    require_names(names, count, source)
    preprocessing = preprocessing.changed(told, source)
    classifier = NetworkClassifier(
        module, network, names, preprocessing, fingerprint=fingerprint, source=source
    )
    classifier.check_size(classifier.image_size, f"{source}: image_size")
    return classifier
