"""The steps of `dfq deploy` in its folder: quantize, export, check, time, and tell."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from ..errors import shown
from ..export.cost import BESIDE, detector_cost
from ..export.exported import SUFFIXES
from ..export.structure import structure_faults
from ..export.targets import Target
from ..models.base import Model
from ..recipe import Recipe, changed_recipe
from ..runs.deployment import DeploymentFolder, described
from ..runs.folder import load_run, read_metrics
from ..runs.inputs import MOST_JOINING
from ..runtime.files import json_bytes, user_path, write_atomic, write_json
from ..runtime.progress import Progress
from ..runtime.surroundings import versions
from ..runtime.unfinished import short_name
from .export import export
from .quantize import quantize
from .sensitivity import sensitivity
from .speed import Speed, compare_speed
from .synthesize import synthesize

NOTED_IMAGES = 8
"""That the bits of single layers are looked at on, for a compiler that takes them."""


class DeploymentSteps:
    """One deployment: quantizes, exports and checks in its folder, step by step.

    Args:
        place: the folder, locked.
        target: what to deploy to.
        model: the float network, as the user named it.
        detector: the float network, loaded.
        settings: of quantization.
        side: of the exported images, pixels.
        told: told of progress.
    """

    def __init__(
        self,
        place: DeploymentFolder,
        target: Target,
        model: str | Path,
        detector: Model,
        settings: Recipe,
        side: int,
        told: Progress,
    ) -> None:
        self.place, self.folder, self.target = place, place.folder, target
        self.model, self.detector = model, detector
        self.settings, self.side, self.told = settings, side, told
        self.stem = short_name(Path(detector.source).stem)
        self.run = self.folder / "run"
        self.set = Path()
        self.data: str | Path | None = None
        self.photos: str | Path | None = None
        self.joined: str | None = None

    def quantize(
        self,
        images: str | Path | None,
        photos: int,
        data: str | Path | None,
        device: str,
        trust: bool,
    ) -> None:
        """The run; what of it is there already is not made again."""
        if data is None:
            made = synthesize(self.detector, self.settings, device=device, progress=self.told)
            self.set = made.root
        else:
            self.set, self.data = user_path(data), data
        quantize(
            self.settings, model=self.model, data=data, out=self.run, photos=images,
            device=device, trust=trust, progress=self.told,
        )  # fmt: skip
        # The float network's copies are made where files are written, which is on the CPU.
        self.detector.to("cpu")
        if images is not None:
            self.photos = images
            count = len(range(0, photos - 1, 2)[:MOST_JOINING])
            self.joined = (
                f"{count} of {photos} real photos joined calibration and rounding, the others "
                "were looked at; no label was used"
            )

    def exported(self, data: str | Path | None) -> dict[str, Any]:
        """The files for the target, checked and timed; returns what `deploy.json` is to hold.

        Args:
            data: images to check it on; None: those that it was made on.
        """
        suffix = SUFFIXES[self.target.format]
        bits = self.target.precision.lower()
        file = self.folder / f"{self.stem}-{'int8' if bits == 'w8a8' else bits}{suffix}"
        reference = self._float_file(suffix)
        if not file.is_file():
            self._export(self.run, file.name, self.target.runtime)
        verified = self._verify(file, data)
        speed = None
        if self.target.latency:
            with self.told.task("latency", 1, "comparisons") as task:
                speed = compare_speed(file, reference, image_size=self.side)
                task.update(1, 1)
        faults = list(verified["faults"])
        said = [f"wrong with {shown(file.name)}: {fault}" for fault in faults]
        said += self._said(verified, speed, size_of(file), size_of(reference))
        measured = f"dfq cost --model {shlex.quote(str(file))} --measure"
        figures = {
            "model_file": file.name,
            "float_file": reference.name,
            "faults": faults,
            "verification": verified,
            "speed": None if speed is None else {**speed.to_dict(), "command": measured},
            "size": {"bytes": size_of(file), "float_bytes": size_of(reference)},
        }
        # Where the page of the run looks for it.
        write_json(
            self.run / "exports" / f"{file.name}.verify.json",
            {**verified, "latency": [] if speed is None else speed.to_dict()["latency"]},
        )
        places = {"file": str(file), "float": str(reference), "stem": file.stem}
        files = [
            *((path, f"the {self.target.precision} network") for path in parts(file)),
            *((path, "the float network") for path in parts(reference)),
        ]
        return self._whole(figures, said, places, files)

    def calibration_only(self) -> dict[str, Any]:
        """The float file, and what a vendor's compiler needs to quantize it; returns what
        `deploy.json` is to hold."""
        from ..export.calibration_files import export_for

        tool = self.target.calibration
        assert tool is not None
        reference = self._float_file(".onnx")
        calibration = self.folder / "calibration"
        if not calibration.is_dir():
            export_for(tool, self.set, calibration, self.side)
        notes = self.folder / "precision.txt"
        write_atomic(notes, precision_notes(self.detector, self.settings, self.set).encode())
        said = self._said(None, None, None, size_of(reference))
        figures: dict[str, Any] = {
            "model_file": None,
            "float_file": reference.name,
            "faults": [],
            "calibration": {"tool": tool, "folder": calibration.name},
            "size": {"float_bytes": size_of(reference)},
        }
        places = {
            "float": str(reference),
            "stem": reference.stem,
            "calibration": str(calibration),
        }
        files = [
            *((path, "the float network") for path in parts(reference)),
            (notes, "layers that may want more bits"),
        ]
        return self._whole(figures, said, places, files)

    def _float_file(self, suffix: str) -> Path:
        file = self.folder / f"{self.stem}-float{suffix}"
        if not file.is_file():
            self._export(self.detector, file.name, self.target.runtime)
        return file

    def _export(self, model: Path | Model, name: str, runtime: str) -> None:
        with self.place.making() as making:
            export(
                model, making / name, format=self.target.format, runtime=runtime,
                image_size=self.side, progress=self.told,
            )  # fmt: skip

    def _verify(self, file: Path, data: str | Path | None) -> dict[str, Any]:
        """What `dfq verify` finds, as JSON has it; and what can be seen of a file that does not run
        here."""
        from .verify import verify

        verification = verify(file, self.run, data=data, progress=self.told).to_dict()
        if self.target.verify == "structure":
            verification["faults"] = [*structure_faults(file), *verification["faults"]]
        return dict(json.loads(json_bytes(verification)))

    def _said(
        self,
        verified: dict[str, Any] | None,
        speed: Speed | None,
        size: int | None,
        float_size: int,
    ) -> list[str]:
        """What there is to know, for people."""
        # What a run calls photos are images here.
        lines = [
            str(line).replace("--photos", "--images") for line in read_metrics(self.run)["said"]
        ]
        if self.joined is not None:
            lines.append(self.joined)
        if size is not None:
            lines.append(
                f"{size / 1e6:.2f} MB, the float file {float_size / 1e6:.2f} MB "
                f"({size / float_size:.0%})"
            )
        if verified is not None and not verified["faults"]:
            if self.target.verify == "run":
                share = verified["integers"]["share_of_macs"]
                lines.append(
                    f"verified in {verified['runtime']}: its outputs are those of PyTorch, "
                    f"{share:.1%} of the MACs are computed in integers"
                )
            else:
                lines.append(
                    "verified as far as it can be here: its grids are where "
                    f"{self.target.runtime} wants them, its values (in {verified['runtime']}) "
                    "those of PyTorch"
                )
        if speed is not None:
            lines += [*speed.table(), *speed.said()]
        else:
            lines.append(f"not timed here, where there is no such device: {self.target.title}")
        return [*lines, *self.target.notes]

    def _whole(
        self,
        figures: dict[str, Any],
        said: list[str],
        places: dict[str, str],
        files: list[tuple[Path, str]],
    ) -> dict[str, Any]:
        """All that `deploy.json` holds; the page is drawn, too."""
        from .report import report

        page = report(self.run, self.folder / "report.html")
        run, recipe = (shlex.quote(str(path)) for path in (self.run, self.run / "recipe.yaml"))
        # A set in the cache is what the recipe leads to.
        named = {"data": self.data, "photos": self.photos}
        inputs = "".join(
            f" --{option} {shlex.quote(str(value))}"
            for option, value in named.items()
            if value is not None
        )
        costs = detector_cost(load_run(self.run), self.side).to_dict()
        metrics = read_metrics(self.run)
        return {
            **figures,
            "model": shown(self.model),
            "closeness": {
                **metrics.get("closeness", {}),
                "command": f"dfq qat --recipe {recipe} --model {shlex.quote(str(self.model))}"
                f"{inputs}",
            },
            "cost": {
                **{key: costs[key] for key in ("total", "float", "ratio", "image_size")},
                "command": f"dfq cost --model {run} --image-size {self.side}",
            },
            "set": str(self.set),
            "photos": self.joined,
            "said": said,
            "next": self.target.commands(places),
            "files": described(files),
            "page": page.name,
            "versions": versions(),
        }


def parts(file: Path) -> list[Path]:
    """The files that one exported file consists of."""
    beside = file.with_suffix(BESIDE.get(file.suffix, ""))
    return [file, beside] if file.suffix in BESIDE else [file]


def size_of(file: Path) -> int:
    """Bytes of an exported file, with what it keeps beside itself."""
    return sum(path.stat().st_size for path in parts(file))


def precision_notes(detector: Model, settings: Recipe, data: Path) -> str:
    """For a compiler that takes bits layer by layer: how much each layer alone changes the
    predictions at 8 bits, the worst first."""
    with_widths = changed_recipe(
        settings,
        {
            "quantization.mixed": {"candidates": [4, 8], "images": NOTED_IMAGES},
            # Those that see the image and give the predictions are looked at as well.
            "quantization.first_last_bits": "same",
        },
    )
    rows = []
    for layer in sensitivity(detector, with_widths, data=data).layers:
        for width, divergence in zip(layer.widths, layer.divergence, strict=True):
            if layer.free and tuple(width) == (8, 8):
                rows.append((divergence, layer.name))
    last = detector.boundary_layers().last
    lines = [
        "# Give 16 bits to these first, if 8 bits lose too much: the layers that give the",
        "# predictions, then by how far the predictions move when a layer alone has 8 bits.",
        *(f"{name}  gives the predictions" for name in last),
        *(
            f"{name}  {divergence:.4g}"
            for divergence, name in sorted(rows, reverse=True)
            if name not in last
        ),
    ]
    return "\n".join(lines) + "\n"
