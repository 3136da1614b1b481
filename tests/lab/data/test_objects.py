"""Detection sets in COCO's format: masks from run lengths and polygons, boxes, and what is left out."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_lengths

from kalmannorm.lab.data.objects import SOURCES, DetectionData, DetectionSet

HEIGHT, WIDTH = 20, 30


def rectangle(left, top, width, height):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def run_length(mask):
    encoded = run_lengths.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def annotation(image, box, **changes):
    left, top, width, height = box
    right, bottom = left + width, top + height
    polygon = [[left, top, right, top, right, bottom, left, bottom]]
    entry = {"image_id": image, "bbox": box, "category_id": 3, "iscrowd": 0, "area": width * height}
    return entry | {"segmentation": polygon} | changes


def write_set(folder, files):
    """Four images: two objects; none; a crowd alone; one object beside a box without area."""
    boxes = [[2, 3, 10, 8], [15, 5, 6, 12]]
    annotations = [
        annotation(1, boxes[0], segmentation=run_length(rectangle(*boxes[0]))),
        annotation(1, boxes[1], category_id=7),
        annotation(3, [0, 0, 20, 20], iscrowd=1, segmentation=run_length(rectangle(0, 0, 20, 20))),
        annotation(4, boxes[0]),
        annotation(4, [5, 5, 0, 4]),
    ]
    (folder / files.images).mkdir(parents=True, exist_ok=True)
    (folder / files.annotations).parent.mkdir(exist_ok=True)
    images = [{"id": n, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for n in range(1, 5)]
    for image in images:
        Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0)).save(folder / files.images / image["file_name"])
    numbered = [entry | {"id": n} for n, entry in enumerate(annotations, 1)]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    content = {"images": images, "annotations": numbered, "categories": categories}
    (folder / files.annotations).write_text(json.dumps(content))


@pytest.fixture(params=SOURCES)
def name(request, root):
    for files in (SOURCES[request.param].train, SOURCES[request.param].validation):
        write_set(root / request.param, files)
    return request.param


@pytest.fixture
def data(name):
    data = DetectionData(name, 2, score_batch=2, workers=0)
    data.setup()
    return data


def test_boxes_labels_and_masks_are_those_of_the_file(data):
    image, target = data.validation_set[0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert image.dtype == torch.float32
    assert 0.9 < image[0].min() <= image[0].max() <= 1
    assert target["boxes"].tolist() == [[2, 3, 12, 11], [15, 5, 21, 17]]
    assert target["labels"].tolist() == [3, 7]
    assert target["masks"].dtype == torch.uint8
    assert torch.equal(target["masks"][0], torch.from_numpy(rectangle(2, 3, 10, 8)))
    assert torch.equal(target["masks"][1], torch.from_numpy(rectangle(15, 5, 6, 12)))
    assert target["image_id"] == 1
    assert data.num_classes == 8


def test_an_image_without_objects_has_a_target_of_the_usual_shape(data):
    _, target = data.validation_set[1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, HEIGHT, WIDTH)


def test_training_leaves_out_what_cannot_be_learned_and_scoring_keeps_crowds(data):
    assert [target["image_id"] for _, target in data.train_set] == [1, 4]
    assert [target["image_id"] for _, target in data.validation_set] == [1, 2, 3, 4]
    assert len(data.train_set[1][1]["boxes"]) == len(data.validation_set[3][1]["boxes"]) == 1
    _, crowd = data.validation_set[2]
    assert crowd["iscrowd"].tolist() == [1]
    assert crowd["masks"].sum() == 400
    assert data.validation_set[0][1]["iscrowd"].tolist() == [0, 0]


def test_a_flip_moves_boxes_and_masks_with_the_image(data):
    for _ in range(20):
        _, target = data.train_set[0]
        for (left, top, right, bottom), mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
            assert mask[top:bottom, left:right].all()
            assert mask.sum() == (bottom - top) * (right - left)


def test_batches_are_lists(data):
    images, targets = next(iter(data.val_dataloader()))
    assert [image.shape for image in images] == [(3, HEIGHT, WIDTH)] * 2
    assert [target["image_id"] for target in targets] == [1, 2]
    images, targets = next(iter(data.train_dataloader()))
    assert {target["image_id"] for target in targets} == {1, 4}


def test_limit_keeps_the_first(name):
    data = DetectionData(name, 1, workers=0, limit=1)
    data.setup()
    assert (len(data.train_set), len(data.validation_set)) == (1, 1)


def test_nothing_is_printed(root, capsys):
    files = SOURCES["pennfudan"].train
    write_set(root, files)
    DetectionSet(root, files, train=False)
    assert capsys.readouterr().out == ""
