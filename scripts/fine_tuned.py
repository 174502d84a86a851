"""Fine-tune detectors as users do, on worlds that differ from the one they were trained on.

    python -m scripts.fine_tuned --yolov5n yolov5n.pt --photos coco-train --out networks

What holds for one network may hold for its statistics alone; `benchmarks/accuracy/networks.py`
measures these as well. Each is the demo detector or a COCO-trained YOLOv5n, trained on with its
family's own loss, BatchNorm included, on drawn scenes or photographs that were made dark, pale,
grey, bluish or crowded, with fewer categories. A network that is there is not trained again. Each
takes about 5 minutes on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Generator, Tensor

from dfq.cli.options import report_user_errors
from dfq.data.augment import augment, mosaic
from dfq.data.readers import open_set
from dfq.data.training_images import LetterboxedImages
from dfq.models import from_spec, load_detector, require_detector, save_detector
from dfq.models.base import Detector, Targets
from scripts.demo_detector import draw

Look = Callable[[Tensor], Tensor]
"""What is done to images, float32 `(n, 3, h, w)` in [0, 1]."""


def dark(images: Tensor) -> Tensor:
    """A third of the light, and a sensor's noise."""
    return (0.3 * images + 0.03 * torch.randn_like(images)).clamp(0, 1)


def pale(images: Tensor) -> Tensor:
    """Fog: a third of the contrast about a light grey."""
    return 0.65 + 0.3 * (images - 0.5)


def grey(images: Tensor) -> Tensor:
    """No colour."""
    return images.mean(dim=1, keepdim=True).expand_as(images)


def bluish(images: Tensor) -> Tensor:
    """As under water: little red, and blur."""
    small = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return small * small.new_tensor([0.35, 0.8, 0.9])[:, None, None]


def unchanged(images: Tensor) -> Tensor:
    """As they are."""
    return images


@dataclass(frozen=True)
class Variant:
    """One network.

    Attributes:
        look: what is done to the images.
        categories: of the source, by name, which keep their objects; None: all of them, as one.
        crowded: whether four images make one, twice over: up to 16 times as many, tiny objects.
    """

    look: Look
    categories: Sequence[str] | None
    crowded: bool = False


DEMO: dict[str, Variant] = {
    "demo-dark": Variant(dark, ("ball", "star", "cross", "ring")),
    "demo-pale": Variant(pale, ("ball", "triangle")),
    "demo-grey": Variant(grey, None),
    "demo-crowded": Variant(unchanged, ("ball", "star", "triangle", "ring", "cross"), crowded=True),
}
YOLOV5N: dict[str, Variant] = {
    "yolov5n-dark": Variant(dark, ("person", "car", "chair", "bottle")),
    "yolov5n-grey": Variant(grey, ("person", "dog")),
    "yolov5n-pale": Variant(pale, None),
    "yolov5n-bluish": Variant(bluish, ("person", "bird", "boat", "sheep")),
}


def with_categories(detector: Detector, names: list[str]) -> Detector:
    """The detector with other categories: whatever has the same shape keeps its weights.

    Args:
        detector: an Ultralytics network or a YOLOv5; not changed.
        names: of the new categories.
    """
    spec = detector.spec()
    key = "yaml" if "yaml" in spec else "description"
    *head, (inputs, repeats, module, (_, *others)) = spec[key]["head"]
    last = [inputs, repeats, module, [len(names), *others]]
    spec |= {"names": names, key: {**spec[key], "nc": len(names), "head": [*head, last]}}
    # What has another shape begins at random.
    torch.manual_seed(0)
    changed = require_detector(from_spec(spec))
    state, old = changed.module.state_dict(), detector.module.state_dict()
    kept = {name: old[name] for name in state if state[name].shape == old[name].shape}
    changed.module.load_state_dict({**state, **kept})
    return changed


