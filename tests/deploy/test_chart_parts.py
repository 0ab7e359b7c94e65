"""What the chart can add to a Deployment: volumes, a fetched checkpoint, several hosts, replicas by
what waits, gateways, monitoring."""

import argparse
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.cli import make_parser
from server.commands.rank import host_of_ranks
from tests.deploy import chart
from tests.deploy.chart import HELM, NAME, ROOT, Manifest, Rendered, container, environment, pod
from tests.servers import Server
from wire.loading import load

pytestmark = chart.needs_helm

EXAMPLES = chart.examples()
SHARED = {"create": True, "accessModes": ["ReadWriteMany"]}


@pytest.fixture(scope="module")
def renders() -> dict[str, Rendered]:
    return dict(zip(EXAMPLES, chart.render(list(EXAMPLES.values())), strict=True))


def rendered(**values: Any) -> Rendered:
    (one,) = chart.render([values])
    assert not one.error, one.error
    return one


def volumes(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {volume["name"]: volume for volume in spec["volumes"]}


def mounts(of: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {mount["mountPath"]: mount for mount in of["volumeMounts"]}


def test_a_claim_is_made_as_asked_for_and_mounted() -> None:
    claim = {**SHARED, "size": "7Gi", "storageClass": "fast"}
    one = rendered(model={"path": "/models/x", "claim": claim}, cache={"claim": SHARED})
    models, cache = (one.manifests[f"PersistentVolumeClaim/{name}"] for name in ("models", "cache"))
    assert models["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "7Gi"}},
    }
    # Weights outlive the release, and what they compile to does not.
    assert models["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert "annotations" not in cache["metadata"]
    deployment = one.manifests["Deployment"]
    for path, claimed in (("/models", models), ("/cache", cache)):
        mount = mounts(container(deployment))[path]
        source = volumes(pod(deployment))[mount["name"]]["persistentVolumeClaim"]
        assert source == {"claimName": claimed["metadata"]["name"]}
        assert mount.get("readOnly", False) == (path == "/models")


def test_compiled_kernels_go_where_they_are_kept() -> None:
    one = rendered(cache={"claim": {"existing": "kept"}})
    server = container(one.manifests["Deployment"])
    variables = {entry["name"]: entry.get("value", "") for entry in server["env"]}
    for name in ("TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "HF_HOME"):
        assert variables[name].startswith("/cache/")
    plain = container(rendered().manifests["Deployment"])
    assert "TRITON_CACHE_DIR" not in {entry["name"] for entry in plain["env"]}


def words(of: dict[str, Any]) -> argparse.Namespace:
    """What `internvl` makes of a container's arguments."""
    return make_parser().parse_args(of["args"])


def test_each_pod_fetches_its_checkpoint_before_it_serves(renders: dict[str, Rendered]) -> None:
    one = renders["cpu"]
    spec = pod(one.manifests["Deployment"])
    (fetch,) = spec["initContainers"]
    told = words(fetch)
    assert (told.command, told.name, told.wait) == ("fetch", "OpenGVLab/InternVL3-1B", False)
    settings = load({}, environment(one))
    assert str(told.to) == settings.engine.model == "/models/InternVL3-1B"
    assert settings.server.served_model_name == "OpenGVLab/InternVL3-1B"
    assert mounts(fetch)["/models"] == {"name": "models", "mountPath": "/models"}
    egress = one.manifests["NetworkPolicy"]["spec"]["egress"]
    assert [rule["ports"][0]["port"] for rule in egress] == [53, 443]
    assert not [key for key in one.manifests if key.startswith("Job")]


def test_a_job_fetches_for_pods_that_neither_reach_the_hub_nor_have_its_token(
    renders: dict[str, Rendered],
) -> None:
    one = renders["tp4"]
    (job,) = (m for m in one.manifests.values() if m["kind"] == "Job")
    fetch = container(job)
    assert not words(fetch).wait
    assert fetch["env"][-1] == {"name": "HF_TOKEN_PATH", "value": "/etc/internvl/hub/token"}
    assert volumes(pod(job))["hub"] == {"name": "hub", "secret": {"secretName": "hub-token"}}
    assert job["spec"]["activeDeadlineSeconds"] == 3600
    labels = job["spec"]["template"]["metadata"]["labels"]
    policy = one.manifests["NetworkPolicy/fetch"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert "ingress" not in policy
    assert [rule["ports"][0]["port"] for rule in policy["egress"]] == [53, 443]

    server = pod(one.manifests["Deployment"])
    (wait,) = server["initContainers"]
    told = words(wait)
    assert told.wait
    assert (told.name, told.to) == (words(fetch).name, words(fetch).to)
    assert mounts(wait)["/models"]["readOnly"]
    assert "hub" not in volumes(server)
    ports = [r["ports"][0]["port"] for r in one.manifests["NetworkPolicy"]["spec"]["egress"]]
    assert ports == [53]


def test_another_revision_is_another_folder_and_another_job() -> None:
    hub = {"name": "a/b", "by": "job"}
    first, second = (
        rendered(model={"hub": hub | {"revision": revision}, "claim": SHARED})
        for revision in ("", "refs/pr/1")
    )
    names = [
        {m["metadata"]["name"] for m in r.manifests.values() if m["kind"] == "Job"}
        for r in (first, second)
    ]
    assert not names[0] & names[1]
    folders = [load({}, environment(one)).engine.model for one in (first, second)]
    assert folders == ["/models/b", "/models/b-refs-pr-1"]


@pytest.mark.parametrize(
    "change",
    [
        {"image": {"tag": "0.1.0-1"}},
        {"imagePullSecrets": [{"name": "pull"}]},
        {"tmp": {"sizeLimit": "2Gi"}},
        {"model": {"hub": EXAMPLES["tp4"]["model"]["hub"] | {"tokenSecret": "other"}}},
        {"model": {"claim": {"existing": "other", "create": False}}},
    ],
    ids=str,
)
def test_a_job_whose_pod_changes_is_another_job(
    renders: dict[str, Rendered], change: dict[str, Any]
) -> None:
    values = EXAMPLES["tp4"]
    model = values["model"] | change.get("model", {})
    one = rendered(**(values | change | {"model": model}))
    before, after = (
        next(m for m in r.manifests.values() if m["kind"] == "Job") for r in (renders["tp4"], one)
    )
    assert before["spec"]["template"] != after["spec"]["template"]
    # Kubernetes refuses to change the template of a Job that is there.
    assert before["metadata"]["name"] != after["metadata"]["name"]


def test_what_fetches_reaches_the_port_of_a_mirror(renders: dict[str, Rendered]) -> None:
    def ports(endpoint: str, by: str) -> list[int]:
        hub = {"name": "a/b", "by": by, "endpoint": endpoint}
        one = rendered(model={"hub": hub, "claim": SHARED})
        policy = one.manifests["NetworkPolicy/fetch" if by == "job" else "NetworkPolicy"]
        return [port["port"] for port in policy["spec"]["egress"][1]["ports"]]

    for by in ("init", "job"):
        assert ports("https://mirror.example:8443/hub", by) == [443, 8443]
    assert ports("http://mirror.example", "job") == [443, 80]
    assert ports("https://[2001:db8::1]", "job") == [443]


def test_starting_may_take_as_long_as_the_model_is_large(renders: dict[str, Rendered]) -> None:
    budgets = {}
    for name, one in renders.items():
        server = container(runner(one))
        probe = server["startupProbe"]
        assert probe["httpGet"]["path"] == "/started"
        budgets[name] = probe["periodSeconds"] * probe["failureThreshold"]
        if "Deployment" in one.manifests:
            deadline = one.manifests["Deployment"]["spec"]["progressDeadlineSeconds"]
            fetching = "initContainers" in pod(one.manifests["Deployment"])
            assert deadline > budgets[name] + (3600 if fetching else 0)
    assert budgets["cpu"] == budgets["gpu"] == 600
    assert budgets["tp4"] == 300 + 76 * 10
    # The ranks of other hosts are waited for as well.
    waits = load({}, {}).engine.rank_timeout
    assert budgets["multi-node"] == 300 + 157 * 10 + waits
    assert budgets["everything"] == 10 * 90


def runner(one: Rendered) -> Manifest:
    if "Deployment" in one.manifests:
        return one.manifests["Deployment"]
    return chart.pods(one.manifests["LeaderWorkerSet/group"])[0]


def test_memory_follows_the_model_or_the_gpus(renders: dict[str, Rendered]) -> None:
    found = {name: container(runner(one))["resources"] for name, one in renders.items()}
    assert found["cpu"]["limits"] == {"memory": "8Gi"}
    assert found["tp4"]["requests"] == {"cpu": "16", "memory": "64Gi"}
    assert found["tp4"]["limits"] == {"memory": "128Gi", "nvidia.com/gpu": 4}
    assert found["everything"] == EXAMPLES["everything"]["resources"]


def hosts(one: Rendered) -> tuple[Manifest, Manifest]:
    leader, rank = chart.pods(one.manifests["LeaderWorkerSet/group"])
    return leader, rank


def test_several_hosts_are_a_group_of_one_leader_and_ranks(renders: dict[str, Rendered]) -> None:
    one = renders["multi-node"]
    group = one.manifests["LeaderWorkerSet/group"]
    assert "Deployment" not in one.manifests
    # Ranks come back by themselves, and the leader waits for them before it is ready.
    assert group["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "None"
    assert group["spec"]["startupPolicy"] == "LeaderCreated"
    leader, rank = hosts(one)
    assert (container(leader)["args"], container(rank)["args"]) == (["serve"], ["rank"])
    assert container(leader)["image"] == container(rank)["image"]
    for manifest in (leader, rank):
        assert container(manifest)["resources"]["limits"]["nvidia.com/gpu"] == 8
        secret = volumes(pod(manifest))["ranks"]["secret"]["secretName"]
        assert secret == EXAMPLES["multi-node"]["hosts"]["secret"]
        assert "/etc/internvl/ranks" in mounts(container(manifest))
    # LeaderWorkerSet makes a Service of the group's name.
    assert group["metadata"]["name"] != one.manifests["Service"]["metadata"]["name"]
    assert "API_KEY" in str(container(leader)["env"])
    assert "API_KEY" not in str(container(rank)["env"])


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [({}, (16, 1)), ({"tensor_parallel_size": 8, "pipeline_parallel_size": 2}, (8, 2))],
)
def test_leader_and_ranks_agree_on_how_the_model_is_split(
    settings: dict[str, int], sizes: tuple[int, int], tmp_path: Path
) -> None:
    values = EXAMPLES["multi-node"] | {"settings": settings}
    one = rendered(**values)
    given = one.manifests["ConfigMap"]["data"]
    for manifest in hosts(one):
        folder, _, file = given["INTERNVL_RANK_SECRET_FILE"].rpartition("/")
        assert folder in mounts(container(manifest))
    (tmp_path / file).write_text("x" * 32)
    # The volumes are not here.
    given |= {"INTERNVL_RANK_SECRET_FILE": str(tmp_path / file), "INTERNVL_MODEL": ""}
    leader = load({}, given).engine
    assert (leader.tensor_parallel_size, leader.pipeline_parallel_size) == sizes
    assert leader.nodes == 2
    # As LeaderWorkerSet sets them in each pod.
    group = {
        "LWS_LEADER_ADDRESS": f"{NAME}-group-0.{NAME}-group.vision",
        "LWS_GROUP_SIZE": "2",
        "LWS_WORKER_INDEX": "1",
    }
    host = host_of_ranks({}, given | group)
    assert (host["leader"], host["node"]) == (group["LWS_LEADER_ADDRESS"], 1)
    assert host["port"] == leader.rank_port
    _, rank = hosts(one)
    assert f"-ge {host['processes']} ]" in container(rank)["readinessProbe"]["exec"]["command"][2]


def test_only_leaders_are_sent_requests_and_only_the_group_reaches_ranks(
    renders: dict[str, Rendered],
) -> None:
    one = renders["multi-node"]
    labels = [manifest["metadata"]["labels"] for manifest in hosts(one)]
    chosen = one.manifests["Service"]["spec"]["selector"]
    assert [chosen.items() <= each.items() for each in labels] == [True, False]
    policy = one.manifests["NetworkPolicy/rank"]["spec"]
    selected = policy["podSelector"]["matchLabels"]
    assert [selected.items() <= each.items() for each in labels] == [False, True]
    (ingress,) = policy["ingress"]
    names, egress = policy["egress"]
    assert names["ports"][0]["port"] == 53
    for rule, side in ((ingress, "from"), (egress, "to")):
        (peer,) = rule[side]
        (roles,) = peer["podSelector"]["matchExpressions"]
        assert sorted(each[roles["key"]] for each in labels) == sorted(roles["values"])
    _, among = one.manifests["NetworkPolicy"]["spec"]["ingress"]
    assert among == ingress
    assert "-rank" not in str(renders["gpu"].manifests)


def test_ranks_stay_while_their_leader_drains(renders: dict[str, Rendered]) -> None:
    leader, rank = hosts(renders["multi-node"])
    grace = "terminationGracePeriodSeconds"
    drain = float(renders["multi-node"].manifests["ConfigMap"]["data"]["INTERNVL_DRAIN_TIMEOUT"])
    assert pod(rank)[grace] == pod(leader)[grace] > drain
    command = container(rank)["lifecycle"]["preStop"]["exec"]["command"][2]
    assert command.startswith("while [ $(")
    assert "livenessProbe" not in container(rank)


def test_a_rank_is_ready_when_all_its_processes_are_and_stops_when_none_is(
    renders: dict[str, Rendered], tmp_path: Path
) -> None:
    _, rank = hosts(renders["multi-node"])
    ready, stop = (
        [*shell, text.replace("/proc/", f"{tmp_path}/")]
        for *shell, text in (
            container(rank)["readinessProbe"]["exec"]["command"],
            container(rank)["lifecycle"]["preStop"]["exec"]["command"],
        )
    )

    def run_in(pid: int, *argv: str) -> Path:
        line = tmp_path / str(pid) / "cmdline"
        line.parent.mkdir(exist_ok=True)
        line.write_bytes(b"".join(word.encode() + b"\0" for word in argv))
        return line

    def succeeds(command: list[str]) -> bool:
        return subprocess.run(command, check=False, timeout=60).returncode == 0

    run_in(1, "tini", "--", "internvl", "rank")
    run_in(7, "python3", "-P", "-m", "engine.node", "{}")
    run_in(8, *ready)  # itself
    assert not succeeds(ready)
    assert succeeds(stop)
    ranks = [run_in(10 + i, "python3", "-P", "-m", "engine.rank", "5", "7", "") for i in range(8)]
    assert succeeds(ready)
    ranks[3].unlink()
    assert not succeeds(ready)
    with subprocess.Popen(stop) as waiting:
        for line in ranks[:3] + ranks[4:]:
            assert waiting.poll() is None
            line.unlink()
        assert waiting.wait(60) == 0


WAITING = {"internvl_num_requests_waiting": 4, "internvl_num_visual_tokens_waiting": 16384}


def test_replicas_follow_what_waits(renders: dict[str, Rendered]) -> None:
    one = renders["pool"]
    scaler = one.manifests["HorizontalPodAutoscaler"]["spec"]
    found = {
        metric["pods"]["metric"]["name"]: int(metric["pods"]["target"]["averageValue"])
        for metric in scaler["metrics"]
    }
    assert found == WAITING
    deployment = one.manifests["Deployment"]
    assert scaler["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]
    assert "replicas" in rendered().manifests["Deployment"]["spec"]
    assert "HorizontalPodAutoscaler needs an adapter" in one.notes
    with_cpu = renders["everything"].manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert with_cpu[-1]["resource"]["target"]["averageUtilization"] == 70


def test_keda_asks_prometheus_for_the_same(renders: dict[str, Rendered]) -> None:
    one = renders["tp4"]
    scaled = one.manifests["ScaledObject"]["spec"]
    assert scaled["minReplicaCount"] == 1
    for trigger, (name, most) in zip(scaled["triggers"], WAITING.items(), strict=True):
        given = trigger["metadata"]
        assert given["threshold"] == str(most)
        assert given["query"].startswith(f'sum({name}{{namespace="vision",pod=~"{NAME}-(')
        assert given["ignoreNullValues"] == "false"
        assert given["serverAddress"] == "http://prometheus-operated.monitoring:9090"
    assert "replicas" not in one.manifests["Deployment"]["spec"]
    assert "HorizontalPodAutoscaler" not in one.manifests


def test_scalers_and_pickers_read_metrics_that_the_server_has(
    renders: dict[str, Rendered], demo_server: Server
) -> None:
    page = httpx.get(demo_server.url + "/metrics", timeout=60).text
    known = set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))
    assert set(WAITING) <= known
    docs = (ROOT / "docs" / "kubernetes.md").read_text("utf-8")
    (text,) = re.findall(r"```yaml\n(apiVersion: llm-d.*?)```", docs, re.DOTALL)
    picker = yaml.safe_load(text)
    plugins = {plugin["type"]: plugin.get("parameters") for plugin in picker["plugins"]}
    (engine,) = plugins["core-metrics-extractor"]["engineConfigs"]
    assert {name for key, name in engine.items() if key.endswith("Spec")} <= known
    template = renders["pool"].manifests["Deployment"]["spec"]["template"]
    assert engine["name"] == template["metadata"]["labels"]["llm-d.ai/engine-type"]
    (profile,) = picker["schedulingProfiles"]
    assert {plugin["pluginRef"] for plugin in profile["plugins"]} <= set(plugins)
    (text,) = re.findall(r"```yaml\n(rules:.*?)```", docs, re.DOTALL)
    (rule,) = yaml.safe_load(text)["rules"]["custom"]
    (pattern,) = re.findall(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    assert {name for name in known if re.fullmatch(pattern, name)} == set(WAITING)


def test_groups_are_scaled_as_groups() -> None:
    scaling = {"enabled": True, "metrics": [{"type": "cpu", "metadata": {"value": "70"}}]}
    for by, kind in (("hpa", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")):
        values = EXAMPLES["multi-node"] | {"autoscaling": scaling | {"by": by}}
        one = rendered(**values)
        group = one.manifests["LeaderWorkerSet/group"]
        target = one.manifests[kind]["spec"]["scaleTargetRef"]
        assert target["kind"] == "LeaderWorkerSet"
        assert target["name"] == group["metadata"]["name"]
        assert "replicas" not in group["spec"]


def test_a_gateway_leads_to_the_service_or_to_the_pool(renders: dict[str, Rendered]) -> None:
    (rule,) = renders["tp4"].manifests["HTTPRoute"]["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": NAME, "port": 8000}]
    one = renders["pool"]
    (rule,) = one.manifests["HTTPRoute"]["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    pool = one.manifests["InferencePool"]
    assert backend["group"] == pool["apiVersion"].split("/")[0]
    assert (backend["kind"], backend["name"]) == (pool["kind"], pool["metadata"]["name"])
    # What a server behind a path has to know, it is told.
    found = load({}, environment(renders["everything"])).server.root_path
    assert found == EXAMPLES["everything"]["gateway"]["path"]


def test_an_endpoint_picker_finds_pods_metrics_and_priorities(renders: dict[str, Rendered]) -> None:
    one = renders["pool"]
    pool, deployment = one.manifests["InferencePool"]["spec"], one.manifests["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert pool["selector"]["matchLabels"].items() <= labels.items()
    assert labels["llm-d.ai/engine-type"] == "internvl"
    (port,) = pool["targetPorts"]
    assert port["number"] == load({}, environment(one)).server.port
    assert load({}, environment(one)).server.open_metrics
    for name, priority in (("interactive", 10), ("batch", -10)):
        spec = one.manifests[f"InferenceObjective/{name}"]["spec"]
        assert spec["priority"] == priority
        assert spec["poolRef"]["name"] == one.manifests["InferencePool"]["metadata"]["name"]


def test_prometheus_asks_pods_or_their_service_and_needs_no_key(
    renders: dict[str, Rendered],
) -> None:
    one = renders["tp4"]
    labels = one.manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    spec = one.manifests["PodMonitor"]["spec"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = spec["podMetricsEndpoints"]
    ports = container(one.manifests["Deployment"])["ports"]
    assert endpoint["port"] in {port["name"] for port in ports}
    assert load({}, environment(one)).server.open_metrics


def test_dashboards_and_alerts_are_passed_on_unchanged(renders: dict[str, Rendered]) -> None:
    one = renders["everything"]
    files = {file.name: file.read_text("utf-8") for file in HELM.glob("files/dashboards/*.json")}
    passed = {}
    for key, manifest in one.manifests.items():
        if key.startswith("ConfigMap/dashboard-"):
            assert manifest["metadata"]["labels"]["grafana_dashboard"] == "1"
            assert manifest["metadata"]["annotations"] == {"grafana_folder": "Vision"}
            passed |= manifest["data"]
    assert passed.keys() == files.keys() != set()
    for name, text in files.items():
        assert json.loads(passed[name]) == json.loads(text)
    alerts = yaml.safe_load((HELM / "files" / "alerts.yaml").read_text("utf-8"))
    assert one.manifests["PrometheusRule"]["spec"] == alerts


def test_pods_are_spread_and_change_with_their_configuration() -> None:
    plain, other = (rendered(settings=given) for given in ({}, {"max_model_len": 4096}))
    template = plain.manifests["Deployment"]["spec"]["template"]
    keys = [rule["topologyKey"] for rule in template["spec"]["topologySpreadConstraints"]]
    assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    for rule in template["spec"]["topologySpreadConstraints"]:
        chosen = rule["labelSelector"]["matchLabels"]
        assert chosen.items() <= template["metadata"]["labels"].items()
        assert rule["whenUnsatisfiable"] == "ScheduleAnyway"
    sums = [
        one.manifests["Deployment"]["spec"]["template"]["metadata"]["annotations"][
            "checksum/config"
        ]
        for one in (plain, other)
    ]
    assert sums[0] != sums[1]
