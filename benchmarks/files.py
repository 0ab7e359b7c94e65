"""What it costs to ask about one picture many times: sent with every question, or uploaded once.

Starts the server with the demo model and asks ``--asks`` times about photographs of 1, 4 and 12
megapixels, as one tile, for one token. Prints JSON for each: bytes of a request, and processor time
in milliseconds of the API process alone, for a question and for the upload. The picture is decoded
before, once, in both cases.

    python -m benchmarks.files
"""

import argparse
import base64
import io
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.processes import Server

SIZES = {"1 MP": (1152, 864), "4 MP": (2304, 1728), "12 MP": (4032, 3024)}
TICK = 1000 / os.sysconf("SC_CLK_TCK")
PORT = 8731


def photograph(width: int, height: int) -> bytes:
    """A JPEG with about as many bytes as a camera's: blurred noise."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def milliseconds(pid: int) -> float:
    """Processor time of one process, its children not included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK


def questions(client: httpx.Client, server: Server, url: str, asks: int) -> dict[str, float]:
    """What each question takes; one that is not counted comes first."""
    picture = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    content = [picture, {"type": "text", "text": "What is it?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    data = json.dumps(body).encode()
    before = 0.0
    for number in range(asks + 1):
        if number == 1:
            before = milliseconds(server.pid)
        headers = {"Content-Type": "application/json"}
        client.post("/v1/chat/completions", content=data, headers=headers).raise_for_status()
    spent = (milliseconds(server.pid) - before) / asks
    return {"request_bytes": len(data), "cpu_ms": round(spent, 2)}


def measure(asks: int) -> dict[str, Any]:
    """All sizes."""
    command = f"{sys.executable} -m server --port {PORT} --log-level error"
    found: dict[str, Any] = {}
    with (
        Server("internvl", f"http://127.0.0.1:{PORT}", command) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        for name, size in SIZES.items():
            encoded = photograph(*size)
            inline = "data:image/jpeg;base64," + base64.b64encode(encoded).decode()
            before = milliseconds(server.pid)
            for _ in range(asks):
                form: Any = {"files": {"file": encoded}, "data": {"purpose": "vision"}}
                answer = client.post("/v1/files", **form).raise_for_status()
            found[name] = {
                "picture_bytes": len(encoded),
                "upload_cpu_ms": round((milliseconds(server.pid) - before) / asks, 2),
                "inline": questions(client, server, inline, asks),
                "file": questions(client, server, answer.json()["id"], asks),
            }
    return found


def main() -> None:
    """Read the arguments, print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--asks", type=int, default=100)
    arguments = parser.parse_args()
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    found = {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "asks": arguments.asks,
        "pictures": measure(arguments.asks),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
