"""Binary segmentation with a U-Net of segmentation_models_pytorch, at 2 images a batch."""

import segmentation_models_pytorch as smp
import torch
from torch.utils.data import DataLoader, TensorDataset

import kalmannorm as kn


def discs(count, size=64):
    """Noisy images of a disc, and the mask of it."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    center_row, center_column = torch.randint(size // 4, 3 * size // 4, (2, count, 1, 1))
    masks = ((rows - center_row) ** 2 + (columns - center_column) ** 2 < (size // 5) ** 2).float()[:, None]
    images = masks + 0.3 * torch.randn(count, 3, size, size)
    return (images - images.mean()) / images.std(), masks  # as after the usual Normalize: what input_stats say


torch.manual_seed(0)
loader = DataLoader(TensorDataset(*discs(16)), batch_size=2, shuffle=True)  # your images and masks
model = smp.Unet("resnet18", encoder_weights=None)  # "imagenet", for pretrained ones
model = kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3))
print(str(kn.describe(model, next(iter(loader))[0])).splitlines()[-1])
dice = smp.losses.DiceLoss("binary")
optimizer, epochs = torch.optim.Adam(model.parameters(), lr=1e-3), 6
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
for epoch in range(epochs):
    for images, masks in loader:
        loss = dice(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    schedule.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")

kn.recalibrate(model, loader, progress=False)  # running statistics of inputs as in eval(), where it may fail otherwise
plain = kn.to_batchnorm(model).eval()  # torch's own layers, to save and deploy
print(f"a batch's loss in eval(): {dice(plain(images), masks).item():.3f}")
