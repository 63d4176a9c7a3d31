"""Names in any script, in Matplotlib's pictures: by a font of this machine that has the characters, or as numbers."""

from __future__ import annotations

import logging
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SHAPING = (3, 11)  # the first Matplotlib that joins letters and writes from right to left
SHAPED = (("\u0900", "\u0dff"), ("\u1000", "\u109f"), ("\u1780", "\u17ff"))  # scripts of India, Burma and Cambodia
LAST_RESORT = "Last Resort"  # a font of boxes in place of characters


@contextmanager
def legible(texts: Iterable[str], out: str | Path) -> Iterator[Callable[[str], str]]:
    """Let Matplotlib draw names in any script.

    Characters that its font lacks come from other fonts of this machine. A word without a font becomes a number in
    brackets, and the log tells which. Matplotlib warns of no character.

    Args:
        texts: all names of a picture.
        out: the file of the picture, for the log.

    Yields:
        A function that replaces the words without a font in a text.
    """
    import matplotlib

    texts = list(texts)
    lacking = _characters(texts) - _covered(_own_font())
    families = _families(lacking)
    for characters in families.values():
        lacking = lacking - characters
    if matplotlib.__version_info__[:2] < SHAPING:
        lacking |= {character for character in _characters(texts) if _is_shaped(character)}
    numbers: dict[str, str] = {}
    word = re.compile(rf"[^\s,;:]*[{re.escape(''.join(sorted(lacking)))}][^\s,;:]*" if lacking else "(?!)")

    def drawable(text: str) -> str:
        return word.sub(lambda match: numbers.setdefault(match[0], f"[{len(numbers) + 1}]"), text)

    own = matplotlib.rcParams["font.family"]
    with matplotlib.rc_context({"font.family": [*own, *families]}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield drawable
    if numbers:
        legend = ", ".join(f"{number} is {name}" for name, number in numbers.items())
        log.warning(
            f"{out}: this machine has no font for some names, so that numbers stand in their place: {legend}. "
            "Install a font with their characters, such as one of Noto Sans, and draw it again"
        )


def _characters(texts: Iterable[str]) -> set[str]:
    """Return the characters that a font must have; controls, joiners and spaces are drawn by none."""
    return {each for text in texts for each in text if unicodedata.category(each)[0] not in "CZ"}


def _is_shaped(character: str) -> bool:
    """Tell whether a character is joined with others, or written from right to left."""
    joined = any(first <= character <= last for first, last in SHAPED)
    return joined or unicodedata.bidirectional(character) in ("R", "AL")


def _own_font() -> str:
    from matplotlib import font_manager

    return str(font_manager.findfont(font_manager.FontProperties()))


def _covered(path: str) -> set[str]:
    """Return the characters of a font; none of a file that cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return {chr(code) for code in FT2Font(path).get_charmap()}
    except (OSError, RuntimeError):
        return set()


def _families(lacking: set[str]) -> dict[str, set[str]]:
    """Choose as few fonts as possible for the characters: by the name of the family, those that it has."""
    from matplotlib import font_manager

    chosen: dict[str, set[str]] = {}
    if not lacking:
        return chosen
    fonts: dict[str, set[str]] = {}
    for entry in sorted(font_manager.fontManager.ttflist, key=_unlike_text):
        if entry.name not in fonts and not entry.name.startswith(LAST_RESORT) and not getattr(entry, "index", 0):
            fonts[entry.name] = _covered(entry.fname) & lacking
    while fonts and (best := max(fonts, key=lambda name: len(fonts[name] & lacking))) and fonts[best] & lacking:
        chosen[best] = fonts[best] & lacking
        lacking = lacking - chosen[best]
    return chosen


def _unlike_text(entry: Any) -> tuple[bool, bool, bool, str]:
    """Sort plain fonts without serifs first."""
    return "Sans" not in entry.name, entry.style != "normal", entry.weight not in (400, "normal"), entry.name
