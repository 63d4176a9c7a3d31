"""Vision-language teachers: the image tower of an open_clip model, told the classes by prompts.

Not here: how the towers are explained (`rules/`), and what a student copies of their end (`heads.py`).
"""

from __future__ import annotations

import difflib
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
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.networks.heads import l2_norm
from pipeline.networks.models import ImageShape

PREFIX = "clip:"
CONFIG = "open_clip_config.json"  # of a folder of open_clip's own
TEMPLATE = "a photo of a {}"
NEEDED = ("embed_dim", "vision_cfg", "text_cfg")  # of a model's configuration
TOLD = 12  # names, at most
TINY = 1e-6  # that a product which should be whole may fall short of it

T = TypeVar("T")


@dataclass(frozen=True)
class ZeroShot:
    """A vision-language teacher, as the user names it; it can be pickled, and is a key.

    arch: a model of open_clip's by name, as ``RN50``; a file with the configuration of one (``.json``); a folder with
    ``open_clip_config.json`` and weights; or ``hf-hub:OWNER/NAME``. pretrained: a tag of open_clip's, whose weights are
    fetched unless they are there, or a checkpoint's path; None for the last two of these, which have their own.
    classes: what each class of the dataset is called in prompts, in the dataset's order; None is its own names.
    templates: prompts with ``{}`` where the class goes; a class is the mean of its prompts.
    """

    arch: str
    pretrained: str | None = None
    classes: tuple[str, ...] | None = None
    templates: tuple[str, ...] = (TEMPLATE,)

    def prompts(self, class_names: Sequence[str]) -> dict[str, list[str]]:
        """The prompts of each class, by the dataset's name for it. Raises ModelError where they do not fit."""
        names = self.classes if self.classes is not None else tuple(class_names)
        if len(names) != len(class_names):
            raise ModelError(
                f"--classes has {len(names)} classes ({'; '.join(names)}), the dataset {len(class_names)} "
                f"({'; '.join(class_names)}): give one for each, in this order, separated by semicolons"
            )
        if not self.templates:
            raise ModelError("there is no prompt: give --prompt, or a --prompts file with one on each line")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ModelError(f"the prompt '{template}' must have one {{}} where the class goes, as in '{TEMPLATE}'")
        made = [[template.replace("{}", name) for template in self.templates] for name in names]
        for name in names:
            if not name.strip() or names.count(name) > 1:
                raise ModelError(
                    f"--classes has '{name}', which is empty or there twice: no prompt would tell it apart"
                )
        return dict(zip(class_names, made, strict=True))

    def __str__(self) -> str:
        return PREFIX + self.arch


class Preprocess(nn.Module):
    """What an open_clip model's images go through, as a module: (N, 3, H, W) in [0, 1] to (N, 3, *size).

    Resized with antialiasing, cropped or padded, clamped, and normalised; within rounding of Pillow's 8 bits the same
    as open_clip's own transforms, but differentiable, so that relevance reaches the pixels that a student sees.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        size = config["size"]
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.mode = "bilinear" if config.get("interpolation") == "bilinear" else "bicubic"
        self.resize_mode = config.get("resize_mode") or "shortest"
        self.fill = config.get("fill_color", 0) / 255
        for name in ("mean", "std"):
            values = torch.as_tensor(config[name], dtype=torch.float32).expand(3)
            self.register_buffer(name, values.view(1, 3, 1, 1).clone())

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        ratios = [wanted / found for wanted, found in zip(self.size, (height, width), strict=True)]
        if self.resize_mode == "squash":
            resized = self.size
        else:
            # the longer side is cut to whole pixels in torchvision's Resize, and rounded in open_clip's own
            ratio, whole = (max(ratios), int) if self.resize_mode == "shortest" else (min(ratios), round)
            resized = (whole(height * ratio + TINY), whole(width * ratio + TINY))
        # one axis after the other, first the one that shrinks more, and clipped after each, as Pillow does
        across_first = resized[1] * height <= resized[0] * width
        for size in ((height, resized[1]) if across_first else (resized[0], width), resized):
            if tuple(images.shape[2:]) != size:
                images = F.interpolate(images, size, mode=self.mode, align_corners=False, antialias=True).clamp(0, 1)
        for axis, (found, wanted) in enumerate(zip(resized, self.size, strict=True), start=2):
            if found > wanted:
                images = images.narrow(axis, round((found - wanted) / 2), wanted)
            elif found < wanted:
                before = (wanted - found) // 2
                pads = (before, wanted - found - before)
                images = F.pad(images, pads if axis == 3 else (0, 0, *pads), value=self.fill)
        return (images - self.mean) / self.std


class _Embedding(nn.Module):
    """An image tower that returns the image's embedding and its tokens, as CoCa's: the embedding alone."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.tower(images)[0]
        return embedding


