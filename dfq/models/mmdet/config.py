"""mmdet's configs: finding them, and what they say about images, categories and the network."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import UserError
from ...runtime.plain import one_line
from ..bounded import bounded
from ..metadata import listed_names
from ..nn.decomposed import expose
from ..torchvision.networks import letterbox_side
from .spec import undotted

_PARTS = {"mmdet": "3.3.0", "mmengine": "0.10.7", "mmcv": "2.1.0"}


def require_mmdet() -> None:
    """Make mmdet importable.

    Raises:
        UserError: it is not installed.
    """
    absent = [name for name in _PARTS if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f"mmdet's detectors need {', '.join(absent)}: pip install 'dfq[mmdet]'")
    from .ops import ensure_ops

    ensure_ops()


def shipped_config(name: str) -> Path | None:
    """The file of a config that comes with mmdet, by its name with or without `.py`."""
    if "/" in name:
        return None
    return _shipped(_root()).get(name.removesuffix(".py"))


def shipped_names() -> list[str]:
    """The names of the configs that come with mmdet."""
    return list(_shipped(_root()))


def _root() -> Path | None:
    spec = importlib.util.find_spec("mmdet")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / ".mim" / "configs"


@functools.cache
def _shipped(root: Path | None) -> dict[str, Path]:
    if root is None:
        return {}
    paths = sorted(path for path in root.glob("*/*.py") if path.parent.name != "_base_")
    # The first of a name counts.
    return {path.stem: path for path in reversed(paths)}


def read_config(path: Path) -> dict[str, Any]:
    """The config in a file, its bases included. A config is a program: reading it runs it.

    Raises:
        UserError: it cannot be read, or is no config of a detector.
    """
    require_mmdet()
    from mmengine.config import Config

    try:
        with quiet(), _package_paths():
            config = Config.fromfile(str(path)).to_dict()
    except KeyboardInterrupt:
        raise
    # BaseException: a config is a program, and may end with sys.exit.
    except BaseException as error:
        raise UserError(
            f"{path}: cannot be read as a config ({one_line(error, 300, kind=True)})"
        ) from error
    if not isinstance(config.get("model"), Mapping):
        raise UserError(f"{path}: is no config of a detector: it has no `model`")
    return config


@contextlib.contextmanager
def _package_paths() -> Iterator[None]:
    """Lets configs inherit from a package (`mmdet::_base_/...`) where `pkg_resources`, which
    mmengine asks for its folder, has gone with setuptools 82."""
    from mmengine.config import config as reader

    if importlib.util.find_spec("pkg_resources") is not None:
        yield
        return

    def folder(package: str) -> str:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed")
        return str(Path(spec.origin).parent)

    before = reader.is_installed, reader.get_installed_path
    reader.is_installed = lambda package: importlib.util.find_spec(package) is not None
    reader.get_installed_path = folder
    try:
        yield
    finally:
        reader.is_installed, reader.get_installed_path = before


def plain(value: Any) -> Any:
    """A part of a config in types that JSON has; tuples, which some layers insist on, are marked.

    Raises:
        UserError: it holds something else, a class say.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"()": [plain(item) for item in value]}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | float | str | type(None)):
        return value
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    raise UserError(f"the config's model holds a {type(value).__name__}, which cannot be saved")


def unplain(value: Any) -> Any:
    """The inverse of `plain`."""
    if isinstance(value, dict):
        if set(value) == {"()"}:
            return tuple(unplain(item) for item in value["()"])
        return {key: unplain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unplain(item) for item in value]
    return value


def prepared(model: Any) -> Any:
    """A model's config (of `plain`) without downloads, recomputation or synchronised BatchNorm,
    and with types as the registries have them."""
    if isinstance(model, list):
        return [prepared(item) for item in model]
    if not isinstance(model, dict):
        return model
    result = {key: prepared(item) for key, item in model.items()}
    # Its weights are the checkpoint's, or random.
    if "init_cfg" in result:
        result["init_cfg"] = _start(result["init_cfg"])
    if result.get("pretrained") is not None:
        result["pretrained"] = None
    if result.get("with_cp"):
        # Gradients of the images need every activation once; running a layer twice would show its
        # BatchNorm statistics twice.
        result["with_cp"] = False
    kind = result.get("type")
    if kind in ("SyncBN", "MMSyncBN"):
        result["type"] = "BN"
    elif isinstance(kind, str) and "." in kind:
        result["type"] = undotted(kind)
    return result


def _start(init: Any) -> Any:
    """How weights are initialised, without those that are read from a file."""
    if isinstance(init, list):
        return [entry for entry in map(_start, init) if entry is not None]
    if isinstance(init, dict) and (init.get("type") == "Pretrained" or "checkpoint" in init):
        return None
    return init


