"""What the chart tests need: Helm's own renderer, and the schema that the settings imply.

``python -m tests.deploy.chart settings`` writes the schema of the chart's ``settings`` value
again after a setting came or went, ``... golden`` what the examples in helm/ci render to after a
template was changed, and ``... manifests FOLDER`` the same whole, for other people's linters.
``... render`` is how the tests call Helm: its library brings the Go runtime along, which has no
business in the process that runs the tests.
"""

import json
import platform
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from wire.loading import ENV_PREFIX
from wire.settings import each_setting

ROOT = Path(__file__).parents[2]
HELM = ROOT / "helm"
SCHEMA = HELM / "values.schema.json"
GOLDEN = Path(__file__).parent / "golden"
RELEASE, NAMESPACE = "demo", "vision"
NAME = f"{RELEASE}-internvl-server"

needs_helm = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="Helm's library is installed on Linux x86-64 only",
)

# The chart sets these itself, from other values.
OWNED = {"host", "port", "model", "device", "api_key", "drain_timeout", "api_keys_file"}
OWNED |= {"nodes", "rank_secret_file"}
OWNED |= {"tls_certificate", "tls_key", "admin_host", "admin_port", "admin_key_file"}


Manifest = dict[str, Any]


class Rendered(typing.NamedTuple):
    """A chart rendered with some values: its manifests, its notes, or why it refused.

    A manifest's key is its kind, and behind a slash what its name has beside the release's."""

    manifests: dict[str, Manifest]
    notes: str
    error: str


def examples() -> dict[str, dict[str, Any]]:
    """The values in helm/ci, by name."""
    files = sorted((HELM / "ci").glob("*-values.yaml"))
    texts = {file.name.removesuffix("-values.yaml"): file.read_text("utf-8") for file in files}
    return {name: yaml.safe_load(text) for name, text in texts.items()}


def render(values: list[dict[str, Any]]) -> list[Rendered]:
    """Render the chart once for each of ``values``, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.deploy.chart", "render"],
        cwd=ROOT,
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=True,
    )
    return [_sort(texts) for texts in json.loads(done.stdout)]


def _sort(texts: dict[str, str]) -> Rendered:
    notes, error, manifests = "", texts.pop("error", ""), {}
    for path, text in texts.items():
        if path.endswith("NOTES.txt"):
            notes = text
            continue
        for manifest in yaml.safe_load_all(text):
            if manifest is not None:
                assert manifest["metadata"]["namespace"] == NAMESPACE
                key = _key(manifest)
                assert key not in manifests
                manifests[key] = manifest
    return Rendered(manifests, notes, error)


def _key(manifest: Manifest) -> str:
    name = manifest["metadata"]["name"]
    for whole in (NAME, "internvl"):  # the latter as fullnameOverride
        if name == whole:
            return str(manifest["kind"])
        name = name.removeprefix(whole + "-")
    return f"{manifest['kind']}/{name}"


def pods(manifest: Manifest) -> list[Manifest]:
    """Of a LeaderWorkerSet: its pods, which few programs know to look for inside."""
    if manifest["kind"] != "LeaderWorkerSet":
        return []
    group = manifest["spec"]["leaderWorkerTemplate"]
    found = []
    for role in ("leader", "worker"):
        template = group[f"{role}Template"]
        own = template["metadata"]
        annotations = manifest["metadata"]["annotations"] | own["annotations"]
        about = own | {"name": role, "namespace": NAMESPACE, "annotations": annotations}
        found.append(
            {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": template["spec"]}
        )
    return found


def pod(manifest: Manifest) -> dict[str, Any]:
    """Its pods' spec."""
    spec: dict[str, Any] = manifest["spec"]
    return spec["template"]["spec"] if "template" in spec else spec


def container(manifest: Manifest) -> dict[str, Any]:
    """The one of its pods that is none of those that end before."""
    (one,) = pod(manifest)["containers"]
    return dict(one)


