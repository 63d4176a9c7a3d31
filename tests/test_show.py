"""What `show-explanations` promises: the maps that models and stores give, in one picture that replaces no other."""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import termios
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click import UsageError
from click.testing import CliRunner, Result
from PIL import Image

import teacher_cache.layout
import trainer.results.show as module
from cli import main
from data import DatasetError, DatasetWriter, make_coloured_mnist, open_dataset
from pipeline import EXPLAINERS, ModelError, RelevanceError, cache_explanations, explain, load_classifier
from pipeline.device import as_input
from teacher_cache import CacheError, open_cache
from terminal import inline_picture
from trainer import show_explanations, train_student, train_teacher
from trainer.results.pictures import Cell, Grid
from trainer.results.show import common_limit, pick_samples

OUT = "heat.png"


@pytest.fixture
def drawn(monkeypatch) -> list[dict[str, Any]]:
    """What pictures would be drawn of, in place of drawing them."""
    seen: list[dict[str, Any]] = []
    names = ("cells", "columns", "rows", "title", "limit", "unit")

    def noting(grid: Grid, out: Path, description: str) -> None:
        values = [getattr(grid, field.name) for field in dataclasses.fields(Grid)]
        seen.append(dict(zip(names, values, strict=True)) | {"out": out, "about": description})

    monkeypatch.setattr(module, "grid_picture", noting)
    return seen


@pytest.fixture(scope="module")
def student(dataset, cache, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "student"
    train_student(dataset, cache, path, steps=3, batch_size=32)
    return path


@pytest.fixture(scope="module")
def parted(dataset, teacher, tmp_path_factory) -> Path:
    """A store of the ood split, in shards of 64 samples, of which the second is not there."""
    path = tmp_path_factory.mktemp("caches") / "ood.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache.layout, "MAX_SHARD_SAMPLES", 64)
        cache_explanations(dataset, teacher, path, split="ood", draws=2)
    open_cache(path, writable=True).uncommit(1)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["show-explanations", *map(str, arguments)])


