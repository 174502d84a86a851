"""`dfq predict` and `dfq.predict`: photos in, boxes in their own pixels and pictures out."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from pycocotools import mask as coco_mask
from support.harness import command, has_one_error

import dfq
from dfq.data.drawing import colour
from dfq.data.readers import open_set
from dfq.demo.scenes import write_coco
from dfq.evaluation.coco import predict as evaluated
from dfq.evaluation.prediction import Prediction
from dfq.evaluation.prediction_picture import draw_prediction, name_pictures
from dfq.models.base import Detections


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in which the demo detector finds something."""
    folder = tmp_path_factory.mktemp("scenes") / "set"
    write_coco(folder, 18, 160)
    return folder / "images"


@pytest.fixture(scope="session")
def one(scenes: Path) -> Path:
    return scenes / "000001.png"


def listed(result: Any) -> dict[str, Any]:
    """The JSON that a command has printed, and nothing else."""
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def boxes_of(image: dict[str, Any]) -> np.ndarray:
    return np.array([row["box"] for row in image["detections"]]).reshape(-1, 4)


def check_against_evaluation(model: str | Path, photos: Path, size: int | None) -> int:
    """Compare with what evaluation detects; how many detections there are."""
    found = dfq.predict(model, photos, image_size=size)
    detector, images = dfq.load_detector(model), open_set(photos)
    wanted = evaluated(detector, images, image_size=size)
    for mine, item, theirs in zip(found, images.items, wanted, strict=True):
        sure = theirs.scores >= 0.25
        assert mine.file == str(item.path)
        assert (mine.width, mine.height) == (item.width, item.height)
        np.testing.assert_allclose(mine.boxes, theirs.boxes[sure].numpy(), atol=1e-3)
        np.testing.assert_allclose(mine.scores, theirs.scores[sure].numpy(), atol=1e-5)
        np.testing.assert_array_equal(mine.labels, theirs.labels[sure].numpy())
    return sum(map(len, found))


def test_boxes_are_those_of_evaluation(scenes: Path) -> None:
    assert check_against_evaluation("demo", scenes, None) > 20


def test_boxes_on_real_photos_are_those_of_evaluation(
    kit: Path, yolov5n: Path, tmp_path: Path
) -> None:
    for path in sorted((kit / "coco-val" / "images").iterdir())[:6]:
        shutil.copy(path, tmp_path)
    assert check_against_evaluation(yolov5n, tmp_path, 320) > 6


def test_a_table_is_printed(place: Path, one: Path) -> None:
    result = command("predict", "--model", "demo", one)
    assert result.exit_code == 0, result.output
    head, *rows, total = result.stdout.splitlines()
    (found,) = dfq.predict("demo", one)
    assert head == f"{one} (160 x 160): {len(found)} detections"
    for row, name, score, box in zip(
        rows, found.categories, found.scores, found.boxes, strict=True
    ):
        assert row.split() == [name, f"{score:.2f}", *(f"{value:.1f}" for value in box)]
    assert total == f"1 images, {len(found)} detections with a score of 0.25 or more"


def test_the_threshold_counts(scenes: Path) -> None:
    many = listed(command("predict", "--model", "demo", scenes, "--threshold", "0.05", "--json"))
    few = listed(command("predict", "--model", "demo", scenes, "--threshold", "0.8", "--json"))
    least, most = (
        [row["score"] for image in found["images"] for row in image["detections"]]
        for found in (many, few)
    )
    assert min(least) < 0.25
    assert min(most) >= 0.8
    assert 0 < len(most) < len(least)


