from .caching.stage_one import CacheSummary, cache_explanations
from .errors import ClusterError, ModelError, RelevanceError
from .explainers import EXPLAINERS, Explainer
from .forward import Forward, resize
from .networks.classifier import Classifier, ModelConfig, load_classifier
from .networks.export import export_model, plain, save_plain
from .networks.fronts import Front, build_front
from .networks.homogeneous import BiasFreeReport, ScaleNorm, bias_free, homogeneity_error
from .networks.models import architectures, build_network
from .networks.own_teachers import OwnTeacher
from .networks.preprocessing import PreprocessSpec
from .networks.processes import LostProcess
from .networks.synchronised import synchronise_batch_norm
from .networks.teachers import load_teacher, parse_teacher
from .networks.zero_shot import ZeroShot
from .relevance import Trace, explain
from .rules import RULE_SETS, RuleSet, rule_for, stop_relevance

__all__ = [
    "EXPLAINERS",
    "RULE_SETS",
    "BiasFreeReport",
    "CacheSummary",
    "Classifier",
    "ClusterError",
    "Explainer",
    "Forward",
    "Front",
    "LostProcess",
    "ModelConfig",
    "ModelError",
    "OwnTeacher",
    "PreprocessSpec",
    "RelevanceError",
    "RuleSet",
    "ScaleNorm",
    "Trace",
    "ZeroShot",
    "architectures",
    "bias_free",
    "build_front",
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
