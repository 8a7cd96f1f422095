"""The coverage table on its small rows. Oracles: the original model's outputs, zennit, conservation layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import coverage, zoo

SMALL = [(case, exporter) for case in zoo.cases() for exporter in case.exporters if case.small]


@pytest.mark.filterwarnings("ignore")  # exporters warn about themselves and about parts of torch that they use
@pytest.mark.parametrize(("case", "exporter"), SMALL, ids=lambda value: getattr(value, "name", value))
def test_small_row(case: zoo.Case, exporter: str) -> None:
    row = coverage.run(case, exporter)
    assert row.get("error") is None, row.get("trace", row.get("error"))
    assert row["exports"] is True
    assert row["canonizes"] is True
    assert row["explains"] is True
    assert row["conserves"] is True
    assert all(held is not False for held in row["conditions"])
    if case.oracle:
        assert min(row["parity"], row.get("parity64", 1)) < 1e-4
    if not row["not_itemised"]:
        assert abs(row["sum"] - 1) < 1e-3
    assert sum(row["rules"].values()) > 0


def test_eight_small_rows_of_more_than_sixty() -> None:
    assert len(SMALL) == 8
    rows = coverage.wanted((), False)
    assert len({f"{case.name} ({exporter})" for case, exporter in rows}) == len(rows) >= 60


def test_rows_are_kept_and_run_again_only_when_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def apart(key: str, limit: float) -> coverage.Row:
        ran.append(key)
        case, exporter = next((c, e) for c, e in SMALL if f"{c.name} ({e})" == key)
        failed = (
            {"exports": False, "error": "Error: a|b"} if exporter == "dynamo" else {"exports": True, "explains": True}
        )
        return {"name": case.name, "group": case.group, "exporter": exporter, "composite": case.composite, **failed}

    monkeypatch.setattr(coverage, "apart", apart)
    options = ["--small", "--json", str(tmp_path / "rows.json"), "--table", str(tmp_path / "table.md")]
    for more in ([], [], ["--only", "bert-like (dynamo)"]):
        result = CliRunner().invoke(coverage.main, [*options, *more])
        assert result.exit_code == 0, result.output
    assert len(ran) == 9
    assert ran[-1] == "bert-like (dynamo)"
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert [f"{row['name']} ({row['exporter']})" for row in kept] == [f"{c.name} ({e})" for c, e in SMALL]
    table = (tmp_path / "table.md").read_text()
    (tmp_path / "table.md").unlink()
    assert CliRunner().invoke(coverage.main, [*options, "--markdown"]).exit_code == 0
    assert (tmp_path / "table.md").read_text() == table
    assert len(ran) == 9
    assert "8 rows: 4 export, 4 of these are explained" in table
    assert "- bert-like (dynamo): Error: a\\|b" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {12}
    assert "no row nothing" in CliRunner().invoke(coverage.main, [*options, "--only", "nothing"]).output


def test_a_row_that_fails_or_takes_too_long_is_a_row(tmp_path: Path) -> None:
    row = coverage.apart("squeezenet1_1 (torchscript)", 0.01)
    assert row["error"] == "not done within 0.01 s"
    assert row["name"] == "squeezenet1_1"
