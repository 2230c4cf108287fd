"""What services charge beside time, and how long they take to start."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from prefect_slo import pricing
from prefect_slo.charges import charge, charges
from prefect_slo.errors import InvalidValue, UnknownPrices


@pytest.mark.parametrize("name", charges())
def test_a_charge_says_its_unit_day_source_and_how_sure_it_is(name: str) -> None:
    known = charge(name)
    assert known.unit
    assert known.source.startswith("https://")
    assert date.fromisoformat(known.as_of) <= date(2026, 12, 31)
    assert known.confidence in ("high", "medium", "low")
    assert known.least <= known.value <= known.most


def test_a_write_costs_as_much_as_a_dozen_reads() -> None:
    assert charge("s3.put").value == pytest.approx(12.5 * charge("s3.get").value)


def test_starts_of_jobs_are_estimates_with_a_range() -> None:
    starts = [
        charge(f"batch_launch.{kind}") for kind in ("warm_instance", "fargate", "new_instance", "new_gpu_instance")
    ]
    assert [each.value for each in starts] == sorted(each.value for each in starts)
    assert all(each.least < each.value < each.most and each.confidence == "low" for each in starts)


def test_ones_own_charge_stands_for_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "aws.toml").write_text('as_of = 2026-11-20\n[s3.put]\nvalue = 0.1\nunit = "USD"\n')
    monkeypatch.setattr(pricing, "_OWN_FOLDERS", [tmp_path])
    assert (charge("s3.put").value, charge("s3.put").as_of) == (0.1, "2026-11-20")
    assert charge("s3.get").value == 4e-7


def test_an_unknown_charge_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UnknownPrices, match=r"s3\.put"):
        charge("s3.thought")
    with pytest.raises(UnknownPrices, match="aws"):
        charges("moon")


@pytest.mark.parametrize(
    "content",
    ["s3 = 1", "[s3]\nput = 1", "[s3.put]\nunit = 'USD'", "[s3.put]\nvalue = -1", "[s3.put]\nvalue = 1\nvalu = 2",
     "[s3.put]\nvalue = 3\nmost = 2", "not toml"],
)  # fmt: skip
def test_a_file_that_holds_no_charges_is_refused(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "aws.toml").write_text(content)
    monkeypatch.setattr(pricing, "_OWN_FOLDERS", [tmp_path])
    with pytest.raises(InvalidValue):
        charges()
