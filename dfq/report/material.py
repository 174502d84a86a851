"""Everything that a page is made of, gathered: from the run's folder, and from where its set, its
photos and its float network are, as far as they are still there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ..data.calibration_set import CalibrationSet
from ..data.pixels import LabelledImages
from ..data.training_images import open_training_data
from ..errors import UserError
from ..evaluation.measuring import RealSet, open_unlabelled
from ..graph.fold_batchnorm import fold
from ..models import load_model
from ..models.base import Model
from ..models.loading import TIMM, TORCHVISION
from ..quantization.inspection import LayerInfo, list_layers
from ..recipe import Recipe, recorded_recipe
from ..runs.identity import contents
from ..runs.inputs import joining
from ..runs.pipeline import data_identity
from ..runs.set_cache import origin_of
from ..runtime.files import read_json, user_path
from ..runtime.plain import plain_tree
from ..runtime.surroundings import cache_folder
from .exports import Export, read_exports

SYNTHESIS = "synthesis"
"""What a run's log calls a set that it made itself, or found in the cache."""

_ORIGIN = re.compile(r"  model .*, \d+ images from (.*)$")

T = TypeVar("T")


@dataclass(frozen=True)
class Compared:
    """A network beside the run's own, measured on the same images.

    Attributes:
        name: what it is called.
        AP, AP50: fractions in [0, 1].
        this: whether it is the run's own network.
        before: whether it is the float one.
        cost: what it costs, see `cost.Costs`; empty: not known.
    """

    name: str
    AP: float
    AP50: float
    this: bool = False
    before: bool = False
    cost: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Networks measured on labelled images.

    Attributes:
        rows: two of them at least, the float network and the run's own among them.
        data: what images.
        source: the file that has these figures.
        command: that repeats them.
    """

    rows: Sequence[Compared]
    data: str
    source: str
    command: str


@dataclass(frozen=True)
class Material:
    """What a page is made of.

    Attributes:
        manifest, metrics: of the run, as JSON has them.
        recipe: that the run was made by.
        student: its network.
        layers: what `list_layers` says of that.
        origin: what the run's log calls its set; None where it says nothing.
        teacher: the float network, folded, on the student's device; None: not found.
        data: the whole set that the run was made on; None: not found.
        photos: those that it was looked at on; None: there were none, or they are not found.
        sensitivity: what `sensitivity.json` holds; None: there is none.
        exports: what is known of exported files.
        comparison: with other networks; None: there is none.
        missing: what could not be found or read, a line each.
    """

    manifest: Mapping[str, Any]
    metrics: Mapping[str, Any]
    recipe: Recipe
    student: Model
    layers: list[LayerInfo]
    origin: str | None = None
    teacher: Model | None = None
    data: LabelledImages | None = None
    photos: RealSet | None = None
    sensitivity: Mapping[str, Any] | None = None
    exports: list[Export] = field(default_factory=list)
    comparison: Comparison | None = None
    missing: list[str] = field(default_factory=list)


def gather(
    folder: Path,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Any],
    student: Model,
    *,
    teacher: Model | None = None,
    data: LabelledImages | None = None,
    photos: RealSet | None = None,
    layers: list[LayerInfo] | None = None,
    comparison: Comparison | None = None,
) -> Material:
    """The material of a run; what is given need not be searched for.

    Args:
        folder: of the run.
        manifest, metrics: what it says.
        student: its network.
        teacher, data, photos, layers, comparison: see `Material`.

    Raises:
        UserError: where the run's recipe is broken.
    """
    try:
        recipe = recorded_recipe(folder / "recipe.yaml")
    except UserError as error:
        problem = str(error).removeprefix(f"{folder / 'recipe.yaml'}: ")
        raise UserError(f"{folder / 'recipe.yaml'}: damaged ({problem}); restore it") from None
    exports, problems = read_exports(folder)
    material = Material(
        manifest, metrics, recipe, student, layers or list_layers(student), _origin(folder),
        teacher, data, photos, exports=exports, comparison=comparison, missing=problems,
    )  # fmt: skip
    search = _Search(folder, material)
    if (folder / "sensitivity.json").exists():
        read = search.tried("sensitivity.json", search.sensitivity)
        material = replace(material, sensitivity=read)
    if data is None:
        # The next ones may be named by it.
        search.material = material = replace(material, data=search.tried("the set", search.set))
    looked = "photos" in _mapping(metrics.get("closeness"))
    if photos is None and looked:
        material = replace(material, photos=search.tried("the photos", search.photos))
    if teacher is None:
        material = replace(material, teacher=search.tried("the float network", search.float))
    return material


def _origin(folder: Path) -> str | None:
    """What the run's log calls its set, when the run was begun for the last time."""
    try:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    origins = [match[1] for line in lines if (match := _ORIGIN.search(line))]
    return origins[-1] if origins else None


