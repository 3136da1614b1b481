"""What tests of whole runs share: generated images, and a configuration that trains on them in a second."""

import copy
import functools
from types import SimpleNamespace

import datasets
import pytest
import yaml
from lightning.fabric.utilities.data import get_all_subclasses
from torch.utils.data import BatchSampler, DataLoader
from torchvision.models.resnet import Bottleneck, ResNet

from kalmannorm.lab import jobs
from kalmannorm.lab.cli import main
from kalmannorm.lab.data.generated import generate_images
from kalmannorm.lab.experiments import merge
from kalmannorm.lab.fitting import fit

CONFIG = {
    "seed_everything": 0,
    "model": {
        "class_path": "kalmannorm.lab.training.Classifier",
        "init_args": {
            "network": {
                "class_path": "kalmannorm.lab.models.cifar_resnet.CifarResNet",
                "init_args": {"depth": 8, "width": 4},
            },
            "normalization": "kn",
            "statistics_batch": 2,
            "rate": 0.05,
        },
    },
    "data": {
        "class_path": "kalmannorm.lab.data.classification.ClassificationData",
        "init_args": {"name": "cifar10", "gradient_batch": 8, "validation": 16, "score_batch": 20},
    },
    "trainer": {"max_steps": 20, "val_check_interval": 6, "accelerator": "cpu", "devices": 1},
    "checkpoint_every": 4,
}


@pytest.fixture(autouse=True)
def _loaders_as_they_were():
    """Lightning wraps the methods of all data loaders while a module makes its own, and leaves them so if it raises."""
    yield
    for base in (DataLoader, BatchSampler):
        for each in (base, *get_all_subclasses(base)):
            for name in ("__init__", "__setattr__", "__delattr__"):
                if f"__old{name}" in vars(each):
                    setattr(each, name, vars(each)[f"__old{name}"])
                    delattr(each, f"__old{name}")


@pytest.fixture
def config():
    """A copy of a configuration, to change at will."""
    return copy.deepcopy(CONFIG)


@pytest.fixture
def short(config):
    """One of four steps."""
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 2}
    return config


@pytest.fixture
def shallow(monkeypatch):
    """Mask R-CNNs get a ResNet of four blocks, which this makes."""
    make = functools.partial(ResNet, Bottleneck, [1, 1, 1, 1])
    monkeypatch.setattr("kalmannorm.lab.models.detection.resnet50", make)
    return make


@pytest.fixture
def refused(capsys):
    """Gives the command line what it must refuse in one line with these words; returns what it printed beside that."""

    def refused(arguments, *words):
        capsys.readouterr()
        assert main([str(each) for each in arguments]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("kalmannorm: ")
        assert err.count("\n") == 1
        assert [word for word in words if word not in err] == []
        return out

    return refused


@pytest.fixture
def writes(tmp_path, config):
    """Makes of a study, and of what its base has beside the configuration, what writes them with some changes."""

    def of(study, **base):
        def write(**changes):
            (tmp_path / "base.yaml").write_text(yaml.safe_dump({**config, **base}))
            content = {key: value for key, value in merge(study, changes).items() if value != "absent"}
            (tmp_path / "ours.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
            return tmp_path / "ours.yaml"

        return write

    return of


@pytest.fixture
def here(monkeypatch):
    """Trainings run one after another here, as a process of its own would take ten seconds to import Lightning.

    `jobs` collects them, and `train` may be replaced.
    """
    found = SimpleNamespace(jobs=[], train=jobs._fit)

    def run_all(todo, work, steps, workers, console):
        found.jobs += todo
        return jobs.in_turn(todo, lambda job: found.train(job, lambda step: None), steps, console)

    monkeypatch.setattr(jobs, "run_all", run_all)
    return found


@pytest.fixture
def root(monkeypatch, tmp_path):
    """An empty folder that KALMANNORM_DATA names; whatever `datasets` caches goes beside it."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("KALMANNORM_DATA", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """A folder with a small CIFAR-10."""
    datasets.disable_progress_bars()  # whichever test reads it first would have one on its screen
    folder = tmp_path_factory.mktemp("generated")
    generate_images(folder, "cifar10")
    return folder


@pytest.fixture(autouse=True)
def asked_of_the_hub(monkeypatch):
    """What was asked of the hub, which can't be reached."""
    asked = []
    load = datasets.load_dataset

    def without_network(path, *args, **kwargs):
        if path == "parquet":
            return load(path, *args, **kwargs)
        asked.append(path)
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(datasets, "load_dataset", without_network)
    return asked


@pytest.fixture
def images(generated, monkeypatch, tmp_path_factory):
    """The environment in which it is found, by this process and by others that it starts."""
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setenv("KALMANNORM_DATA", str(generated))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return generated


@pytest.fixture
def unbroken(images, config, tmp_path_factory):
    """The result of the configuration as it is, in one go; once trained, it is read."""
    return fit(config, tmp_path_factory.getbasetemp() / "unbroken")
