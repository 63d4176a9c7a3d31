"""Write the tables of the pages that list the entries of a registry.

python docs/tables.py    after you enter, rename or remove an entry, or change the first sentence of its docstring

A table stands between two comments, ``<!-- table: NAME -->`` and ``<!-- end of table -->``. Do not edit it by hand: its
cells are the names, the data and the first sentences of the docstrings of the entries. `TABLES` lists all tables.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))  # import the packages of this checkout

from data.builders.registry import BUILDERS, Builder, all_builders  # noqa: E402
from options import Registry, option_fields  # noqa: E402
from pipeline.caching.options import CachingOptions  # noqa: E402
from pipeline.explainers import EXPLAINERS, Explainer  # noqa: E402
from pipeline.networks.debias import DEBIAS  # noqa: E402
from pipeline.networks.formats import FORMATS  # noqa: E402
from pipeline.rules import RULE_SETS  # noqa: E402
from teacher_cache.codec import COMPRESSORS, PRECISIONS  # noqa: E402
from trainer.loop.augmentation import AUGMENTATIONS  # noqa: E402
from trainer.loop.losses import MAP_LOSSES  # noqa: E402
from trainer.loop.methods import METHODS, SUMS, Method, of_store  # noqa: E402
from trainer.loop.optim import OPTIMIZERS, SCHEDULES  # noqa: E402
from trainer.settings import StudentOptions, TeacherOptions  # noqa: E402

END = "<!-- end of table -->"


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        page: the file in docs/.
        name: its name in the comment that begins it.
        registry: the registry whose entries are its rows.
        columns: the header of each column after the first one, and the function that makes a cell of it from a name and
            an entry.
        omitted: names that have no row here.
        names: the header of the first column; the option of the registry if empty.
        by_name: sort the rows by name; otherwise they have the order of the registry.
    """

    page: str
    name: str
    registry: Registry[Any]
    columns: tuple[tuple[str, Callable[[str, Any], str]], ...]
    omitted: Collection[str] = ()
    names: str = ""
    by_name: bool = False


def summary(function: Any) -> str:
    """Return the first sentence of a docstring, see `first_sentence`."""
    return first_sentence(inspect.getdoc(function) or "")


def first_sentence(documentation: str) -> str:
    """Return the first sentence of a text as Markdown, without its full stop and the words "Return" and "Build".

    Raises:
        ValueError: there is no text.
    """
    text = " ".join(documentation.partition("\n\n")[0].split())
    if not text:
        raise ValueError("it has no docstring, whose first sentence the docs show: write one")
    sentence = re.split(r"(?<!al)\.\s+(?=[A-Z`])", text, maxsplit=1)[0].removesuffix(".")
    sentence = re.sub("^(Return|Build) ", "", sentence)
    return (sentence[0].upper() + sentence[1:]).replace("``", "`").replace("|", r"\|")


def code(names: Collection[str], last: str = ", ") -> str:
    """Return names in code spans, as "`a`, `b` or `c`" with ``last`` = " or "."""
    *others, final = [f"`{name}`" for name in names] or [""]
    return last.join([", ".join(others), final]) if others else final


def _loss(name: str, method: Method) -> str:
    first = next(other for other, rival in METHODS.items() if rival.loss is method.loss)
    if first != name:
        return f"as for `{first}`, with the maps of {code(method.explainers, ' or ')}"
    terms = ",".join(f"{term}={weight:g}" for term, weight in SUMS.get(name, {}).items())
    return summary(method.loss) + (f"; `--method {name}` is `--loss {terms}`" if terms else "")


def _store(name: str, method: Method) -> str:
    if not of_store({name: 1}):
        return "no store"
    explainers = f"`--explainer` {code(method.explainers, ' or ')}" if method.explainers else ""
    return explainers or ("`--features`" if "features" in method.needs else "any store")


def _dataset(name: str, method: Method) -> str:
    arrays = {"group_weights": "groups", "masks": "masks"}
    return code([arrays[need] for need in method.needs if need in arrays])


def _shape(name: str, explainer: Explainer) -> str:
    return "(N, 1, h, w)" if explainer.coarse else "as the images"


def _images(name: str, builder: Builder) -> str:
    title, _, body = builder.help.partition("\n\n")
    return f"{first_sentence(title)}. {first_sentence(body)}" if body else first_sentence(title)


