"""Vision-language teachers: the image tower of an open_clip model, with a last layer made from prompts.

Not here: how the towers are explained (`rules/`), and which of their last layers a student copies (`heads.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from options import Message, Option, Word, did_you_mean, import_problem
from pipeline.errors import ModelError
from pipeline.log_level import log_level
from pipeline.networks.heads import l2_norm
from pipeline.networks.models import error_summary
from pipeline.networks.preprocessing import SHORTEST, Preprocess, PreprocessSpec
from pipeline.networks.sources import ImageShape
from pipeline.networks.weight_files import file_fault, reason_of

PREFIX = "clip:"
HUB = "hf-hub:"
CONFIG = "open_clip_config.json"  # in a folder that open_clip's push_to_hf_hub wrote
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")  # endings of files in such a folder
TEMPLATE = "a photo of a {}"
NEEDED = ("embed_dim", "vision_cfg", "text_cfg")  # keys of a model's configuration
MOST_TAGS = 12  # tags that an error lists

T = TypeVar("T")
Tokenizer = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class ZeroShot:
    """A vision-language teacher as the user names it. It can be pickled, and is hashable.

    Attributes:
        arch: the name of an open_clip model, such as ``RN50``; a file with a model's configuration (``.json``); a
            folder with ``open_clip_config.json`` and weights; or ``hf-hub:OWNER/NAME``.
        pretrained: a tag of open_clip's, whose weights are downloaded unless they are cached, or the path of a
            checkpoint; None for a folder and for ``hf-hub:``, which have their own weights.
        classes: the name of each class in prompts, in the dataset's order; None for the dataset's own names.
        templates: prompts with ``{}`` in place of the class; the prompts of a class are averaged.
    """

    arch: str
    pretrained: str | None = None
    classes: tuple[str, ...] | None = None
    templates: tuple[str, ...] = (TEMPLATE,)

    def prompts(self, class_names: Sequence[str]) -> dict[str, list[str]]:
        """Return the prompts of each class, by the dataset's name for it.

        Raises:
            ModelError: the names of ``classes`` do not fit the dataset's, or a template has no ``{}``.
        """
        names = self.classes if self.classes is not None else tuple(class_names)
        if len(names) != len(class_names):
            raise ModelError(
                Message(
                    Option("classes"),
                    f" has {len(names)} classes ({'; '.join(names)}), the dataset {len(class_names)} "
                    f"({'; '.join(class_names)}): give one name for each class of the dataset, in this order",
                )
            )
        if not self.templates:
            raise ModelError(
                Message("there is no prompt: give ", Option("prompt", TEMPLATE), ", or a file by ", Option("prompts"))
            )
        for template in self.templates:
            if template.count("{}") != 1:
                raise ModelError(
                    f"the prompt '{template}' must have one {{}} in place of the class, such as '{TEMPLATE}'"
                )
        for name in names:
            if not name.strip() or names.count(name) > 1:
                raise ModelError(
                    Message(
                        Option("classes"),
                        f" has '{name}', which is empty or there twice: give each class a name of its own",
                    )
                )
        prompts = [[template.replace("{}", name) for template in self.templates] for name in names]
        return dict(zip(class_names, prompts, strict=True))

    def __str__(self) -> str:
        return PREFIX + self.arch


class _Embedding(nn.Module):
    """The embedding alone of an image tower that returns tokens too, as CoCa's does."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.tower(images)[0]
        return embedding


def preprocessing(model: nn.Module) -> Preprocess:
    """Return the preprocessing of an open_clip model, with open_clip's defaults for missing settings."""
    from open_clip import get_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    return preprocess_of(merge_preprocess_dict(PreprocessCfg(), get_model_preprocess_cfg(model)))


