"""What a reproduction promises: what it makes and in which order, to go on after anything, and honest tables."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from test_resume import same, stop_after  # noqa: F401
from test_training import weights

import cli
from data import open_dataset
from data.builders.fashion_on_textures import UNSEEN
from options import option_fields
from pipeline import ModelError, load_classifier
from teacher_cache import open_cache
from trainer import TrainingError, evaluate, train_teacher
from trainer.loop.interruption import TrainingInterrupted
from trainer.reproduction import profiles
from trainer.reproduction import reproduce as module
from trainer.reproduction.options import ReproduceOptions
from trainer.reproduction.plan import before, chosen, plan
from trainer.reproduction.profiles import (
    ANY_TEACHER,
    PAPERS,
    PROFILES,
    ROWS,
    ColouredMnistTableOptions,
    FashionTableOptions,
    Quoted,
)
from trainer.reproduction.reproduce import reproduce
from trainer.results.evaluation import evaluate_snapshots, predict
from trainer.results.tables import escape, latex, markdown, measured, summarise, text
from trainer.run_dir import Run, lock
from trainer.settings import StudentOptions, TeacherOptions

CPU = PROFILES["cpu"]
TINY = dataclasses.replace(
    CPU,
    limit=100,
    draws=2,
    teacher={**CPU.teacher, "steps": 4, "batch_size": 40},
    student={**CPU.student, "steps": 3, "batch_size": 40, "snapshots": 2},
    of_row={"erm": {"steps": 4}},
)
SUBSETS = st.lists(st.sampled_from([*ROWS]), min_size=1, unique=True)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def times(out: Path, names: Iterable[str] = ("weights.pt", "zarr.json", "metrics.jsonl", "starts.jsonl")) -> dict:
    """When each file was written that a stage makes."""
    return {path: path.stat().st_mtime_ns for name in names for path in out.rglob(name)}


# --- what there is to make ----------------------------------------------------------------------------------


@given(name=st.sampled_from([*PROFILES]), methods=SUBSETS, seeds=st.integers(1, 3))
def test_a_plan_has_what_the_rows_need_once_after_what_it_needs_and_nothing_else(name, methods, seeds):
    profile = dataclasses.replace(PROFILES[name], rows=None)
    rows = chosen(profile, methods)
    stages = plan(profile, rows, seeds)
    places = {stage.path: place for place, stage in enumerate(stages)}
    assert len(places) == len(stages)
    assert all(places[needed.path] < places[stage.path] for stage in stages for needed in stage.needs)
    teachers = {ROWS[row].teacher or row for row in methods}
    expected = {"data.zarr"} | {f"models/{teacher}" for teacher in teachers}
    for row in (ROWS[row] for row in methods):
        if row.explainer is not None:
            expected |= {f"stores/{row.teacher}-{row.explainer}-{split}.zarr" for split in ("train", "validation")}
    expected |= {f"models/{row}-{seed}" for row in methods if ROWS[row].loss is not None for seed in range(seeds)}
    assert set(places) == expected


@given(name=st.sampled_from([*PROFILES]), fewer=SUBSETS, more=SUBSETS, seeds=st.tuples(st.integers(1, 3), st.just(3)))
def test_a_stage_is_made_in_the_same_way_whatever_is_made_beside_it(name, fewer, more, seeds):
    """So methods and seeds can be added to a folder later: a store has what rows that may come will need."""
    profile = dataclasses.replace(PROFILES[name], rows=None)
    one, other = (
        {stage.path: stage for stage in plan(profile, chosen(profile, methods), count)}
        for methods, count in zip((fewer, [*fewer, *more]), seeds, strict=True)
    )
    assert one.items() <= other.items()


@pytest.mark.parametrize("name", PROFILES)
def test_students_of_a_row_differ_by_their_seed_alone_and_have_the_teachers_form(name):
    profile = dataclasses.replace(PROFILES[name], rows=None)
    stages = {stage.path: stage for stage in plan(profile, tuple(ROWS), 3)}
    for key, row in ROWS.items():
        if row.loss is not None:
            first, *others = (stages[f"models/{key}-{seed}"] for seed in range(3))
            assert [stage.seed for stage in (first, *others)] == [0, 1, 2]
            for stage in others:
                assert {**stage.options, "seed": 0} == first.options
                assert stage.needs == first.needs
            of_teacher = stages[f"models/{row.teacher}"].options["bias_free"]
            assert first.options["bias_free"] == (of_teacher if row.bias_free is None else row.bias_free)
    assert before(stages["models/output-1"]).keys() == before(stages["models/features-0"]).keys()  # one store
    assert before(stages["models/erm-0"]).keys() == {"data.zarr"}


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_has_options_that_trainings_take(name):
    profile = PROFILES[name]
    assert profile.of_row.keys() <= ROWS.keys()
    for stage in plan(dataclasses.replace(profile, rows=None), tuple(ROWS), 1):
        if stage.kind in ("teacher", "student"):
            made = TeacherOptions if stage.kind == "teacher" else StudentOptions
            assert ("steps" in stage.options) != ("epochs" in stage.options)
            made(data="data.zarr", out="out", **stage.options)  # raises for an unknown option or a wrong value
    (profile_field,) = (field for field in option_fields(ColouredMnistTableOptions) if field.name == "profile")
    assert tuple(name for name in PROFILES if name != "quickstart") == profile_field.choices


def test_the_options_name_every_profile_and_their_defaults_are_the_functions():
    (coloured,) = (field.choices for field in option_fields(ColouredMnistTableOptions) if field.name == "profile")
    (fashion,) = (field.choices for field in option_fields(FashionTableOptions) if field.name == "profile")
    assert set(coloured) == set(PROFILES) - {"quickstart"}
    assert set(fashion) == set(profiles.ON_TEXTURES)
    parameters = inspect.signature(reproduce).parameters
    defaults = {field.name: field.default for field in option_fields(ReproduceOptions) if not field.required}
    assert {name: parameters[name].default for name in defaults} == defaults


def test_rows_are_those_of_the_paper_unless_named_in_the_order_of_the_table():
    assert chosen(CPU, None) == tuple(PAPERS)
    assert chosen(CPU, ["all"]) == tuple(ROWS)
    assert chosen(CPU, ["output", "lrp"]) == ("teacher", "lrp", "output")
    assert chosen(CPU, ["lrp-biased-teacher"]) == ("biased-teacher", "lrp-biased-teacher")
    assert not PAPERS.keys() & ANY_TEACHER.keys()
    with pytest.raises(TrainingError, match="no row is called 'irm' in methods: choose from all, teacher, erm, lrp"):
        chosen(CPU, ["lrp", "irm"])
    with pytest.raises(TrainingError, match="methods names no row"):
        chosen(CPU, [])


# --- tables -------------------------------------------------------------------------------------------------


def result(method: str, scores: tuple[float, float, float], seed: int = 0, **more: object) -> dict:
    iid, ood, shift = scores
    row = {"method": method, "title": method.upper(), "seed": seed, "teacher": "t", "seconds": 10.0}
    return {**row, "iid": iid, "ood": ood, "shift": shift, "gap": iid - ood, "published": None, **more}


COLOURED = profiles.BENCHMARKS["coloured-mnist"]
RESULTS = [
    result("t", (99.0, 98.0, 97.0), teacher=None, published={"iid": 1.0, "ood": 2.0, "shift": 3.0}),
    result("a", (90.0, 80.0, 70.0)),
    result("a", (94.0, 86.0, 71.0), seed=1, seconds=20.0),
    result("a", (95.0, 86.0, 72.0), seed=2, seconds=60.0),
    result("orphan", (50.0, 51.0, 52.0), teacher="elsewhere"),
]


def test_the_table_is_the_arithmetic_done_by_hand():
    note = "published, needs unbiased data"
    benchmark = dataclasses.replace(COLOURED, quoted=(Quoted("Q", {"iid": 7.0, "ood": 8.0, "shift": 9.0}, note),))
    teacher, a, orphan, quoted = summarise(RESULTS, benchmark)
    # of 90, 94, 95: mean 93, squared deviations 9 + 1 + 4 over n − 1 = 2; of 80, 86, 86: mean 84, 16 + 4 + 4;
    # of 70, 71, 72: mean 71, 1 + 0 + 1; of the gaps 10, 8, 9: mean 9, 1 + 1 + 0
    assert [*a.ours] == ["IID", "OOD", "shift", "gap"]
    assert [each.mean for each in a.ours.values()] == pytest.approx([93, 84, 71, 9])
    assert [each.deviation for each in a.ours.values()] == pytest.approx([7**0.5, 12**0.5, 1, 1])
    assert a.to_teacher == pytest.approx({"OOD": 84 - 98, "shift": 71 - 97})
    assert (a.title, a.published, a.seconds, a.note) == ("A", {}, 30.0, "measured, 3 seeds; no number quoted")
    assert [str(each) for each in a.ours.values()] == ["93.00 ± 2.65", "84.00 ± 3.46", "71.00 ± 1.00", "9.00 ± 1.00"]
    assert [str(each) for each in teacher.ours.values()] == ["99.00", "98.00", "97.00", "1.00"]  # one has no spread
    assert teacher.note == "measured, 1 seed; published numbers as quoted"
    assert (teacher.to_teacher, teacher.published) == ({}, {"IID": 1.0, "OOD": 2.0, "shift": 3.0})
    assert orphan.to_teacher == {}
    assert str(orphan.ours["gap"]) == "−1.00"
    assert (quoted.ours, quoted.to_teacher, quoted.seconds) == ({}, {}, None)

    row = next(line for line in markdown([teacher, a]).splitlines() if line.startswith("| A "))
    assert row == (
        "| A | 93.00 ± 2.65 | 84.00 ± 3.46 | 71.00 ± 1.00 | 9.00 ± 1.00 | −14.00 | −26.00 | – | – | – | 30 | "
        "measured, 3 seeds; no number quoted |"
    )
    shown = text([teacher, quoted]).splitlines()
    assert shown[0].split() == ["in", "%", "IID", "OOD", "shift", "gap", "published:", "IID", "OOD", "shift", "seconds"]
    assert shown[1].split() == ["T", "99.00", "98.00", "97.00", "1.00", "1.00", "2.00", "3.00", "10"]
    assert shown[2].split()[:9] == ["Q", "–", "–", "–", "–", "7.00", "8.00", "9.00", "–"]
    assert shown[2].endswith("published, needs unbiased data")


def test_a_table_has_the_columns_of_its_benchmark_and_of_what_was_measured():
    benchmark = profiles.BENCHMARKS["waterbirds"]
    results = [
        {"method": method, "title": method, "seed": seed, "teacher": teacher, "seconds": 1.0, "published": None}
        | {"test": test, "gap": None, "worst_group": {"accuracy": test - 20}, "on_object": {"test": share}}
        for method, seed, teacher, test, share in (
            ("teacher", 0, None, 80.0, 100.0),
            ("lrp", 0, "teacher", 70.0, 90.0),
            ("lrp", 1, "teacher", 74.0, None),  # of a model that has no rule for an operation
        )
    ]
    head, _, teacher, lrp = markdown(summarise(results, benchmark)).splitlines()
    assert head == "|  | test | worst group | on object | less its teacher's: test | seconds of training | source |"
    assert teacher.startswith("| teacher | 80.00 | 60.00 | 100.00 | – | 1 |")
    assert lrp.startswith("| lrp | 72.00 ± 2.83 | 52.00 ± 2.83 | 90.00 | −8.00 | 1 |")

    of_places = profiles.BENCHMARKS["coco-on-places"]
    student = result("lrp", (50.0, 48.0, 47.0), published=of_places.rows["lrp"].published)
    head, _, *rows = markdown(summarise([student], of_places)).splitlines()
    assert head == "|  | IID | OOD | shift | gap | published: gap | seconds of training | source |"
    assert [row.split(" | ")[1:6] for row in rows] == [
        ["50.00", "48.00", "47.00", "2.00", "4.40"],
        ["–", "–", "–", "–", "52.10"],
    ]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9))
def test_spread_is_the_sample_standard_deviation(values):
    found = measured(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.deviation == (pytest.approx(np.std(values, ddof=1), abs=1e-9) if len(values) > 1 else None)


@given(st.text("ab&%$#_{}~^\\×±−–ε| ", max_size=12))
def test_any_title_is_one_cell_of_every_table(title):
    table = summarise([*RESULTS, result("odd", (1.0, 2.0, 3.0), title=title)], COLOURED)
    for row in markdown(table).splitlines():
        assert len(re.split(r"(?<!\\)\|", row)) == 12 + 2
    source = latex(table)
    assert source.isascii()
    assert [line for line in source.splitlines() if "tabular" in line] == [
        r"\begin{tabular}{lrrrrrrrrrrl}", r"\end{tabular}",
    ]  # fmt: skip
    body = source[source.index(r"\midrule") : source.index(r"\bottomrule")].splitlines()[1:]
    assert len(body) == len(table)
    for row in body:
        plain = row.removesuffix(r" \\").replace(r"\textbackslash{}", "").replace(r"\{", "").replace(r"\}", "")
        assert len(re.split(r"(?<!\\)&", plain)) == 12
        assert plain.count("{") == plain.count("}")
        assert plain.count("$") - plain.count(r"\$") == 2 * len(re.findall(r"(?<!\\)\$[^$]*[^$\\]\$", plain))


def test_latex_escapes():
    assert escape("a_b & 50 % of #1 {x} $y") == r"a\_b \& 50 \% of \#1 \{x\} \$y"
    assert escape("\\~^") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}"
    assert escape("A×B ± 1 − 2 – 3, ε") == r"A$\times$B $\pm$ 1 $-$ 2 -- 3, $\varepsilon$"


# --- everything, once ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[dict], list[str], list[str]]:
    """All rows at a tiny size, with one seed: the folder, its results, what was said, and the models tested."""
    out, said, looked = tmp_path_factory.mktemp("reproduction") / "r", [], []
    expected = [stage.path for stage in plan(TINY, tuple(ROWS), 1) if stage.row is not None]

    def once_trained(data, model, **more):
        assert (model / "result.json").exists()
        looked.append(str(model.relative_to(out)))
        return evaluate(data, model, **more)

    def once_all_are(data, model, **more):
        assert all((out / path / "result.json").exists() for path in expected)
        assert looked == expected
        return evaluate_snapshots(data, model, **more)

    def gallery(dataset, splits, models, path, factories):
        """Draw nothing: the picture itself is the quickstart's too, and takes seconds."""
        assert list(models) == [row.title for row in ROWS.values()]
        assert list(models.values()) == [out / path for path in expected]
        assert set(factories.values()) == {None}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "evaluate", once_trained)
        patched.setattr(module, "evaluate_snapshots", once_all_are)
        patched.setattr(module, "heatmap_picture", gallery)
        results = reproduce(out, TINY, ["all"], seeds=1, device="cpu", echo=said.append)
    return out, results, said, looked


