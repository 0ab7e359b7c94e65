"""The benchmarks' client, tables and charts: that what they say is what was measured."""

import itertools
import json
import multiprocessing
import os
import select
import threading
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import pytest
from tokenizers import Tokenizer

from benchmarks.bench import give_texts
from benchmarks.cases import CASES, TransformersClient, our_client
from benchmarks.charts import BEGIN, CHARTS, END, chart, insert, shown
from benchmarks.compare import Comparison, facts, our_server, peer_server, without_folders
from benchmarks.processes import Server as Process
from benchmarks.table import LADDER, MARKS, TTFT, Results, aligned, report
from benchmarks.vllm_client import VllmClient, VllmProgram
from server.bench.client import Case, summary
from server.bench.send import Answer, Failed, send
from tests import scripted_api
from tests.checkpoints import make_checkpoint
from tests.servers import ROOT, Server

USAGE = {"prompt_tokens": 1, "completion_tokens": 1}
SVG = "{http://www.w3.org/2000/svg}"


def measured(server: str, case: str, round_: int, **figures: float) -> dict[str, Any]:
    return {"server": server, "case": case, "round": round_, **figures}


def results(records: list[dict[str, Any]]) -> dict[str, Any]:
    known = facts("our own") | {"cases": {case.name: case.title for case in CASES}}
    return known | {"records": records}


RECORDS = [
    measured(server, "text-c1", index, tokens_per_s=speed, ttft_p50_ms=wait, output_tokens=64)
    for server, rounds in {
        "ours": [(10, 100), (30, 110), (25, 120)],
        "slow<&>": [(10, 300), (10, 500), (8, 400)],
    }.items()
    for index, (speed, wait) in enumerate(rounds)
]


def row(text: str, *beginning: str) -> list[str]:
    """Cells of the row of a table that begins with some."""
    rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    (found,) = (cells for cells in rows if cells[: len(beginning)] == list(beginning))
    return found


def test_a_ratio_is_of_medians_and_judged_by_its_mark() -> None:
    records = [
        *RECORDS,
        measured("ours", "start", 0, ready_s=9, rss_gib=2),
        measured("slow<&>", "start", 0, ready_s=30, rss_gib=4),
    ]
    text = report(results(records))
    assert row(text, "text, 1 at once", "output, tokens/s")[2:] == [
        *("25 (10–30)", "10 (8–10)", "2.5 (1–3.12)", "≥ 2", "yes")
    ]
    assert row(text, "start to ready", "s")[2:] == ["9", "30", "0.3", "≤ 0.25", "**no**"]
    assert row(text, "memory when ready", "GiB")[2:] == ["2", "4", "0.5", "≤ 0.8", "yes"]
    assert row(text, "text, 1 at once", "slow<&>")[4] == "400 (300–500)"