class _Search:
    """Finds what a run was made from."""

    def __init__(self, folder: Path, material: Material) -> None:
        self.folder, self.material = folder, material
        self.identity = _mapping(material.manifest.get("identity"))

    def tried(self, subject: str, find: Callable[[], T]) -> T | None:
        """What is found; where it is not, `missing` says why."""
        try:
            return find()
        except (UserError, OSError) as error:
            text = error.args[0] if isinstance(error, UserError) else str(error)
            # The folder has another name for everybody.
            text = str(text).removeprefix(f"{self.folder / subject}: ")
            self.material.missing.append(f"{subject}: {text}")
            return None

    def sensitivity(self) -> Mapping[str, Any]:
        content = plain_tree(read_json(self.folder / "sensitivity.json"), "sensitivity.json")
        if not isinstance(content, dict):
            raise UserError("not as dfq wrote it")
        return content

    def set(self) -> LabelledImages:
        """The very set; one that changed since is none."""
        wanted = self.identity.get("data")
        for path in self._sets(wanted):
            with contextlib.suppress(UserError, OSError):
                size = self.material.recipe.synthesis.image_size
                opened = open_training_data(path, self.material.student, size)
                source = path if isinstance(opened, CalibrationSet) else self.material.origin
                if data_identity(opened, source) == wanted and self._is_unchanged(data=opened):
                    return opened
        name = self.material.origin or "its name is not known"
        where = "the cache" if name == SYNTHESIS else name
        raise UserError(f"not found, or changed since ({where})")

    def _sets(self, wanted: Any) -> Iterator[Path]:
        if self.material.origin not in (None, SYNTHESIS):
            yield from self._places(str(self.material.origin))
        if not isinstance(wanted, list) or not wanted:
            return
        cache = cache_folder()
        for manifest in sorted(cache.glob("*/manifest.json")) if cache.is_dir() else ():
            with contextlib.suppress(UserError, OSError):
                content = read_json(manifest)
                if isinstance(content, dict) and content.get("annotations_sha256") == wanted[0]:
                    yield manifest.parent

    def _places(self, name: str) -> Iterable[Path]:
        """Where something may be that was named from another folder than this one."""
        path = user_path(name)
        yield path
        if not path.is_absolute():
            yield from (parent / path for parent in self.folder.resolve().parents)

    def photos(self) -> RealSet:
        wanted = self.identity.get("photos")
        source, count = wanted if isinstance(wanted, list) and len(wanted) == 2 else (None, None)
        if not isinstance(source, str):
            raise UserError("the run does not say where they were")
        for path in self._places(source):
            if not path.exists():
                continue
            photos = open_unlabelled(path, self.material.student)
            if len(photos) != count:
                raise UserError(f"{source}: {len(photos)} images, and there were {count}")
            if not self._is_unchanged(photos=photos):
                raise UserError(f"{source}: other images than there were")
            joined = set(joining(len(photos)))
            return photos.only([index for index in range(len(photos)) if index not in joined])
        raise UserError(f"not found ({source})")

    def _is_unchanged(self, **sets: object) -> bool:
        # Earlier versions did not record it.
        return all(self.identity.get(key, now) == now for key, now in contents(**sets).items())

    def float(self) -> Model:
        """The very network. Nothing is fetched for it, and no program run."""
        wanted = self.identity.get("checkpoint")
        name = self.material.recipe.model
        for source in self._networks(name):
            with contextlib.suppress(UserError, OSError):
                detector = load_model(source)
                if detector.fingerprint == wanted:
                    return fold(detector).to(self.material.student.device)
        raise UserError(f"not found, or changed since ({name})")

    def _networks(self, name: str | None) -> Iterator[str]:
        names = [name] if name else []
        data = self.material.data
        if isinstance(data, CalibrationSet):
            with contextlib.suppress(UserError):
                names.append(origin_of(data.root).model)
        for source in names:
            network, apart, weights = source.rpartition("@")
            if source == "demo":
                yield source
            elif apart and network.startswith((TORCHVISION, TIMM)):
                yield from (f"{network}@{path}" for path in self._files(weights))
            elif apart and Path(network).suffix.lower() in (".yaml", ".yml"):
                for description in self._files(network):
                    yield from (f"{description}@{path}" for path in self._files(weights))
            else:
                yield from map(str, self._files(source))

    def _files(self, name: str) -> Iterator[Path]:
        for path in self._places(name):
            # A config is a program.
            if path.suffix.lower() != ".py" and path.is_file():
                yield path


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
