"""The CPU threads of PyTorch: how many, and a word on a busy machine."""

from __future__ import annotations

import json
import os
import threading

import pytest
import torch
import yaml
from click.testing import CliRunner

import pipeline.threads
from cli import main
from pipeline import RelevanceError, cache_explanations
from pipeline.caching.options import CachingOptions
from pipeline.device import small_numbers_are_zero
from pipeline.threads import cpu_threads, machine_load
from trainer import train_student

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("load", "threads", "device", "busy"),
    [(5.2, None, "cpu", True), (2.0, None, "cpu", False), (5.2, 2, "cpu", False), (5.2, None, "cuda", False)],
)
def test_a_machine_with_more_work_than_cores_is_told_once(
    monkeypatch, caplog, two_threads, load, threads, device, busy
):
    monkeypatch.setattr(pipeline.threads, "machine_load", lambda: load)
    monkeypatch.setattr(pipeline.threads, "cpu_count", lambda: 2)
    with cpu_threads(threads, torch.device(device)):
        pass
    expected = "this machine is busy (load 5.2, 2 cores): the 2 threads of PyTorch wait for each other"
    assert [expected in message for message in caplog.messages] == [True] * busy
    assert ("give threads=1" in caplog.text) == busy


def test_one_thread_waits_for_nobody(monkeypatch, caplog):
    monkeypatch.setattr(pipeline.threads, "machine_load", lambda: 100.0)
    with cpu_threads(None, CPU):
        assert torch.get_num_threads() == 1
    assert not caplog.messages


def test_the_number_of_threads_holds_until_the_end_of_the_work_and_no_longer(two_threads):
    seen = []

    def fail() -> None:
        with cpu_threads(1, CPU):
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [1]
    assert torch.get_num_threads() == 2


def test_a_system_that_tells_no_load_is_not_busy(monkeypatch):
    monkeypatch.delattr(os, "getloadavg")
    assert machine_load() == 0.0


@pytest.mark.parametrize(("asked", "of_openmp", "used"), [(None, None, 1), (2, None, 2), (None, "2", 2)])
def test_a_container_that_may_use_fewer_cores_gets_fewer_threads(monkeypatch, two_threads, asked, of_openmp, used):
    monkeypatch.setattr(pipeline.threads, "cpu_count", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if of_openmp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", of_openmp)
    with cpu_threads(asked, CPU):
        assert torch.get_num_threads() == used
    assert torch.get_num_threads() == 2


def test_a_training_and_a_store_take_the_number_of_threads(dataset, teacher, tmp_path):
    train_student(dataset, None, tmp_path / "s", method="erm", steps=1, threads=2)
    assert json.loads((tmp_path / "s" / "starts.jsonl").read_text())["threads"] == 2
    cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=1, threads=2)
    assert torch.get_num_threads() == 1
    with pytest.raises(RelevanceError, match="threads=2 or scheduler, not both"):
        CachingOptions(data="d", teacher="t", out="o", threads=2, scheduler="tcp://a:1")


def test_another_number_of_threads_resumes_a_training_and_older_config_files_are_read(dataset, tmp_path):
    options = {"method": "erm", "steps": 2, "checkpoint_steps": 1}
    train_student(dataset, None, tmp_path / "s", **options, threads=1)
    for name in ("result.json", "checkpoints/step-000000002.pt"):
        (tmp_path / "s" / name).unlink()
    train_student(dataset, None, tmp_path / "s", **options, threads=2)
    written = yaml.safe_load((tmp_path / "s" / "config.yaml").read_text())
    assert written.pop("threads") == 1
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({**written, "out": str(tmp_path / "again")}))
    result = CliRunner().invoke(main, ["train-student", "--config", str(tmp_path / "old.yaml")])
    assert result.exit_code == 0, result.output


def test_the_command_line_names_the_flag(dataset, tmp_path, monkeypatch, two_threads, capfd):
    monkeypatch.setattr(pipeline.threads, "machine_load", lambda: 100.0)
    arguments = [
        "train-student",
        "--data",
        str(dataset),
        "--method",
        "erm",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "s"),
    ]
    result = CliRunner().invoke(main, arguments)
    assert "give --threads 1\n" in result.output + capfd.readouterr().err


def _are_zero() -> bool:
    return (torch.full((4,), 1e-38) * 1e-5 == 0).all().item()


FLUSHES = pytest.mark.skipif(not torch.set_flush_denormal(False), reason="PyTorch cannot set it on this processor")


@FLUSHES
def test_small_numbers_are_zero_in_the_context_and_its_threads_alone():
    seen = []
    with small_numbers_are_zero():
        with small_numbers_are_zero():
            pass
        thread = threading.Thread(target=lambda: seen.append(_are_zero()))
        thread.start()
        thread.join()
        assert _are_zero()
        assert seen == [True]
    assert not _are_zero()


@FLUSHES
def test_small_numbers_are_zero_in_both_stages(dataset, teacher, tmp_path):
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *call: seen.append(_are_zero()))
    try:
        train_student(dataset, None, tmp_path / "s", method="erm", steps=1)
        assert seen
        assert all(seen)
        seen.clear()
        cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=1)
        assert seen[-1]
    finally:
        hook.remove()
    assert not _are_zero()