def in_units(maps: np.ndarray) -> np.ndarray:
    """Maps (C, h, w), as they are to be shown: in a second, slower way."""
    summed = sum(channel.astype(float) for channel in maps)
    some = [abs(value) for value in summed.flat if value]
    return summed / (sum(some) / len(some))


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("models", [1, 4])
def test_a_png_is_written_with_all_that_was_asked_for_in_it(dataset, teacher, student, tmp_path, samples, models):
    out = tmp_path / "new" / OUT
    model_flags = [arg for model in [teacher, student, teacher, student][:models] for arg in ("--model", model)]
    result = run("--data", dataset, *model_flags, "--samples", samples, "--out", out)
    assert result.exit_code == 0, result.output
    with Image.open(out) as picture:
        asked = json.loads(picture.info["Description"])
        assert picture.width > 200 * models
        assert picture.height > 200 * samples
    assert (asked["split"], asked["explain"], asked["epsilon"]) == ("iid", "true", 0.1)
    assert asked["samples"] == [300 * number // samples for number in range(samples)]
    assert asked["fingerprint"] == open_dataset(dataset).split("iid").fingerprint
    assert result.output.startswith(f"{out}: {samples} sample")
    assert [path.name for path in out.parent.iterdir()] == [OUT]


def test_a_models_maps_are_those_of_explain_in_units_of_their_own_mean(dataset, teacher, student, tmp_path, drawn):
    show_explanations(dataset, tmp_path / OUT, models=[teacher, student], split="ood", samples=[7, 3], epsilon=0.3)
    (picture,) = drawn
    split = open_dataset(dataset).split("ood")
    images, labels = as_input(split.images[:8], torch.device("cpu")), torch.as_tensor(split.labels[:8])
    assert picture["columns"] == ["image", "teacher", "student"]
    for column, path in enumerate((teacher, student), start=1):
        logits, maps = explain(load_classifier(path)[0], images, labels, 0.3)
        for row, sample in enumerate((7, 3)):
            cell, says = picture["cells"][row][column], int(logits[sample].argmax())
            np.testing.assert_allclose(cell.content, in_units(maps[sample].numpy()), rtol=1e-3, atol=1e-3)
            share = 100 * logits[sample].softmax(0)[says]
            assert cell.below == f"says {open_dataset(dataset).class_names[says]}, {share:.1f} %"
            assert cell.wrong == (says != labels[sample])
    for row, sample in enumerate((7, 3)):
        assert np.array_equal(picture["cells"][row][0].content, images[sample].numpy())
        colour = open_dataset(dataset).group_name(int(split.groups[sample]))
        assert picture["rows"][row].split("\n") == [
            open_dataset(dataset).class_names[labels[sample]],
            colour,
            f"sample {sample}",
        ]


def test_maps_that_differ_in_their_unit_alone_look_alike_and_zeros_count_for_nothing():
    maps, logits = np.random.default_rng(0).standard_normal((3, 4, 5)), np.array([1.0, 3.0])
    one, other = (module._cell(("a", "b"), 1, each, logits) for each in (maps, 1e-6 * maps))
    np.testing.assert_allclose(one.content, other.content)
    padded = module._cell(("a", "b"), 1, np.pad(maps, ((0, 0), (9, 9), (9, 9))), logits)
    np.testing.assert_allclose(padded.content[9:-9, 9:-9], one.content)
    nothing = module._cell(("a", "b"), 1, 0 * maps, logits)
    assert not nothing.content.any()
    assert nothing.below.endswith("no relevance at all")


def test_one_limit_holds_for_the_picture_and_single_peaks_do_not_set_it():
    maps = [np.linspace(-1, 1, 100).reshape(10, 10), np.array([[0.0, 1000.0]]), None]
    assert 0.9 < common_limit(maps) < 1.1
    assert common_limit([np.zeros((2, 2)), None]) == common_limit([]) == 1


def test_a_store_shows_its_first_draws_and_only_of_committed_shards(dataset, teacher, parted, tmp_path, drawn):
    show_explanations(dataset, tmp_path / OUT, caches=[parted], split="ood", samples=[5, 70, 200])
    (picture,) = drawn
    assert picture["columns"] == ["image", "ood.zarr (flex)"]
    store, names = open_cache(parted), open_dataset(dataset).class_names
    cells = [row[1] for row in picture["cells"]]
    assert cells[1] == Cell(None, "not in the store yet")
    for cell, sample in ((cells[0], 5), (cells[2], 200)):
        shard = store.read_shard(sample // 64)
        np.testing.assert_allclose(cell.content, in_units(shard.heatmaps[sample % 64, 0]), rtol=1e-6, atol=1e-6)
        drawn_class, epsilon = shard.target_class[sample % 64, 0], shard.epsilon[sample % 64, 0]
        assert cell.below.split("\n")[1] == f"map of {names[drawn_class]}, ε {epsilon:.2g}"
        assert cell.below.startswith(f"says {names[shard.teacher_logits[sample % 64].argmax()]}, ")


@pytest.mark.parametrize("explainer", ["grad-cam", "attention"])
def test_what_a_map_does_not_know_is_not_said_of_it(dataset, teacher, tmp_path, drawn, explainer):
    cache_explanations(dataset, teacher, tmp_path / "c.zarr", split="ood", explainer=explainer)
    options = {"models": [teacher], "caches": [tmp_path / "c.zarr"], "split": "ood", "explainer": explainer}
    show_explanations(dataset, tmp_path / OUT, **options, samples=2)
    (picture,) = drawn
    _, model, store = picture["cells"][0]
    assert model.content.shape == store.content.shape == (3, 3)
    assert "ε" not in store.below + picture["title"]
    assert ("map of" in store.below) == ("true class" in picture["title"]) == (explainer == "grad-cam")


def test_the_predicted_class_or_one_by_its_name_is_explained(dataset, teacher, student, tmp_path, drawn):
    split = open_dataset(dataset).split("ood")
    images = as_input(split.images[:2], torch.device("cpu"))
    model, _ = load_classifier(teacher)
    for asked in ("predicted", "four"):
        show_explanations(dataset, tmp_path / OUT, models=[teacher], split="ood", samples=[0, 1], explain=asked)
        classes = model(images).argmax(1) if asked == "predicted" else torch.tensor([4, 4])
        _, maps = explain(model, images, classes, 0.1)
        for row in range(2):
            expected = in_units(maps[row].numpy())
            np.testing.assert_allclose(drawn[-1]["cells"][row][1].content, expected, rtol=1e-3, atol=1e-3)


def test_the_same_command_gives_the_same_picture_and_evenly_spread_samples(dataset, teacher, tmp_path):
    for name in ("a.png", "b.png"):
        show_explanations(dataset, tmp_path / name, models=[teacher], samples=2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert pick_samples(300, 4, "ood").tolist() == [0, 75, 150, 225]
    assert pick_samples(3, 8, "ood").tolist() == [0, 1, 2]
    assert pick_samples(3, [2, 0, 2], "ood").tolist() == [2, 0, 2]


def test_without_test_splits_it_is_train_and_images_of_one_channel_and_no_groups_are_shown(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 1, 12, 20), dtype=np.uint8)
    with DatasetWriter(tmp_path / "d.zarr") as writer:
        writer.write_split("train", images=images, labels=np.arange(6) % 2, masks=images[:, :1] // 128)
        writer.finish(class_names=["a", "a_class for $5 ^whose_name_goes_on_and_on_for_$6"])
    train_teacher(tmp_path / "d.zarr", tmp_path / "t", debias="mask", steps=1, batch_size=4)
    summary = show_explanations(tmp_path / "d.zarr", tmp_path / OUT, models=[tmp_path / "t"], samples=100)
    assert (summary["split"], summary["samples"]) == ("train", [0, 1, 2, 3, 4, 5])
    with Image.open(tmp_path / OUT) as picture:
        assert picture.format == "PNG"


def test_models_of_one_name_are_told_apart_by_their_paths(dataset, teacher, tmp_path, drawn):
    twin = tmp_path / "teacher"
    shutil.copytree(teacher, twin)
    summary = show_explanations(dataset, tmp_path / OUT, models=[teacher, twin], samples=1)
    assert summary["columns"] == [str(teacher), str(twin)]


FACTORY = """
from torch import nn

def net(num_classes):
    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(features, nn.Linear(16, num_classes))
"""


def test_code_of_ones_own_is_run_for_the_models_that_need_it_and_refused_where_none_does(
    dataset, teacher, cache, tmp_path, monkeypatch, drawn
):
    monkeypatch.chdir(tmp_path)
    Path("shownnet.py").write_text(FACTORY)
    factory = {"student_factory": "shownnet:net"}
    train_student(dataset, cache, "own", steps=1, batch_size=16, **factory)
    summary = show_explanations(dataset, OUT, models=[teacher, "own"], samples=1, **factory)
    assert summary["columns"] == ["teacher", "own"]
    with pytest.raises(ModelError, match="give student_factory='shownnet:net'"):
        show_explanations(dataset, OUT, models=[teacher, "own"], samples=1)
    with pytest.raises(ModelError, match="leave the option out"):
        show_explanations(dataset, OUT, models=[teacher], samples=1, **factory)


def test_every_explainer_can_be_chosen():
    (option,) = [each for each in main.commands["show-explanations"].params if each.name == "explainer"]
    assert list(option.type.choices) == list(EXPLAINERS)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"explain": "sevn"}, DatasetError, "explain='sevn': .* no such class. Did you mean seven"),
    ({"explain": "tru"}, DatasetError, "Did you mean true"),
    ({"explain": "q"}, DatasetError, "Give true, predicted, or one of zero, one, two"),
    ({"samples": [0, 300]}, DatasetError, "there is no sample 300 in the split 'iid': choose samples from 0 to 299"),
    ({"samples": [-1]}, DatasetError, "there is no sample -1"),
    ({"samples": 0}, RelevanceError, "shows 1 to 100 samples, not 0"),
    ({"samples": range(101)}, RelevanceError, "shows 1 to 100 samples, not 101"),
    ({"split": "odd"}, DatasetError, "no split 'odd': choose one of train"),
    ({"epsilon": float("nan")}, RelevanceError, "epsilon must be at least 0, got nan"),
    ({"explainer": "lrp"}, RelevanceError, "unknown explainer 'lrp': choose one of flex"),
    ({"models": []}, RelevanceError, "give models or caches"),
    ({"models": ["nowhere"]}, ModelError, "no model at nowhere"),
    ({"caches": ["nowhere"]}, CacheError, "no heatmap store at nowhere"),
    ({"device": "tpu"}, ModelError, "the device 'tpu' cannot be used here"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_what_cannot_be_shown_is_refused_and_nothing_is_written(dataset, teacher, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        show_explanations(dataset, tmp_path / OUT, **{"models": [teacher], **options})
    assert not list(tmp_path.iterdir())


def test_a_store_of_another_dataset_or_split_or_without_the_samples_is_refused(
    dataset, teacher, cache, parted, tmp_path, drawn
):
    make_coloured_mnist(tmp_path / "other.zarr", seed=5, limit=300)
    with pytest.raises(CacheError, match="was made from another dataset"):
        show_explanations(tmp_path / "other.zarr", tmp_path / OUT, caches=[cache], split="train")
    with pytest.raises(
        CacheError, match=r"explains the split 'train', and the samples are of 'iid': give split='train'"
    ):
        show_explanations(dataset, tmp_path / OUT, caches=[cache])
    with pytest.raises(CacheError, match="is incomplete, and has none of the samples 70, 80: run cache_explanations"):
        show_explanations(dataset, tmp_path / OUT, caches=[parted], split="ood", samples=[70, 80])
    assert not drawn


def test_a_model_that_does_not_fit_the_dataset_is_refused(teacher, tmp_path):
    for name, shape, classes in (
        ("size", (3, 32, 32), load_classifier(teacher)[1].class_names),
        ("few", (3, 28, 28), "ab"),
    ):
        with DatasetWriter(tmp_path / name) as writer:
            writer.write_split("ood", images=np.zeros((4, *shape), np.uint8), labels=np.zeros(4, np.int64))
            writer.finish(class_names=list(classes))
        with pytest.raises(ModelError, match="use a model that was trained on"):
            show_explanations(tmp_path / name, tmp_path / OUT, models=[teacher])


def test_a_picture_that_is_there_stays_as_it_is(dataset, teacher, tmp_path, monkeypatch):
    options = ("--data", dataset, "--model", teacher, "--samples", 1, "--out")
    (tmp_path / OUT).write_text("mine")
    result = run(*options, tmp_path / OUT)
    assert (result.exit_code, "exists: choose another --out" in result.output) == (1, True), result.output
    monkeypatch.setattr(module, "_check_out", lambda out: None)  # as if it came while the picture was made
    result = run(*options, tmp_path / OUT)
    assert (result.exit_code, "exists: choose another --out" in result.output) == (1, True), result.output
    assert (tmp_path / OUT).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [OUT]


def test_another_kind_of_file_and_samples_given_twice_are_refused(dataset, teacher, tmp_path):
    options = ("--data", dataset, "--model", teacher, "--out")
    assert "heat.pdf is no .png" in run(*options, tmp_path / "heat.pdf").output
    both = run(*options, tmp_path / OUT, "--samples", 2, "--sample", 1)
    assert (both.exit_code, "give --samples, how many, or --sample, which, not both" in both.output) == (2, True)
    assert not list(tmp_path.iterdir())


# --- in the terminal ----------------------------------------------------------------------------------------

OF_KITTY = re.compile("\x1b_G([^;]*);([A-Za-z0-9+/=]*)\x1b\\\\")
OF_ITERM2 = re.compile("\x1b]1337;File=([^:]*):([A-Za-z0-9+/=]*)\x07")


def keys_and_png(sequences: str, protocol: Any) -> tuple[dict[str, str], bytes]:
    """What the sequences of a picture ask for, and the PNG in them; they have to be all that there is."""
    kitty = protocol is inline_picture.kitty
    pattern = OF_KITTY if kitty else OF_ITERM2
    assert pattern.sub("", sequences) == ""
    asked, data = zip(*pattern.findall(sequences), strict=True)
    keys = dict(key.split("=") for key in asked[0].split("," if kitty else ";"))
    if kitty:  # each but the last says that there is more, and is full
        assert [f"m={keys['m']}", *asked[1:]] == ["m=1"] * (len(asked) - 1) + ["m=0"]
        assert all(len(each) == 4096 for each in data[:-1])
    else:
        assert len(data) == 1
    return keys, base64.b64decode("".join(data), validate=True)


@pytest.mark.parametrize("size", [1, 3071, 3072, 3073, 20_000])
@pytest.mark.parametrize("protocol", [inline_picture.kitty, inline_picture.iterm2])
def test_the_sequences_of_a_picture_have_all_of_its_bytes(protocol, size):
    png = np.random.default_rng(size).bytes(size)
    kitty = protocol is inline_picture.kitty
    for columns in (None, 80):
        keys, decoded = keys_and_png(protocol(png, columns), protocol)
        assert decoded == png
        assert keys.get("c" if kitty else "width") == ("80" if columns else None if kitty else "auto")
        rest = {"a": "T", "f": "100", "q": "2"} if kitty else {"inline": "1", "size": str(size)}
        assert keys.items() >= rest.items()


XTERM = {"TERM": "xterm-256color"}
TERMINALS = [
    ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, inline_picture.kitty),
    ({"TERM": "xterm-kitty"}, inline_picture.kitty),  # over ssh
    ({**XTERM, "KITTY_WINDOW_ID": "1"}, inline_picture.kitty),
    ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, inline_picture.kitty),
    ({**XTERM, "GHOSTTY_RESOURCES_DIR": "/usr/share/ghostty"}, inline_picture.kitty),
    ({**XTERM, "KONSOLE_VERSION": "220400"}, inline_picture.kitty),
    ({**XTERM, "KONSOLE_VERSION": "211203"}, None),
    ({**XTERM, "KONSOLE_VERSION": "new"}, None),
    ({**XTERM, "TERM_PROGRAM": "iTerm.app"}, inline_picture.iterm2),
    ({**XTERM, "LC_TERMINAL": "iTerm2"}, inline_picture.iterm2),
    ({**XTERM, "TERM_PROGRAM": "WezTerm"}, inline_picture.iterm2),
    ({"TERM": "wezterm", "WEZTERM_EXECUTABLE": "/usr/bin/wezterm-gui"}, inline_picture.iterm2),
    ({**XTERM, "TERM_PROGRAM": "mintty"}, inline_picture.iterm2),
    ({**XTERM, "TERM_PROGRAM": "vscode", "KITTY_WINDOW_ID": "1"}, inline_picture.iterm2),  # started from kitty
    ({**XTERM, "TERM_PROGRAM": "Apple_Terminal", "LC_TERMINAL": "iTerm2"}, None),
    ({"TERM": "xterm-kitty", "TERM_PROGRAM": "vscode"}, inline_picture.kitty),
    ({"TERM": "tmux-256color", "TERM_PROGRAM": "tmux", "TMUX": "/tmp/tmux", "KITTY_WINDOW_ID": "1"}, None),
    ({**XTERM, "TMUX": "/tmp/tmux", "KITTY_WINDOW_ID": "1"}, None),
    ({"TERM": "screen.xterm-256color", "STY": "1.pts", "LC_TERMINAL": "iTerm2"}, None),
    ({"TERM": "xterm-kitty", "ZELLIJ": "0", "KITTY_WINDOW_ID": "1"}, None),
    ({"TERM": "dumb", "KITTY_WINDOW_ID": "1"}, None),  # as in Emacs, started from kitty
    (XTERM, None),
    ({}, None),
]


@pytest.mark.parametrize(("environ", "protocol"), TERMINALS)
def test_what_a_terminal_can_show_is_told_by_its_environment(environ, protocol):
    assert inline_picture.protocol_of(environ) is protocol


def in_terminal(monkeypatch, environ: dict[str, str], pixels: int, *arguments: object) -> str:
    """What show-explanations prints on a pseudo-terminal of 80 columns, so many pixels wide (0: it does not tell)."""
    for each in {key for known, _ in TERMINALS for key in known}:
        monkeypatch.delenv(each, raising=False)
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, pixels, 0))
    output = bytearray()

    def read() -> None:
        try:
            while piece := os.read(ours, 65536):
                output.extend(piece)
        except OSError:  # Linux's end of file, when the other side is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with open(theirs, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", terminal)
            main(["show-explanations", *map(str, arguments)], standalone_mode=False)
    finally:
        reader.join(timeout=60)
        os.close(ours)
    return output.decode().replace("\r\n", "\n")


