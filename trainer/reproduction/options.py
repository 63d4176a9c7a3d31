"""Options of the commands that train many models: reproductions, the quickstart and sweeps. No PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from options import Doc, Ge, Heading, Kind, Metavar, OptionSet, Separated
from options.common import Device, Seed
from trainer.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(OptionSet):
    """Options of every `reproduce`."""

    ERROR = TrainingError
    HEADING = "Benchmark"

    methods: Annotated[
        tuple[str, ...] | None,
        Separated(),
        Metavar("ROW,…"),
        Doc("Rows of the table, such as lrp,output, or all. Default: the usual rows of the benchmark."),
    ] = None
    seeds: Annotated[int, Ge(1), Doc("Number of students in each row. Each has its own seed.")] = 3
    arch: Annotated[
        str | None, Kind.ARCHITECTURE, Doc("Architecture of teachers and students. Default: the profile's.")
    ] = None
    out: Annotated[
        str | Path,
        Kind.FOLDER,
        Heading("Files"),
        Doc("Output folder: new, empty, or an earlier reproduction to resume or extend."),
    ]
    device: Annotated[Device, Heading("Run")] = "auto"


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
    seed: Annotated[Seed, Heading("Run")] = 0


@dataclass(frozen=True, kw_only=True)
class SweepOptions(OptionSet):
    """Options of a sweep, besides those of its students."""

    ERROR = TrainingError

    out: Annotated[
        str | Path,
        Kind.FOLDER,
        Heading("Files"),
        Doc("Output folder, with a subfolder for each student: new, empty, or an earlier sweep to resume or extend."),
    ]
    devices: Annotated[
        tuple[str, ...] | None,
        Separated(),
        Metavar("DEVICE,…"),
        Heading("Run"),
        Doc("Devices, such as cuda:0,cuda:1. Each trains one student at a time. Default: all GPUs, or the CPU."),
    ] = None
