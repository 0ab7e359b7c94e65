"""``benchmarks.gpu`` goes through all its parts without a GPU, on tiny shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as visit
from benchmarks.gpu import checks, ours
from benchmarks.gpu.harness import Bench
from tests import fp8
from tests.replay import MaskedAttention, Replays
from tests.standin import standin


def failed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """But for what this torch cannot do without a GPU."""
    errors = [entry for entry in found if "error" in entry]
    return [entry for entry in errors if fp8.works() or "scaled_mm" not in entry["error"]]


def results(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(out.read_text())["results"]
    return found


def test_every_part_runs_dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With graphs stood in for, whose paths a visit takes.
    for module in ("engine.runner", "benchmarks.gpu.kernels"):
        monkeypatch.setattr(f"{module}.capture_on", lambda device: Replays())
    monkeypatch.setattr("engine.runner.choose", lambda name, config, *_: MaskedAttention(config))
    out = tmp_path / "result.json"
    status = visit.main(["--dry-run", "--out", str(out)])
    found = results(out)
    assert failed(found) == []
    assert status == (0 if fp8.works() else 1)
    assert {entry["part"] for entry in found} == set(visit.PARTS)
    figures = [entry for entry in found if "value" in entry]
    assert {entry["part"] for entry in figures} >= {"ceilings", "decode", "encoder", "syncs"}
    # No machine but the one the marks are meant for is judged by them.
    assert not any("passed" in entry for entry in figures)
    assert any(entry.get("passed") for entry in found if entry["part"] == "tokens")


def test_every_part_runs_beside_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device made of main memory, where a wait in a step is an error to the part ``syncs``."""
    monkeypatch.setattr("model.triton._fault", lambda: "not to be used")
    bench = Bench(torch.device("cuda"), dry=True)
    with standin():
        for bench.part, part in visit.PARTS.items():
            # Kernels' tests choose the device by themselves; tokens are test_on_a_device's.
            if part not in (ours.tests, checks.tokens):
                with bench.case(bench.part):
                    part(bench)
    assert failed(bench.results) == []
    assert [entry for entry in bench.results if entry.get("passed") is False] == []
    replayed = {entry["case"] for entry in bench.results if entry["case"].startswith("graph")}
    assert replayed == {"graph tiles=1", "graph tiles=2"}


def test_one_failure_does_not_lose_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: Bench) -> None:
        bench.record("before", 1.0, "s")
        raise RuntimeError("out of memory")

    def works(bench: Bench) -> None:
        bench.check("right", True)

    monkeypatch.setattr(visit, "PARTS", {"first": fails, "second": works, "third": works})
    out = tmp_path / "result.json"
    assert visit.main(["first", "second", "--dry-run", "--out", str(out)]) == 1
    assert [entry["part"] for entry in results(out)] == ["first", "first", "second"]
    assert results(out)[1]["error"] == "RuntimeError: out of memory"
    assert "| second | right |  |  | ok |" in capsys.readouterr().out
    assert visit.main(["--dry-run", "--seconds", "-1", "--out", str(out)]) == 0
    assert {entry["skipped"] for entry in results(out)} == {"out of time"}
    with pytest.raises(SystemExit):
        visit.main(["--out", str(out)])  # without a GPU nothing else than a dry run


def test_marks_are_judged_on_a_device() -> None:
    bench = Bench(device=None, dry=False)  # type: ignore[arg-type]
    bench.record("fast enough", 2.0, "x", least=2.0)
    bench.record("too slow", 2.1, "x", most=2.0)
    assert [entry["passed"] for entry in bench.results] == [True, False]
    assert "**no**" in visit.table(bench.results)
