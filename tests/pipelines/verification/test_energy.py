from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.verification.energy import POWERCAP, open_meter


def stand_in(root: Path, packages: dict[str, int], *, range_uj: int = 1_000_000) -> None:
    for name, value in packages.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "energy_uj").write_text(f"{value}\n")
        (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")


def test_a_stand_in_for_rapl_is_summed_over_packages_and_wraps(tmp_path: Path) -> None:
    stand_in(tmp_path, {"intel-rapl:0": 100, "intel-rapl:1": 900_000, "intel-rapl:0:0": 5})
    meter = open_meter(tmp_path)
    assert meter.reason == ""
    before = meter.read_uj()
    assert before == (100, 900_000)
    stand_in(tmp_path, {"intel-rapl:0": 500_100, "intel-rapl:1": 150_000, "intel-rapl:0:0": 7})
    assert meter.joules_since(before) == pytest.approx(0.5 + 0.25)


def test_without_counters_energy_is_unknown_with_a_reason_never_zero(tmp_path: Path) -> None:
    meter = open_meter(tmp_path)
    assert str(tmp_path) in meter.reason
    assert meter.joules_since(meter.read_uj()) is None


def test_a_counter_that_cannot_be_read_is_named_in_the_reason(tmp_path: Path) -> None:
    stand_in(tmp_path, {"intel-rapl:0": 1})
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()
    meter = open_meter(tmp_path)
    assert "energy_uj" in meter.reason
    assert meter.joules_since(meter.read_uj()) is None


def test_this_machine_gives_either_energy_or_a_reason() -> None:
    meter = open_meter()
    assert bool(meter.domains) != bool(meter.reason)
    if not POWERCAP.exists():
        assert meter.reason