def test_every_row_is_trained_tested_once_and_told(made):
    out, results, said, looked = made
    assert lines(out / "results.jsonl") == results
    assert [line["method"] for line in results] == [*ROWS]
    assert len(looked) == len({*looked}) == len(ROWS)
    stages = plan(TINY, tuple(ROWS), 1)
    assert len(said) == len(stages) + 1
    assert f"[3/{len(said)}] erm, seed 0: 4 steps of small-cnn" in said
    state = json.loads((out / "reproduce.json").read_text())
    assert state["profile"] == json.loads(json.dumps(dataclasses.asdict(TINY)))
    assert state["versions"]["torch"] == torch.__version__
    assert state["seconds"].keys() == {stage.path for stage in stages} | {"report"}
    for line in results:
        row, scores = ROWS[line["method"]], evaluate(out / "data.zarr", out / line["model"], device="cpu")
        assert {key: line[key] for key in ("iid", "ood", "shift", "gap", "worst_group", "arch")} == {
            key: scores[key] for key in ("iid", "ood", "shift", "gap", "worst_group", "arch")
        }
        for split in ("iid", "ood", "shift"):
            of_split = [group for group in line["groups"] if group["split"] == split]
            right = sum(group["accuracy"] * group["samples"] for group in of_split)
            assert right / sum(group["samples"] for group in of_split) == pytest.approx(line[split])
        assert (line["title"], line["published"]) == (row.title, row.published)
        assert line["steps"] == (3 if row.loss not in (None, "erm") else 4)
        assert line["batch_size"] == 40
        assert math.isfinite(line["loss"])
        assert line["stages"].keys() == before(next(s for s in stages if s.path == line["model"])).keys()


