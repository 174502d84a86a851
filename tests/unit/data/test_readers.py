from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfq.data.readers import ImageSet, open_set
from dfq.errors import UserError
from dfq.models.coco_categories import COCO_NAMES, coco_id


def write_image(path: Path, width: int = 40, height: int = 20, **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (200, 10, 30)).save(path, **save)
    return path


def coco_data() -> dict:
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 20},
            {"id": 3, "file_name": "b.png"},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 10, 5], "area": 30},
            {"id": 2, "image_id": 7, "category_id": 18, "bbox": [0, 0, 4, 4], "iscrowd": 1},
        ],
    }


def write_coco(folder: Path, data: dict, name: str = "annotations.json") -> Path:
    write_image(folder / "images" / "a.png")
    write_image(folder / "images" / "b.png", 8, 6)
    (folder / name).write_text(json.dumps(data))
    return folder


def write_yolo(folder: Path, header: str, labels: str = "1 0.5 0.5 0.5 0.5\n") -> Path:
    write_image(folder / "images" / "val" / "a.png")
    (folder / "labels" / "val").mkdir(parents=True, exist_ok=True)
    (folder / "labels" / "val" / "a.txt").write_text(labels)
    (folder / "data.yaml").write_text(header)
    return folder / "data.yaml"


VOC_OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin>"
    "<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
)


def write_voc(folder: Path, objects: str, lists: dict[str, str]) -> Path:
    for stem in ("a", "b"):
        write_image(folder / "JPEGImages" / f"{stem}.jpg")
    (folder / "Annotations").mkdir()
    (folder / "Annotations" / "a.xml").write_text(f"<annotation>{objects}</annotation>")
    (folder / "Annotations" / "b.xml").write_text("<annotation></annotation>")
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for name, lines in lists.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(lines)
    return folder


# --- COCO


def test_coco_folder_reads_everything_in_file_order(tmp_path):
    opened = open_set(write_coco(tmp_path, coco_data()))
    assert opened.labelled
    assert opened.names == ["dog", "person"]
    first, second = opened.items
    assert (first.image_id, first.width, first.height) == (7, 40, 20)
    # x, y, width, height become corners.
    np.testing.assert_array_equal(first.boxes, [[1, 2, 11, 7], [0, 0, 4, 4]])
    assert first.boxes.dtype == np.float32
    assert first.labels.tolist() == [1, 0]
    assert first.ignore.tolist() == [False, True]
    # The stated area where there is one, else the box's.
    assert first.area.tolist() == [30, 16]
    # No size in the file: the image's header tells.
    assert (second.width, second.height) == (8, 6)
    assert second.boxes.shape == (0, 4)


def test_coco_outlines(tmp_path):
    data = coco_data()
    polygon = [[1, 2, 11, 2, 11, 7, 1, 7]]
    runs = {"size": [20, 40], "counts": [0, 20, 780]}
    data["annotations"][0]["segmentation"] = polygon
    data["annotations"][1]["segmentation"] = runs
    data["annotations"].insert(0, {"image_id": 7, "category_id": 1, "bbox": [0, 0, 0, 5]})
    item, empty = open_set(write_coco(tmp_path, data)).items
    # The first box is unusable; its outline, of which there is none, goes with it.
    assert item.segments == (polygon, runs)
    assert item.segmented
    assert empty.segmented
    # Two points enclose nothing, and some tools write an empty list.
    for nothing in ([], [[1, 2, 3, 4]], None):
        data["annotations"][2]["segmentation"] = nothing
        opened = open_set(write_coco(tmp_path, data))
        assert opened.items[0].segments == (polygon, None)
        assert opened.segmented() is None
    for wrong in ([[1, 2, 3]], [1, 2, 3, 4, 5, 6], {"size": [20], "counts": []}, "x", [["a"] * 6]):
        data["annotations"][2]["segmentation"] = wrong
        opened = open_set(write_coco(tmp_path, data))
        # Boxes are measured all the same; masks cannot be.
        assert len(opened.items[0].boxes) == 2
        with pytest.raises(UserError, match=r"annotations\[2\] .*'segmentation' "):
            opened.segmented()


