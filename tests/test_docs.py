"""What the pages promise: commands and Python run as they stand there (with small sizes), links and tables are true."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import click
import numpy as np
import pytest
import timm
import torch
import torchvision
from click.testing import CliRunner
from conftest import save_clip
from safetensors.torch import save_file
from transformers import ResNetConfig, ResNetForImageClassification

from cli import main
from data import DatasetWriter
from data.builders.registry import BUILDERS, Builder, BuilderOptions
from options import Registry
from pipeline.explainers import EXPLAINERS, Explainer
from pipeline.networks.formats import FORMATS, Format
from pipeline.rules import RULE_SETS
from teacher_cache import COMPRESSORS, PRECISIONS, Compressor
from trainer.loop.methods import METHODS, Method

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OF_OTHER_PROGRAMS = {"--logdir", "--nproc-per-node"}  # tensorboard, torchrun
LINKED_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
ANCHOR_LEVELS = 4  # as myst_heading_anchors in docs/conf.py
PACKAGES = ("data", "options", "pipeline", "teacher_cache", "terminal", "trainer")
SMALL = {
    "make-data": ("--limit", "120"),
    **dict.fromkeys(["train-teacher", "train-student", "train-students"], ("--steps", "2")),
}


def used(network: torch.nn.Module) -> torch.nn.Module:
    """Let batch norms see images, as otherwise relevance is so small that a CPU computes it very slowly."""
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.rand(8, 3, 32, 32))
    return network


def save_networks() -> None:
    """Write the files of a user that the page on own networks names."""
    for name, classes in (("mine.pth", 10), ("imagenet.pth", 1000)):
        torch.save(used(torchvision.models.resnet18(num_classes=classes)).state_dict(), name)
    save_file(used(timm.create_model("resnet18", num_classes=10)).state_dict(), "resnet18.safetensors")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10)
    used(ResNetForImageClassification(config)).save_pretrained("my-model")
    with DatasetWriter("ANIMALS.zarr") as writer:
        images = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), np.uint8)
        writer.write_split("train", images=images, labels=np.arange(40) % 2)
        writer.finish(class_names=["dog", "cat"])


_spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")  # a script of no package
tables = sys.modules["docs_tables"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def save_files(page: Path) -> None:
    """A block that begins with the comment ``# name.py`` or ``# name.yaml`` is that file, in the current folder."""
    for block in [*blocks(page, "python"), *blocks(page, "yaml")]:
        if name := re.match(r"# (\w+\.(?:py|yaml))\n", block):
            Path(name[1]).write_text(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_files(page)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {"__name__": "__docs__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch, fashion):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.builders.fashion_on_textures.DEBIAN", str(fashion))
    if page.name == "clip.md":
        save_clip(Path("TINY/vit/clip"), "vit")
    small = SMALL
    if page.name == "own-networks.md":
        save_networks()
        of_networks = ("cache-explanations", "train-teacher", "train-student")
        small = {**SMALL, **{command: (*SMALL.get(command, ()), "--input-size", "32") for command in of_networks}}
    save_files(page)
    for line in "\n".join(blocks(page, "bash")).splitlines():
        if line.startswith("python cli.py ") and not {"quickstart", "reproduce"} & {
            *line.split()
        }:  # have no small sizes
            arguments = shlex.split(line)[2:]
            result = CliRunner().invoke(main, [*arguments, *small.get(arguments[0], ())])
            assert result.exit_code == 0, f"{line}\n{result.output}"


# --- links ---


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"^ *(```+).*?^ *\1 *$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the code host and MyST make them."""
    headings = re.findall(rf"^#{{1,{ANCHOR_LEVELS}}} +(.+?)[ #]*$", prose(page), re.MULTILINE)
    titles = [re.sub(r"!?\[([^]]*)]\([^)]*\)", r"\1", heading) for heading in headings]
    slugs, before = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], Counter()
    for number, slug in enumerate(slugs):
        slugs[number] = f"{slug}-{before[slug]}" if before[slug] else slug
        before[slug] += 1
    return set(slugs)


