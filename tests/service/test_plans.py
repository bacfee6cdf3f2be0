"""No call of the API reads a large table from end to end. `make bench-scale` looks at fifty times as many rows."""

from pathlib import Path

import pytest

from service.settings import Settings
from tests.benchmarks.durability_parts import libpq_url
from tests.benchmarks.scale import serving
from tests.benchmarks.scale_plans import Statement, call_everything, read_statements, scans
from tests.benchmarks.scale_rows import fill
from tests.engine import free_port

NUM_REPLIES, NUM_VOTES = 40_000, 16_000
LARGE = {"votes", "replies", "snapshot_feedback"}


@pytest.mark.database
def test_every_statement_of_every_call_finds_its_rows_by_an_index(prepared: Settings, tmp_path: Path) -> None:
    settings = prepared.model_copy(update={"port": free_port()})
    fill(libpq_url(settings), NUM_REPLIES, NUM_VOTES)
    before = scans(libpq_url(settings))
    assert before.keys() >= LARGE
    with serving(settings, str(tmp_path / "plans")):
        left_out = call_everything(settings)
    statements = read_statements(tmp_path / "plans", libpq_url(settings))
    assert left_out == [], "`Walk` in scale_plans.py makes each call once: add it there"
    assert [(fault, statement.text) for statement in statements for fault in statement.faults] == []
    assert scans(libpq_url(settings), before) == {}
    assert sum("votes" in statement.text for statement in statements) > 5


@pytest.mark.parametrize(
    ("kind", "table", "rows", "loops", "faults"),
    [
        ("Seq Scan", "votes", 1, 1, 1),
        ("Seq Scan", "policies", 100_000, 1, 0),
        ("Index Scan", "votes", 100, 1, 0),
        ("Index Only Scan", "votes", 300_000, 1, 1),
        ("Index Scan", "replies", 3, 10_000, 1),
    ],
)
def test_a_step_that_reads_too_much_of_a_large_table_is_a_fault(
    kind: str, table: str, rows: int, loops: int, faults: int
) -> None:
    step = {"Node Type": kind, "Relation Name": table, "Actual Rows": rows, "Actual Loops": loops}
    statement = Statement("SELECT")
    statement.add("GET /", {"Execution Time": 1.0, "Plan": {"Node Type": "Limit", "Plans": [step]}}, LARGE)
    assert len(statement.faults) == faults
