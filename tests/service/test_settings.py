"""Options, where they come from, and how many CPUs a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import CliApp

from service.settings import Settings, available_cpus, cgroup_cpus, sentences, unknown_variables


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DSFORMER_"):
            monkeypatch.delenv(name)


def test_every_option_has_a_flag_that_beats_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSFORMER_MAX_BATCH_ITEMS", "3")
    monkeypatch.setenv("DSFORMER_PORT", "9001")
    settings = CliApp.run(Settings, cli_args=["--max-batch-items", "5"])
    assert (settings.max_batch_items, settings.port) == (5, 9001)


def test_every_option_is_described() -> None:
    assert all(option.description for option in Settings.model_fields.values())


def test_a_wrong_value_is_named_as_flag_and_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    # What Kubernetes sets in pods beside a Service called dsformer.
    monkeypatch.setenv("DSFORMER_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert "--port (DSFORMER_PORT)" in sentences(caught.value)
    assert "tcp://10.0.0.1:8000" in sentences(caught.value)


def test_variables_that_nobody_reads_are_found_and_those_of_the_kernels_are_not() -> None:
    environ = {"DSFORMER_ISA": "scalar", "DSFORMER_THREAD": "1", "DSFORMER_THREADS": "1", "HOME": "/"}
    assert unknown_variables(environ) == ["DSFORMER_THREAD"]


def test_an_isa_forced_by_variable_is_no_error_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSFORMER_ISA", "scalar")
    Settings()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_cgroup_quota(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_cpus(tmp_path) == expected
    affinity = len(os.sched_getaffinity(0))
    whole = affinity if expected is None else {1.5: 2, 0.5: 1}[expected]
    assert available_cpus(tmp_path) == min(affinity, whole)
