"""Short trainings for tests."""

import os

import lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from kalmannorm.lab.training import quiet


def loader(images, labels, batch_size, seed=None):
    """Batches of tensors in memory: shuffled by ``seed`` and of equal size, or in order if that is None."""
    data = TensorDataset(images, labels)
    if seed is None:
        return DataLoader(data, batch_size)
    order = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    # A sampler of whole batches: one indexing a batch instead of one an image and a stack of them.
    return DataLoader(data, sampler=BatchSampler(order, batch_size, drop_last=True), batch_size=None)


def quiet_trainer(steps, *callbacks, **options):
    """A Trainer for many short runs: it stops after ``steps``, saves nothing and prints nothing."""
    quiet()
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(callbacks),
    }
    return lightning.Trainer(**(settings | options))


def fit_forked(environment, *args, **options):
    """``fit``, in a process that a fork server starts: that has the environment in which the server began."""
    import datasets

    from kalmannorm.lab.fitting import fit

    os.environ.update(environment)
    datasets.config.HF_DATASETS_CACHE = environment["HF_DATASETS_CACHE"]
    fit(*args, **options)


def descent(model, loss_of, steps=30, rate=0.05):
    """The loss that is asked for before each step of SGD with momentum, and after the last."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [*losses, loss_of().item()]


class Nested(lightning.LightningModule):
    """A module the usual way: the network is an attribute, which the steps call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
        )

    def forward(self, x):
        return self.net(x).mean((2, 3))

    called = forward  # and not the module itself, whose hooks would run

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.called(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self.called(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def small_mask_rcnn(num_classes: int = 2) -> nn.Module:
    """A Mask R-CNN on one convolution with a norm, for images of 64 pixels."""
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    backbone.out_channels = 8
    pools = {f"{what}_roi_pool": MultiScaleRoIAlign(["0"], size, 2) for what, size in (("box", 7), ("mask", 14))}
    anchors = AnchorGenerator(((16, 32),), ((1.0,),))
    few = {"rpn_post_nms_top_n_train": 16, "rpn_post_nms_top_n_test": 16, "box_detections_per_img": 8}
    return MaskRCNN(backbone, num_classes, min_size=64, max_size=64, rpn_anchor_generator=anchors, **pools, **few)


def pairs(count=8):
    """What `Nested` is trained on, two images a batch."""
    images = 3 + torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return loader(images, torch.arange(count) % 2, 2)


def assert_same(one, other):
    """Of state dicts: the same names and, to the bit, the same tensors."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