def test_coco_images_beside_the_json(tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    (tmp_path / "some.json").write_text(json.dumps(coco_data()))
    assert [item.path.name for item in open_set(tmp_path / "some.json").items] == ["a.png", "b.png"]


def test_coco_official_layout(tmp_path):
    write_image(tmp_path / "val2017" / "a.png")
    write_image(tmp_path / "val2017" / "b.png")
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.parent.mkdir()
    file.write_text(json.dumps(coco_data()))
    assert open_set(file).items[0].path == tmp_path / "val2017" / "a.png"
    with pytest.raises(UserError, match=r"instances_val2017\.json"):
        open_set(tmp_path)


def test_unusable_boxes_are_dropped_and_counted(tmp_path):
    data = coco_data()
    for box in ([0, 0, 0, 5], [0, 0, 5, -1], [float("nan"), 0, 5, 5], [0, 0, float("inf"), 5]):
        data["annotations"].append({"id": 9, "image_id": 3, "category_id": 1, "bbox": box})
    opened = open_set(write_coco(tmp_path, data))
    assert opened.dropped == 4
    assert sum(len(item.boxes) for item in opened.items) == 2


def broken(change) -> dict:
    data = coco_data()
    change(data)
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (broken(lambda d: d.pop("categories")), "no list 'categories'"),
        (broken(lambda d: d["images"].clear() or d["annotations"].clear()), "holds no images"),
        (broken(lambda d: d["annotations"][0].update(category_id=99)), "category_id 99"),
        (broken(lambda d: d["annotations"][1].update(image_id=5)), r"annotations\[1\].*image_id 5"),
        (broken(lambda d: d["annotations"][0].update(bbox=[1, 2, 3])), "four numbers"),
        (broken(lambda d: d["annotations"][0].update(bbox=[1, 2, 3, None])), "four numbers"),
        (broken(lambda d: d["annotations"][0].update(area="big")), "'area'"),
        (broken(lambda d: d["images"][1].update(id=7)), "repeats the id 7"),
        (broken(lambda d: d["images"][0].update(width=0)), "impossible size"),
        (broken(lambda d: d["images"][0].pop("file_name")), "'file_name'"),
    ],
)
def test_coco_mistakes_name_the_file(tmp_path, data, message):
    with pytest.raises(UserError, match=message) as error:
        open_set(write_coco(tmp_path, data))
    assert "annotations.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_json_names_the_line(tmp_path):
    (tmp_path / "annotations.json").write_text('{\n"images": [\n}')
    with pytest.raises(UserError, match=r"annotations.json, line 3: broken JSON"):
        open_set(tmp_path)


def test_missing_images_are_counted_and_the_first_named(tmp_path):
    write_coco(tmp_path, coco_data())
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images are missing.*b\.png"):
        open_set(tmp_path)


# --- YOLO


@pytest.mark.parametrize("names", ["names: [cat, dog]", "names: {1: dog, 0: cat}"])
@pytest.mark.parametrize("entry", ["images/val", "[images/val]", "val.txt"])
def test_yolo_split_as_folder_list_or_text(tmp_path, names, entry):
    (tmp_path / "val.txt").write_text("./images/val/a.png\n\n")
    opened = open_set(write_yolo(tmp_path, f"val: {entry}\n{names}\n"))
    assert opened.names == ["cat", "dog"]
    item = opened.items[0]
    # 40 x 20 pixels, centre half-way, half the size.
    np.testing.assert_allclose(item.boxes, [[10, 5, 30, 15]])
    assert item.labels.tolist() == [1]
    assert item.area.tolist() == [200]


def test_yolo_path_is_relative_to_the_yaml(tmp_path):
    write_yolo(tmp_path / "root", "")
    yaml = tmp_path / "set.yaml"
    yaml.write_text("path: root\nval: images/val\nnames: [cat, dog]\n")
    assert open_set(yaml).items[0].path == tmp_path / "root" / "images" / "val" / "a.png"


def test_yolo_split_can_be_chosen(tmp_path):
    yaml = write_yolo(tmp_path, "val: nowhere\ntest: images/val\nnames: [cat, dog]\n")
    assert len(open_set(yaml, split="test")) == 1
    with pytest.raises(UserError, match="no split 'train'; it has: val, test"):
        open_set(yaml, split="train")