def preprocessing(model: nn.Module) -> Preprocess:
    """That of an open_clip model: its own, and open_clip's defaults for what it says nothing of."""
    from open_clip import get_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    return Preprocess(merge_preprocess_dict(PreprocessCfg(), get_model_preprocess_cfg(model)))


def zero_shot_network(
    model: nn.Module, tokenize: Callable[[list[str]], Tensor], prompts: Sequence[Sequence[str]]
) -> nn.Sequential:
    """An open_clip model as a classifier, frozen, without its text tower: images (N, 3, H, W) in [0, 1] → (N, K).

    Its preprocessing, its image tower, the division by the L2 norm, and a linear layer whose weights are the classes'
    text embeddings, less their mean, times the temperature: logits are ``exp(logit_scale) · cos(image, text)`` less
    their mean over the classes. Decisions and softmax are the same; a heatmap tells what speaks for its class rather
    than for the others, and not what all texts have in common. ``prompts`` are those of each class: its embedding is
    the normalised mean of theirs, normalised each (Radford et al., ICML 2021, section 3.1.4).
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
    """The network of a vision-language teacher, tried once on images (3, H, W), and a record of its origin.

    The record has ``pretrained``, ``prompts`` (JSON), the version of ``open_clip``, and ``sha256``, over the image
    tower, its preprocessing, the temperature and the prompts: the teacher's identity. Text embeddings are not part of
    it, as machines round differently.

    Raises ModelError where open_clip is missing, has no such model or weights, they cannot be fetched or loaded, or
    do not take these images; and as `ZeroShot.prompts`.
    """
    prompts = teacher.prompts(class_names)
    if image_shape[0] != 3:
        raise ModelError(f"{teacher} takes images with 3 channels, the dataset's have {image_shape[0]}")
    try:
        import open_clip
    except ImportError:
        raise ModelError(
            f"{teacher} needs open_clip, which is not installed: pip install open_clip_torch, or "
            "pip install -e '.[clip]' in the checkout"
        ) from None
    model, tokenizer = _load(teacher)
    network: Any = zero_shot_network(model, tokenizer, list(prompts.values()))
    try:
        with torch.no_grad():
            network(torch.rand(1, *image_shape))
    except Exception as error:
        raise ModelError(f"{teacher} does not take images of shape {image_shape}: {_first_line(error)}") from error
    record = {"pretrained": teacher.pretrained or teacher.arch, "prompts": json.dumps(prompts, ensure_ascii=False)}
    decides = ["less their mean", record["prompts"], cast(Any, model).logit_scale.item()]
    digest = hashlib.sha256(json.dumps(decides).encode())
    for part in (network.preprocess, network.tower):
        digest.update(repr([value for key, value in sorted(vars(part).items()) if key in _DECIDING]).encode())
        for name, value in sorted(part.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)};".encode() + value.contiguous().numpy().tobytes())
    return network, {**record, "open_clip": open_clip.__version__, "sha256": digest.hexdigest()}


_DECIDING = ("size", "mode", "resize_mode", "fill")  # of `Preprocess`, besides what it has as buffers


def _load(teacher: ZeroShot) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    """The open_clip model and its tokenizer, on the CPU in float32; no code of a checkpoint is run."""
    import open_clip

    arch, path = teacher.arch, Path(teacher.arch)
    with warnings.catch_warnings(), _quiet(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", UserWarning)  # of the activation, which is the tag's own below
        if arch.startswith("hf-hub:") or path.is_dir():
            if teacher.pretrained is not None:
                raise ModelError(f"{teacher} has its own weights: leave --pretrained {teacher.pretrained} out")
            name = arch if arch.startswith("hf-hub:") else f"local-dir:{path}"
            if path.is_dir() and not (path / CONFIG).exists():
                raise ModelError(
                    f"the folder {path} has no {CONFIG}: give a folder as open_clip's push_to_hf_hub writes"
                )
            return _said(teacher, lambda: (open_clip.create_model(name, require_pretrained=True), _tokenizer(name)))
        if path.suffix == ".json":
            _write_config(path, Path(folder) / CONFIG)
            name = f"local-dir:{folder}"
        elif arch in open_clip.list_models():
            name = arch
        else:
            near = difflib.get_close_matches(arch, open_clip.list_models(), n=3, cutoff=0.5)
            raise ModelError(
                f"open_clip has no model '{arch}'"
                + (f": did you mean {' or '.join(PREFIX + name for name in near)}?" if near else "")
                + " Give a name of open_clip.list_models(), a configuration (.json), or a folder with one and weights"
            )
        tags = [] if path.suffix == ".json" else open_clip.list_pretrained_tags_by_model(arch)
        if teacher.pretrained is None:
            raise ModelError(f"{teacher} needs --pretrained: a checkpoint's file{_or_tags(tags)}")
        if (file := Path(teacher.pretrained)).is_file():
            published = {cfg.get("url", "").rpartition("/")[2]: cfg for cfg in map(partial(_config, arch), tags)}
            config = published.get(file.name, {})  # a file by the name that it is published under is just that
            model = _said(
                teacher,
                lambda: open_clip.create_model(
                    name,
                    load_weights=False,
                    pretrained_text=False,
                    force_quick_gelu=bool(config.get("quick_gelu")),
                    force_preprocess_cfg=config,
                ),
            )
            _said(teacher, lambda: open_clip.load_checkpoint(model, str(_plain_checkpoint(file, Path(folder)))))
            return model, _said(teacher, lambda: _tokenizer(name))
        config = _config(arch, teacher.pretrained)
        if not config:
            raise ModelError(
                f"--pretrained {teacher.pretrained} is no file, and no weights of {teacher}: give a checkpoint's "
                f"file{_or_tags(tags)}"
            )
        return _said(
            teacher,
            lambda: (
                open_clip.create_model(
                    arch, teacher.pretrained, force_quick_gelu=bool(config.get("quick_gelu")), require_pretrained=True
                ),
                _tokenizer(arch),
            ),
            where=config.get("url") or f"{config.get('hf_hub', '')} of the Hugging Face hub",
        )


def _plain_checkpoint(file: Path, folder: Path) -> Path:
    """The file, or where it is a TorchScript archive, as OpenAI's are, another one with the weights that it holds."""
    if not zipfile.is_zipfile(file):
        return file
    with zipfile.ZipFile(file) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated is for who writes such files
        weights = torch.jit.load(file, map_location="cpu").state_dict()
    target = folder / "weights.pt"
    torch.save({name: value for name, value in weights.items() if name not in _NO_WEIGHTS}, target)
    return target


