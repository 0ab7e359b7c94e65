"""docs/models.md shows what benchmarks/results/family.json holds, all of it in bounds."""

import json

from benchmarks.family import FORMATS, table
from tests.checkpoints import INTERNVL3
from tests.servers import ROOT


def test_the_table_is_of_the_results() -> None:
    rows = json.loads((ROOT / "benchmarks/results/family.json").read_text("utf-8"))["rows"]
    assert table(rows) in (ROOT / "docs/models.md").read_text("utf-8")
    assert all(row["passed"] and not row["wrong"] for row in rows)
    for precision in ("float32", "bfloat16"):
        found = {(row["size"], row["format"]) for row in rows if row["precision"] == precision}
        assert found == {(size, format) for size in INTERNVL3 for format in FORMATS}