def train(
    detector: Detector, images: Tensor, labels: list[Tensor], variant: Variant, epochs: int
) -> None:
    """AdamW with a cosine, on mirrored and zoomed images.

    Args:
        detector: trained in place; in eval mode afterwards.
        images: uint8 `(n, 3, s, s)`, as they were before the variant's look.
        labels: one `(n_i, 5)` an image: category, and centre and size as shares of the side.
        variant: what is done to them.
        epochs: passes over the images.
    """
    generator = Generator().manual_seed(0)
    torch.manual_seed(0)
    module = detector.module.train()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for child in module.modules():
        if isinstance(child, torch.nn.BatchNorm2d):
            child.momentum = 0.03
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=5e-4)
    batch, side = 16, images.shape[2]
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + 1)
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator).split(batch)
        for chosen in order:
            if len(chosen) < batch:
                continue
            pixels = images[chosen].float() / 255
            targets = Targets.from_per_image([labels[int(i)] for i in chosen])
            pixels, targets = augment(pixels, targets, generator, flip=0.5, zoom=0.3)
            for _ in range(2 if variant.crowded else 0):
                pixels, targets = mosaic(pixels, targets, generator)
            terms = detector.task_loss(
                detector.raw(variant.look(pixels)), targets, (side, side)
            ).values()
            loss = torch.stack(list(terms)).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        click.echo(f"  epoch {epoch + 1}/{epochs}: loss {total * batch / len(images):.3f}")
    module.eval()


def relabelled(labels: list[Tensor], names: list[str], kept: Sequence[str] | None) -> list[Tensor]:
    """Labels of the categories that are kept, renumbered; all as category 0 for None.

    Args:
        labels: one `(n_i, 5)` an image, the category first.
        names: of the categories they index.
        kept: names of those to keep.
    """
    if kept is None:
        return [torch.cat([torch.zeros(len(own), 1), own[:, 1:]], dim=1) for own in labels]
    index = torch.full((len(names),), -1.0)
    for new, name in enumerate(kept):
        index[names.index(name)] = new
    result = []
    for own in labels:
        moved = torch.cat([index[own[:, 0].long()][:, None], own[:, 1:]], dim=1)
        result.append(moved[moved[:, 0] >= 0])
    return result


def scenes(count: int) -> tuple[Tensor, list[Tensor]]:
    """Drawn scenes that the demo detector was not measured on: uint8 images and their labels."""
    images, labels = [], []
    for seed in range(count):
        scene = draw(seed)
        corners = torch.from_numpy(scene.boxes).float()
        side = scene.image.shape[0]
        centre = (corners[:, :2] + corners[:, 2:]) / 2 / side
        extent = (corners[:, 2:] - corners[:, :2]) / side
        label = torch.from_numpy(scene.labels).float()[:, None]
        images.append(torch.from_numpy(scene.image).permute(2, 0, 1))
        labels.append(torch.cat([label, centre, extent], dim=1))
    return torch.stack(images), labels


def photographs(source: str, detector: Detector) -> tuple[Tensor, list[Tensor]]:
    """A labelled set, letterboxed to the detector's size: uint8 images and their labels."""
    real = LetterboxedImages(open_set(source), detector, detector.image_size)
    indices = list(range(len(real)))
    return real.load(indices), real.targets(indices).per_image(len(real))


def fine_tune(
    source: Detector,
    variant: Variant,
    data: tuple[Tensor, list[Tensor]],
    epochs: int,
    path: Path,
) -> None:
    """Train the variant of a network on images and labels, and save it."""
    images, labels = data
    names = list(variant.categories) if variant.categories else ["object"]
    detector = with_categories(source, names)
    labels = relabelled(labels, source.names, variant.categories)
    train(detector, images, labels, variant, epochs)
    save_detector(detector, path)


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--yolov5n", help="A COCO-trained YOLOv5n; without it, the demo's variants alone.")
@click.option("--photos", help="Labelled photographs for it.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--only", help="Names, by commas; the default is all.")
@report_user_errors
def main(yolov5n: str | None, photos: str | None, out: Path, only: str | None) -> None:
    chosen = only.split(",") if only else [*DEMO, *(YOLOV5N if yolov5n and photos else {})]
    for name in chosen:
        if name not in DEMO | YOLOV5N:
            raise click.UsageError(f"--only {name}: choose from {', '.join(DEMO | YOLOV5N)}")
        if name in YOLOV5N and not (yolov5n and photos):
            raise click.UsageError(f"--only {name}: needs --yolov5n and --photos")
    out.mkdir(parents=True, exist_ok=True)
    drawn: tuple[Tensor, list[Tensor]] | None = None
    for name in chosen:
        path = out / f"{name}.safetensors"
        if path.is_file():
            continue
        click.echo(name)
        if name in DEMO:
            drawn = drawn or scenes(3000)
            fine_tune(load_detector("demo"), DEMO[name], drawn, 3, path)
        else:
            source = load_detector(str(yolov5n))
            source.image_size = 320
            data = photographs(str(photos), source)
            fine_tune(source, YOLOV5N[name], data, 24, path)


if __name__ == "__main__":
    main()
