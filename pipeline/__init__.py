"""How an explanation is made: the relevance engine, teachers, and stage one, which writes heatmaps to a store."""

from pipeline.caching.cluster import ClusterError
from pipeline.caching.stage_one import CacheSummary, cache_explanations
from pipeline.explainers import EXPLAINERS, Explainer, Forward, resize
from pipeline.networks.classifier import Classifier, ModelConfig, load_classifier
from pipeline.networks.export import export_model, plain, save_plain
from pipeline.networks.homogeneous import BiasFreeReport, ScaleNorm, bias_free, homogeneity_error
from pipeline.networks.models import ModelError, architectures, build_network
from pipeline.networks.processes import LostProcess
from pipeline.networks.synchronised import synchronise_batch_norm
from pipeline.networks.teachers import load_teacher, parse_teacher
from pipeline.networks.zero_shot import ZeroShot
from pipeline.relevance import Trace, explain
from pipeline.rules import RULE_SETS, RelevanceError, RuleSet, rule_for, stop_relevance

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
