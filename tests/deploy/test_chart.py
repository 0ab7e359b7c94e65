"""The chart renders with Helm's own engine into manifests that Kubernetes knows, and keeps the
promises that docs/kubernetes.md makes. No cluster is involved."""

import ipaddress
import json
import math
import re
import subprocess
import sys
import tomllib
from typing import Any

import httpx
import jsonschema
import pytest
import yaml

from tests.deploy import chart
from tests.deploy.chart import HELM, ROOT, SCHEMA, Rendered, container, environment, pod
from tests.servers import Server
from wire.loading import ENV_PREFIX, load
from wire.settings import each_setting

pytestmark = chart.needs_helm

VALUES = yaml.safe_load((HELM / "values.yaml").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CLAIM = {"persistentVolumeClaim": {"claimName": "weights"}}

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "gpu": chart.examples()["gpu"],
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
    "everything": chart.examples()["everything"],
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
    "digest": {"image": {"digest": "sha256:short"}},
    "name": {"model": {"hub": {"name": "/models/x"}}},
    "env": {"env": [{"name": "INTERNVL_PORT", "value": "1"}]},
    "parentRefs": {"gateway": {"enabled": True}},
    "/gateway/path": {"gateway": {"enabled": True, "parentRefs": [{"name": "a"}], "path": "/v/"}},
    "endpointPicker": {"inferencePool": {"enabled": True}},
    "one of volume": {"model": {"volume": CLAIM, "claim": {"existing": "a"}}},
    "where to": {"model": {"hub": {"name": "a/b"}}},
    "below /models": {"model": {"hub": {"name": "a/b"}, "path": "/x", "volume": CLAIM}},
    "shares with the pods": {
        "model": {"hub": {"name": "a/b", "by": "job"}, "claim": {"create": True}},
        "strategy": {"type": "Recreate"},
    },
    "cache.claim.accessModes": {"cache": {"claim": {"create": True}}, "replicas": 2},
    "strategy.type": {"model": {"claim": {"create": True}}},
    "hosts.secret": {"hosts": {"size": 2}},
    "counted twice": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}},
    "plain HTTP": {
        "inferencePool": {"enabled": True, "endpointPicker": {"name": "epp"}},
        "tls": {"existingSecret": "certificate"},
    },
    "networkPolicy": {"networkPolicy": None},
    "3 processes cannot": {
        "hosts": {"size": 2, "secret": "s"},
        "settings": {"tensor_parallel_size": 3},
    },
    "need more GPUs": {"gpu": {"count": 2}, "settings": {"pipeline_parallel_size": 4}},
    "fullnameOverride": {"fullnameOverride": "1eye"},
    "where is Prometheus": {"autoscaling": {"enabled": True, "by": "keda"}},
    "minReplicas: 5 is more": {"autoscaling": {"enabled": True, "minReplicas": 5}},
}


@pytest.fixture(scope="module")
def renders() -> dict[str, Rendered]:
    return dict(zip(CASES, chart.render(list(CASES.values())), strict=True))


@pytest.fixture(params=CASES)
def rendered(request: pytest.FixtureRequest, renders: dict[str, Rendered]) -> Rendered:
    one = renders[request.param]
    assert not one.error
    return one


def agree(schema: dict[str, Any], values: dict[str, Any], path: str = "") -> None:
    """Whether the schema knows the keys that there are, all the way down."""
    rules = schema["properties"]
    assert set(rules) == set(values), path
    for name, rule in rules.items():
        if values[name] and "properties" in rule:
            agree(rule, values[name], f"{path}.{name}")


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
    agree(schema, VALUES | {"global": {}})


def test_the_schema_knows_every_setting_of_the_server() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert schema["properties"]["settings"]["properties"] == chart.settings_schema(), (
        "run: python -m tests.deploy.chart settings"
    )


def test_the_page_explains_every_value() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.split("\n") if line.startswith("|")]
    explained = set(re.findall(r"`([^`]+)`", " ".join(rows)))
    assert set(VALUES) <= explained
    named = {name for name in explained if name.startswith("helm/ci/")}
    assert named == {f"helm/ci/{name}-values.yaml" for name in chart.examples()}


