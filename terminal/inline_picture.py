"""Show a PNG in the terminal itself: find out whether the terminal can, and write the escape sequences.

The environment variables tell which terminal it is, because a terminal might never answer a question. Not here: any
drawing. A library would cost more than two protocols: term-image holds Pillow below 11, and textual-image (LGPL) asks
the terminal.
"""

from __future__ import annotations

import struct
import sys
from base64 import b64encode
from collections.abc import Callable, Mapping

import click

Inline = Callable[
    [bytes, int | None], str
]  # (PNG, columns that it must fit, or None for its own size) → escape sequences

CHUNK = 4096  # maximum number of base64 characters in one of kitty's sequences
CELL = 8  # width of a character in pixels, if the terminal does not report it
TERMINALS = "kitty, Ghostty, WezTerm, iTerm2, Konsole 22.04, mintty or the terminal of VS Code"


def kitty(png: bytes, columns: int | None) -> str:
    """Return the sequences of kitty's graphics protocol that show a PNG. They ask the terminal not to answer (q=2).

    https://sw.kovidgoyal.net/kitty/graphics-protocol
    """
    data = b64encode(png).decode()
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    keys = ["a=T,f=100,q=2," + (f"c={columns}," if columns else ""), *[""] * (len(chunks) - 1)]
    more = [1] * (len(chunks) - 1) + [0]
    return "".join(f"\x1b_G{key}m={m};{chunk}\x1b\\" for key, m, chunk in zip(keys, more, chunks, strict=True))


def iterm2(png: bytes, columns: int | None) -> str:
    """Return the sequence of iTerm2's inline images that shows a PNG.

    https://iterm2.com/documentation-images.html
    """
    about = f"inline=1;size={len(png)};width={columns or 'auto'};preserveAspectRatio=1"
    return f"\x1b]1337;File={about}:{b64encode(png).decode()}\x07"


PROGRAMS = {  # by the value of TERM_PROGRAM
    "ghostty": kitty,
    "iTerm.app": iterm2,
    "WezTerm": iterm2,
    "mintty": iterm2,
    "vscode": iterm2,
}


def protocol_of(environ: Mapping[str, str]) -> Inline | None:
    """Return how a terminal with these variables shows a picture; None if it is not known to show any.

    TERM decides first, then TERM_PROGRAM, then the other variables, because a terminal inherits them from the terminal
    that started it. Multiplexers do not pass the sequences on to the terminal around them.
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
    """Decide how to show a picture on the standard output.

    Args:
        display: show it or not; None shows it if the terminal can.
        environ: the environment variables.

    Returns:
        The protocol of the terminal; None to show nothing.

    Raises:
        click.UsageError: ``display`` is true, and the terminal is not known to show pictures.
    """
    if display is False:
        return None
    terminal = sys.stdout.isatty()
    protocol = protocol_of(environ) if terminal else None
    if display and protocol is None:
        where = f"the terminal here ({_name(environ)}) is not known to show any" if terminal else "this is no terminal"
        raise click.UsageError(
            f"--display shows the picture on the standard output, and {where}: leave it out and open the PNG, or run "
            f"the command in {TERMINALS}, outside tmux and screen."
        )
    return protocol


def show(png: bytes, protocol: Inline) -> None:
    """Print a PNG on the terminal of the standard output, no wider than the terminal, and end the line."""
    import fcntl  # exists on POSIX only
    import termios

    size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
    _, columns, width, _ = struct.unpack(
        "4H", size
    )  # in characters and in pixels, 0 if the terminal does not report it
    (png_width,) = struct.unpack(">I", png[16:20])  # in the header, IHDR
    click.echo(protocol(png, columns if columns and png_width > (width or columns * CELL) else None))


def _name(environ: Mapping[str, str]) -> str:
    multiplexers = {"TMUX": "tmux", "STY": "screen", "ZELLIJ": "zellij"}
    inside = [name for key, name in multiplexers.items() if key in environ]
    program, term = (environ.get(key) for key in ("TERM_PROGRAM", "TERM"))
    return inside[0] if inside else program or f"TERM={term or ''}"
