"""The chart renders with Helm's own engine into manifests that Kubernetes knows, and keeps the
promises that docs/deployment.md makes. No cluster is involved."""

import json
import math
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy import chart
from tests.deploy.chart import HELM, ROOT, SCHEMA, Rendered
from tests.servers import Server
from wire.loading import ENV_PREFIX, load
from wire.settings import each_setting

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="Helm's library is installed on Linux x86-64 only",
)

VALUES = yaml.safe_load((HELM / "values.yaml").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
KUBERNETES = ("1.28", "1.31", "1.34", "1.37")
CLAIM = {"persistentVolumeClaim": {"claimName": "weights"}}

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "gpu": {
        "gpu": {"count": 1},
        "model": {"path": "/models/InternVL3-8B", "volume": CLAIM},
        "runtimeClassName": "nvidia",
        "strategy": {"type": "Recreate"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "settings": {"gpu_memory_utilization": 0.85, "max_model_len": 16384},
    },
    "gpus": {"gpu": {"count": 4}, "model": {"path": "/models/InternVL3-38B", "volume": CLAIM}},
    "stages": {"gpu": {"count": 3}, "settings": {"pipeline_parallel_size": 3}},
    "keys": {"apiKeys": {"values": ["first", "second"]}},
    "existing": {"apiKeys": {"existingSecret": "vault", "secretKey": "tokens"}},
    "files": {
        "apiKeys": {"fileSecret": "named-keys"},
        "tls": {"existingSecret": "certificate"},
        "admin": {"existingSecret": "operators"},
        "serviceMonitor": {"enabled": True},
    },
    "hpa": {"autoscaling": {"enabled": True, "minReplicas": 2}},
    "everything": {
        "fullnameOverride": "internvl",
        "image": {"repository": "registry.example/internvl", "tag": "0.1.0-1"},
        "imagePullSecrets": [{"name": "pull"}],
        "settings": {
            "max_request_bytes": 1 << 28,
            "allowed_media_domains": ["a.example", "b.example"],
            "allow_private_media": False,
            "served_model_name": "eyes",
            "keep_alive_interval": 2.5,
            "threads": 3,
        },
        "drainTimeout": 119.5,
        "networkPolicy": {
            "media": True,
            "from": [{"namespaceSelector": {"matchLabels": {"team": "vision"}}}],
            "dns": [{"ipBlock": {"cidr": "169.254.20.10/32"}}],
        },
        "podDisruptionBudget": {"enabled": True, "maxUnavailable": "50%"},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "autoscaling": {
            "enabled": True,
            "metrics": [
                {
                    "type": "Pods",
                    "pods": {
                        "metric": {"name": "waiting"},
                        "target": {"type": "AverageValue", "averageValue": "5"},
                    },
                }
            ],
        },
        "podAnnotations": {"note": "x"},
        "podLabels": {"team": "vision"},
        "nodeSelector": {"disk": "ssd"},
        "affinity": {"podAntiAffinity": {}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "priorityClassName": "high",
        "service": {"type": "NodePort", "port": 80, "annotations": {"a": "b"}},
    },
}

REFUSED: dict[str, dict[str, Any]] = {
    "max_model_length": {"settings": {"max_model_length": 1}},
    "media_workers": {"settings": {"media_workers": -1}},
    "log_level": {"settings": {"log_level": "loud"}},
    "port": {"settings": {"port": 9000}},
    "tls_key": {"settings": {"tls_key": "/x"}},
    "volume": {"model": {"volume": {"hostPath": {"path": "/"}}}},
    "tag": {"image": {"tag": "latest"}},
    "count": {"gpu": {"count": 65}},
    "values": {"apiKeys": {"values": ["a,b"]}},
    "replica": {"replica": 3},
    "shutdownMargin": {"shutdownMargin": 0},
    "path": {"model": {"path": "OpenGVLab/InternVL3-1B"}},
}


@pytest.fixture(scope="module")
def renders() -> dict[str, Rendered]:
    return dict(zip(CASES, chart.render(list(CASES.values())), strict=True))


@pytest.fixture(params=CASES)
def rendered(request: pytest.FixtureRequest, renders: dict[str, Rendered]) -> Rendered:
    one = renders[request.param]
    assert not one.error
    return one


def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return spec["template"]["spec"] if manifest["kind"] == "Deployment" else spec


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    (one,) = pod(manifest)["containers"]
    return dict(one)


def environment(one: Rendered) -> dict[str, str]:
    """The server's environment as far as it is written down in the release."""
    server = container(one.manifests["Deployment"])
    (source,) = server["envFrom"]
    assert source["configMapRef"]["name"] == one.manifests["ConfigMap"]["metadata"]["name"]
    found: dict[str, str] = dict(one.manifests["ConfigMap"]["data"])
    for entry in server.get("env", []):
        reference = entry["valueFrom"].get("secretKeyRef")
        if reference and "Secret" in one.manifests:
            secret = one.manifests["Secret"]
            assert reference["name"] == secret["metadata"]["name"]
            found[entry["name"]] = secret["stringData"][reference["key"]]
        else:
            found.setdefault(entry["name"], "1")
    return found


def test_the_linter_has_nothing_to_say_but_that_there_is_no_icon() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.deploy.chart", "lint"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    messages = [message["error"] for message in json.loads(done.stdout)]
    assert messages == ["icon is recommended"]


def test_the_defaults_obey_the_schema_and_the_schema_knows_only_documented_values() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(VALUES, schema, jsonschema.Draft7Validator)
    assert set(schema["properties"]) - {"global"} == set(VALUES)
    for name, rule in schema["properties"].items():
        if name != "settings" and "properties" in rule:
            assert set(rule["properties"]) == set(VALUES[name]), name


def test_the_schema_knows_every_setting_of_the_server() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert schema["properties"]["settings"]["properties"] == chart.settings_schema(), (
        "run: python -m tests.deploy.chart settings"
    )


def test_the_page_explains_every_value() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.split("\n") if line.startswith("|")]
    explained = set(re.findall(r"`([^`]+)`", " ".join(rows)))
    assert set(VALUES) <= explained


def test_chart_and_server_carry_one_version() -> None:
    about = yaml.safe_load((HELM / "Chart.yaml").read_text(encoding="utf-8"))
    assert about["version"] == about["appVersion"] == PROJECT["version"]


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field(rendered: Rendered, version: str) -> None:
    for kind, manifest in rendered.manifests.items():
        if kind != "ServiceMonitor":  # of the Prometheus operator; no schema at hand
            kubernetes_validate.validate(manifest, version, strict=True)


def test_optional_parts_appear_only_when_asked_for(renders: dict[str, Rendered]) -> None:
    always = {"ConfigMap", "Deployment", "NetworkPolicy", "Pod", "Service"}
    extras = {
        "default": set(),
        "gpu": set(),
        "gpus": set(),
        "stages": set(),
        "keys": {"Secret"},
        "existing": set(),
        "files": {"ServiceMonitor"},
        "hpa": {"HorizontalPodAutoscaler"},
        "everything": {"HorizontalPodAutoscaler", "PodDisruptionBudget", "ServiceMonitor"},
    }
    for name, one in renders.items():
        assert set(one.manifests) == always | extras[name], name
        assert ("replicas" in one.manifests["Deployment"]["spec"]) == (
            "HorizontalPodAutoscaler" not in extras[name]
        )


def test_mistakes_are_refused_by_name() -> None:
    for (name, values), one in zip(
        REFUSED.items(), chart.render(list(REFUSED.values())), strict=True
    ):
        assert not one.manifests, values
        assert name in one.error, (values, one.error)


def test_the_environment_is_made_of_settings_that_exist(rendered: Rendered) -> None:
    known = {ENV_PREFIX + field.name.upper() for _, field, _ in each_setting()}
    found = environment(rendered)
    assert set(found) <= known
    settings = load({}, found)
    assert settings.server.host == "0.0.0.0"
    assert (
        settings.server.port
        == container(rendered.manifests["Deployment"])["ports"][0]["containerPort"]
    )


def test_values_reach_the_server_unchanged(renders: dict[str, Rendered]) -> None:
    settings = load({}, environment(renders["everything"]))
    assert settings.server.max_request_bytes == 1 << 28
    assert settings.server.served_model_name == "eyes"
    assert settings.server.keep_alive_interval == 2.5
    assert settings.server.drain_timeout == 119.5
    assert settings.media.allowed_media_domains == ("a.example", "b.example")
    assert settings.media.allow_private_media is False
    assert settings.engine.threads == 3
    assert load({}, environment(renders["keys"])).server.api_key == ("first", "second")
    assert load({}, environment(renders["default"])).server.api_key == ()
    (entry,) = (
        entry
        for entry in container(renders["existing"].manifests["Deployment"])["env"]
        if entry["name"] == "INTERNVL_API_KEY"
    )
    assert entry["valueFrom"]["secretKeyRef"] == {"name": "vault", "key": "tokens"}


def test_files_of_secrets_stand_where_the_settings_say(renders: dict[str, Rendered]) -> None:
    one = renders["files"]
    server = load({}, environment(one)).server
    volumes = {volume["name"]: volume for volume in pod(one.manifests["Deployment"])["volumes"]}
    folders = {
        mount["mountPath"]: volumes[mount["name"]]["secret"]["secretName"]
        for mount in container(one.manifests["Deployment"])["volumeMounts"]
        if "secret" in volumes[mount["name"]]
    }
    for file, secret in (
        (server.api_keys_file, "named-keys"),
        (server.tls_certificate, "certificate"),
        (server.tls_key, "certificate"),
        (server.admin_key_file, "operators"),
    ):
        assert folders[file.rsplit("/", 1)[0]] == secret
    assert server.admin_port == VALUES["admin"]["port"]
    assert server.admin_host == "127.0.0.1"
    assert server.open_metrics
    assert not load({}, environment(renders["default"])).server.open_metrics
    endpoint = one.manifests["ServiceMonitor"]["spec"]["endpoints"][0]
    assert endpoint["scheme"] == "https"
    probes = container(one.manifests["Deployment"])
    for name in ("startup", "readiness", "liveness"):
        assert probes[f"{name}Probe"]["httpGet"]["scheme"] == "HTTPS"
    assert "No API keys" not in one.notes
    names = {entry["name"] for entry in container(one.manifests["Pod"])["env"]}
    assert names == {"SERVER_HOST", "SERVER_PORT", "SERVER_TLS", "NO_KEY_KNOWN"}


def test_each_probe_has_its_own_path_and_budget(rendered: Rendered) -> None:
    server = container(rendered.manifests["Deployment"])
    probes = {name: server[name + "Probe"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/started",
        "readiness": "/ready",
        "liveness": "/live",
    }
    budget = {
        name: probe["periodSeconds"] * probe["failureThreshold"] for name, probe in probes.items()
    }
    assert budget["startup"] >= 600
    assert budget["liveness"] > budget["readiness"]
    assert all(probe["timeoutSeconds"] <= probe["periodSeconds"] for probe in probes.values())


def test_the_pod_outlives_the_drain(rendered: Rendered) -> None:
    spec = pod(rendered.manifests["Deployment"])
    program, pause = container(rendered.manifests["Deployment"])["lifecycle"]["preStop"]["exec"][
        "command"
    ]
    drain = load({}, environment(rendered)).server.drain_timeout
    assert program == "sleep"
    assert int(pause) > 0
    spare = spec["terminationGracePeriodSeconds"] - int(pause) - math.ceil(drain)
    assert spare == VALUES["shutdownMargin"]


@pytest.mark.parametrize("kind", ["Deployment", "Pod"])
def test_nothing_runs_with_rights(rendered: Rendered, kind: str) -> None:
    spec = pod(rendered.manifests[kind])
    assert spec["automountServiceAccountToken"] is False
    # A service named "internvl" would otherwise set INTERNVL_PORT to a URL.
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert container(rendered.manifests[kind])["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_image_is_pinned_and_fits_the_device(renders: dict[str, Rendered]) -> None:
    version = PROJECT["version"]
    expected = {
        "default": f"internvl-server:{version}",
        "gpu": f"internvl-server:{version}-cuda",
        "everything": "registry.example/internvl:0.1.0-1",
    }
    for name, image in expected.items():
        for kind in ("Deployment", "Pod"):
            assert container(renders[name].manifests[kind])["image"] == image


def test_a_gpu_is_asked_for_and_the_weights_are_read_only(renders: dict[str, Rendered]) -> None:
    manifest = renders["gpu"].manifests["Deployment"]
    server = container(manifest)
    assert server["resources"]["limits"] == {"memory": "4Gi", "nvidia.com/gpu": 1}
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in server["volumeMounts"]
    assert {"name": "models", **CLAIM} in pod(manifest)["volumes"]
    assert pod(manifest)["runtimeClassName"] == "nvidia"
    assert manifest["spec"]["strategy"] == {"type": "Recreate"}
    settings = load({}, environment(renders["gpu"])).engine
    assert (settings.device, settings.model) == ("cuda", "/models/InternVL3-8B")
    assert load({}, environment(renders["default"])).engine.device == "cpu"


def test_a_model_is_split_over_the_gpus_of_its_pod(renders: dict[str, Rendered]) -> None:
    for name, count, sizes in (("gpu", 1, (1, 1)), ("gpus", 4, (4, 1)), ("stages", 3, (1, 3))):
        limits = container(renders[name].manifests["Deployment"])["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == count
        settings = load({}, environment(renders[name])).engine
        assert (settings.tensor_parallel_size, settings.pipeline_parallel_size) == sizes
    assert "InternVL3-38B on 4 GPUs" in " ".join(renders["gpus"].notes.split())


def test_every_mount_has_its_volume_and_shared_memory_is_memory(rendered: Rendered) -> None:
    spec = pod(rendered.manifests["Deployment"])
    mounts = {
        m["mountPath"]: m["name"]
        for m in container(rendered.manifests["Deployment"])["volumeMounts"]
    }
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "sizeLimit" in volumes[mounts["/tmp"]]["emptyDir"]
    assert not any("hostPath" in volume for volume in volumes.values())


def test_services_and_policies_select_the_servers_and_not_the_smoke_test(
    rendered: Rendered,
) -> None:
    deployment = rendered.manifests["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    smoke = rendered.manifests["Pod"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        rendered.manifests["Service"]["spec"]["selector"],
        rendered.manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    if budget := rendered.manifests.get("PodDisruptionBudget"):
        selectors.append(budget["spec"]["selector"]["matchLabels"])
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= smoke.items()
    if monitor := rendered.manifests.get("ServiceMonitor"):
        chosen = monitor["spec"]["selector"]["matchLabels"]
        assert chosen.items() <= rendered.manifests["Service"]["metadata"]["labels"].items()
    if scaler := rendered.manifests.get("HorizontalPodAutoscaler"):
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_the_network_is_closed_but_for_what_is_named(renders: dict[str, Rendered]) -> None:
    closed = renders["default"].manifests["NetworkPolicy"]["spec"]
    assert closed["policyTypes"] == ["Ingress", "Egress"]
    assert closed["ingress"] == [{"ports": [{"port": "http"}]}]
    assert [p["port"] for rule in closed["egress"] for p in rule["ports"]] == [53, 53]

    opened = renders["everything"].manifests["NetworkPolicy"]["spec"]
    (ingress,) = opened["ingress"]
    client, smoke = ingress["from"]
    assert client == CASES["everything"]["networkPolicy"]["from"][0]
    labels = renders["everything"].manifests["Pod"]["metadata"]["labels"]
    assert smoke["podSelector"]["matchLabels"].items() <= labels.items()
    names, media = opened["egress"]
    assert names["to"] == CASES["everything"]["networkPolicy"]["dns"]
    assert [p["port"] for p in media["ports"]] == [80, 443]
    excepted = media["to"][0]["ipBlock"]["except"]
    assert {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"} <= set(excepted)


def test_the_notes_say_what_is_open_and_what_is_shut(renders: dict[str, Rendered]) -> None:
    assert "demo model" in renders["default"].notes
    assert "No API keys" in renders["default"].notes
    assert "only data: URIs" in renders["default"].notes
    assert "No API keys" not in renders["keys"].notes
    assert "only data: URIs" not in renders["everything"].notes
    assert "/models/InternVL3-8B on one GPU" in " ".join(renders["gpu"].notes.split())


def test_probes_and_scrapes_ask_for_paths_that_the_server_has(
    renders: dict[str, Rendered], demo_server: Server
) -> None:
    one = renders["everything"]
    server = container(one.manifests["Deployment"])
    paths = {
        server[name + "Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")
    }
    paths.add(one.manifests["ServiceMonitor"]["spec"]["endpoints"][0]["path"])
    for path in paths:
        assert httpx.get(demo_server.url + path).status_code == 200, path


def run_smoke(one: Rendered, port: int, keys: str = "") -> subprocess.CompletedProcess[str]:
    """What `helm test` would run, here; the service's name becomes this machine."""
    smoke = container(one.manifests["Pod"])
    assert smoke["command"] == ["python3", "-c"]
    names = {entry["name"] for entry in smoke["env"]}
    assert names == {"SERVER_HOST", "SERVER_PORT"} | ({"API_KEYS"} if keys else set())
    return subprocess.run(
        [sys.executable, "-c", *smoke["args"]],
        env={
            **os.environ,
            "SERVER_HOST": "127.0.0.1",
            "SERVER_PORT": str(port),
            "API_KEYS": keys,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_smoke_test_passes_on_the_demo_model(
    renders: dict[str, Rendered], demo_server: Server
) -> None:
    done = run_smoke(renders["default"], demo_server.port)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("internvl-demo: ")


class Stub(BaseHTTPRequestHandler):
    """Answers like a server behind a key; what it answers is the test's choice."""

    words = "red"

    def answer(self) -> None:
        allowed = self.headers.get("Authorization") == "Bearer first" or self.path == "/ready"
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = {
            "data": [{"id": "m"}],
            "choices": [{"message": {"content": self.words}}],
        }
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    do_GET = do_POST = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_smoke_test_sends_a_key_and_fails_on_refusal_and_silence(
    renders: dict[str, Rendered], stub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = stub.server_address[1]
    assert run_smoke(renders["keys"], port, "first,second").stdout == "m: red\n"
    refused = run_smoke(renders["keys"], port, "wrong")
    assert refused.returncode == 1
    assert "answered 401" in refused.stderr
    monkeypatch.setattr(Stub, "words", " ")
    silent = run_smoke(renders["keys"], port, "first")
    assert (silent.returncode, "empty" in silent.stderr) == (1, True)
