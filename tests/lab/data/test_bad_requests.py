"""Bad requests, and sets that are absent, are told in one clear error."""

from functools import partial
from pathlib import Path

import pytest
from image_files import write_parquet

from kalmannorm.lab.data.classification import ClassificationData
from kalmannorm.lab.data.digits import cluttered_digits
from kalmannorm.lab.data.folders import REPOSITORY, FolderData
from kalmannorm.lab.data.generated import generate_objects
from kalmannorm.lab.data.images import load_images
from kalmannorm.lab.data.objects import SOURCES as OBJECTS
from kalmannorm.lab.data.objects import DetectionData
from kalmannorm.lab.data.roots import SOURCES, MissingDataError
from kalmannorm.lab.data.signals import SignalData
from kalmannorm.lab.data.volumes import generate_volumes

of_images = partial(load_images, "cifar10")
of_signals = partial(SignalData, "digits")
CLASSES = r"classes must be different labels of cifar10, 0 to 9; got \["


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (partial(cluttered_digits, "exam", 4), "exam"),
        (partial(cluttered_digits, "train", 0), "at least 1; got 0"),
        (partial(generate_volumes, "exam", 1), "one of train, validation, test; got 'exam'"),
        (partial(generate_volumes, "train", 0), "got count=0, size=24"),
        (partial(generate_volumes, "train", 1, 6), "got count=1, size=6"),
        (partial(SignalData, "iris"), "one of digits, breast_cancer; got 'iris'"),
        (partial(of_signals, validation=0), "validation=0 and test=449"),
        (partial(of_signals, validation=1700, test=97), "1797 inputs .* validation=1700 and test=97"),
        (partial(ClassificationData, "cifar10", scaling="robust"), "'robust'"),
        (partial(ClassificationData, "cifar10", 8, size=0), "size must be at least 1; got 0"),
        (partial(FolderData, validation=0.5), r"got 0\.5"),
        (partial(DetectionData, "pets"), "'pets'"),
        (partial(generate_objects, Path("nowhere"), "pets"), "'pets'"),
        (partial(load_images, "mnist"), "mnist"),
        (partial(of_images, validation=5), "0 to 4.*got 5"),
        (partial(of_images, limit=0), "at least 1; got 0"),
        *((partial(of_images, classes=classes), CLASSES) for classes in ([], [1, 1], [3, 10], [-1])),
    ],
)
def test_bad_requests_say_what_was_wrong(root, ask, message):
    write_parquet(root, "cifar10", {"train": 5, "test": 5})
    with pytest.raises(ValueError, match=message):
        ask()


@pytest.mark.parametrize(
    ("load", "asked", "told"),
    [
        *((partial(load_images, name), [of.repository], [of.repository, f"{{}}/{of.folder}/train-*.parquet"])
          for name, of in SOURCES.items()),
        *((DetectionData(name).setup, [], [f"{{}}/{name}/annotations/instances_train"]) for name in OBJECTS),
        (FolderData("imagenet").setup, [REPOSITORY],
         ["'imagenet' was not found", "image-net.org", "log in at the Hugging Face hub", "{}/imagenet/train/*/*"]),
        (FolderData("photos").setup, [], ["'photos' was not found", "{}; expected one with images as CLASS/*.jpg"]),
    ],
    ids=[*SOURCES, *OBJECTS, "imagenet", "photos"],
)  # fmt: skip
def test_an_absent_set_is_asked_of_the_hub_once_if_it_is_there_and_then_of_the_user(
    root, asked_of_the_hub, load, asked, told
):
    with pytest.raises(MissingDataError) as raised:
        load()
    assert asked_of_the_hub == asked
    assert [words for words in told if words.format(root) not in str(raised.value)] == []