def test_chart_and_server_carry_one_version() -> None:
    about = yaml.safe_load((HELM / "Chart.yaml").read_text(encoding="utf-8"))
    assert about["version"] == about["appVersion"] == PROJECT["version"]


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
    names = {entry["name"] for entry in container(one.manifests["Pod/smoke"])["env"]}
    assert names >= {"SERVER_TLS", "NO_KEY_KNOWN"}


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
    before = container(rendered.manifests["Deployment"])["lifecycle"]["preStop"]
    if "exec" in before:
        program, pause = before["exec"]["command"]
        assert program == "sleep"
    else:
        pause = before["sleep"]["seconds"]
    drain = load({}, environment(rendered)).server.drain_timeout
    assert int(pause) > 0
    spare = spec["terminationGracePeriodSeconds"] - int(pause) - math.ceil(drain)
    assert spare >= VALUES["shutdownMargin"]


def test_the_kubelet_sleeps_itself_where_it_can() -> None:
    versions = {"1.29": "exec", "v1.30.0": "sleep", "1.34": "sleep"}
    for (version, how), one in zip(
        versions.items(), chart.render([{"kubeVersion": v} for v in versions]), strict=True
    ):
        assert set(container(one.manifests["Deployment"])["lifecycle"]["preStop"]) == {how}, version
    (none,) = chart.render([{"preStopDelay": 0}])
    assert "lifecycle" not in container(none.manifests["Deployment"])


def test_nothing_runs_with_rights(rendered: Rendered) -> None:
    runners = [m for m in rendered.manifests.values() if m["kind"] in ("Deployment", "Pod", "Job")]
    assert len(runners) >= 2
    for manifest in runners:
        has_no_rights(pod(manifest))


def has_no_rights(spec: dict[str, Any]) -> None:
    assert spec["automountServiceAccountToken"] is False
    # A service named "internvl" would otherwise set INTERNVL_PORT to a URL.
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    for one in spec["containers"] + spec.get("initContainers", []):
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_the_image_is_pinned_and_fits_the_device(renders: dict[str, Rendered]) -> None:
    version = PROJECT["version"]
    expected = {
        "default": f"internvl-server:{version}",
        "gpu": f"registry.example/internvl-server:{version}-cuda",
        "everything": f"registry.example/internvl-server@sha256:{'0123456789abcdef' * 4}",
    }
    for name, image in expected.items():
        for kind in ("Deployment", "Pod/smoke"):
            assert container(renders[name].manifests[kind])["image"] == image


def test_a_gpu_is_asked_for_and_the_weights_are_read_only(renders: dict[str, Rendered]) -> None:
    manifest = renders["gpu"].manifests["Deployment"]
    server = container(manifest)
    assert server["resources"]["limits"] == {"memory": "32Gi", "nvidia.com/gpu": 1}
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in server["volumeMounts"]
    weights = {"persistentVolumeClaim": {"claimName": "internvl-weights"}}
    assert {"name": "models", **weights} in pod(manifest)["volumes"]
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
    starting = [m["name"] for c in spec.get("initContainers", []) for m in c["volumeMounts"]]
    assert {*mounts.values(), *starting} == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "sizeLimit" in volumes[mounts["/tmp"]]["emptyDir"]
    assert not any("hostPath" in volume for volume in volumes.values())


