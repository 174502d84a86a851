"""Photographs as the world of a fine-tuned network has them: dark, pale, grey or bluish.

    python -m scripts.own_world --of yolov5n-grey --photos coco-val --out grey/coco-val

`scripts/fine_tuned.py` trains networks on photographs that were changed so. Plain ones are another
world to them than the one they were made for; this makes what to measure and calibrate them with in
their own. Images alone, without labels, as JPEG files.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from dfq.cli.options import report_user_errors
from dfq.data.class_set import open_photo_set
from scripts.fine_tuned import DEMO, YOLOV5N

QUALITY = 95
"""Of the JPEG files."""


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--of", "name", type=click.Choice([*DEMO, *YOLOV5N]), required=True)
@click.option("--photos", required=True, help="A folder of photographs.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@report_user_errors
def main(name: str, photos: str, out: Path) -> None:
    look = (DEMO | YOLOV5N)[name].look
    out.mkdir(parents=True, exist_ok=True)
    # Of the noise of dark ones.
    torch.manual_seed(0)
    images = open_photo_set(photos)
    for number in range(len(images)):
        pixels = torch.from_numpy(images.load_image(number)).permute(2, 0, 1)[None].float() / 255
        seen = (look(pixels)[0].permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(np.ascontiguousarray(seen)).save(out / f"{number:06d}.jpg", quality=QUALITY)
    click.echo(f"{out}: {len(images)} images")


if __name__ == "__main__":
    main()