def test_a_terminal_that_can_shows_the_picture_above_its_name(dataset, teacher, tmp_path, monkeypatch):
    arguments = ("--data", dataset, "--model", teacher, "--samples", 1)
    for name, protocol, environ, pixels, fits in [
        ("kitty", inline_picture.kitty, {"TERM": "xterm-kitty"}, 4000, None),
        ("narrow", inline_picture.kitty, {"TERM": "xterm-kitty"}, 100, "80"),
        ("iterm2", inline_picture.iterm2, {**XTERM, "TERM_PROGRAM": "iTerm.app"}, 100, "80"),
        ("plain", None, XTERM, 100, None),
    ]:
        out = tmp_path / name / OUT
        *picture, line = in_terminal(monkeypatch, environ, pixels, *arguments, "--out", out).splitlines()
        assert line.startswith(f"{out}: 1 sample of iid"), line
        if protocol is None:
            assert not picture
        else:
            keys, png = keys_and_png("".join(picture), protocol)
            assert png == out.read_bytes()
            assert keys.get("c", keys.get("width")) == fits
    output = in_terminal(monkeypatch, {"TERM": "xterm-kitty"}, 0, *arguments, "--no-display", "--out", tmp_path / OUT)
    assert output.startswith(str(tmp_path))
    assert "\x1b" not in output


