"""Names in any script, in pictures: drawn with a font that has the characters, or numbered with a legend."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from trainer.results import fonts
from trainer.results.charts import Chart, Line, draw
from trainer.results.fonts import legible
from trainer.results.pictures import Cell, Grid, curves_picture, grid_picture, groups_picture

CAT, DOG, HINDI, ARABIC = "猫", "犬", "बिल्ली", "قطة"


@pytest.fixture(autouse=True)
def only_own_fonts(monkeypatch):
    """The fonts that Matplotlib brings: those of the machine differ."""
    own = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of Matplotlib's own libraries
        yield


@pytest.fixture
def cjk_font(tmp_path, monkeypatch):
    """A font of the machine that has the two animals, as black squares."""
    pen = TTGlyphPen(None)
    for move, point in ((pen.moveTo, (0, 0)), (pen.lineTo, (0, 900)), (pen.lineTo, (900, 900)), (pen.lineTo, (900, 0))):
        move(point)
    pen.closePath()
    square, names = pen.glyph(), [".notdef", "cat", "dog"]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(CAT): "cat", ord(DOG): "dog"})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Two Animals Sans", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "animals.ttf")
    font_manager.fontManager.addfont(tmp_path / "animals.ttf")
    return "Two Animals Sans"


def test_names_without_a_font_become_numbers_and_the_log_says_which(tmp_path, caplog):
    with legible([CAT, f"says {DOG}, 98.1 %", "Güte кот", HINDI], tmp_path / "p.png") as drawable:
        assert drawable(f"{CAT}; {DOG} {CAT}") == "[1]; [2] [1]"
        assert drawable(f"says {DOG}, 98.1 %") == "says [2], 98.1 %"
        assert drawable("Güte кот") == "Güte кот"
        assert drawable(HINDI) == "[3]"
    assert f"[1] is {CAT}, [2] is {DOG}, [3] is {HINDI}. Install a font" in caplog.text


def test_a_font_of_the_machine_that_has_the_characters_is_taken(tmp_path, caplog, cjk_font):
    import matplotlib

    with legible([f"{CAT} {DOG} {HINDI}"], tmp_path / "p.png") as drawable:
        assert drawable(f"{CAT} {DOG} {HINDI}") == f"{CAT} {DOG} [1]"
        assert matplotlib.rcParams["font.family"][-1] == cjk_font
    assert cjk_font not in matplotlib.rcParams["font.family"]
    assert f"[1] is {HINDI}" in caplog.text
    assert CAT not in caplog.text


def test_latin_names_change_nothing(tmp_path, caplog):
    import matplotlib

    before = list(matplotlib.rcParams["font.family"])
    with legible(["ship", "Güte, $5", "naïve\n\u200b"], tmp_path / "p.png") as drawable:
        assert drawable("ship") == "ship"
        assert list(matplotlib.rcParams["font.family"]) == before
    assert not caplog.text


def test_an_older_matplotlib_does_not_draw_joined_letters_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.__version_info__", (3, 10, 0))
    with legible([ARABIC, "cat"], tmp_path / "p.png") as drawable:
        assert [drawable(ARABIC), drawable("cat")] == ["[1]", "cat"]
    monkeypatch.setattr("matplotlib.__version_info__", (3, 11, 0))
    with legible([ARABIC], tmp_path / "p.png") as drawable:
        assert drawable(ARABIC) == ARABIC
    assert fonts.SHAPING == (3, 11)


def grid(names: list[str]) -> Grid:
    cells = [Cell(np.full((3, 8, 8), 0.5, np.float32), name) for name in names]
    maps = [Cell(np.ones((8, 8)), f"says {name}", wrong=True) for name in names]
    return Grid([cells, maps], names, ["image", CAT], CAT, 1.0, DOG)


def ink(path) -> int:
    """The number of dark pixels."""
    return int((np.asarray(Image.open(path).convert("L")) < 80).sum())


def test_every_picture_draws_names_of_any_script_without_a_warning(tmp_path, caplog, cjk_font):
    grid_picture(grid([CAT, HINDI, ARABIC]), tmp_path / "grid.png", "{}")
    results = [{"title": CAT, "groups": [{"split": DOG, "group": HINDI, "accuracy": 50.0}]}]
    groups_picture(results, [DOG], tmp_path / "groups.png")
    curves_picture([{"title": HINDI, "step": 1, "seed": 0, DOG: 50.0}], [DOG], tmp_path / "curves.png")
    assert caplog.text.count(f"[1] is {HINDI}") == 3
    chart = Chart(CAT, DOG, HINDI, [Line(0, np.arange(2), np.arange(2.0))], ticks=(CAT, DOG))
    assert CAT in draw(chart, "p")


def test_the_picture_shows_the_characters_of_the_font(tmp_path, cjk_font):
    """The font draws squares, which are much ink."""
    grid_picture(grid([CAT * 5]), tmp_path / "square.png", "{}")
    grid_picture(grid(["i" * 5]), tmp_path / "thin.png", "{}")
    assert ink(tmp_path / "square.png") > ink(tmp_path / "thin.png") + 2000