def dead_links(page: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of a page."""
    text = re.sub(r"(`+).+?\1", "", prose(page))
    links = re.findall(r"]\(\s*<?([^)>\s]*)", text) + re.findall(r"^\[[^]]+]: +<?([^>\s]+)", text, re.MULTILINE)
    links += re.findall(r"<(?:a|img)\b[^>]*?(?:href|src)=[\"']([^\"']*)", text)
    dead = []
    for link in links:
        path, _, anchor = unquote(link).partition("#")
        file = page.parent / path if path else page
        if not re.match(r"[a-z]+:", link) and (not file.exists() or (anchor and anchor not in anchors(file))):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", LINKED_PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_every_anchor_to_a_heading(page):
    assert dead_links(page) == []


def test_dead_links_and_anchors_are_seen_in_every_form(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# A rule of `yours`, too\n## Same\n## Same\n##### Deep\n```\n# not a heading\n```\n")
    live = [
        "other.md",
        "other.md#a-rule-of-yours-too",
        "other.md#same",
        "other.md#same-1",
        "#here",
        "https://example.org/#x",
    ]
    dead = ["none.md", "other.md#same-2", "other.md#deep", "other.md#not-a-heading", "other.md#rule", "#there"]
    page.write_text("# Here\n`[code](none)`\n" + "\n".join(f"[text\nin lines]({link})" for link in [*live, *dead]))
    assert dead_links(page) == dead
    page.write_text('![picture](no.png) <img src="no.svg"> <a href="#no">x</a>\n\n[name]: no.md\n')
    assert sorted(dead_links(page)) == ["#no", "no.md", "no.png", "no.svg"]


# --- names ---


def flags(command: click.Command) -> set[str]:
    """The options of a command and of its sub-commands."""
    own = {
        flag for param in command.get_params(click.Context(command)) for flag in (*param.opts, *param.secondary_opts)
    }
    return own.union(*(flags(one) for one in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_option_that_a_page_names_exists(page):
    benchmarks = "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
    known = flags(main) | OF_OTHER_PROGRAMS | set(re.findall(r"(?<=\")--[a-z-]+", benchmarks))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"<!--.*?-->", "", page.read_text()))) <= known


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_program_file_that_a_page_names_exists(page):
    own = set(re.findall(r"^# (\w+\.py)$", page.read_text(), re.MULTILINE))  # files that the page shows
    names = {file.name for file in ROOT.rglob("*.py")} | own
    for path in re.findall(r"`([\w/]+\.py)`", prose(page)):
        assert (ROOT / path).exists() if "/" in path else path in names, path


# --- tables ---


@pytest.mark.parametrize("page", sorted({table.page for table in tables.TABLES}))
def test_the_tables_of_a_page_are_those_of_the_registries(page):
    text = (ROOT / "docs" / page).read_text()
    assert text == tables.updated(text, page), "run: python docs/tables.py"


def test_every_registry_has_a_table():
    listed = [table.registry for table in tables.TABLES]
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for name in re.findall(r"^(\w+)(?:: [^=]*)? = Registry\b", file.read_text(), re.MULTILINE):
            module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
            assert any(getattr(module, name) is registry for registry in listed), (
                f"{name} has no table in docs/tables.py"
            )


def documented(*values):
    """Return a thing of the test. It is no second sentence."""


def enter(registry: Registry, function) -> None:
    """Enter an entry called ``mine``, of the registry's kind, which `function` documents."""
    if registry is RULE_SETS:
        registry.defer("mine")(function)
    elif registry is METHODS:
        registry["mine"] = Method("mine", function, needs=("labels",))
    elif registry is EXPLAINERS:
        registry["mine"] = Explainer(function, "flex")
    elif registry is BUILDERS:
        registry["mine"] = Builder(function, BuilderOptions, function.__doc__, "make-data mine --out DATA.zarr")
    elif registry is PRECISIONS:
        registry["mine"] = replace(PRECISIONS["int8"], quantise=function)
    elif registry is COMPRESSORS:
        registry["mine"] = Compressor(5, "a thing of the test")
    elif registry is FORMATS:
        registry["mine"] = Format(function, function)
    else:
        registry["mine"] = function


@pytest.mark.parametrize("table", tables.TABLES, ids=lambda table: table.name)
def test_what_is_entered_at_run_time_is_in_the_table_of_its_kind(table, request):
    text = (ROOT / "docs" / table.page).read_text()
    assert "| `mine` |" not in tables.updated(text, table.page)
    request.addfinalizer(lambda: table.registry.pop("mine"))
    enter(table.registry, documented)
    before, comment, after = tables.updated(text, table.page).partition(f"<!-- table: {table.name} -->")
    assert comment
    assert re.search(r"\| `mine` \|.* [Aa] thing of the test \|", after.partition(tables.END)[0])
    assert "`mine`" not in before


def test_an_entry_without_a_docstring_is_named_where_its_table_is_made(request):
    (table,) = [table for table in tables.TABLES if table.name == "map losses"]
    request.addfinalizer(lambda: table.registry.pop("mine"))
    enter(table.registry, lambda *_: None)
    with pytest.raises(ValueError, match=r"map_loss 'mine': it has no docstring"):
        tables.render(table)


# --- commands ---


def test_ci_runs_the_readmes_own_test_command():
    (found,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith("python -m pytest")]
    assert found.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
