"""Options of the commands that train many models: reproductions, the quickstart and sweeps. No PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from options import Doc, Ge, Heading, Kind, Le, OptionSet, Separated
from trainer.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(OptionSet):
    """Options of every `reproduce`."""

    ERROR = TrainingError
    HEADING = "Table"

    methods: Annotated[
        tuple[str, ...] | None,
        Separated(),
        Doc("Rows of the table, such as lrp,output; or all. Default: the usual rows of the benchmark."),
    ] = None
    seeds: Annotated[int, Ge(1), Doc("Number of students of each row.")] = 3
    arch: Annotated[
        str | None, Kind.ARCHITECTURE, Doc("Architecture of teachers and students. Default: that of the profile.")
    ] = None
    out: Annotated[
        str | Path,
        Kind.FOLDER,
        Heading("Files"),
        Doc("Output folder: new, empty, or an earlier reproduction to resume or extend."),
    ]
    device: Annotated[str, Heading("Run"), Doc("Device: auto, cpu, cuda or cuda:N.")] = "auto"


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions(OptionSet):
    """Options of the quickstart command."""

    ERROR = TrainingError

    out: Annotated[
        str | Path,
        Kind.FOLDER,
        Heading("Files"),
        Doc("Output folder: new, empty, or an earlier quickstart to resume."),
    ] = "quickstart"
    seed: Annotated[int, Ge(0), Le(2**63 - 1), Heading("Run"), Doc("Random seed.")] = 0


@dataclass(frozen=True, kw_only=True)
class SweepOptions(OptionSet):
    """Options of a sweep, besides those of its students."""

    ERROR = TrainingError

    out: Annotated[
        str | Path,
        Kind.FOLDER,
        Heading("Files"),
        Doc("Output folder, with a folder for each student: new, empty, or an earlier sweep to resume or extend."),
    ]
    devices: Annotated[
        tuple[str, ...] | None,
        Separated(),
        Heading("Run"),
        Doc("Devices, such as cuda:0,cuda:1; each trains one student at a time. Default: every GPU, or the CPU."),
    ] = None
