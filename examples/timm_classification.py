"""Classification with a model of timm, at 2 images a batch: train, then deploy timm's own layers."""

import timm
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import kalmannorm as kn


def stripes(count, size=32):
    """Noisy images of stripes, and whether they run across or down."""
    labels = torch.randint(0, 2, (count,))
    wave = torch.sin(torch.arange(size) / 2 + 6 * torch.rand(count, 1))
    across, down = wave[:, None, :, None].expand(-1, 3, size, size), wave[:, None, None, :].expand(-1, 3, size, size)
    images = torch.where(labels.bool()[:, None, None, None], down, across)
    images = images + 0.5 * torch.randn(count, 3, size, size)
    return (images - images.mean()) / images.std(), labels  # as after the usual Normalize: what input_stats say


torch.manual_seed(0)
loader = DataLoader(TensorDataset(*stripes(16)), batch_size=2, shuffle=True)  # your images and labels
model = timm.create_model("regnetx_002", pretrained=False, num_classes=2)
model = kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3))
print(str(kn.describe(model, next(iter(loader))[0])).splitlines()[-1])

optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for epoch in range(4):
    total = 0.0
    for images, labels in loader:
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    print(f"epoch {epoch}: loss {total / len(loader):.3f}")

plain = kn.to_batchnorm(model).eval()
print(f"{type(plain.stem.bn).__name__}: {(plain(images).argmax(1) == labels).float().mean():.0%} of a batch right")
