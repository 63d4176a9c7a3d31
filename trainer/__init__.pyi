from .distill import train_student
from .errors import TrainingError
from .loop.losses import heatmap_loss
from .results.evaluation import evaluate
from .results.pictures import heatmap_picture
from .results.report import write_report
from .results.show import show_explanations
from .supervised import train_teacher

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
