"""What an option is: its name, type, bounds, choices and help, and errors that name it.

Options are frozen dataclasses. A field is the one place for a name, a default and a help text: the command line, config
files, Python signatures and checks are made from it. No PyTorch, and nothing of the other packages.
"""

from annotated_types import Ge, Gt, Le, Lt
from typing_extensions import Doc

from options.fields import (
    Among,
    Heading,
    InsteadOf,
    Kind,
    Metavar,
    OptionField,
    OptionSet,
    Positional,
    Separated,
    option_fields,
    overridden,
    takes,
)
from options.lazy import Lazy
from options.messages import Call, Message, Option, Word, did_you_mean, first_line, import_problem, joined, renamed
from options.registry import Registry

__all__ = [
    "Among",
    "Call",
    "Doc",
    "Ge",
    "Gt",
    "Heading",
    "InsteadOf",
    "Kind",
    "Lazy",
    "Le",
    "Lt",
    "Message",
    "Metavar",
    "Option",
    "OptionField",
    "OptionSet",
    "Positional",
    "Registry",
    "Separated",
    "Word",
    "did_you_mean",
    "first_line",
    "import_problem",
    "joined",
    "option_fields",
    "overridden",
    "renamed",
    "takes",
]
