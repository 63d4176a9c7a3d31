"""How an explanation is made: the relevance engine, teachers, and stage one, which writes heatmaps to a store."""

from pipeline.classifier import Classifier, ModelConfig, load_classifier
from pipeline.cluster import ClusterError
from pipeline.explainers import EXPLAINERS, Explainer, Forward, resize
from pipeline.export import export_model, plain, save_plain
from pipeline.homogeneous import BiasFreeReport, ScaleNorm, bias_free, homogeneity_error
from pipeline.models import ModelError, architectures, build_network
from pipeline.processes import LostProcess
from pipeline.relevance import Trace, explain
from pipeline.rules import RULE_SETS, RelevanceError, RuleSet, rule_for, stop_relevance
from pipeline.stage_one import CacheSummary, cache_explanations
from pipeline.synchronised import synchronise_batch_norm
from pipeline.teachers import load_teacher, parse_teacher
from pipeline.zero_shot import ZeroShot

__all__ = [
    "EXPLAINERS",
    "RULE_SETS",
    "BiasFreeReport",
    "CacheSummary",
    "Classifier",
    "ClusterError",
    "Explainer",
    "Forward",
    "LostProcess",
    "ModelConfig",
    "ModelError",
    "RelevanceError",
    "RuleSet",
    "ScaleNorm",
    "Trace",
    "ZeroShot",
    "architectures",
    "bias_free",
    "build_network",
    "cache_explanations",
    "explain",
    "export_model",
    "homogeneity_error",
    "load_classifier",
    "load_teacher",
    "parse_teacher",
    "plain",
    "resize",
    "rule_for",
    "save_plain",
    "stop_relevance",
    "synchronise_batch_norm",
]
