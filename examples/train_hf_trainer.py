"""Distil a student with the Trainer of Hugging Face.

python examples/train_hf_trainer.py --data DATA.zarr --cache CACHE.zarr --steps 3000 --out student.pt
"""

import argparse
from typing import Any

import torch
from accuracy import print_accuracies
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from trainer import DistillationLoss, ExplainedDataset, build_student


class DistillationTrainer(Trainer):
    def __init__(self, *, cache: str, **options: Any):
        super().__init__(**options)
        self.distillation = DistillationLoss(cache)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        if self.state.global_step >= self.state.max_steps // 2:
            model.eval()  # Trainer puts it in training mode in each step
        value = self.distillation(model, inputs)
        return (value, {}) if return_outputs else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    student = build_student(options.cache, "small-cnn")
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=options.steps)
    trainer = DistillationTrainer(
        cache=options.cache,
        model=student,
        args=TrainingArguments(
            output_dir=f"{options.out}.trainer", max_steps=options.steps, seed=options.seed, max_grad_norm=1.0,
            per_device_train_batch_size=options.batch_size, dataloader_drop_last=True, remove_unused_columns=False,
            logging_steps=100, save_strategy="no", report_to="none",
        ),
        train_dataset=ExplainedDataset(options.data, options.cache, fields=["heatmaps"], seed=options.seed),
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer.train()
    torch.save(student.state_dict(), options.out)
    print_accuracies(student.cpu(), options.data)
