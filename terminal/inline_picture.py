"""A PNG in the terminal itself: which terminals can show one, and the escape sequences that do.

What a terminal can is told by its environment: a question to it might never be answered. Not here: any drawing. Two
protocols are less than a library: term-image holds Pillow below 11, textual-image (LGPL) asks the terminal.
"""

from __future__ import annotations

import struct
import sys
from base64 import b64encode
from collections.abc import Callable, Mapping

import click

Inline = Callable[[bytes, int | None], str]  # a PNG, and the columns that it has to fit (None: its own size)

CHUNK = 4096  # characters of base64 in one sequence of kitty's, at most
CELL = 8  # pixels, of the width of a character whose terminal does not tell it
CAN = "kitty, Ghostty, WezTerm, iTerm2, Konsole 22.04, mintty or the terminal of VS Code"


def kitty(png: bytes, columns: int | None) -> str:
    """The sequences of kitty's graphics protocol that show a PNG; the terminal is asked to answer nothing (q=2).

    https://sw.kovidgoyal.net/kitty/graphics-protocol
    """
    data = b64encode(png).decode()
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    keys = ["a=T,f=100,q=2," + (f"c={columns}," if columns else ""), *[""] * (len(chunks) - 1)]
    more = [1] * (len(chunks) - 1) + [0]
    return "".join(f"\x1b_G{key}m={m};{chunk}\x1b\\" for key, m, chunk in zip(keys, more, chunks, strict=True))


def iterm2(png: bytes, columns: int | None) -> str:
    """The sequence of iTerm2's inline images that shows a PNG. https://iterm2.com/documentation-images.html"""
    about = f"inline=1;size={len(png)};width={columns or 'auto'};preserveAspectRatio=1"
    return f"\x1b]1337;File={about}:{b64encode(png).decode()}\x07"


PROGRAMS = {  # by the TERM_PROGRAM that they set
    "ghostty": kitty,
    "iTerm.app": iterm2,
    "WezTerm": iterm2,
    "mintty": iterm2,
    "vscode": iterm2,
}


def protocol_of(environ: Mapping[str, str]) -> Inline | None:
    """How a terminal with these variables shows a picture; None where it cannot, or nothing says that it can.

    What a terminal sets in TERM comes first, then TERM_PROGRAM: the other variables are also in the environment of a
    terminal that was started from one that has them. Multiplexers keep the sequences from the terminal around them.
    """
    term = environ.get("TERM", "")
    if not term.startswith(("xterm", "wezterm")) or {"TMUX", "STY", "ZELLIJ"} & environ.keys():
        return None
    if term in ("xterm-kitty", "xterm-ghostty"):
        return kitty
    if program := environ.get("TERM_PROGRAM"):
        return PROGRAMS.get(program)
    konsole = environ.get("KONSOLE_VERSION", "")
    if {"KITTY_WINDOW_ID", "GHOSTTY_RESOURCES_DIR"} & environ.keys() or (konsole.isdigit() and int(konsole) >= 220400):
        return kitty
    if "WEZTERM_EXECUTABLE" in environ or environ.get("LC_TERMINAL") == "iTerm2":
        return iterm2
    return None


def choose(display: bool | None, environ: Mapping[str, str]) -> Inline | None:
    """How to show a picture on the standard output, None for not: as asked for, or unless asked where that can be.

    Raises click.UsageError where it was asked for and cannot be.
    """
    if display is False:
        return None
    terminal = sys.stdout.isatty()
    protocol = protocol_of(environ) if terminal else None
    if display and protocol is None:
        where = f"the terminal here ({_name(environ)}) is not known to show any" if terminal else "this is no terminal"
        raise click.UsageError(
            f"--display shows the picture on the standard output, and {where}: leave it out and open the PNG, or run "
            f"the command in {CAN}, outside tmux and screen."
        )
    return protocol


def show(png: bytes, protocol: Inline) -> None:
    """Print a PNG on the terminal of the standard output, no wider than that, and begin a new line after it."""
    import fcntl  # of POSIX alone
    import termios

    size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
    _, columns, width, _ = struct.unpack("4H", size)  # in characters, and in pixels: 0 where it does not tell
    (across,) = struct.unpack(">I", png[16:20])  # of the header, IHDR
    click.echo(protocol(png, columns if columns and across > (width or columns * CELL) else None))


def _name(environ: Mapping[str, str]) -> str:
    multiplexers = {"TMUX": "tmux", "STY": "screen", "ZELLIJ": "zellij"}
    inside = [name for key, name in multiplexers.items() if key in environ]
    program, term = (environ.get(key) for key in ("TERM_PROGRAM", "TERM"))
    return inside[0] if inside else program or f"TERM={term or ''}"
