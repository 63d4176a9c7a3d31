from .distill import train_student
from .errors import TrainingError
from .loop.losses import heatmap_loss
from .loop.phases import raise_momentum
from .own_loop import DistillationLoss, build_student
from .results.evaluation import evaluate
from .results.pictures import heatmap_picture
from .results.prediction import Prediction, predict, write_predictions
from .results.report import write_report
from .results.show import show_explanations
from .stream.explained import ExplainedDataset, ExplainedStream
from .supervised import train_teacher

__all__ = [
    "DistillationLoss",
    "ExplainedDataset",
    "ExplainedStream",
    "Prediction",
    "TrainingError",
    "build_student",
    "evaluate",
    "heatmap_loss",
    "heatmap_picture",
    "predict",
    "raise_momentum",
    "show_explanations",
    "train_student",
    "train_teacher",
    "write_predictions",
    "write_report",
]
