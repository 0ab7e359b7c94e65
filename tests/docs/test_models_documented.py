"""docs/models.md shows what benchmarks/results/family.json holds, all of it in bounds."""

import json
import subprocess
import sys

from tests.checkpoints import INTERNVL3
from tests.servers import ROOT


def test_the_table_is_of_the_results() -> None:
    file = "benchmarks/results/family.json"
    rows = json.loads((ROOT / file).read_text("utf-8"))["rows"]
    # In a process of its own: it imports Triton, which tests/kernels must do first.
    command = [sys.executable, "-m", "benchmarks.family", "--table", "--out", file]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.strip()
    assert told.strip() in (ROOT / "docs/models.md").read_text("utf-8")
    assert all(row["passed"] and not row["wrong"] for row in rows)
    for precision in ("float32", "bfloat16"):
        found = {(row["size"], row["format"]) for row in rows if row["precision"] == precision}
        assert found == {(size, format) for size in INTERNVL3 for format in ("hf", "chat")}
