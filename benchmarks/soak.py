"""Does any process grow? Thousands of mixed requests against a real server with the demo model:
pictures of all formats, new and repeated, whole and broken, from a site and in the request;
streams, several choices, clients that leave. Prints JSON: for each process its memory behind every
round of requests, and the slope behind the warm-up in bytes per 1,000 requests.

    python -m benchmarks.soak --requests 5000
"""

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.servers import Server
from tests.soak import FLAGS, Soak


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole run."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "log.txt", [*FLAGS, *arguments.flags])
        try:
            began, spent = time.monotonic(), time.process_time()
            soak = Soak(server, seed=arguments.seed)
            report = asyncio.run(soak.run(arguments.requests, arguments.round))
            seconds, client = time.monotonic() - began, time.process_time() - spent
        finally:
            server.close()
    slopes = {name: round(report.slope(name, arguments.warm_up)) for name in report.anonymous}
    return {
        "requests": report.requests,
        "warm_up": arguments.warm_up,
        "seconds": round(seconds, 1),
        "client_cpu_seconds": round(client, 1),
        "bytes_per_1000_requests": slopes,
        "anonymous_bytes": report.anonymous,
        "threads": {name: sorted(set(found)) for name, found in report.threads.items()},
        "descriptors": {name: sorted(set(found)) for name, found in report.descriptors.items()},
        "outcomes": dict(sorted(report.outcomes.items())),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
    }


def main() -> None:
    """Read the arguments, print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--warm-up", type=int, default=1000)
    parser.add_argument("--round", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="for the server, after --")
    print(json.dumps(measure(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