def test_rows_share_stores_and_there_are_no_others(made):
    out, *_ = made
    explainers = ["flex", "gradient-x-input", "input-gradient", "grad-cam", "attention"]
    pairs = [("teacher", explainer) for explainer in explainers] + [("biased-teacher", "flex")]
    assert {path.name for path in (out / "stores").iterdir()} == {
        f"{teacher}-{explainer}-{split}.zarr" for teacher, explainer in pairs for split in ("train", "validation")
    }
    assert "features" in open_cache(out / "stores" / "teacher-flex-train.zarr").sample_fields
    assert "features" not in open_cache(out / "stores" / "biased-teacher-flex-train.zarr").sample_fields
    configs = {path.name: json.loads((path / "config.json").read_text()) for path in (out / "models").iterdir()}
    assert configs["erm-0"]["training"]["cache"] is None
    for row, teacher, student in (
        ("lrp", True, True),
        ("lrp-biased-teacher", False, False),
        ("lrp-biased-teacher-bias-free-student", False, True),
    ):
        config = configs[f"{row}-0"]
        assert (config["training"]["cache"]["teacher"]["bias_free"], config["bias_free"]) == (teacher, student)


def test_curves_end_with_the_last_weights_and_no_snapshot_stays(made):
    out, results, *_ = made
    points = lines(out / "curves.jsonl")
    students = [line for line in results if ROWS[line["method"]].loss is not None]
    assert [(point["method"], point["step"]) for point in points] == [
        (line["method"], step) for line in students for step in ((2, 4) if line["method"] == "erm" else (2, 3))
    ]
    assert all("nothing was chosen by it" in point["used_for"] for point in points)
    (erm,) = [line for line in results if line["method"] == "erm"]  # no validation chooses among its weights
    last = next(point for point in points if (point["method"], point["step"]) == ("erm", 4))
    assert {split: last[split] for split in ("iid", "ood", "shift")} == {
        split: erm[split] for split in ("iid", "ood", "shift")
    }
    assert not [path for line in results for path in Run(out / line["model"]).snapshots.values()]


