"""What streaming costs the API process: processor time per token, and how late tokens arrive.

Starts the server as ``internvl serve`` does, with an engine process that has no model: it replays
a text over the real channel, one token per stream and report, so many reports a second. A third
process, this one, opens the streams and counts what arrives. Prints JSON for each case:
processor time of the API process per token and its inverse, tokens per second of one core, and
milliseconds from an engine's report to the client at the median and the 99th percentile.

    python -m benchmarks.frontend --streams 256 --offered 20000 --seconds 4
"""

import argparse
import functools
import gc
import itertools
import json
import os
import platform
import re
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine.client
from server.cli import main as internvl
from server.tokenizer import Tokenizer
from wire.channel import Channel
from wire.geometry import PromptFormat, VisionGeometry
from wire.messages import (
    Abort,
    EngineOutput,
    EngineRequest,
    EngineStats,
    Ready,
    StepReport,
    ToEngine,
    TokenLogprobs,
)
from wire.settings import EngineSettings

CHECKPOINT = Path(__file__).parent.parent / "demo" / "checkpoint" / "hf"
# Seconds between two looks at the sockets. Waiting for them would have the server's processor wake
# this process for nearly every packet; clients elsewhere are woken by processors of their own.
POLL = 0.001
TEXT = " the picture shows a red circle to the left of a blue square and what they say of it"
BODY = {"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0, "ignore_eos": True}
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "usage": {"stream_options": {"include_usage": True}},
    "stops": {"stop": ["\n\n###", "Observation:", "</answer>", "circle circle"]},
    "logprobs": {"logprobs": True, "top_logprobs": 5},
    "resumable": {"stream_options": {"resumable": True}},
    "whole": {"stream": False},
}


def replay(sock: socket.socket, streams: int, offered: float, sent: Path) -> None:
    """Be an engine: when ``streams`` requests are there, give each a token per report until it has
    ``max_tokens``; then write to ``sent`` when each report was sent; over and over."""
    settings, _ = Channel[EngineSettings](sock, EngineSettings).receive()
    channel: Channel[ToEngine] = Channel(sock, ToEngine)
    tokenizer = Tokenizer.load(Path(settings.model))
    ready = Ready(
        geometry=VisionGeometry(448, 256),
        prompt_format=PromptFormat("hf", None, False),
        max_model_len=1 << 20,
        max_positions=1 << 20,
        vocab_size=1152,
        eos_token_ids=(0,),
        block_size=settings.block_size,
        blocks_total=1,
        device="none",
        dtype="none",
        attention="none",
        parameters=0,
    )
    channel.send(ready)
    # Each has one blank, by which the reader knows it.
    ids = [t for t in tokenizer.encode(TEXT) if tokenizer.token_bytes(t).count(b" ") == 1]
    likely = TokenLogprobs(-0.25, [(token, -0.25) for token in ids[:5]])
    stats = EngineStats(running=streams)
    while True:
        rows: list[EngineRequest] = []
        while len(rows) < streams:
            message, _ = channel.receive()
            if not isinstance(message, Abort):
                rows.append(message)
        gc.collect()
        steps = rows[0].sampling.max_tokens
        logprobs = [likely] if rows[0].sampling.logprobs >= 0 else None
        times = []
        began = time.monotonic()
        for step, token in zip(range(1, steps + 1), itertools.cycle(ids), strict=False):
            reason = "length" if step == steps else None
            outputs = [EngineOutput(row.id, [token], reason, logprobs=logprobs) for row in rows]
            times.append(time.monotonic())
            channel.send(StepReport(outputs, stats if reason is None else EngineStats()))
            time.sleep(max(0.0, began + step * streams / offered - time.monotonic()))
        sent.with_suffix(".part").write_text(json.dumps(times))
        sent.with_suffix(".part").rename(sent)


class Server:
    """``internvl serve`` in a child process, with the engine that replays."""

    def __init__(
        self, streams: int, offered: float, folder: Path, flags: Sequence[str] = ()
    ) -> None:
        self.sent = folder / "sent.json"
        words = [sys.executable, "-m", "benchmarks.frontend", "--streams", str(streams)]
        words += ["--offered", str(offered), "--sent", str(self.sent)]
        log = folder / "log"
        with log.open("wb") as sink:
            self._process = subprocess.Popen([*words, "--serve", "--", *flags], stderr=sink)
        self.pid = self._process.pid
        while "API at" not in log.read_text():
            assert self._process.poll() is None, log.read_text()
            time.sleep(0.05)
        found = re.search(r"listening on http://\S+:(\d+),", log.read_text())
        assert found is not None
        self.port = int(found[1])

    def processor_time(self) -> float:
        """Seconds that all its threads have run."""
        return time.clock_gettime((~self.pid << 3) | 2)  # as clock_getcpuclockid(3) has it

    def check(self) -> None:
        """Whether it runs."""
        assert self._process.poll() is None, "the server has ended"

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


