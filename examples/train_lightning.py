"""Distil a student with Lightning.

python examples/train_lightning.py --data DATA.zarr --cache CACHE.zarr --steps 3000 --out student.pt
"""

import argparse

import lightning
import torch
from accuracy import print_accuracies
from torch.utils.data import DataLoader

from trainer import DistillationLoss, ExplainedDataset, build_student


class Distillation(lightning.LightningModule):
    def __init__(self, cache: str, steps: int):
        super().__init__()
        self.student, self.loss, self.steps = build_student(cache, "small-cnn"), DistillationLoss(cache), steps

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        if self.global_step >= self.steps // 2:
            self.student.eval()
        value = self.loss(self.student, batch)
        self.log("loss", value)
        return value

    def on_train_epoch_start(self) -> None:
        self.trainer.train_dataloader.dataset.set_epoch(self.current_epoch)

    def configure_optimizers(self) -> dict:
        learnt = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(learnt, lr=4e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    lightning.seed_everything(options.seed)
    dataset = ExplainedDataset(options.data, options.cache, fields=["heatmaps"], seed=options.seed)
    loader = DataLoader(dataset, options.batch_size, shuffle=True, drop_last=True)
    module = Distillation(options.cache, options.steps)
    trainer = lightning.Trainer(
        max_steps=options.steps, gradient_clip_val=1.0, accelerator="auto", logger=False, enable_checkpointing=False
    )
    trainer.fit(module, loader)
    torch.save(module.student.state_dict(), options.out)
    print_accuracies(module.student.cpu(), options.data)