def test_a_terminal_sees_columns() -> None:
    text = report(results(RECORDS))
    shown = aligned(text)
    for beginning in ("text, 1 at once", "output, tokens/s"), ("text, 1 at once", "slow<&>"):
        assert row(shown, *beginning) == row(text, *beginning)
    tables = [table.splitlines() for table in shown.split("\n\n") if table.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert (
            len({tuple(at for at, sign in enumerate(line) if sign == "|") for line in table}) == 1
        )


def test_what_is_missing_is_no_figure_and_no_verdict() -> None:
    records = [record for record in RECORDS if record["server"] == "ours"]
    assert "reached" not in report(results(records))
    records += [
        measured("peer", "text-c1", 0) | {"error": "400: no such model"},
        measured("peer", "start", 0) | {"ready_s": None, "rss_gib": 3},
    ]
    text = report(results(records))
    assert row(text, "text, 1 at once", "output, tokens/s")[3:] == ["–", "–", "≥ 2", "–"]
    assert row(text, "peer", "–", "3")
    assert "peer failed text-c1: 400: no such model" in text


def test_answers_of_different_length_are_told() -> None:
    assert "different numbers of tokens" not in report(results(RECORDS))
    other = measured("other", "text-c1", 0, tokens_per_s=9, output_tokens=12)
    assert "wrote different numbers of tokens" in report(results([*RECORDS, other]))
    sent = [record | {"prompt_tokens": 9 + len(record["server"])} for record in RECORDS]
    assert "were sent different numbers of tokens" in report(results(sent))
    renamed = {"ours": "1B shape", "slow<&>": "demo model"}  # two models, as `make bench` has
    sent = [record | {"server": renamed[record["server"]]} for record in sent]
    assert "different numbers of tokens" not in report(results(sent))


def test_a_client_that_may_be_the_limit_is_told() -> None:
    for busy, told in ((0.4, False), (0.62, True)):
        records = [record | {"client_busy": busy} for record in RECORDS]
        assert ("text-c1: the client was busy for 62%" in report(results(records))) == told


def test_every_mark_is_of_a_case_that_is_measured() -> None:
    named = {case.name for case in CASES} | {"start"}
    assert {mark.case for mark in MARKS if mark.applies("vllm")} == named


def test_bars_are_as_long_as_their_figures() -> None:
    found = Results(results(RECORDS))
    for title, metric in CHARTS.values():
        root = ElementTree.fromstring(chart(found, title, metric))  # noqa: S314
        bars = {
            bar.attrib["class"]: float(bar.attrib["width"])
            for bar in root.iter(f"{SVG}rect")
            if bar.attrib["height"] == "16"
        }
        ratio = found.ratio("slow<&>", "text-c1", metric)
        assert ratio is not None
        assert bars["ours"] / bars["first"] == pytest.approx(ratio.median, rel=0.01)
        said = [text.text for text in root.iter(f"{SVG}text")]
        assert f"(×{ratio.short})" in " ".join(filter(None, said))
        assert "slow<&>" in said


def test_a_chart_has_a_dash_for_a_server_that_failed() -> None:
    failed = measured("peer", "text-c1", 0) | {"error": "500"}
    root = ElementTree.fromstring(chart(Results(results([*RECORDS, failed])), "Wait", TTFT))  # noqa: S314
    assert "–" in [text.text for text in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("place", ["vllm", "transformers", "ladder"])
def test_documentation_has_a_place_for_the_tables(place: str) -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    once = insert(page, place, "a table")
    assert once.count("a table") == 1
    assert insert(once, place, "a table") == once
    assert insert(once, place, "another").count("a table") == 0
    assert page.split(BEGIN.format(place))[0] in once
    assert page.split(END.format(place))[1] in once


def test_other_peers_than_vllm_have_no_marks() -> None:
    for peer in ("vllm", "transformers"):
        renamed = [
            record | {"server": peer if record["server"] != "ours" else "ours"}
            for record in RECORDS
        ]
        place, text, charts = shown(results(renamed))
        assert place == peer
        assert row(text, "text, 1 at once", "output, tokens/s")[2:5] == [
            *("25 (10–30)", "10 (8–10)", "2.5 (1–3.12)")
        ]
        assert ("| mark |" in text) == (peer == "vllm")
        assert (charts.keys() == CHARTS.keys()) == (peer == "vllm")


def test_a_comparison_with_nobody_has_no_place() -> None:
    with pytest.raises(ValueError, match="neither a ladder nor a comparison"):
        shown(results([record for record in RECORDS if record["server"] == "ours"]))


def test_a_ladder_has_a_row_and_a_bar_for_each_rung() -> None:
    records = [
        measured("ours", rung, index, **{metric.key: value for metric in LADDER[:-1]})
        for rung, values in {"low": (40.0, 60.0, 50.0), "high": (25.0, 20.0, 90.0)}.items()
        for index, value in enumerate(values)
    ]
    found = results(records) | {"cases": {"low": "nothing", "high": "all of it"}}
    place, text, charts = shown(found)
    assert place == "ladder"
    assert row(text, "nothing")[1:] == ["50 (40–60)"] * 5 + ["–"]
    assert row(text, "all of it")[1:] == ["25 (20–90)"] * 5 + ["–"]
    ((_, svg),) = charts.values()
    root = ElementTree.fromstring(svg)  # noqa: S314
    bars = [float(bar.attrib["width"]) for bar in root.iter(f"{SVG}rect") if "x" in bar.attrib]
    assert len(bars) == 8
    assert bars[0] == pytest.approx(2 * bars[1], abs=0.1)
    said = [text.text for text in root.iter(f"{SVG}text")]
    assert (said.count("50"), said.count("25")) == (4, 4)
    assert "all of it" in said


def test_a_case_has_as_many_requests_as_go_at_once() -> None:
    assert Case("", "", 8, concurrency=4).at_most(2).requests == 4
    assert Case("", "", 8).at_most(2).requests == 2
    assert Case("", "", 8).at_most(20).requests == 8


def test_figures_of_answers() -> None:
    answers = [Answer([0.1, 0.2, 0.5], 10, 5), Answer([0.3, 0.4], 20, 3)]
    found = summary(answers, 2.0)
    assert (found["requests_per_s"], found["tokens_per_s"]) == (1.0, 4.0)
    assert (found["prompt_tokens"], found["output_tokens"]) == (30, 8)
    assert found["ttft_p50_ms"] == pytest.approx(200)
    assert found["itl_p50_ms"] == pytest.approx(100)
    assert found["tpot_p50_ms"] == pytest.approx((100 + 50) / 2)
    assert found["e2e_p50_ms"] == pytest.approx(450)
    assert [found[f"{name}_count"] for name in ("ttft", "itl", "tpot", "e2e")] == [2, 3, 2, 2]


def test_an_answer_of_one_token_has_no_time_per_further_token() -> None:
    found = summary([Answer([0.1, 0.5], 1, 3), Answer([0.1], 1, 1)], 1.0)
    assert (found["tpot_count"], found["tpot_p50_ms"]) == (1, pytest.approx(200))


@pytest.mark.parametrize(
    ("count", "known"), [(0, ()), (1, (50,)), (9, (50,)), (10, (50, 90)), (100, (50, 90, 99))]
)
def test_a_percentile_of_too_few_values_is_none(count: int, known: tuple[int, ...]) -> None:
    answers = [Answer([0.1 + index / 1000], 1, 1) for index in range(count)]
    found = summary(answers, 1.0)
    assert tuple(p for p in (50, 90, 99) if found[f"ttft_p{p}_ms"] is not None) == known
    assert found["itl_p50_ms"] is None
    if count == 100:
        assert found["ttft_p90_ms"] == pytest.approx(100 + 89.1)


def test_prompts_have_the_tokens_of_the_case(demo_server: Server) -> None:
    client = our_client(demo_server.url)
    few = client.measure(Case("", "", 3, 2, input_tokens=50, output_tokens=8), 1)
    many = client.measure(Case("", "", 3, 2, input_tokens=150, output_tokens=8), 1)
    assert (few["requests"], few["output_tokens"]) == (3, 24)
    assert many["prompt_tokens"] - few["prompt_tokens"] == pytest.approx(300, rel=0.1)
    assert 0 < few["ttft_p50_ms"] < 1000 / few["requests_per_s"] * 3


def test_what_is_shared_was_sent_before(demo_server: Server) -> None:
    client = our_client(demo_server.url)
    name = "internvl_prefix_cache_hits_total"
    case = {"requests": 2, "input_tokens": 16, "output_tokens": 2}

    def hits(seed: int, **options: Any) -> float:
        before = demo_server.metric(name) or 0.0
        found = client.measure(Case("", "", **(case | options)), seed)
        assert found["requests"] == 2
        return (demo_server.metric(name) or 0.0) - before

    assert hits(5, shared=200) > 2 * 150
    fresh, again = (hits(6 + again, picture=112, again=again) for again in (False, True))
    assert fresh == 0
    assert again > 0


def test_a_refusal_is_an_error(demo_server: Server) -> None:
    with pytest.raises(Failed, match="400"):
        our_client(demo_server.url).measure(Case("", "", 1, input_tokens=9000), 1)


def test_processes_that_send_more_at_once_send_more() -> None:
    """Of five at once three processes have two, two and one, and of fifteen requests as much: each
    that has an answer sends its next, and at the end none has more left than others."""
    rounds = [threading.Barrier(5) for _ in range(3)]
    count = itertools.count()

    def answer(_: str, body: Any) -> scripted_api.Answer:
        rounds[next(count) // 5].wait(30)  # BrokenBarrierError unless five at once come each time
        event = {"choices": [{"delta": {"content": "a"}}], "usage": USAGE}
        return 200, {}, iter([b"data: " + json.dumps(event).encode() + b"\n\n"])

    with scripted_api.Api(answer) as api:
        found = send({"base_url": api.url}, [b"{}"] * 15, [0.0] * 15, 5, processes=3)
    assert (len(found.answers), found.errors.total()) == (15, 0)


def test_a_process_that_sends_may_end_too_soon() -> None:
    """It is named, and nothing is waited for."""

    def answer(_: str, body: Any) -> scripted_api.Answer:
        for process in multiprocessing.active_children()[:1]:
            process.kill()
        return 200, {}, iter([])

    with scripted_api.Api(answer) as api, pytest.raises(Failed, match="processes that send"):
        send({"base_url": api.url}, [b"{}"] * 8, [0.0] * 8, 4, processes=2)
    assert not multiprocessing.active_children()


def test_a_failed_case_does_not_end_the_comparison(demo_server: Server, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    cases = [Case("long", "", 1, input_tokens=9000), Case("short", "", 1, output_tokens=4)]
    comparison = Comparison(cases, our_client, 7, out, facts("our own"))
    server = Process("ours", demo_server.url, str(demo_server.process.pid))
    for number in (0, 1):
        comparison.measure(server, number)
    found = json.loads(out.read_text())["records"]
    assert [entry["case"] for entry in found] == ["start", "long", "short"] * 2
    assert "400" in found[1]["error"]
    assert found[0]["ready_s"] is None
    assert found[2]["output_tokens"] == 4
    assert found[2]["server_cpu_s"] > 0
    assert 0 <= found[2]["others"] <= 100
    assert len({entry["seed"] for entry in found if "seed" in entry}) == 4
    assert demo_server.process.poll() is None


def test_a_server_is_started_and_stopped(tmp_path: Path) -> None:
    with our_server(None, log=tmp_path / "log") as server:
        assert server.ready_s is not None
        assert server.cpu_s() > 0
        assert 0.1 < server.rss_gib() < 8
        assert "-m server" in server.command_line()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_nothing_outlives_a_server(demo_server: Server, tmp_path: Path) -> None:
    """Not even an engine that its first process does not wait for: it would hold the GPU."""
    (tmp_path / "engine").write_text("trap '' TERM\nexec 9> pipe\nexec sleep 1000")
    os.mkfifo(tmp_path / "pipe")
    command = f"sh -c 'cd {tmp_path}; sh engine & wait'"
    with Process("x", demo_server.url, command):
        pipe = (tmp_path / "pipe").open("rb")  # returns when the engine has it open too
    with pipe:
        assert select.select([pipe], [], [], 10)[0]  # at its end: nobody can write any more


def test_a_server_that_ends_is_not_waited_for() -> None:
    with (
        pytest.raises(RuntimeError, match="did not get ready"),
        Process("x", "http://[::1]:9", "false"),
    ):
        pass


class Recorded(VllmProgram):
    """Answers as vLLM's client would."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def run(self, words: list[str]) -> dict[str, Any]:
        self.words = words
        keys = ("completed", "total_input_tokens", "total_output_tokens", "request_throughput")
        keys += ("output_throughput", "p50_ttft_ms", "p50_tpot_ms", "p50_itl_ms", "p99_itl_ms")
        return dict.fromkeys(keys, 3)


def test_vllm_is_told_the_case(demo_server: Server, tmp_path: Path) -> None:
    program = Recorded()
    client = VllmClient(demo_server.url, program, tmp_path)
    cases = {case.name: case for case in CASES}
    assert client.measure(cases["picture-c4"], 9)["ttft_p50_ms"] == 3
    said = " ".join(program.words)
    for word in (
        *("--max-concurrency 4", "--num-prompts 8", "--seed 9", "--model internvl-demo"),
        *("--dataset-name random-mm", "{(448, 448, 1): 1.0}", "--ignore-eos"),
    ):
        assert word in said
    client.measure(cases["prefix"], 9)
    assert "--random-prefix-len 512" in " ".join(program.words)
    program.words = []
    client.measure(Case("", "", 1, input_tokens=8, output_tokens=2, picture=112, again=True), 9)
    assert program.words == []  # by our own client


def test_transformers_is_asked_in_its_own_way(demo_server: Server, tmp_path: Path) -> None:
    known = demo_server.url, str(demo_server.process.pid), Path("internvl-demo"), tmp_path
    assert peer_server("vllm", *known).client is None
    server = peer_server("transformers", *known)
    assert server.client is not None
    client = server.client(server.url)
    assert isinstance(client, TransformersClient)
    body = client._request([], 5)
    assert "ignore_eos" not in body
    assert (body["model"], body["max_tokens"]) == ("internvl-demo", 5)
    assert json.loads(body["generation_config"]) == {"min_new_tokens": 5}

    def others(url: str) -> NoReturn:
        raise AssertionError(url)

    cases = [Case("text", "", 2, input_tokens=9, output_tokens=5)]
    comparison = Comparison(cases, others, 7, tmp_path / "result.json", facts("our own"))
    comparison.measure(server, 0)
    assert comparison.records[-1]["requests"] == 2


def test_paths_are_not_told() -> None:
    said = "/opt/x/bin/vllm serve /tmp/c --model /data/m --url http://127.0.0.1:8101/v1 a/b"
    assert without_folders(said) == "vllm serve c --model m --url http://127.0.0.1:8101/v1 a/b"


def test_every_token_of_a_random_model_has_a_text(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, weights=False)
    give_texts(folder / "tokenizer.json", 700)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 700
    assert all(tokenizer.decode([token], skip_special_tokens=False) for token in (3, 515, 699))