def serve(arguments: argparse.Namespace) -> int:
    """Be the API process."""
    words = [sys.executable, "-m", "benchmarks.frontend", "--streams", str(arguments.streams)]
    words += ["--offered", str(arguments.offered[0]), "--sent", str(arguments.sent), "--engine"]
    engine.client.ProcessEngine = functools.partial(  # type: ignore[misc, assignment]
        engine.client.ProcessEngine, command=words
    )
    limits = ["--max-concurrent-requests", "4096", "--max-num-queued-reqs", "4096"]
    return internvl(["serve", "--port", "0", "--media-workers", "1", *limits, *arguments.flags])


class Reader:
    """One client: sends a request, and notes when which tokens and bytes of the answer came."""

    def __init__(self, port: int, body: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\nConnection: close\r\n\r\n"
        self.socket.sendall(head.encode() + body)
        self.socket.setblocking(False)
        self.arrivals: list[tuple[float, int]] = []  # when, and how many tokens by then
        self.bytes = self.events = self._tokens = 0
        self._last = b""
        self._begun = False

    def read(self) -> bool:
        """Take what is there; whether the answer goes on."""
        data = self.socket.recv(1 << 18)
        if not data:
            return False
        if not self._begun:
            head, _, data = data.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), data
            self._begun = True
        self.bytes += len(data)
        joint = self._last + data
        self.events += joint.count(b"\n\n")
        # All other blanks of a stream, without logprobs, stand behind the colon of "data: ".
        self._tokens += data.count(b" ") - joint.count(b": ")
        self._last = data[-1:]
        self.arrivals.append((time.monotonic(), self._tokens))
        return True


def measure(server: Server, streams: int, tokens: int, variant: str) -> dict[str, Any]:
    """One answer of ``tokens`` tokens in each of ``streams`` streams."""
    body = BODY | {"stream": True, "max_tokens": tokens} | VARIANTS[variant]
    server.sent.unlink(missing_ok=True)
    # All but the last: the engine waits for that one too.
    readers = {}
    poll = select.epoll()
    began = 0.0
    for number in range(streams):
        if number == streams - 1:
            time.sleep(1.0)
            began = server.processor_time()
        reader = Reader(server.port, json.dumps(body).encode())
        readers[reader.socket.fileno()] = reader
        poll.register(reader.socket, select.EPOLLIN)
    open_ = len(readers)
    while open_:
        time.sleep(POLL)
        for number, _ in poll.poll():
            if not readers[number].read():
                poll.unregister(number)
                open_ -= 1
    spent = server.processor_time() - began
    while not server.sent.exists():
        time.sleep(0.01)
    sent = json.loads(server.sent.read_text())
    for reader in readers.values():
        reader.socket.close()
    found: dict[str, Any] = {
        "us_per_token": round(spent / (streams * tokens) * 1e6, 2),
        "tokens_per_second_of_one_core": round(streams * tokens / spent),
        "offered": round((tokens - 1) * streams / (sent[-1] - sent[0])),
        "bytes_per_token": round(statistics.mean(r.bytes for r in readers.values()) / tokens),
    }
    if variant not in ("whole", "logprobs"):
        found["ms_to_client"] = _delays(list(readers.values()), sent)
        found["tokens_per_event"] = round(
            streams * tokens / sum(reader.events for reader in readers.values()), 2
        )
    return found


def _delays(readers: Sequence[Reader], sent: Sequence[float]) -> dict[str, float]:
    """Milliseconds from the report of each token to the moment its text was there."""
    delays = []
    for reader in readers:
        arrivals = iter(reader.arrivals)
        at, tokens = next(arrivals)
        for number, when in enumerate(sent):
            while tokens <= number:
                at, tokens = next(arrivals)
            delays.append((at - when) * 1000)
    cuts = statistics.quantiles(delays, n=100)
    return {"p50": round(cuts[49], 1), "p99": round(cuts[98], 1)}


def main() -> int:
    """Read the arguments, print the measurements as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--offered", type=float, nargs="+", default=[20000.0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sent", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine is not None:
        sock = socket.socket(fileno=arguments.engine)
        replay(sock, arguments.streams, arguments.offered[0], arguments.sent)
    if arguments.serve:
        return serve(arguments)
    rows = []
    for offered in arguments.offered:
        with tempfile.TemporaryDirectory() as folder:
            server = Server(arguments.streams, offered, Path(folder))
            tokens = int(offered * arguments.seconds / arguments.streams)
            try:
                measure(server, arguments.streams, 20, "plain")
                for variant in arguments.variants:
                    found = measure(server, arguments.streams, tokens, variant)
                    rows.append({"case": variant} | found)
            finally:
                server.close()
    answer = {
        "streams": arguments.streams,
        "rows": rows,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps(answer, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