def test_services_and_policies_select_the_servers_and_not_the_smoke_test(
    rendered: Rendered,
) -> None:
    deployment = rendered.manifests["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    smoke = rendered.manifests["Pod/smoke"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        rendered.manifests["Service"]["spec"]["selector"],
        rendered.manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= smoke.items()
    budget = rendered.manifests["PodDisruptionBudget"]["spec"]["selector"]
    assert budget["matchLabels"].items() <= labels.items()
    (roles,) = budget["matchExpressions"]
    assert labels[roles["key"]] in roles["values"]
    assert smoke[roles["key"]] not in roles["values"]
    if monitor := rendered.manifests.get("ServiceMonitor"):
        chosen = monitor["spec"]["selector"]["matchLabels"]
        assert chosen.items() <= rendered.manifests["Service"]["metadata"]["labels"].items()


def test_the_network_is_closed_but_for_what_is_named(renders: dict[str, Rendered]) -> None:
    closed = renders["default"].manifests["NetworkPolicy"]["spec"]
    assert closed["policyTypes"] == ["Ingress", "Egress"]
    assert closed["ingress"] == [{"ports": [{"port": "http"}], "from": [{"podSelector": {}}]}]
    assert [p["port"] for rule in closed["egress"] for p in rule["ports"]] == [53, 53]

    given = CASES["everything"]["networkPolicy"]
    opened = renders["everything"].manifests["NetworkPolicy"]["spec"]
    (ingress,) = opened["ingress"]
    _, gateway, client = ingress["from"]
    assert gateway["namespaceSelector"]["matchExpressions"][0]["values"] == given["namespaces"]
    assert client == given["from"][0]
    names, media, traces = opened["egress"]
    assert names["to"] == given["dns"]
    assert [p["port"] for p in media["ports"]] == [80, 443]
    assert traces == given["egress"][0]


def test_no_egress_reaches_a_metadata_service_or_a_neighbour(
    renders: dict[str, Rendered],
) -> None:
    metadata = ("169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192")
    neighbours = ("10.0.0.1", "172.16.0.1", "192.168.0.1", "127.0.0.1")
    inner = ("fd00:ec2::254", "fe80::1", "::1", "2002:a9fe:a9fe::1")
    blocks = [
        peer["ipBlock"]
        for policy in renders["everything"].manifests.values()
        if policy["kind"] == "NetworkPolicy"
        for rule in policy["spec"]["egress"]
        for peer in rule.get("to", [])
        if "ipBlock" in peer and "53" not in str(rule["ports"])
    ]
    assert len(blocks) == 3
    for address in map(ipaddress.ip_address, (*metadata, *neighbours, *inner)):
        assert not any(covers(block, address) for block in blocks), address
    for address in map(ipaddress.ip_address, ("93.184.215.14", "2606:2800:21f::1")):
        assert any(covers(block, address) for block in blocks), address


def covers(block: dict[str, Any], address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if address not in ipaddress.ip_network(block["cidr"]):
        return False
    return not any(address in ipaddress.ip_network(hole) for hole in block.get("except", []))


def test_the_notes_say_what_is_open_and_what_is_shut(renders: dict[str, Rendered]) -> None:
    assert "demo model" in renders["default"].notes
    assert "No API keys" in renders["default"].notes
    assert "only data: URIs" in renders["default"].notes
    assert "No API keys" not in renders["keys"].notes
    assert "only data: URIs" not in renders["everything"].notes
    assert "Only pods of namespace vision" in renders["default"].notes
    assert "Only pods" not in renders["everything"].notes
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
        assert httpx.get(demo_server.url + path, timeout=60).status_code == 200, path


def test_the_longest_name_still_leaves_room_for_what_is_added() -> None:
    values = chart.examples()["multi-node"] | {"dashboards": {"enabled": True}}
    claim = {"create": True, "accessModes": ["ReadWriteMany"]}
    values["model"] = {"hub": {"name": "a/b", "by": "job"}, "claim": claim, "size": "2Gi"}
    longest: list[dict[str, Any]] = [{"fullnameOverride": "x" * 42}, {"nameOverride": "x" * 50}]
    for one in chart.render([values | name for name in longest]):
        assert not one.error
        kinds = {m["kind"]: m["metadata"]["name"] for m in one.manifests.values()}
        # A Job's name becomes a label. So does that of a leader's StatefulSet of ranks, with the
        # hash of a revision, ten characters, behind it.
        assert len(kinds["Job"]) <= 63
        assert len(kinds["LeaderWorkerSet"] + "-999-1234567890") <= 63


def test_a_name_that_looks_like_a_number_stays_text() -> None:
    (one,) = chart.render([{"nameOverride": "123"}])
    for manifest in one.manifests.values():
        assert manifest["metadata"]["labels"]["app.kubernetes.io/name"] == "123"