def test_yolo_roboflow_paths(tmp_path):
    yaml = write_yolo(tmp_path / "set", "val: ../images/val\nnames: [cat, dog]\n")
    assert len(open_set(yaml)) == 1


def test_yolo_polygons_duplicates_and_backgrounds(tmp_path):
    labels = "0 0.1 0.2 0.5 0.2 0.5 0.6\n1 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5\n"
    yaml = write_yolo(tmp_path, "val: images/val\nnames: [cat, dog]\n", labels)
    write_image(tmp_path / "images" / "val" / "b.png")
    opened = open_set(yaml)
    np.testing.assert_allclose(opened.items[0].boxes, [[4, 4, 20, 12], [10, 5, 30, 15]], rtol=1e-6)
    assert opened.dropped == 1
    assert len(opened.items[1].boxes) == 0
    assert opened.labelled


def test_yolo_without_label_files_is_unlabelled(tmp_path):
    yaml = write_yolo(tmp_path, "val: images/val\nnames: [cat, dog]\n")
    (tmp_path / "labels" / "val" / "a.txt").unlink()
    assert not open_set(yaml).labelled


def test_yolo_without_names_numbers_its_categories(tmp_path):
    opened = open_set(write_yolo(tmp_path, "val: images/val\n"))
    assert opened.names == ["0", "1"]
    assert opened.category_mapping(["apple", "pear"]) == [0, 1]
    with pytest.raises(UserError, match=r"'0', '1'.*'apple'"):
        opened.category_mapping(["apple", "pear", "plum"])


@pytest.mark.parametrize(
    ("header", "labels", "message"),
    [
        ("val: [", "", r"data.yaml, line \d: broken YAML"),
        ("just text", "", "not a YOLO data file"),
        ("names: [cat]", "", "no split 'val'; it has: none"),
        ("train: images/val", "", "no split 'val'; it has: train"),
        ("val: images/none", "", "'images/none' does not exist"),
        ("path: none\nval: images/val", "", "'path' does not exist"),
        ("val: images/val\nnames: {0: a, 2: b}", "", "0, 1, 2"),
        (
            "val: images/val\nnames: [a]",
            "0 .5 .5 .5 .5\n1 .5 .5 .5 .5",
            "a.txt, line 2: category 1",
        ),
        ("val: images/val\nnames: [a]", "0 .5 .5 .5", "a.txt, line 1: 4 numbers"),
        ("val: images/val\nnames: [a]", "0 20 5 .5 .5", "line 1: coordinates must be normalised"),
        ("val: images/val\nnames: [a]", "cat .5 .5 .5 .5", "line 1: not numbers"),
        ("val: images/val\nnames: [a]", "0.5 .5 .5 .5 .5", "whole number"),
        ("val: images/val\nnames: [a]", "nan .5 .5 .5 .5", "whole number"),
    ],
)
def test_yolo_mistakes(tmp_path, header, labels, message):
    with pytest.raises(UserError, match=message) as error:
        open_set(write_yolo(tmp_path, header, labels))
    assert "\n" not in str(error.value)


def test_yolo_numbers_that_are_not_finite_are_dropped(tmp_path):
    yaml = write_yolo(tmp_path, "val: images/val\nnames: [a]\n", "0 nan .5 .5 .5\n0 .5 .5 0 .5\n")
    opened = open_set(yaml)
    assert opened.dropped == 2
    assert opened.items[0].boxes.shape == (0, 4)


def test_yolo_list_with_missing_image(tmp_path):
    (tmp_path / "val.txt").write_text("images/val/a.png\nimages/val/z.png\n")
    with pytest.raises(UserError, match=r"1 of 2 images are missing.*z\.png"):
        open_set(write_yolo(tmp_path, "val: val.txt\nnames: [a, b]\n"))


# --- Pascal VOC