def test_a_width_in_pixels_that_is_not_told_is_that_of_small_characters(monkeypatch):
    asked = []
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: struct.pack("4H", 24, 80, 0, 0))
    with open(os.devnull, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", terminal)
        for across in (640, 641):
            header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", across, 9)
            inline_picture.show(header, lambda _, columns: asked.append(columns) or "")
    assert asked == [None, 80]


def test_a_picture_that_cannot_be_shown_is_refused_where_it_was_asked_for(dataset, teacher, tmp_path, monkeypatch):
    arguments = ("--data", dataset, "--model", teacher, "--samples", 1, "--out", tmp_path / OUT)
    for environ, where in [
        ({**XTERM, "TERM_PROGRAM": "Apple_Terminal"}, r"\(Apple_Terminal\)"),
        ({"TERM": "linux"}, r"\(TERM=linux\)"),
        ({**XTERM, "TMUX": "/tmp/tmux", "TERM_PROGRAM": "tmux"}, r"\(tmux\)"),
    ]:
        with pytest.raises(
            UsageError, match=rf"{where} is not known to show any: leave it out and open the PNG, or run"
        ):
            in_terminal(monkeypatch, environ, 0, *arguments, "--display")
    monkeypatch.setenv("TERM", "xterm-kitty")
    result = run(*arguments, "--display")
    assert (result.exit_code, "and this is no terminal: leave it out" in result.output) == (2, True), result.output
    assert not list(tmp_path.iterdir())
    result = run(*arguments)  # what is piped has the line alone
    assert (result.exit_code, result.output.count("\n"), "\x1b" in result.output) == (0, 1, False), result.output