def test_a_turned_photo_has_boxes_as_it_is_seen(place: Path, one: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(one)
    # As a camera held on its side stores it.
    upright.transpose(Image.Transpose.ROTATE_90).save(place / "turned.png", exif=exif)
    found = listed(command("predict", "--model", "demo", "turned.png", one, "--json"))
    turned, plain = found["images"]
    assert len(plain["detections"]) > 1
    np.testing.assert_allclose(boxes_of(turned), boxes_of(plain), atol=1e-3)


def test_kinds_of_pixels_do_not_matter(place: Path, one: Path) -> None:
    image = Image.open(one)
    image.convert("RGBA").save(place / "alpha.png")
    grey = image.convert("L")
    grey.save(place / "grey.png")
    grey.convert("RGB").save(place / "grey-rgb.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(place / "deep.png")
    names = ("alpha.png", "grey.png", "grey-rgb.png", "deep.png")
    alpha, *greys = listed(command("predict", "--model", "demo", *names, "--json"))["images"]
    (plain,) = listed(command("predict", "--model", "demo", one, "--json"))["images"]
    # Sums depend on what else is in a batch, in their last bits.
    for wanted, *others in ((plain, alpha), (greys[0], *greys[1:])):
        assert len(wanted["detections"]) > 1
        for other in others:
            np.testing.assert_allclose(boxes_of(other), boxes_of(wanted), atol=1e-3)


def test_images_of_any_shape_are_taken_and_drawn(place: Path) -> None:
    sizes = {"dot": (1, 1), "line": (900, 1), "pole": (2, 700), "large": (3000, 2000)}
    for name, size in sizes.items():
        Image.new("RGB", size, "red").save(place / f"{name}.png")
    names = [f"{name}.png" for name in sizes]
    result = command("predict", "--model", "demo", *names, "--out", "out", "--compare", "demo")
    assert result.exit_code == 0, result.output
    found = json.loads((place / "out" / "detections.json").read_text())
    assert [(one["width"], one["height"]) for one in found["images"]] == list(sizes.values())
    for name in sizes:
        with Image.open(place / "out" / f"{name}.jpg") as picture:
            assert min(picture.size) >= 60
            assert max(picture.size) >= 640


def test_a_broken_image_is_named_and_left_out(place: Path, one: Path) -> None:
    (place / "photos").mkdir()
    shutil.copy(one, place / "photos" / "good.png")
    data = one.read_bytes()
    (place / "photos" / "cut.png").write_bytes(data[: len(data) // 2])
    (place / "photos" / "text.jpg").write_text("no image")
    result = command("predict", "--model", "demo", "photos", "--out", "out", "--json", "a.json")
    assert result.exit_code == 0, result.output
    for name in ("cut.png", "text.jpg"):
        assert f"left out: photos/{name}: is not an image that can be read" in result.stderr
    assert "; 2 could not be read" in result.stdout
    found = json.loads((place / "a.json").read_text())
    assert found == json.loads((place / "out" / "detections.json").read_text())
    assert [image["file"] for image in found["images"]] == ["photos/good.png"]
    assert [row["file"] for row in found["unreadable"]] == ["photos/cut.png", "photos/text.jpg"]
    assert sorted(os.listdir("out")) == ["detections.json", "good.jpg"]
    assert list(dfq.predict("demo", "photos").unreadable) == ["photos/cut.png", "photos/text.jpg"]


def test_where_nothing_can_be_read_one_line_says_so(place: Path) -> None:
    (place / "photos").mkdir()
    words = ("predict", "--model", "demo", "--out", "out")
    assert "photos: no images there" in has_one_error(command(*words, "photos"))
    (place / "photos" / "a.png").write_text("no image")
    (place / "photos" / "b.png").write_text("nor this")
    line = has_one_error(command(*words, "photos"))
    assert "photos/a.png: is not an image that can be read; of 2 images none can be read" in line
    assert "absent.png: no such file or folder" in has_one_error(command(*words, "absent.png"))
    assert "which images?" in has_one_error(command(*words))
    assert not (place / "out").exists()


def test_other_mistakes_are_one_line(place: Path, one: Path, model: Path) -> None:
    words = ("predict", one, "--out", "out", "--model", "demo")
    for more, problem in (
        (("--threshold", "1.5"), "--threshold 1.5: is no score"),
        (("--threshold", "nan"), "--threshold nan: is no score"),
        (("--image-size", "100"), "no multiple of the model's stride"),
        (("--compare", model), "its categories are not those of the model"),
        (("--compare", "absent.pt"), "absent.pt"),
    ):
        assert problem in has_one_error(command(*words, *more))
    assert "absent.pt" in has_one_error(command("predict", one, "--model", "absent.pt"))
    assert not (place / "out").exists()
    with pytest.raises(dfq.UserError, match="'threshold'"):
        dfq.predict("demo", one, threshold=-1)
    with pytest.raises(dfq.UserError, match="'compare'"):
        dfq.predict("demo", one, compare=model)


def test_json_of_a_photo_never_takes_its_place(place: Path, one: Path) -> None:
    shutil.copy(one, place / "photo.png")
    before = (place / "photo.png").read_bytes()
    found = listed(command("predict", "--model", "demo", "--json", "photo.png"))
    assert [image["file"] for image in found["images"]] == ["photo.png"]
    assert (place / "photo.png").read_bytes() == before
    # Nor where its name is that of JSON.
    (place / "photo.json").write_bytes(before)
    line = has_one_error(
        command("predict", "--model", "demo", "photo.json", "--json", "photo.json")
    )
    assert "is one of the inputs" in line
    assert (place / "photo.json").read_bytes() == before


def test_pictures_replace_nothing_but_themselves(place: Path, one: Path) -> None:
    (place / "photos").mkdir()
    shutil.copy(one, place / "photos" / "a.png")
    Image.open(one).save(place / "photos" / "b.jpg")
    words = ("predict", "--model", "demo", "photos", "--out")
    before = {path.name: path.read_bytes() for path in (place / "photos").iterdir()}
    # Into the folder of the photos themselves: one has the name of its picture.
    line = has_one_error(command("predict", "--model", "demo", "photos/b.jpg", "--out", "photos"))
    assert "photos/b.jpg: is one of the inputs" in line
    for name, content in (("a.jpg", b"a photo of mine"), ("detections.json", b"{}")):
        (place / "mine").mkdir()
        (place / "mine" / name).write_bytes(content)
        assert f"mine/{name}: is in the way" in has_one_error(command(*words, "mine"))
        assert (place / "mine" / name).read_bytes() == content
        assert os.listdir("mine") == [name]
        shutil.rmtree("mine")
    (place / "mine").mkdir()
    (place / "mine" / "a.jpg").symlink_to(place / "photos" / "a.png")
    assert "mine/a.jpg: is a link" in has_one_error(command(*words, "mine"))
    assert {path.name: path.read_bytes() for path in (place / "photos").iterdir()} == before
    # Its own are replaced, also where another call had been stopped before the list was written.
    assert command(*words, "out").exit_code == 0
    (place / "out" / "detections.json").unlink()
    (place / "out" / "other.txt").write_text("mine")
    assert command(*words, "out", "--threshold", "0.9").exit_code == 0
    assert command(*words, "out").exit_code == 0
    assert sorted(os.listdir("out")) == ["a.jpg", "b.jpg", "detections.json", "other.txt"]


def test_pictures_below_the_photos_do_not_become_photos(place: Path, one: Path) -> None:
    shutil.copy(one, place / "a.png")
    for _ in range(2):
        assert command("predict", "--model", "demo", ".", "--out", "out").exit_code == 0
        found = json.loads((place / "out" / "detections.json").read_text())
        assert [image["file"] for image in found["images"]] == ["a.png"]


def test_photos_of_one_name_have_pictures_of_their_own(place: Path, one: Path) -> None:
    names = [Path("a/x.png"), Path("b/x.jpg"), Path("X.png"), Path("x-2.png"), Path(".y.png")]
    assert name_pictures(names) == ["x.jpg", "x-2.jpg", "X-3.jpg", "x-2-2.jpg", "y.jpg"]
    for folder in ("a", "b"):
        (place / folder).mkdir()
        shutil.copy(one, place / folder / "x.png")
    assert command("predict", "--model", "demo", "a", "b", "--out", "out").exit_code == 0
    found = json.loads((place / "out" / "detections.json").read_text())
    pictures = {image["file"]: image["picture"] for image in found["images"]}
    assert pictures == {"a/x.png": "x.jpg", "b/x.png": "x-2.jpg"}


def drawn(picture: np.ndarray, box: np.ndarray, hue: str) -> float:
    """The share of the box's edges in a picture that has its colour."""
    wanted = [int(hue[at : at + 2], 16) for at in (1, 3, 5)]
    x1, y1, x2, y2 = box.round().astype(int)
    edges = [picture[y1, x1:x2], picture[y2, x1:x2], picture[y1:y2, x1], picture[y1:y2, x2]]
    near = [np.abs(edge.astype(int) - wanted).max(axis=1) < 60 for edge in edges]
    return float(np.concatenate(near).mean())


def test_boxes_are_drawn_where_they_are(place: Path, scenes: Path) -> None:
    found = dfq.predict("demo", scenes / "000001.png", out="out")
    assert len(found[0]) > 2
    picture = np.asarray(Image.open(place / "out" / "000001.jpg"))
    assert picture.shape == (640, 640, 3)
    for box, label in zip(found[0].boxes, found[0].labels.tolist(), strict=True):
        # Other boxes and tags may lie on it.
        assert drawn(picture, (box * 4).clip(0, 639), colour(label)) > 0.6


def test_a_pair_has_the_float_network_on_the_left(place: Path, scenes: Path) -> None:
    image = np.zeros((640, 640, 3), np.uint8)
    box = np.array([[100, 200, 300, 400]], np.float32)
    one = Prediction("a", 640, 640, box, np.array([0.9], np.float32), np.array([0]), ["ball"])
    plain = np.asarray(draw_prediction(image, one))
    titled = np.asarray(draw_prediction(image, one, "float: x"))
    assert plain.shape == (640, 640, 3)
    above = len(titled) - 640
    assert above > 0
    np.testing.assert_array_equal(titled[above:], plain)
    low = dfq.load_detector("demo")
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    low.detect = lambda images, **_: [nothing] * len(images)  # type: ignore[method-assign]
    found = dfq.predict(low, scenes / "000001.png", compare="demo", out="out")
    reference = found[0].reference
    assert reference is not None
    assert len(found[0]) == 0 < len(reference)
    assert found.kept() == found[0].kept()
    assert found.to_dict()["compare"]["agree"] == 0
    assert found.to_dict()["compare"]["float_detections"] == len(reference)
    picture = np.asarray(Image.open(place / "out" / "000001.jpg"))[-640:]
    left, right = picture[:, :640], picture[:, -640:]
    hue, largest = colour(int(reference.labels[0])), (reference.boxes[0] * 4).clip(0, 639)
    assert drawn(left, largest, hue) > 0.6
    assert drawn(right, largest, hue) < 0.2


def test_a_model_agrees_with_itself(place: Path, scenes: Path) -> None:
    words = ("predict", "--model", "demo", scenes, "--compare", "demo")
    found = listed(command(*words, "--json"))
    total = found["compare"]
    assert total["float_detections"] == total["detections"] == total["agree"] > 20
    assert total["score_shift"] == 0
    assert total["agree"] == sum(image["compare"]["agree"] for image in found["images"])
    for image in found["images"]:
        assert image["compare"]["float"] == image["detections"]
    result = command(*words)
    n = total["agree"]
    assert f"in all {n} agree (float network: {n}, this one: {n})" in result.stdout
    first = found["images"][0]["compare"]["agree"]
    line = f"{scenes / '000001.png'}: {first} agree (float network: {first}, this one: {first})"
    assert line in result.stdout.splitlines()


def test_another_network_agrees_in_part(scenes: Path) -> None:
    low = dfq.load_detector("demo")
    generator = torch.Generator().manual_seed(0)
    for parameter in low.module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.1 * parameter.data.std(correction=0) * noise
    found = dfq.predict(low, scenes, compare="demo")
    kept = found.kept()
    assert kept is not None
    assert 0 < kept.kept < kept.objects
    assert kept.objects == sum(map(len, dfq.predict("demo", scenes)))
    assert kept.kept == sum(one.kept().kept for one in found)  # type: ignore[union-attr]


def test_masks_are_drawn_and_listed(place: Path, one: Path) -> None:
    detector = dfq.load_detector("demo")

    class Masked(type(detector)):  # type: ignore[misc]
        """Has a mask for all that it finds but the last, which fills the box."""

        has_masks = True

        def detect(self, images: Any, *, masks: bool = False, **thresholds: Any) -> Any:
            assert masks
            return [
                replace(found, masks=torch.ones(len(found) - 1, 28, 28))
                for found in super().detect(images, **thresholds)
            ]

    plain = dfq.predict("demo", one)[0]
    detector.__class__ = Masked
    first = dfq.predict(detector, one, out="out")[0]
    np.testing.assert_array_equal(first.boxes, plain.boxes)
    masks = first.masks()
    assert plain.masks() is None
    assert masks is not None
    assert masks.shape == (len(first), 160, 160)
    assert not masks[-1].any()
    for box, mask in zip(first.boxes[:-1], masks[:-1], strict=True):
        x1, y1, x2, y2 = box
        assert mask.sum() == pytest.approx((x2 - x1) * (y2 - y1), rel=0.12)
        assert mask[int(y1 + y2) // 2, int(x1 + x2) // 2]
    (image,) = json.loads((place / "out" / "detections.json").read_text())["images"]
    for row, mask in zip(image["detections"], masks, strict=True):
        np.testing.assert_array_equal(coco_mask.decode(row["mask"]).astype(bool), mask)
    np.testing.assert_array_equal(first.to_supervision().mask, masks)
    # What lies in a box takes on the colour of its category.
    pixels = np.asarray(Image.open(one))
    painted, bare = (
        np.asarray(draw_prediction(pixels, found)).astype(int) for found in (first, plain)
    )
    x1, y1, x2, y2 = (first.boxes[0] * 4).astype(int)
    inside = np.s_[y1 + 12 : y2 - 12, x1 + 12 : x2 - 12]
    hue = np.array(ImageColor.getrgb(colour(int(first.labels[0]))))
    before, after = (np.abs(each[inside] - hue).mean() for each in (bare, painted))
    assert after < 0.75 * before


def test_predictions_go_on_to_supervision(scenes: Path) -> None:
    import supervision

    found = dfq.predict("demo", scenes)
    for one in found:
        given = one.to_supervision()
        assert isinstance(given, supervision.Detections)
        np.testing.assert_array_equal(given.xyxy, one.boxes)
        np.testing.assert_array_equal(given.confidence, one.scores)
        np.testing.assert_array_equal(given.class_id, one.labels)
        assert given.data["class_name"].tolist() == one.categories
    image = np.asarray(Image.open(found[0].file)).copy()
    given = found[0].to_supervision()
    assert (supervision.BoxAnnotator().annotate(image.copy(), given) != image).any()
    nothing = dfq.predict("demo", scenes, threshold=1.0)[0].to_supervision()
    assert len(nothing) == 0
    assert len(given[given.confidence > 2]) == 0


def test_without_supervision_a_line_says_how_to_get_it(
    one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "supervision":
            raise ImportError(name)
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(dfq.UserError, match="pip install supervision"):
        dfq.predict("demo", one)[0].to_supervision()


def test_boxes_that_are_none_are_left_out(one: Path) -> None:
    detector = dfq.load_detector("demo")
    plain = detector.detect

    def broken(images: Any, **thresholds: Any) -> Any:
        found = plain(images, **thresholds)
        for each in found:
            each.boxes[0] = float("nan")
            each.scores[1] = float("nan")
        return found

    wanted = dfq.predict(detector, one)[0]
    detector.detect = broken  # type: ignore[method-assign]
    found = dfq.predict(detector, one)
    np.testing.assert_array_equal(found[0].boxes, wanted.boxes[2:])
    # JSON has no NaN.
    json.dumps(found.to_dict(), allow_nan=False)
