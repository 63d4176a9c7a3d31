"""How a classifier learns: teachers by labels, students from a store; their evaluation, and the paper's table."""

from trainer.distill import train_student
from trainer.errors import TrainingError
from trainer.loop.losses import heatmap_loss
from trainer.results.evaluation import evaluate
from trainer.results.pictures import heatmap_picture
from trainer.results.report import write_report
from trainer.results.show import show_explanations
from trainer.supervised import train_teacher

__all__ = [
    "TrainingError",
    "evaluate",
    "heatmap_loss",
    "heatmap_picture",
    "show_explanations",
    "train_student",
    "train_teacher",
    "write_report",
]
