"""Why a file of weights does not load: it is of another kind, a download was cut, or it is of another model.

Not here: the readers of whole networks (`classifier.py`, `zero_shot.py`, `segmenters.py`).
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from options import first_line
from pipeline.errors import ModelError

LFS, ANNEX = b"version https://git-lfs", b"/annex/objects/"
ZIP, PICKLE, SAFETENSORS = b"PK\x03\x04", b"\x80", ".safetensors"
OTHERS = {
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"BZh": "a bzip2 archive: unpack it first",
    b"\xfd7zXZ": "an xz archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"\x89HDF": "an HDF5 file, as Keras writes: convert it to a state_dict of PyTorch",
    b"GGUF": "a GGUF file: give weights of PyTorch or safetensors",
    b"\x89PNG": "a picture: give weights of PyTorch or safetensors",
    b"%PDF": "a PDF: give weights of PyTorch or safetensors",
}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into a model, on the CPU; no code of the file runs.

    Raises:
        ModelError: the file does not load or does not fit. The text is the reason alone.
    """
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many types for a file that is cut or foreign
        raise ModelError(reason_of(error, path)) from error


def reason_of(error: BaseException, *paths: Path) -> str:
    """Say why weights did not load: by what the first odd file is, or else by the error."""
    for path in paths:
        if (fault := file_fault(path)) is not None:
            return f"{path.name} is {fault}"
        if isinstance(error, AttributeError | StopIteration | TypeError) and (content := _content(path)) is not None:
            return f"{path.name} holds {content}: it must hold a state_dict, the tensors of a network by their names"
    return plain_reason(error)


def _content(path: Path) -> str | None:
    """Name what a file of `torch.save` holds, if that is no state dict."""
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # of many types
        return None
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    if not content:
        return "nothing"
    others = [key for key, value in content.items() if not isinstance(value, torch.Tensor)]
    return f"'{others[0]}', which is no tensor" if others else None


def plain_reason(error: BaseException) -> str:
    """Return the reason in an error of PyTorch's in one line: never with the advice to load what could run code."""
    text, name = str(error), type(error).__name__
    if "in loading state_dict for" in text:
        return _misfit(text)
    if "TorchScript archive" in text and "constants.pkl" not in text:
        return "it is a TorchScript archive, whose code would run: save the state_dict() of the network alone"
    if "weights_only" in text or "Weights only load" in text:
        of_class = re.search(r"GLOBAL ([\w.]+)", text)
        if of_class is None:
            return "it is damaged, or no file of weights: fetch it again"
        return f"it holds a pickled {of_class[1]}, which could run code: save the state_dict() of the network alone"
    if isinstance(error, EOFError):
        return "its end is missing: fetch it again"
    if (
        "file in archive is not in a subdirectory" in text
        or "PytorchStreamReader failed locating file data.pkl" in text
    ):
        return "it is a zip archive and no file of torch.save: unpack it first"
    if "constants.pkl" in text:
        return "it is a file of torch.save and not a TorchScript archive"
    reason = first_line(error)[:300]
    return name if reason == name else f"{name}: {reason}"


def _misfit(text: str) -> str:
    """Summarise what `load_state_dict` lists: the first missing key, the first unexpected one, and the first shapes."""
    parts: list[str] = []
    first: dict[str, str] = {}
    for what, word in (("Missing", "lack"), ("Unexpected", "have")):
        listed = re.search(rf"{what} key\(s\) in state_dict: (.*)", text)
        if listed:
            keys = re.findall(r'"([^"]+)"', listed[1])
            first[what] = keys[0]
            besides = "" if what == "Missing" else " besides"
            parts.append(f"they {word} '{keys[0]}'{_and_others(len(keys) - 1)}{besides}")
    missing, unexpected = first.get("Missing"), first.get("Unexpected", "")
    if missing and unexpected != missing and unexpected.endswith(missing):
        prefix = unexpected.removesuffix(missing)
        parts.append(f"as all names begin with '{prefix}', which a wrapper such as torch.compile puts there: remove it")
    sizes = re.findall(r"size mismatch for (.+?): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)", text)
    if sizes:
        key, theirs, ours = sizes[0]
        parts.append(f"'{key}' has shape ({theirs}) and must have ({ours}){_and_others(len(sizes) - 1)}")
    return f"the weights are of another model: {', '.join(parts)}" if parts else first_line(text)[:300]


def _and_others(number: int) -> str:
    return f" and {number} other{'s' * (number > 1)}" if number > 0 else ""


def file_fault(path: Path) -> str | None:
    """Say, after "is", what a file is that cannot be weights as its name says; None for one that may be."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError as error:
        return f"not readable ({error.strerror}): give the path of a file"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        return "empty: fetch it again"
    if not start.strip(b"\0"):
        return "full of zeros, as a download that was cut: fetch it again"
    if start.startswith(LFS):
        return "a Git LFS pointer and not the weights themselves: fetch them by git lfs pull"
    if ANNEX in start[:300]:
        return "a git-annex pointer and not the weights themselves: fetch them by git annex get"
    if re.match(rb"<(!doctype|html|head|body|\?xml|!--)", text[:20].lower()):
        return "a web page and not weights: fetch the file behind the link, not the page that shows it"
    for magic, other in OTHERS.items():
        if start.startswith(magic):
            return other
    is_safetensors = len(start) > 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**27
    if is_safetensors and path.suffix != SAFETENSORS:
        return f"a safetensors file: rename it to {path.stem}{SAFETENSORS}, or convert it with torch.save"
    if is_safetensors:
        return _cut_safetensors(path, size)
    if start.startswith(ZIP) and not zipfile.is_zipfile(path):
        return "cut: its end is missing, as of a download that broke off; fetch it again"
    if start.startswith((ZIP, PICKLE)):
        return None if path.suffix != SAFETENSORS else f"a file of torch.save: rename it to {path.stem}.pt"
    if text.startswith((b"{", b"[")) or start.isascii():
        return f"text and not weights, and begins with {first_line(start[:60].decode('ascii', 'replace'))!r}"
    return "cut or damaged: fetch it again" if path.suffix == SAFETENSORS else None


def _cut_safetensors(path: Path, size: int) -> str | None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    try:
        tensors: dict[str, Any] = json.loads(header)
        end = max((value["data_offsets"][1] for key, value in tensors.items() if key != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError):
        return "cut or damaged in its header: fetch it again"
    missing = 8 + length + end - size
    return f"cut: {missing:,} bytes of it are missing; fetch it again" if missing > 0 else None
