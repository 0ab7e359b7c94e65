"""``internvl bench``: measure a server under a load."""

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.commands.asking import add_target, asked
from server.flags import some
from wire.settings import SettingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.bench.client import Case, Client
    from server.bench.send import Result

_ROWS = {
    "ttft": "to the first text, ms",
    "itl": "between pieces of text, ms",
    "tpot": "per token behind the first, ms",
    "e2e": "to the last text, ms",
}


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "bench",
        help="measure a server under a load",
        description="Send requests of random words, and pictures of noise, and measure what a "
        "client sees. The same seed sends the same requests. Ends with 1 if some failed.",
    )
    parser.add_argument(
        "--requests", type=some, default=32, metavar="N", help="that are measured [32]"
    )
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=some, default=4, metavar="N", help="at once [4]")
    load.add_argument(
        "--rate",
        type=_rate,
        default=0.0,
        metavar="X",
        help="begin so many per second instead, at random moments, whatever becomes of them; what "
        "waits is counted from the moment it should have begun",
    )
    for name, default, what in (
        ("--input-tokens", 128, "of text in each"),
        ("--output-tokens", 64, "generated for each"),
    ):
        parser.add_argument(
            name, type=some, default=default, metavar="N", help=f"{what} [{default}]"
        )
    parser.add_argument(
        "--shared-tokens",
        type=some,
        default=0,
        metavar="N",
        help="further ones that all begin with",
    )
    parser.add_argument(
        "--picture",
        type=_size,
        default=(0, 0),
        metavar="SIZE",
        help="show pictures of 448 by 448 pixels, or of 1280x720",
    )
    parser.add_argument(
        "--pictures", type=some, default=1, metavar="N", help="in each request, if any [1]"
    )
    parser.add_argument(
        "--same-picture", action="store_true", default=None, help="show all requests the same"
    )
    parser.add_argument(
        "--photographs",
        action="store_true",
        default=None,
        help="pictures are smooth JPEGs with some noise, not PNGs of nothing else",
    )
    parser.add_argument(
        "--warm-up", type=some, default=2, metavar="N", help="requests before the measured ones [2]"
    )
    parser.add_argument(
        "--processes",
        type=some,
        default=1,
        metavar="N",
        help="that send, where one cannot read all that comes [1]",
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the contents [0]")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the figures as JSON; - for standard output"
    )
    add_target(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure it. Raises SettingError, server.target.Unreachable, and Failed."""
    width, height = options.picture
    out: Path | None = options.out
    if out is not None and str(out) != "-" and not out.parent.is_dir():
        raise SettingError(f"--out: there is no folder {out.parent}")
    from server.bench.client import Case, Client, summary

    case = Case(
        name="bench",
        title="",
        requests=options.requests,
        concurrency=options.concurrency,
        input_tokens=options.input_tokens,
        output_tokens=options.output_tokens,
        shared=options.shared_tokens,
        picture=width,
        height=height,
        pictures=options.pictures,
        again=bool(options.same_picture),
        photo=bool(options.photographs),
        rate=options.rate,
    )
    with asked(options) as target:
        model = options.model if options.url and options.model else ""
        client = Client(target, model, options.processes)
        warm_up = dataclasses.replace(case, requests=options.warm_up, rate=0.0)
        client.run(warm_up, ~options.seed & 0xFFFF_FFFF)
        result = _measure(client, case, options.seed)
    figures: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "server": options.url or "started for this",
        "model": client.model,
        "seed": options.seed,
        "load": {k: v for k, v in dataclasses.asdict(case).items() if k not in ("name", "title")},
        "seconds": result.seconds,
        "client_busy": result.busy,
        "failed": result.errors.total(),
        "errors": dict(result.errors),
        **summary(result.answers, result.seconds),
    }
    written = json.dumps(figures, indent=1) + "\n"
    if str(out) == "-":
        sys.stdout.write(written)
    else:
        print(_table(figures))
        if out is not None:
            out.write_text(written, encoding="utf-8")
    return 1 if result.errors else 0


def _measure(client: "Client", case: "Case", seed: int) -> "Result":
    with _bar(case.requests) as ended:
        return client.run(case, seed, ended)


@contextmanager
def _bar(total: int) -> "Iterator[Callable[[], None]]":
    """What to call for each request that has ended."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda: bar.advance(task)


def _table(figures: dict[str, Any]) -> str:
    from server.bench.client import PERCENTILES, limit

    load, seconds = figures["load"], figures["seconds"]
    how = f"{load['rate']:g} a second" if load["rate"] else f"{load['concurrency']} at once"
    lines = [
        f"{figures['requests']} requests answered, {figures['failed']} failed, {how}, "
        f"in {seconds:.1f} s",
        f"{figures['requests_per_s']:.2f} requests/s, "
        f"{figures['prompt_tokens'] / seconds:.1f} tokens/s in, "
        f"{figures['tokens_per_s']:.1f} tokens/s out",
        "",
        f"{'':32}{'values':>8}" + "".join(f"{f'p{percent}':>10}" for percent in PERCENTILES),
    ]
    for name, title in _ROWS.items():
        cells = [figures[f"{name}_p{percent}_ms"] for percent in PERCENTILES]
        shown = ["–" if cell is None else f"{cell:.1f}" for cell in cells]
        count = figures[f"{name}_count"]
        lines.append(f"{title:32}{count:>8}" + "".join(f"{cell:>10}" for cell in shown))
    if any("–" in line for line in lines):
        lines += ["", "–: too few values to say"]
    if said := limit(figures["client_busy"]):
        lines += ["", f"{said}: see --processes"]
    lines += [f"failed, {count} times: {why}" for why, count in figures["errors"].items()]
    return "\n".join(lines)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate above 0")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to {(1 << 32) - 1}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})(?:[x×](\d{1,5}))?", text, re.ASCII)
    if found is None or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 448 or 1280x720")
    return int(found[1]), int(found[2] or found[1])