def test_voc_boxes_count_from_one_and_difficult_is_ignored(tmp_path):
    objects = VOC_OBJECT.format(name="sofa", difficult=0, x1=1, y1=1, x2=40, y2=20)
    objects += VOC_OBJECT.format(name="cat", difficult=1, x1=5, y1=6, x2=9, y2=8)
    opened = open_set(write_voc(tmp_path, objects, {"train": "b\n", "val": "a\n"}))
    assert opened.names == ["cat", "sofa"]
    assert len(opened) == 1
    item = opened.items[0]
    # Pixels 1 to 40 of 40: the whole image.
    np.testing.assert_array_equal(item.boxes, [[0, 0, 40, 20], [4, 5, 9, 8]])
    assert item.labels.tolist() == [1, 0]
    assert item.ignore.tolist() == [False, True]
    assert (item.width, item.height) == (40, 20)


def test_voc_lists(tmp_path):
    folder = write_voc(tmp_path, "", {"trainval": "a\n", "all": "a\nb\n"})
    assert len(open_set(folder)) == 2
    assert len(open_set(folder, split="trainval")) == 1
    with pytest.raises(UserError, match="no list 'val'; it has: all, trainval"):
        open_set(folder, split="val")


def test_voc_mistakes(tmp_path):
    folder = write_voc(tmp_path, "<object><name>a</name></object>", {})
    with pytest.raises(UserError, match=r"a\.xml: object 1 has no number for xmin"):
        open_set(folder)
    (folder / "Annotations" / "a.xml").write_text("<annotation>\n<object>\n</annotation>")
    with pytest.raises(UserError, match=r"a\.xml, line 3: broken XML"):
        open_set(folder)
    (folder / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images are missing.*a\.jpg"):
        open_set(folder)


# --- bare folders, dispatch


def test_bare_folder_is_unlabelled(tmp_path):
    write_image(tmp_path / "x" / "b.PNG", 8, 6)
    write_image(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("not an image")
    opened = open_set(tmp_path)
    assert not opened.labelled
    assert [(item.path.name, item.width, item.height) for item in opened.items] == [
        ("a.jpg", 40, 20),
        ("b.PNG", 8, 6),
    ]
    assert opened.names == []


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"a\.jpg: is not an image"):
        open_set(tmp_path)
    folder = write_coco(tmp_path / "coco", coco_data())
    for content in (b"", b"hello"):
        (folder / "images" / "a.png").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.png: is not an image"):
            open_set(folder).load_image(0)


def test_wrong_sources(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_set(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no images"):
        open_set(tmp_path)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(UserError, match="not an image set"):
        open_set(tmp_path / "a.csv")
    with pytest.raises(UserError, match="has no split 'val'"):
        open_set(write_coco(tmp_path / "coco", coco_data()), split="val")
    write_image(tmp_path / "yolo" / "images" / "a.png")
    (tmp_path / "yolo" / "labels").mkdir()
    with pytest.raises(UserError, match=r"no data\.yaml"):
        open_set(tmp_path / "yolo")


# --- images


def test_load_image_is_rgb(tmp_path):
    write_image(tmp_path / "a.png")
    image = open_set(tmp_path).load_image(0)
    assert image.dtype == np.uint8
    assert image.shape == (20, 40, 3)
    assert image[0, 0].tolist() == [200, 10, 30]


def write_turned(path: Path) -> None:
    """40 x 20 stored pixels that EXIF says to turn by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(path, exif=exif)


def test_exif_orientation_is_applied(tmp_path):
    write_turned(tmp_path / "a.jpg")
    opened = open_set(tmp_path)
    assert (opened.items[0].width, opened.items[0].height) == (20, 40)
    assert opened.load_image(0).shape == (40, 20, 3)


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40)])
def test_annotations_decide_whether_an_image_is_turned(tmp_path, width, height):
    data = coco_data()
    data["images"] = [{"id": 7, "file_name": "t.jpg", "width": width, "height": height}]
    write_coco(tmp_path, data)
    write_turned(tmp_path / "images" / "t.jpg")
    assert open_set(tmp_path).load_image(0).shape == (height, width, 3)


def test_another_size_than_annotated_is_an_error(tmp_path):
    data = coco_data()
    data["images"][0]["width"] = 41
    with pytest.raises(UserError, match="is 40 x 20 pixels, its annotation says 41 x 20"):
        open_set(write_coco(tmp_path, data)).load_image(0)


def test_head_and_subset(tmp_path):
    for index in range(10):
        write_image(tmp_path / f"{index}.png")
    opened = open_set(tmp_path)
    assert [item.path.stem for item in opened.head(3).items] == ["0", "1", "2"]
    chosen = [item.path.stem for item in opened.subset(4, seed=1).items]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 4
    assert chosen == [item.path.stem for item in opened.subset(4, seed=1).items]
    assert any(
        chosen != [item.path.stem for item in opened.subset(4, seed=s).items] for s in (2, 3)
    )
    assert len(opened.subset(99, seed=0)) == 10
    with pytest.raises(UserError, match="at least 1"):
        opened.head(0)


# --- names


def named(*names: str) -> ImageSet:
    item = object()
    return ImageSet(Path("set"), list(names), [item])  # type: ignore[list-item]


def test_categories_are_matched_by_name():
    voc = named("TVMonitor", "dining_table", "sofa", "aeroplane", "horse", "unicorn")
    model = ["airplane", "couch", "dining table", "tv", "motorcycle", "horse"]
    assert voc.category_mapping(model) == [3, 2, 1, 0, 5, None]


def test_the_exact_name_wins():
    assert named("sofa", "couch").category_mapping(["couch", "sofa"]) == [1, 0]


def test_categories_of_one_name_are_told_apart_by_their_order():
    model = ["", "cat", "", "cat"]
    assert named(*model).category_mapping(model) == [0, 1, 2, 3]
    assert named("cat", "dog", "cat").category_mapping(model) == [1, None, 3]
    # Spelled another way, too; and several of a set may be one of the model.
    assert named("Cat", "Cat").category_mapping(model) == [1, 3]
    assert named("cat", "cat").category_mapping(["dog", "cat"]) == [1, 1]
    assert named("cat", "Cat").category_mapping(["dog", "cat"]) == [1, 1]
    for names in (["cat"], ["cat", "cat", "cat"], ["Cat"]):
        with pytest.raises(UserError, match=r"(?i)set: has the category 'cat' \d times, and the"):
            named(*names).category_mapping(model)


def test_no_shared_name_names_both_lists():
    with pytest.raises(UserError, match=r"set: .*'ball'.*'person', 'bicycle'.*80 in all"):
        named("ball").category_mapping(COCO_NAMES)


def test_equal_counts_alone_do_not_match():
    with pytest.raises(UserError, match="no category name is shared"):
        named("apple", "pear").category_mapping(["pliers", "saw"])


def test_coco_categories():
    # From the published list: https://cocodataset.org, ids 1 to 90, ten left out.
    left_out = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    ids = [coco_id(name) for name in COCO_NAMES]
    assert ids == [number for number in range(1, 91) if number not in left_out]
    assert COCO_NAMES[0] == "person"
    assert COCO_NAMES[79] == "toothbrush"
    assert (coco_id("TV monitor"), coco_id("pottedplant"), coco_id("Sofa")) == (72, 64, 63)
    assert coco_id("unicorn") is None


# --- real sets


def test_real_coco_set(kit):
    opened = open_set(kit / "coco-val")
    data = json.loads((kit / "coco-val" / "annotations.json").read_text())
    assert opened.names == [category["name"] for category in data["categories"]]
    assert len(opened) == len(data["images"])
    kept = sum(len(item.boxes) for item in opened.items)
    assert kept + opened.dropped == len(data["annotations"])
    assert opened.category_mapping(COCO_NAMES) == list(range(80))
    # Official labels have outlines, of crowds too; those of other sources have boxes only.
    sources = {image["id"]: image["label_source"] for image in data["images"]}
    official = [i for i in opened.items if sources[i.image_id].startswith("official")]
    assert len(official) == 31
    assert all(item.segmented for item in official)
    outlined = opened.segmented()
    assert outlined is not None
    assert len(official) <= len(outlined) < len(opened)


def test_real_voc_set(kit):
    opened = open_set(kit / "voc")
    assert len(opened) == 109
    assert len(opened.names) == 20
    assert sum(len(item.boxes) for item in opened.items) == 285
    assert None not in opened.category_mapping(COCO_NAMES)
    for index in range(0, 109, 20):
        item = opened.items[index]
        assert opened.load_image(index).shape == (item.height, item.width, 3)
        assert (item.boxes[:, 2:] <= [item.width, item.height]).all()