_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # that OpenAI's archives have beside them


@contextmanager
def _quiet() -> Iterator[None]:
    """What open_clip logs is for who trains such models: "initialized randomly", say, before weights are loaded."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(level)


def _config(arch: str, tag: str) -> dict[str, Any]:
    """What open_clip knows of weights that it can fetch, as where they are; empty for others."""
    import open_clip

    return open_clip.get_pretrained_cfg(arch, tag)


def _tokenizer(name: str) -> Callable[[list[str]], Tensor]:
    import open_clip

    return open_clip.get_tokenizer(name)


def _write_config(source: Path, target: Path) -> None:
    """A model's configuration as open_clip has them, bare or with preprocessing beside it, where it looks for one."""
    try:
        found = json.loads(source.read_text())
    except OSError as error:
        raise ModelError(f"the configuration {source} cannot be read ({error.strerror}): give its path") from None
    except ValueError as error:
        raise ModelError(f"the configuration {source} is not JSON ({error})") from None
    whole = found if isinstance(found, dict) and "model_cfg" in found else {"model_cfg": found}
    model = whole["model_cfg"]
    if not isinstance(model, dict) or any(key not in model for key in NEEDED):
        raise ModelError(f"the configuration {source} is none of open_clip's: it must have {', '.join(NEEDED)}")
    target.write_text(json.dumps(whole))


def _said(teacher: ZeroShot, load: Callable[[], T], where: str | None = None) -> T:
    """What ``load`` returns; whatever it raises, of any of open_clip's many kinds, becomes a ModelError."""
    try:
        return load()
    except ModelError:
        raise
    except Exception as error:
        reason = _first_line(error)
        if where is None:
            raise ModelError(f"{teacher} does not load with --pretrained {teacher.pretrained}: {reason}") from error
        raise ModelError(
            f"the weights '{teacher.pretrained}' of {teacher} are not here and cannot be fetched ({reason}): fetch "
            f"{where} where there is a network, and give the file by --pretrained FILE"
        ) from error


def _or_tags(tags: Sequence[str]) -> str:
    return f", or one of open_clip's tags, which are fetched: {', '.join(tags[:TOLD])}" if tags else ""


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
