"""What a YAML file of options means: one dialect, numbers as one writes them, words as words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from options.yaml_file import read_yaml

ROOT = Path(__file__).parent.parent
VALUES = {
    "2e-3": 2e-3,
    "1e2": 100.0,
    "1.0e3": 1000.0,
    "-1.5": -1.5,
    ".5": 0.5,
    "5.": 5.0,
    "0": 0,
    "+3": 3,
    "-20": -20,
    ".inf": float("inf"),
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "on": "on",
    "off": "off",
    "yes": "yes",
    "NO": "NO",
    "y": "y",
    "012": "012",
    "00.5": "00.5",
    "0x1F": "0x1F",
    "0o17": "0o17",
    "1_000": "1_000",
    "1:30": "1:30",
    "2024-01-01": "2024-01-01",
    "1e-3 of it": "1e-3 of it",
    "'2e-3'": "2e-3",
    '"true"': "true",
    "none": "none",
    "=": "=",
}


def read(folder: Path, text: str, **options: object) -> dict:
    file = folder / "a.yaml"
    file.write_text(text)
    return read_yaml(file, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", VALUES)
def test_a_value_is_what_yaml_1_2_says(tmp_path, text):
    expected = VALUES[text]
    values = read(tmp_path, f"a: {text}\nb: [{text or 'null'}]")
    assert values == {"a": expected, "b": [expected]}
    assert type(values["a"]) is type(expected)


@pytest.mark.parametrize("text", VALUES)
def test_as_texts_every_value_but_null_is_as_it_was_written(tmp_path, text):
    values = read(tmp_path, f"a: {text}", texts=True)
    assert values == {"a": None if VALUES[text] is None else text.strip("'\"")}


@given(st.floats(allow_nan=False) | st.integers() | st.booleans() | st.text("abc-_ 0.e", max_size=8) | st.none())
def test_what_pyyaml_writes_is_read_again(tmp_path_factory, value):
    """config.yaml is written so."""
    folder = tmp_path_factory.getbasetemp()
    parsed = read(folder, yaml.safe_dump({"a": value}))["a"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_mappings_lists_and_merged_keys(tmp_path):
    assert read(tmp_path, "a: &base {x: 1, y: [true, word]}\nb: {<<: *base, x: 2}")["b"] == {
        "x": 2,
        "y": [True, "word"],
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a: [", "is not valid YAML: while parsing"),
        (b"\xff\xfe\xfa", "is not valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        (b"", "must hold options by name"),
        (b"- a", "must hold options by name"),
    ],
)
def test_a_file_of_anything_else_is_refused_by_its_name(tmp_path, text, words):
    (tmp_path / "a.yaml").write_bytes(text)
    with pytest.raises(ArithmeticError, match=f"{tmp_path / 'a.yaml'} {words}"):
        read_yaml(tmp_path / "a.yaml", error=ArithmeticError)


def test_the_module_does_not_load_pyyaml_before_a_file_is_read():
    code = "import sys; import options.yaml_file; assert not {'yaml', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
