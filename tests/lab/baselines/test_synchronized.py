"""SyncBatchNorm in BatchNorm's place."""

from torch import nn

from kalmannorm.lab.baselines.synchronized import to_sync
from kalmannorm.lab.models.small import SmallConvNet


def test_every_batchnorm_is_synchronized():
    model = SmallConvNet()
    weights = [norm.weight for norm in model.norms]
    assert to_sync(model) is model
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in model.norms)
    assert all(norm.weight is weight for norm, weight in zip(model.norms, weights, strict=True))