def build_model(model: dict[str, Any], source: str, *, tried: bool = False) -> nn.Module:
    """The network of a model's config (of `prepared`), random weights (seed 0), eval mode, frozen.

    Args:
        model: the config.
        source: what to call it in messages.
        tried: whether to see first, in little time, that it is of a moderate size.

    Raises:
        UserError: mmdet cannot build it, or it asks for more than `limits` allows.
    """
    require_mmdet()
    with quiet(), torch.random.fork_rng(devices=[]):
        from mmdet.registry import MODELS
        from mmengine.config import ConfigDict
        from mmengine.registry import DefaultScope

        try:
            with DefaultScope.overwrite_default_scope("mmdet"):
                if tried:
                    with bounded(source, unfilled=True):
                        MODELS.build(ConfigDict(unplain(model)))
                torch.manual_seed(0)
                with bounded(source):
                    network = MODELS.build(ConfigDict(unplain(model)))
                    network.init_weights()
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{source}: mmdet cannot build it ({one_line(error, 300, kind=True)})"
            ) from error
    from .attention import expose_products

    expose_products(network)
    expose(network)
    return network.eval().requires_grad_(False)


def image_side(config: dict[str, Any], stride: int) -> int:
    """The side of a square that shows images as large as the config's test pipeline does."""
    scale = next(_scales(config.get("test_dataloader") or config.get("test_pipeline")), None)
    if scale is None:
        scale = next(_scales(config.get("test_pipeline")), (1333, 800))
    short, long = min(scale), max(scale)
    if short <= 0:
        short = long
    return letterbox_side(short, long, stride)


def _scales(part: Any) -> Iterator[Sequence[int]]:
    if isinstance(part, Mapping):
        scale = part.get("scale")
        if str(part.get("type")).rpartition(".")[2] == "Resize" and _is_pair(scale):
            yield scale  # type: ignore[misc]
        for item in part.values():
            yield from _scales(item)
    elif isinstance(part, list | tuple):
        for item in part:
            yield from _scales(item)


def _is_pair(scale: Any) -> bool:
    return (
        isinstance(scale, list | tuple)
        and len(scale) == 2
        and all(isinstance(side, int) for side in scale)
    )


def category_names(config: dict[str, Any], metadata: Any, count: int, source: str) -> list[str]:
    """Names of `count` categories: those the checkpoint or the config states, or of COCO or VOC
    where the number and the config's data set say so.

    Raises:
        UserError: their number is not the network's.
    """
    data: Any = config.get("test_dataloader")
    data = data.get("dataset") if isinstance(data, Mapping) else None
    parts = (metadata, data, config)
    stated = next((names for part in parts if (names := _stated_names(part, source))), None)
    if stated is not None:
        if len(stated) != count:
            raise UserError(
                f"{source}: names {len(stated)} categories, and the network has {count}; give "
                "num_classes of the heads and metainfo the same number"
            )
        return stated
    import mmdet.datasets

    known = getattr(mmdet.datasets, str(config.get("dataset_type", "CocoDataset")), None)
    classes = (getattr(known, "METAINFO", None) or {}).get("classes") or ()
    if len(classes) == count:
        return [str(name) for name in classes]
    return [f"class{index}" for index in range(count)]


def _stated_names(part: Any, source: str) -> list[str] | None:
    if not isinstance(part, Mapping):
        return None
    for key in ("dataset_meta", "metainfo"):
        inner = part.get(key)
        if isinstance(inner, Mapping):
            part = inner
            break
    names = part.get("classes", part.get("CLASSES"))
    return listed_names(names, source) if isinstance(names, list | tuple) and names else None


def missing_validation(config: dict[str, Any]) -> str | None:
    """A file that a config's validation would read and that is not there; None where all are, or
    where nothing is validated."""
    if config.get("val_cfg") is None:
        return None
    parts = [config.get("val_dataloader"), config.get("val_evaluator")]
    return next((path for path in _files(parts) if not Path(path).exists()), None)


def _files(part: Any) -> Iterator[str]:
    """The annotation files and folders of images in a part of a config."""
    if isinstance(part, Mapping):
        root = part.get("data_root")
        folder = Path(root) if isinstance(root, str) else Path()
        prefixes = part.get("data_prefix")
        names = [part.get("ann_file")]
        names += list(prefixes.values()) if isinstance(prefixes, Mapping) else []
        # What has an address is read by other means than a file's.
        texts = [name for name in names if isinstance(name, str) and name]
        yield from (str(folder / name) for name in texts if "://" not in f"{root}{name}")
        part = [value for key, value in part.items() if key != "data_prefix"]
    if isinstance(part, list | tuple):
        for item in part:
            yield from _files(item)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps mmengine's log lines and warnings about optional parts to itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
