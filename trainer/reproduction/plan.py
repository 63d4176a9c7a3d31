"""The stages of a reproduction, in their order: pure functions of the rows, the profile and the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from options import Message, Option, did_you_mean
from pipeline.explainers import EXPLAINERS
from trainer.errors import TrainingError
from trainer.loop.methods import method_of, needs, parse_terms
from trainer.reproduction.profiles import USUAL_EXPLAINER, Options, Profile, Row


@dataclass(frozen=True)
class Stage:
    """One dataset, store or model to make.

    Attributes:
        kind: ``data``, ``teacher``, ``store`` or ``student``.
        path: its path in the reproduction's folder.
        says: its description in a line of progress.
        options: the options of the function that makes it. With ``teacher_weights``, ``init`` is a path in the
            reproduction's folder.
        needs: the stages before it, in the order of that function's parameters. Those of a teacher with a dataset of
            its own are the dataset of the tests, and its own.
        row: the row of a model.
        seed: the seed of a model.
    """

    kind: str
    path: str
    says: str
    options: Options
    needs: tuple[Stage, ...] = ()
    row: str | None = None
    seed: int = 0


def chosen(profile: Profile, methods: Sequence[str] | None) -> tuple[str, ...]:
    """Choose the rows to make, with the teachers that they need.

    Args:
        profile: the profile, which knows the table.
        methods: names of rows, or ``all``; the usual rows of the benchmark if None.

    Returns:
        Names of rows in the order of the table.

    Raises:
        TrainingError: a name is unknown, or there is none.
    """
    table = profile.table
    known = profile.rows or tuple(table.rows)
    if methods is None:
        methods = [key for key in known if key in table.usual]
    elif "all" in methods:
        methods = known
    for key in methods:
        if key not in known:
            raise TrainingError(
                Message(
                    f"no row is called '{key}' in ",
                    Option("methods"),
                    f": choose from all, {', '.join(known)}.{did_you_mean(key, known)}",
                )
            )
    if not methods:
        raise TrainingError(Message(Option("methods"), f" names no row: choose from all, {', '.join(known)}"))
    rows = {*methods, *(table.rows[key].teacher for key in methods)}
    return tuple(key for key in table.rows if key in rows)


def plan(profile: Profile, rows: Sequence[str], seeds: int) -> list[Stage]:
    """List the stages of the rows, each once and after those that it needs; a seed is finished before the next one."""
    stages: dict[str, Stage] = {}

    def add(stage: Stage) -> None:
        for needed in stage.needs:
            add(needed)
        stages.setdefault(stage.path, stage)

    for seed in range(profile.seed, profile.seed + seeds):
        for row in rows:
            is_teacher = profile.table.rows[row].loss is None
            add(_teacher(profile, row) if is_teacher else _student(profile, row, seed))
    return list(stages.values())


def factory_of(profile: Profile, key: str) -> str | None:
    """Return the function that builds the networks of a row; None if they have an architecture by name."""
    if profile.table.rows[key].loss is None:
        return profile.teacher.get("teacher_factory")
    return {**profile.student, **profile.of_row.get(key, {})}.get("student_factory")


def before(stage: Stage) -> dict[str, Stage]:
    """Collect all stages before a stage, by path."""
    stages: dict[str, Stage] = {}
    for needed in stage.needs:
        stages |= before(needed) | {needed.path: needed}
    return stages


def _data(profile: Profile) -> Stage:
    return Stage("data", "data.zarr", profile.table.says, _of_data(profile, profile.data))


def _of_data(profile: Profile, options: Options) -> Options:
    return {**options, **({"seed": profile.seed} if profile.table.seeded else {}), "limit": profile.limit}


def _teacher(profile: Profile, row: str) -> Stage:
    options = {"debias": profile.table.debias, **profile.teacher, "bias_free": _bias_free(profile, row)}
    options |= {"seed": profile.seed}
    says = f"{row}, which sees {profile.table.sees}: {_length(options)}"
    data: tuple[Stage, ...] = (_data(profile),)
    if profile.teacher_data is not None:
        own = _of_data(profile, profile.teacher_data)
        data += (Stage("data", "teacher-data.zarr", f"the teacher's dataset: {profile.table.sees}", own),)
    return Stage("teacher", f"models/{row}", says, options, data, row, profile.seed)


def _explainer(profile: Profile, row: Row) -> str | None:
    return profile.explainer if row.explainer == USUAL_EXPLAINER else row.explainer


def _loss(profile: Profile, row: Row) -> str:
    """Return the loss of a student, with the method that matches the maps of the profile's explainer for ``lrp``."""
    assert row.loss is not None
    matching, terms = method_of(profile.explainer), parse_terms(None, row.loss)
    if matching == "lrp" or "lrp" not in terms:
        return row.loss
    return ",".join(f"{matching if name == 'lrp' else name}={weight:g}" for name, weight in terms.items())


def _store(profile: Profile, teacher: str, explainer: str, split: str) -> Stage:
    rows = profile.table.rows
    readers = [
        row
        for key in profile.rows or rows
        if ((row := rows[key]).teacher, _explainer(profile, row)) == (teacher, explainer)
    ]
    explained = profile.draws if split == "train" else 1  # a validation uses the first draw alone
    options = {
        "split": split,
        "explainer": explainer,
        "features": any("features" in needs(parse_terms(None, row.loss)) for row in readers),
        "draws": None if EXPLAINERS.find(explainer).rules is None else explained,
        "epsilon_range": profile.epsilon_range,
        "teacher_factory": factory_of(profile, teacher),
        "seed": profile.seed,
        **profile.caching,
    }
    says = f"stage one: {teacher}'s maps ({explainer}) of the {split} split, written to a store"
    path = f"stores/{teacher}-{explainer}-{split}.zarr"
    return Stage("store", path, says, options, (_data(profile), _teacher(profile, teacher)))


def _student(profile: Profile, key: str, seed: int) -> Stage:
    row = profile.table.rows[key]
    options: dict[str, Any] = {"augment": (), "optimizer": "adam", **profile.student, **profile.of_row.get(key, {})}
    options |= {"loss": _loss(profile, row), "bias_free": _bias_free(profile, key), "seed": seed}
    if row.augment:
        options["augment"] = row.augment
    if options.get("teacher_weights"):
        assert row.teacher is not None
        options["init"] = _teacher(profile, row.teacher).path
    stores: tuple[Stage, ...] = ()
    if (explainer := _explainer(profile, row)) is not None:
        assert row.teacher is not None
        splits = ("train", "validation") if profile.table.biased_validation else ("train",)
        stores = tuple(_store(profile, row.teacher, explainer, split) for split in splits)
    says = f"{key}, seed {seed}: {_length(options)}"
    return Stage("student", f"models/{key}-{seed}", says, options, (_data(profile), *stores), key, seed)


def _bias_free(profile: Profile, key: str) -> bool:
    row = profile.table.rows[key]
    if row.bias_free is not None:
        return row.bias_free
    return bool(profile.teacher["bias_free"]) if row.teacher is None else _bias_free(profile, row.teacher)


def _length(options: Options) -> str:
    length = f"{options['steps']:,} steps" if "steps" in options else f"{options['epochs']:g} epochs"
    factory = options.get("teacher_factory") or options.get("student_factory")
    return f"{length} of {factory or options['arch']}"
