"""Any LightningModule at 2 images a batch: the callback converts its network and looks after its statistics."""

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import kalmannorm as kn
from kalmannorm.integrations.lightning import KalmanNormCallback


class Classifier(lightning.LightningModule):  # yours: nothing in it knows of Kalman layers
    def __init__(self):
        super().__init__()
        self.net = resnet18(num_classes=2)

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def on_train_epoch_end(self):
        print(f"epoch {self.current_epoch}: loss {self.trainer.callback_metrics['loss']:.3f}")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


torch.manual_seed(0)
labels = torch.arange(24) % 2
images = 0.5 * torch.randn(24, 3, 32, 32) + labels[:, None, None, None] * torch.linspace(-1, 1, 32)
images = (images - images.mean()) / images.std()  # as after the usual Normalize: what input_stats say
loader = DataLoader(TensorDataset(images, labels), batch_size=2, shuffle=True)  # your images and labels
callback = KalmanNormCallback(input_stats=([0.0] * 3, [1.0] * 3), recalibrate=12)  # in the end, by 12 training batches
trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, callbacks=[callback])  # fmt: skip
trainer.fit(model := Classifier(), loader)
print(str(kn.describe(model.net, images[:2])).splitlines()[-1])
