"""Measured numbers are kept on disk: read again, measured anew where the file is not what was written."""

from __future__ import annotations

import pytest
import torch

from smc_compile.auto.calibration import rates
from smc_compile.auto.kept_rates import kept, machine_of, place

CPU = torch.device("cpu")
NUMBERS = {"call": 1e-6, "small": [1e-9, 2e-9]}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def refuse() -> dict[str, float]:
    raise AssertionError("measured again")


def test_what_was_measured_is_read_again():
    assert kept("some", CPU, lambda: NUMBERS) == NUMBERS
    assert kept("some", CPU, refuse) == NUMBERS
    assert kept("others", CPU, lambda: {"call": 2.0}) == {"call": 2.0}
    assert [path.suffix for path in place("some", CPU).parent.iterdir()] == [".json"] * 2


@pytest.mark.parametrize("text", ["", "{", "[1.0]", '{"call": null}', '{"call": NaN}', '{"call": -1}', '{"a": "1"}'])
def test_a_broken_file_is_measured_anew(text):
    kept("some", CPU, lambda: NUMBERS)
    place("some", CPU).write_text(text)
    assert kept("some", CPU, lambda: {"call": 3.0}) == {"call": 3.0}
    assert kept("some", CPU, refuse) == {"call": 3.0}


def test_where_nothing_can_be_written_it_is_measured(tmp_path):
    (tmp_path / "smc_rates").write_text("a file where the folder should be")
    assert kept("some", CPU, lambda: NUMBERS) == NUMBERS
    assert kept("some", CPU, lambda: {"call": 2.0}) == {"call": 2.0}


def test_the_processor_is_told_without_what_changes_from_hour_to_hour():
    told = " ".join(machine_of(CPU))
    assert told
    assert "MHz" not in told


def test_rates_of_another_process_are_the_same(monkeypatch):
    import smc_compile.auto.calibration as calibration

    calibration._rates.cache_clear()
    first = rates(torch.float32, CPU)
    calibration._rates.cache_clear()  # as in another process
    monkeypatch.setattr(calibration, "measured_rates", lambda *_: pytest.fail("measured again"))
    assert rates(torch.float32, CPU) == first
    calibration._rates.cache_clear()
