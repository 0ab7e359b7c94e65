"""A real Prometheus that scrapes a server of a test."""

import contextlib
import datetime
import math
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.servers import Server, free_port
from tests.tools import tool

JOB = "internvl"
DEADLINE = 60.0


class Prometheus:
    """Scrapes ``server`` every second, with ``key`` if it needs one, and evaluates ``rules``
    once a second. Skips the test where there is no Prometheus."""

    def __init__(
        self, folder: Path, server: Server, key: str = "", rules: Path | None = None
    ) -> None:
        program = tool("prometheus")
        scrape: dict[str, Any] = {
            "job_name": JOB,
            "static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}],
        }
        if key:
            scrape["authorization"] = {"credentials": key}
        config = {
            "global": {
                "scrape_interval": "1s",
                "scrape_timeout": "1s",
                "evaluation_interval": "1s",
            },
            "rule_files": [str(rules)] if rules else [],
            "scrape_configs": [scrape],
        }
        file = folder / "prometheus.yaml"
        file.write_text(yaml.safe_dump(config))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "prometheus.log"
        with self._log.open("wb") as sink:
            self._process = subprocess.Popen(
                [
                    *(program, f"--config.file={file}", f"--storage.tsdb.path={folder / 'tsdb'}"),
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=sink,
                stderr=sink,
            )
        try:
            self.wait_scraped()
        except BaseException:
            self.close()
            raise

    def query(self, query: str) -> list[tuple[dict[str, str], float]]:
        """The labels and values of what is there now; what is no number is left out."""
        found = self._get("query", query=query)["result"]
        values = [(one["metric"], float(one["value"][1])) for one in found]
        return [(labels, value) for labels, value in values if not math.isnan(value)]

    def alerts(self) -> set[str]:
        """Names of those that fire."""
        alerts = self._get("alerts")["alerts"]
        return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}

    def wait_for_alert(self, name: str) -> None:
        self._wait(lambda: name in self.alerts(), f"{name} does not fire")

    def wait_scraped(self) -> None:
        """Until it has what the server says from now on."""
        now = datetime.datetime.now(datetime.UTC)

        def scraped() -> bool:
            (target,) = self._get("targets")["activeTargets"]
            last = datetime.datetime.fromisoformat(target["lastScrape"])
            return target["health"] == "up" and last > now

        self._wait(scraped, "the server is not scraped")

    def _get(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def _wait(self, true: Callable[[], bool], why: str) -> None:
        end = time.monotonic() + DEADLINE
        while True:
            assert self._process.poll() is None, self._log.read_text()
            with contextlib.suppress(httpx.TransportError, ValueError, AssertionError):  # it begins
                if true():
                    return
            assert time.monotonic() < end, f"{why}:\n{self._log.read_text()}"
            time.sleep(0.05)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)