def environment(one: Rendered) -> dict[str, str]:
    """The server's environment as far as it is written down in the release."""
    server = container(one.manifests["Deployment"])
    (source,) = server["envFrom"]
    assert source["configMapRef"]["name"] == one.manifests["ConfigMap"]["metadata"]["name"]
    found: dict[str, str] = dict(one.manifests["ConfigMap"]["data"])
    for entry in server["env"]:
        reference = entry.get("valueFrom", {}).get("secretKeyRef")
        if reference and "Secret/api-keys" in one.manifests:
            secret = one.manifests["Secret/api-keys"]
            assert reference["name"] == secret["metadata"]["name"]
            found[entry["name"]] = secret["stringData"][reference["key"]]
        elif entry["name"].startswith(ENV_PREFIX):
            found.setdefault(entry["name"], "1")
    return found


def golden() -> dict[str, str]:
    """What the examples render to, sorted, by name. Files that the chart passes on are named, not
    repeated."""
    cases = examples()
    pages = {}
    for name, one in zip(cases, render(list(cases.values())), strict=True):
        assert not one.error, one.error
        manifests = [_short(one.manifests[key]) for key in sorted(one.manifests)]
        pages[name] = yaml.safe_dump_all(manifests, sort_keys=True, width=100)
    return pages


def _short(manifest: Manifest) -> Manifest:
    match manifest["kind"]:
        case "PrometheusRule":
            return manifest | {"spec": "files/alerts.yaml"}
        case "ConfigMap" if "-dashboard-" in manifest["metadata"]["name"]:
            return manifest | {
                "data": {file: f"files/dashboards/{file}" for file in manifest["data"]}
            }
        case "Pod":
            (smoke,) = manifest["spec"]["containers"]
            smoke |= {"args": ["files/smoke.py"]}
    return manifest


def settings_schema() -> dict[str, Any]:
    """JSON schema of the chart's ``settings`` value."""
    kinds = {str: "string", int: "integer", float: "number", bool: "boolean"}
    properties: dict[str, Any] = {}
    for _, field, kind in each_setting():
        if field.name in OWNED:
            continue
        if kind in kinds:
            rule: dict[str, Any] = {"type": kinds[kind]}
        elif kind == tuple[str, ...]:
            rule = {"type": "array", "items": {"type": "string", "pattern": "^[^,]*$"}}
        else:
            rule = {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}}
        for key, name in (("low", "minimum"), ("high", "maximum"), ("choices", "enum")):
            if field.metadata[key] is not None:
                rule[name] = field.metadata[key]
        properties[field.name] = rule
    return json.loads(json.dumps(properties))


def _render_here(values: list[dict[str, Any]]) -> list[dict[str, str]]:
    import helm_python as helm

    results = []
    with helm.Chart.load(str(HELM)) as chart:
        for given in values:
            try:
                chart.validate_schema(given)
                results.append(chart.render(given, name=RELEASE, namespace=NAMESPACE))
            except helm.HelmError as error:
                results.append({"error": str(error)})
    return results


def _lint_here() -> list[dict[str, Any]]:
    import helm_python as helm

    return list(helm.lint(str(HELM), strict=True)["messages"])


def _write_settings() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    schema["properties"]["settings"]["properties"] = settings_schema()
    SCHEMA.write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")


def _write_golden() -> None:
    for old in GOLDEN.glob("*.yaml"):
        old.unlink()
    GOLDEN.mkdir(exist_ok=True)
    for name, page in golden().items():
        (GOLDEN / f"{name}.yaml").write_text(page, encoding="utf-8")


def _write_manifests(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cases = examples()
    for name, one in zip(cases, render(list(cases.values())), strict=True):
        manifests = [part for whole in one.manifests.values() for part in (whole, *pods(whole))]
        text = yaml.safe_dump_all(manifests, sort_keys=False)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1]:
        case "render":
            json.dump(_render_here(json.load(sys.stdin)), sys.stdout)
        case "lint":
            json.dump(_lint_here(), sys.stdout)
        case "settings":
            _write_settings()
        case "golden":
            _write_golden()
        case "manifests":
            _write_manifests(Path(sys.argv[2]))
