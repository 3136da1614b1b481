"""Segmentation of volumes with MONAI's 3-d U-Net, at 1 volume a batch."""

import torch
from monai.data import CacheDataset, DataLoader, create_test_image_3d
from monai.losses import DiceLoss
from monai.networks.nets import UNet
from monai.transforms import Compose, EnsureChannelFirstd, NormalizeIntensityd, RandFlipd
from numpy.random import RandomState

import kalmannorm as kn


def volume(seed):
    """A noisy volume of spheres, and the mask of them."""
    image, label = create_test_image_3d(24, 24, 24, 4, 6, 3, 0.5, num_seg_classes=1, random_state=RandomState(seed))
    return {"image": image.astype("float32"), "label": label}


torch.manual_seed(0)
transform = Compose([  # for files: LoadImaged(["image", "label"]) first, and paths in place of volume(seed)
    EnsureChannelFirstd(["image", "label"], channel_dim="no_channel"),
    NormalizeIntensityd("image"),
    RandFlipd(["image", "label"], prob=0.5, spatial_axis=0),
])  # fmt: skip
loader = DataLoader(CacheDataset([volume(seed) for seed in range(6)], transform, progress=False), 1, shuffle=True)
model = UNet(3, 1, 1, channels=(8, 16, 32), strides=(2, 2), num_res_units=2, norm="BATCH")
model = kn.convert(model, input_stats=([0.0], [1.0]))
print(str(kn.describe(model, next(iter(loader))["image"])).splitlines()[-1])

dice, optimizer = DiceLoss(sigmoid=True), torch.optim.Adam(model.parameters(), lr=3e-3)
for epoch in range(3):
    total = 0.0
    for batch in loader:
        optimizer.zero_grad()
        loss = dice(model(batch["image"]), batch["label"])
        loss.backward()
        optimizer.step()
        total += loss.item()
    print(f"epoch {epoch}: loss {total / len(loader):.3f}")