def test_the_report_has_tables_and_pictures(made):
    out, results, *_ = made
    report = out / "report"
    table = summarise(results, COLOURED)
    assert (report / "table.md").read_text() == markdown(table)
    assert (report / "table.tex").read_text() == latex(table)
    for name in ("curves", "groups"):
        assert (report / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_second_time_nothing_is_made_again(made):
    out, results, *_ = made
    written, said = times(out, ("*",)), []
    assert reproduce(out, TINY, ["output", "lrp"], seeds=1, device="cpu", echo=said.append) == results
    assert len(said) == 1
    assert "finished" in said[0]
    assert times(out, ("*",)) == written


def test_another_benchmark_has_its_own_data_teacher_rows_and_table(fashion, tmp_path):
    cpu = profiles.ON_TEXTURES["cpu"]
    tiny = dataclasses.replace(
        cpu,
        data={"size": 16},
        teacher={**cpu.teacher, "arch": "small-cnn", "steps": 3, "batch_size": 20},
        student={**cpu.student, "arch": "small-cnn", "steps": 2, "batch_size": 20, "snapshots": 1},
        of_row={},
        draws=1,
    )
    sources = {"fashion_mnist": fashion}
    results = reproduce(tmp_path / "r", tiny, seeds=1, sources=sources, device="cpu", echo=lambda _: None)
    assert [line["method"] for line in results] == [*profiles.OBJECTS]
    assert load_classifier(tmp_path / "r" / "models" / "teacher")[1].debias == "mask"
    teacher, *students = results
    assert teacher["on_object"]["shift"] == pytest.approx(100)
    assert all(0 < student["on_object"]["ood"] < 100 for student in students)
    assert {group["group"] for group in teacher["groups"] if group["split"] == "ood"} <= {*UNSEEN}
    lrp_output = json.loads((tmp_path / "r" / "models" / "lrp-output-0" / "config.json").read_text())
    assert lrp_output["training"]["loss"] == {"lrp": 1.0, "output": 0.1}
    report = tmp_path / "r" / "report"
    told = (report / "table.md").read_text().splitlines()
    assert len(told) == 2 + len(results)
    assert told[0].startswith("|  | IID | OOD | shift | gap | worst group | on object | less its teacher's: OOD |")
    assert told[2].split(" | ")[6] == "100.00"
    for name in ("curves", "groups", "heatmaps"):
        assert (report / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


# --- snapshots as curves ------------------------------------------------------------------------------------


def test_a_point_of_a_curve_is_the_accuracy_of_that_snapshot_on_every_nth_image(dataset, teacher, tmp_path):
    train_teacher(dataset, tmp_path / "t", steps=4, batch_size=40, snapshots=2, seed=5)
    torch.save(weights(teacher), Run(tmp_path / "t").snapshots[2])
    points = list(evaluate_snapshots(dataset, tmp_path / "t", images=120, device="cpu"))
    assert [point["step"] for point in points] == [2, 4]
    for point, model in zip(points, (teacher, tmp_path / "t"), strict=True):
        classifier, _ = load_classifier(model)
        for split in open_dataset(dataset).test_splits:
            right = predict(classifier, split, torch.device("cpu")) == split.labels[:]
            assert point[split.name] == pytest.approx(100 * right[::2].mean())  # of 300, every second


# --- stopped, grown, refused --------------------------------------------------------------------------------


SMALL = dataclasses.replace(TINY, limit=60, student={**TINY.student, "steps": 2, "batch_size": 20, "snapshots": 1})


@pytest.fixture
def no_pictures(monkeypatch):
    for name in ("heatmap_picture", "groups_picture", "curves_picture"):  # which take seconds
        monkeypatch.setattr(module, name, lambda *_: None)


@pytest.mark.parametrize(
    ("broken", "call"),
    [
        ("make", 1),
        ("train_teacher", 1),
        ("cache_explanations", 2),
        ("train_student", 2),
        ("evaluate", 3),
        ("evaluate_snapshots", 2),
        ("heatmap_picture", 1),
    ],
)
def test_stopped_anywhere_it_goes_on_without_making_anything_again(tmp_path, monkeypatch, no_pictures, broken, call):
    out, calls = tmp_path / "r", []
    benchmark = profiles.BENCHMARKS["coloured-mnist"]
    real = benchmark.make if broken == "make" else getattr(module, broken)

    def stop(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        if broken == "make":
            patched.setitem(profiles.BENCHMARKS, benchmark.name, dataclasses.replace(benchmark, make=stop))
        else:
            patched.setattr(module, broken, stop)
        with pytest.raises(KeyboardInterrupt):
            reproduce(out, SMALL, ["erm", "lrp"], seeds=1, echo=lambda _: None)
    before_it, seconds = times(out), json.loads((out / "reproduce.json").read_text())["seconds"]
    there = lines(out / "results.jsonl") if (out / "results.jsonl").exists() else []
    if there:  # somebody who stops here has a table of what is there
        assert (out / "report" / "table.md").read_text() == markdown(summarise(there, COLOURED))
    results = reproduce(out, SMALL, ["erm", "lrp"], seeds=1, echo=lambda _: None)
    assert before_it.items() <= times(out).items()
    assert [line["method"] for line in results] == ["teacher", "erm", "lrp"]
    assert results[: len(there)] == there
    now = json.loads((out / "reproduce.json").read_text())["seconds"]
    assert all(now[stage] >= spent for stage, spent in seconds.items())
    points = lines(out / "curves.jsonl")
    assert [(point["method"], point["step"]) for point in points] == [("erm", 4), ("lrp", 2)]


def test_a_training_stopped_between_two_steps_ends_with_the_same_weights_and_time_adds_up(
    tmp_path, no_pictures, stop_after  # noqa: F811
):  # fmt: skip
    profile = dataclasses.replace(SMALL, of_row={"erm": {"steps": 6}})
    reproduce(tmp_path / "whole", profile, ["erm"], seeds=1, echo=lambda _: None)
    stop_after(5)  # the teacher has four
    with pytest.raises(TrainingInterrupted, match="stopped after step 5 of 6"):
        reproduce(tmp_path / "r", profile, ["erm"], seeds=1, echo=lambda _: None)
    seconds = json.loads((tmp_path / "r" / "reproduce.json").read_text())["seconds"]
    assert seconds["models/erm-0"] > 0
    stop_after(0)
    reproduce(tmp_path / "r", profile, ["erm"], seeds=1, echo=lambda _: None)
    assert same(tmp_path / "r" / "models" / "erm-0", tmp_path / "whole" / "models" / "erm-0")
    assert (
        json.loads((tmp_path / "r" / "reproduce.json").read_text())["seconds"]["models/erm-0"]
        >= seconds["models/erm-0"]
    )


def test_methods_and_seeds_are_added_and_what_is_finished_stays(tmp_path, no_pictures):
    out, said = tmp_path / "r", []
    first = reproduce(out, SMALL, ["erm"], seeds=1, echo=said.append)
    assert not (out / "stores").exists()
    finished = times(out)
    results = reproduce(out, SMALL, ["lrp", "features"], seeds=2, echo=said.append)
    assert finished.items() <= times(out).items()
    assert [(line["method"], line["seed"]) for line in results] == [
        ("teacher", 0), ("erm", 0), ("lrp", 0), ("lrp", 1), ("features", 0), ("features", 1),
    ]  # fmt: skip
    assert results[:2] == first
    assert [line["steps"] for line in results[2:]] == [2, 2, 2, 2]
    assert "± " in (out / "report" / "table.md").read_text()
    finished = times(out)
    said.clear()
    results = reproduce(out, SMALL, ["erm"], seeds=2, echo=said.append)
    assert [line.split("] ")[1] for line in said] == [
        "erm, seed 1: 4 steps of small-cnn", "the report: tables and pictures",
    ]  # fmt: skip
    assert finished.items() <= times(out).items()
    assert {(point["method"], point["seed"]) for point in lines(out / "curves.jsonl")} == {
        (row, seed) for row in ("erm", "lrp", "features") for seed in (0, 1)
    }

    shutil.rmtree(out / "models" / "erm-1")  # somebody who wants it anew gets it, tested anew
    changed = [{**line, "iid": -1.0} if line["model"] == "models/erm-1" else line for line in results]
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    again = reproduce(out, SMALL, ["lrp"], seeds=1, echo=said.append)
    assert "models/erm-1" not in {line["model"] for line in again}
    assert (line := reproduce(out, SMALL, ["erm"], seeds=2, echo=said.append)[2])["model"] == "models/erm-1"
    assert line["iid"] == results[2]["iid"]


def test_another_profile_or_architecture_in_the_same_folder_is_refused_by_its_values(tmp_path, no_pictures):
    out = tmp_path / "r"
    reproduce(out, SMALL, ["teacher"], seeds=1, echo=lambda _: None)
    written = times(out, ("*",))
    resnet = dataclasses.replace(SMALL, student={**SMALL.student, "arch": "resnet18"})
    for profile, words in (
        (resnet, r"student\.arch: 'small-cnn', 'resnet18'; the recorded value first"),
        (dataclasses.replace(SMALL, seed=1), "seed: 0, 1"),
        (PROFILES["gpu"], r"limit: 60, None; name: 'cpu', 'gpu'; .*, and \d+ more; the recorded value first"),
    ):
        with pytest.raises(TrainingError, match=f"{words}.*choose another out"):
            reproduce(out, profile, ["teacher"], seeds=1)
    busy = r"another process is at work in .*: wait until it has finished"
    with lock(out, "at work"), pytest.raises(TrainingError, match=busy):
        reproduce(out, SMALL, ["teacher"], seeds=1)
    assert times(out, ("*",)) == written
    (out / "results.jsonl").write_text("{")
    with pytest.raises(TrainingError, match=r"results\.jsonl is damaged: remove it"):
        reproduce(out, SMALL, ["teacher"], seeds=1)
    (out / "reproduce.json").write_text("{")
    with pytest.raises(TrainingError, match=r"reproduce\.json is damaged: remove the folder, or choose another out"):
        reproduce(out, SMALL, ["teacher"], seeds=1)


def test_what_cannot_be_right_is_said_before_anything_is_made(tmp_path):
    out = tmp_path / "r"
    for change, error, words in (
        ({"student": {**SMALL.student, "arch": "resnet81"}}, ModelError, "Did you mean resnet18"),
        ({"student": {**SMALL.student, "arch": "vgg11"}}, ModelError, "does not take images of shape"),
    ):
        with pytest.raises(error, match=words):
            reproduce(out, dataclasses.replace(SMALL, **change), ["erm"], seeds=1)
    with pytest.raises(ModelError, match="the device 'tpu' cannot be used here"):
        reproduce(out, SMALL, ["erm"], seeds=1, device="tpu")
    with pytest.raises(TrainingError, match="no row is called 'lpr'"):
        reproduce(out, SMALL, ["lpr"], seeds=1)
    assert not out.exists()


def test_the_command_prints_the_table_and_where_it_is(tmp_path, monkeypatch, no_pictures):
    monkeypatch.setitem(profiles.PROFILES, "gpu", SMALL)
    command = ["reproduce", "coloured-mnist", "--out", str(tmp_path / "r"), "--methods", "erm", "--seeds", "2"]
    result = CliRunner().invoke(cli.main, [*command, "--profile", "gpu", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert re.search(r"^ERM +[\d.]+ ± [\d.]+ .* 100\.00 +16\.93 +0\.18 ", result.output, re.MULTILINE)
    assert re.search(r"^IRM .* published, needs unbiased data$", result.output, re.MULTILINE)
    assert f"tables and pictures: {tmp_path / 'r' / 'report'}" in result.output
    result = CliRunner().invoke(cli.main, [*command, "--profile", "gpu", "--arch", "resnet18"])
    assert result.exit_code == 1
    assert "student.arch: 'small-cnn', 'resnet18'" in result.output
    assert "teacher.arch: 'small-cnn', 'resnet18'" in result.output


def test_another_architecture_does_without_the_options_of_the_profiles_own(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "reproduce", lambda out, profile, arch, **_: asked.append((profile, arch)) or [])
    command = ["reproduce", "fashion-on-textures", "--out", str(tmp_path / "r"), "--profile", "gpu"]
    for more in ([], ["--arch", "resnet18"]):
        result = CliRunner().invoke(cli.main, [*command, *more])
        assert result.exit_code == 0, result.output
    assert asked == [(profiles.ON_TEXTURES["gpu"], None), (profiles.ON_TEXTURES["gpu"], "resnet18")]
    changed = profiles.with_arch(*asked[1])
    for options in (changed.teacher, changed.student):
        assert (options["arch"], "arch_options" in options) == ("resnet18", False)
