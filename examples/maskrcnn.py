"""Instance segmentation with torchvision's Mask R-CNN, at 1 image a batch, on pictures like Penn-Fudan's."""

import torch
from torchvision import tv_tensors
from torchvision.models.detection import maskrcnn_resnet50_fpn

import kalmannorm as kn


def picture(size=64):
    """Noise with a bright upright box; with real data, an item of your data set: an image and its target."""
    left, top = torch.randint(4, size // 2, (2,)).tolist()
    mask = torch.zeros(1, size, size, dtype=torch.uint8)
    mask[:, top : top + 24, left : left + 12] = 1
    box = tv_tensors.BoundingBoxes([[left, top, left + 12.0, top + 24.0]], format="XYXY", canvas_size=(size, size))
    target = {"boxes": box, "labels": torch.tensor([1]), "masks": tv_tensors.Mask(mask)}
    return tv_tensors.Image(0.4 * torch.rand(3, size, size) + 0.5 * mask), target


torch.manual_seed(0)
pictures = [picture() for _ in range(3)]
# weights_backbone="DEFAULT" brings FrozenBatchNorm2d layers; after convert, kn.freeze(model.backbone)
# keeps them as they were. The last four options make this quick; leave them out.
model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2, min_size=64, max_size=64,
                              rpn_post_nms_top_n_train=50, box_batch_size_per_image=16)  # fmt: skip
model = kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3))  # of the images as the model itself normalizes them
image, target = pictures[0]
print(str(kn.describe(model, [image], [target])).splitlines()[-1])

optimizer = torch.optim.Adam(model.parameters(), lr=5e-5)
for epoch in range(3):
    total = 0.0
    for image, target in pictures:
        loss = sum(model([image], [target]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    print(f"epoch {epoch}: loss {total / len(pictures):.3f}")
