"""What the chart tests need: Helm's own renderer, and the schema that the settings imply.

``python -m tests.deploy.chart settings`` writes the schema of the chart's ``settings`` value
again after a setting came or went. ``... render`` is how the tests call Helm: its library brings
the Go runtime along, which has no business in the process that runs the tests.
"""

import json
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import yaml

from wire.settings import each_setting

ROOT = Path(__file__).parents[2]
HELM = ROOT / "helm"
SCHEMA = HELM / "values.schema.json"
RELEASE, NAMESPACE = "demo", "vision"

# The chart sets these itself, from other values.
OWNED = {"host", "port", "model", "device", "api_key", "drain_timeout", "api_keys_file"}
OWNED |= {"tls_certificate", "tls_key", "admin_host", "admin_port", "admin_key_file"}


class Rendered(typing.NamedTuple):
    """A chart rendered with some values: its manifests by kind, its notes, or why it refused."""

    manifests: dict[str, dict[str, Any]]
    notes: str
    error: str


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
                assert manifest["kind"] not in manifests
                manifests[manifest["kind"]] = manifest
    return Rendered(manifests, notes, error)


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


if __name__ == "__main__":
    match sys.argv[1]:
        case "render":
            json.dump(_render_here(json.load(sys.stdin)), sys.stdout)
        case "lint":
            json.dump(_lint_here(), sys.stdout)
        case "settings":
            _write_settings()