def _required(name: str, builder: Builder) -> str:
    return code(
        [
            field.positional or f"--{field.name}"
            for field in option_fields(builder.options)
            if field.required and field.name != "out"
        ]
    )


def _entry(name: str, entry: Any) -> str:
    return summary(entry)


all_builders()  # enters them
TABLES = (
    Table(
        "training.md", "methods", METHODS,
        (
            ("loss of a sample", _loss),
            ("the store needs", _store),
            ("the dataset needs", _dataset),
            ("`--augment`", lambda name, method: ", ".join(method.moves)),
        ),
    ),
    Table("training.md", "map losses", MAP_LOSSES, (("distance between two heatmaps", _entry),)),
    Table("training.md", "augmentations", AUGMENTATIONS, (("effect on an image and its heatmap", _entry),)),
    Table("training.md", "optimizers", OPTIMIZERS, (("optimizer", _entry),)),
    Table("training.md", "schedules", SCHEDULES, (("learning rate", _entry),)),
    Table(
        "engine.md", "rule sets", RULE_SETS,
        (("rules", lambda name, _: summary(RULE_SETS.maker(name))),),
        names="name",
    ),
    Table(
        "engine.md", "explainers", EXPLAINERS,
        (("maps", lambda name, explainer: summary(explainer.read)), ("shape", _shape)),
        omitted=RULE_SETS,
    ),
    Table(
        "cache-layout.md", "precisions", PRECISIONS,
        (
            ("stored", lambda name, precision: summary(precision.quantise)),
            ("dtype in Zarr", lambda name, precision: precision.dtype),
            ("`--codec auto` is", lambda name, precision: f"`{precision.compressor}`"),
        ),
    ),
    Table(
        "cache-layout.md", "compressors", COMPRESSORS,
        (
            ("level", lambda name, compressor: str(compressor.level)),
            ("use", lambda name, compressor: compressor.note),
        ),
    ),
    Table("backgrounds.md", "debiasing fronts", DEBIAS, (("what the teacher's network sees", _entry),)),
    Table(
        "overview.md", "datasets", BUILDERS,
        (("dataset", _images), ("required options", _required)),
        names="`make-data`",
        by_name=True,  # each module enters its own when it is imported
    ),
    Table("students.md", "formats", FORMATS, (("content of the file", lambda name, form: summary(form.encode)),)),
)  # fmt: skip


def render(table: Table) -> str:
    """Return a table as Markdown.

    Raises:
        ValueError: an entry has no docstring.
    """
    default = _default(table.registry)
    rows = [[table.names or f"`--{table.registry.option.replace('_', '-')}`"]]
    rows[0] += [header for header, _ in table.columns]
    rows.append(["---"] * len(rows[0]))
    listed = [name for name in table.registry if name not in table.omitted]
    for name in sorted(listed) if table.by_name else listed:
        try:
            cells = [cell(name, table.registry[name]) for _, cell in table.columns]
        except ValueError as error:
            raise ValueError(f"{table.registry.option} '{name}': {error}") from None
        rows.append([f"`{name}`" + (" (default)" if name == default else ""), *cells])
    return "".join(re.sub(r"  (?=\|)", " ", f"| {' | '.join(row)} |\n") for row in rows)


def _default(registry: Registry[Any]) -> str | None:
    """Return the default of the option that chooses an entry."""
    fields = [field for options in (StudentOptions, TeacherOptions, CachingOptions) for field in option_fields(options)]
    return next((field.default for field in fields if field.registry is registry), None)


def updated(text: str, page: str) -> str:
    """Return a page with its tables as they should be.

    Args:
        text: the page.
        page: its name in `TABLES`.

    Raises:
        ValueError: the page lacks the comments of a table, or an entry has no docstring.
    """
    for table in (table for table in TABLES if table.page == page):
        begin = f"<!-- table: {table.name} -->"
        before, comment, rest = text.partition(begin)
        _, end, after = rest.partition(END)
        if not comment or not end:
            raise ValueError(f"{page} needs the comments '{begin}' and '{END}', between which its table is written")
        text = f"{before}{begin}\n\n{render(table)}\n{END}{after}"
    return text


def main() -> None:
    """Write the tables of all pages."""
    for page in dict.fromkeys(table.page for table in TABLES):
        file = DOCS / page
        file.write_text(updated(file.read_text(), page))


if __name__ == "__main__":
    main()