def preprocess_of(config: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing of a configuration of open_clip's."""
    size = config["size"]
    spec = PreprocessSpec(
        mean=_of_channels(config["mean"]),
        std=_of_channels(config["std"]),
        size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        interpolation="bilinear" if config.get("interpolation") == "bilinear" else "bicubic",
        resize_mode=config.get("resize_mode") or SHORTEST,
    )
    return Preprocess(spec, config.get("fill_color", 0) / 255)


def _of_channels(values: Any) -> tuple[float, ...]:
    return tuple(torch.as_tensor(values, dtype=torch.float32).expand(3).tolist())


def zero_shot_network(model: nn.Module, tokenize: Tokenizer, prompts: Sequence[Sequence[str]]) -> nn.Sequential:
    """Make a frozen classifier of an open_clip model: images (N, 3, H, W) in [0, 1] → logits (N, K).

    The classifier is the model's preprocessing, its image tower, the division by the L2 norm, and a linear layer whose
    weights are the text embeddings of the classes less their mean, times the temperature. A logit is
    ``exp(logit_scale) · cos(image, text)`` less its mean over the classes. Decisions and softmax are those of the
    model; a heatmap shows the evidence for its class rather than for the others, and not what all texts share.

    Args:
        model: the open_clip model.
        tokenize: its tokenizer.
        prompts: the prompts of each class. The embedding of a class is the normalised mean of their normalised
            embeddings (Radford et al., ICML 2021, section 3.1.4).
    """
    any_model: Any = model.eval()
    tower = any_model.visual
    with torch.no_grad():
        texts = [any_model.encode_text(tokenize(list(of_class)), normalize=True).mean(0) for of_class in prompts]
        embeddings = F.normalize(torch.stack(texts).float(), dim=1)
        head = nn.Linear(embeddings.shape[1], len(embeddings), bias=False)
        head.weight.copy_(any_model.logit_scale.exp() * (embeddings - embeddings.mean(0)))
    parts = {
        "preprocess": preprocessing(model),
        "tower": _Embedding(tower) if getattr(tower, "output_tokens", False) else tower,
        "norm": l2_norm(embeddings.shape[1]),
        "head": head,
    }
    return nn.Sequential(OrderedDict(parts)).eval().requires_grad_(False)


def build_zero_shot(
    teacher: ZeroShot, class_names: Sequence[str], image_shape: ImageShape
) -> tuple[nn.Sequential, dict[str, str]]:
    """Build the network of a vision-language teacher, and try it once on a random image.

    Args:
        teacher: the teacher as the user names it.
        class_names: the dataset's classes.
        image_shape: (3, H, W) of the dataset's images.

    Returns:
        The network, and a record of its origin: ``pretrained``, ``prompts`` (JSON), the version of ``open_clip``, and
        ``sha256``, the teacher's identity: a hash of the image tower, its preprocessing, the temperature and the
        prompts. Text embeddings are not hashed, as machines round differently.

    Raises:
        ModelError: open_clip is missing or has no such model or weights, the weights cannot be fetched or loaded, the
            network does not take the images, or prompts do not fit, see `ZeroShot.prompts`.
    """
    prompts = teacher.prompts(class_names)
    if image_shape[0] != 3:
        raise ModelError(f"{teacher} takes images with 3 channels, the dataset's have {image_shape[0]}")
    try:
        import open_clip
    except ImportError as error:
        problem = import_problem(error, "open_clip")
        raise ModelError(
            f"{teacher} needs open_clip, which {problem}: pip install open_clip_torch, or "
            "pip install -e '.[clip]' in the checkout"
        ) from None
    model, tokenizer = _load(teacher)
    network: Any = zero_shot_network(model, tokenizer, list(prompts.values()))
    try:
        with torch.no_grad():
            network(torch.rand(1, *image_shape))
    except Exception as error:
        raise ModelError(
            f"{teacher} does not take images of shape {image_shape}: {error_summary(error)}; use another model"
        ) from error
    record = {"pretrained": teacher.pretrained or teacher.arch, "prompts": json.dumps(prompts, ensure_ascii=False)}
    identity = [
        "less their mean",
        "clipped without an activation",
        record["prompts"],
        cast(Any, model).logit_scale.item(),
    ]
    digest = hashlib.sha256(json.dumps(identity).encode())
    for part in (network.preprocess, network.tower):
        digest.update(repr([value for key, value in sorted(vars(part).items()) if key in _HASHED]).encode())
        for name, value in sorted((part.state_dict() or dict(part.named_buffers())).items()):
            digest.update(f"{name} {tuple(value.shape)};".encode() + value.contiguous().numpy().tobytes())
    return network, {**record, "open_clip": open_clip.__version__, "sha256": digest.hexdigest()}


_HASHED = ("size", "mode", "resize_mode", "fill")  # attributes of `Preprocess`, hashed besides its buffers


def _load(teacher: ZeroShot) -> tuple[nn.Module, Tokenizer]:
    """Load the open_clip model and its tokenizer, on the CPU in float32; no code of a checkpoint runs."""
    with warnings.catch_warnings(), log_level(None, logging.CRITICAL), tempfile.TemporaryDirectory() as folder:
        # open_clip logs "initialized randomly" before it loads weights
        warnings.simplefilter("ignore", UserWarning)  # about the activation, which we choose by the tag
        if teacher.arch.startswith(HUB) or Path(teacher.arch).is_dir():
            return _load_with_own_weights(teacher)
        name, tags = _model_and_tags(teacher, Path(folder))
        if teacher.pretrained is None:
            raise ModelError(
                Message(f"{teacher} needs ", Option("pretrained"), f": a checkpoint's file{_or_tags(tags)}")
            )
        if Path(teacher.pretrained).is_file():
            return _load_file(teacher, name, tags, Path(folder))
        return _load_tag(teacher, tags)


def _load_with_own_weights(teacher: ZeroShot) -> tuple[nn.Module, Tokenizer]:
    """Load a model of the Hugging Face hub, or of a folder as open_clip writes it."""
    import open_clip

    if teacher.pretrained is not None:
        raise ModelError(
            Message(f"{teacher} has its own weights: leave ", Option("pretrained", teacher.pretrained), " out")
        )
    path = Path(teacher.arch)
    if path.is_dir() and not (path / CONFIG).exists():
        raise ModelError(f"the folder {path} has no {CONFIG}: give a folder that open_clip's push_to_hf_hub wrote")
    name = teacher.arch if teacher.arch.startswith(HUB) else f"local-dir:{path}"
    with _errors_of_loading(teacher):
        return open_clip.create_model(name, require_pretrained=True), _tokenizer(name)


def _model_and_tags(teacher: ZeroShot, folder: Path) -> tuple[str, list[str]]:
    """Return open_clip's name of a model, and the tags of its published weights.

    A configuration (``.json``) is written to the folder first, where open_clip finds it, and has no published weights.
    """
    import open_clip

    path = Path(teacher.arch)
    if path.suffix == ".json":
        _write_config(path, folder / CONFIG)
        return f"local-dir:{folder}", []
    if teacher.arch not in open_clip.list_models():
        near = did_you_mean(str(teacher), [PREFIX + name for name in open_clip.list_models()])
        raise ModelError(
            f"open_clip has no model '{teacher.arch}': give a name of open_clip.list_models(), a configuration (.json) "
            f"or a folder with one and weights.{near}"
        )
    return teacher.arch, open_clip.list_pretrained_tags_by_model(teacher.arch)


def _load_file(teacher: ZeroShot, name: str, tags: Sequence[str], folder: Path) -> tuple[nn.Module, Tokenizer]:
    """Load a model with the weights of a checkpoint's file; ``folder`` is a temporary one."""
    import open_clip

    file = Path(str(teacher.pretrained))
    published = {config.get("url", "").rpartition("/")[2]: config for config in (_config(name, tag) for tag in tags)}
    config = published.get(file.name, {})  # a file with the name of published weights has their settings
    with _errors_of_loading(teacher):
        model = open_clip.create_model(
            name,
            load_weights=False,
            pretrained_text=False,
            force_quick_gelu=bool(config.get("quick_gelu")),
            force_preprocess_cfg=config,
        )
        open_clip.load_checkpoint(model, str(_plain_checkpoint(file, folder)))
        return model, _tokenizer(name)


def _load_tag(teacher: ZeroShot, tags: Sequence[str]) -> tuple[nn.Module, Tokenizer]:
    """Load a model with published weights, which open_clip downloads unless they are cached."""
    import open_clip

    tag = str(teacher.pretrained)
    config = _config(teacher.arch, tag)
    if not config:
        raise ModelError(
            Message(
                Option("pretrained", tag),
                f" is no file, and no weights of {teacher}: give a checkpoint's file{_or_tags(tags)}",
            )
        )
    source = config.get("url") or f"{config.get('hf_hub', '')} of the Hugging Face hub"
    with _errors_of_loading(teacher, source):
        quick_gelu = bool(config.get("quick_gelu"))
        model = open_clip.create_model(teacher.arch, tag, force_quick_gelu=quick_gelu, require_pretrained=True)
        return model, _tokenizer(teacher.arch)


def _plain_checkpoint(file: Path, folder: Path) -> Path:
    """Return the file, or for a TorchScript archive, as OpenAI publishes, a new file with the weights that it holds."""
    if not zipfile.is_zipfile(file):
        return file
    with zipfile.ZipFile(file) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, which the reader of a file cannot change
        weights = torch.jit.load(file, map_location="cpu").state_dict()
    target = folder / "weights.pt"
    torch.save({name: value for name, value in weights.items() if name not in _NO_WEIGHTS}, target)
    return target


_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # values beside the weights in OpenAI's archives


def _config(arch: str, tag: str) -> dict[str, Any]:
    """Return open_clip's record of published weights, such as their address; empty for others."""
    import open_clip

    return open_clip.get_pretrained_cfg(arch, tag)


def _tokenizer(name: str) -> Tokenizer:
    import open_clip

    return open_clip.get_tokenizer(name)


def _write_config(source: Path, target: Path) -> None:
    """Write a model's configuration, bare or with its preprocessing, as a folder of open_clip's has it."""
    try:
        content = json.loads(source.read_text())
    except OSError as error:
        raise ModelError(f"the configuration {source} cannot be read ({error.strerror}): give its path") from None
    except ValueError as error:
        raise ModelError(f"the configuration {source} is not JSON ({error}): give another file") from None
    whole = content if isinstance(content, dict) and "model_cfg" in content else {"model_cfg": content}
    model = whole["model_cfg"]
    if not isinstance(model, dict) or any(key not in model for key in NEEDED):
        raise ModelError(f"the configuration {source} is not one of open_clip's: it must have {', '.join(NEEDED)}")
    target.write_text(json.dumps(whole))


@contextmanager
def _errors_of_loading(teacher: ZeroShot, source: str | None = None) -> Iterator[None]:
    """Turn all errors of open_clip, which are of many types, into a ModelError; ``source`` is a download's address."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if source is None:
            files = _weight_files(teacher)
            with_weights = () if teacher.pretrained is None else (" with ", Option("pretrained", teacher.pretrained))
            remedy = "" if any(map(file_fault, files)) else "; give weights of this model"
            reason = reason_of(error, *files)
            raise ModelError(Message(f"{teacher} does not load", *with_weights, f": {reason}{remedy}")) from error
        raise ModelError(
            Message(
                f"the weights '{teacher.pretrained}' of {teacher} are not here and cannot be fetched "
                f"({error_summary(error)}): fetch {source} on a machine with a network, and give the file by ",
                Option("pretrained", Word("FILE")),
            )
        ) from error


def _weight_files(teacher: ZeroShot) -> list[Path]:
    """Return the user's own files with the weights of a teacher, as far as there are any."""
    if teacher.pretrained is not None:
        return [Path(teacher.pretrained)]
    folder = Path(teacher.arch)
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS) if folder.is_dir() else []


def _or_tags(tags: Sequence[str]) -> str:
    return f", or one of open_clip's tags, which are downloaded: {', '.join(tags[:MOST_TAGS])}" if tags else ""
