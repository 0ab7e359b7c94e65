"""The examples in helm/ci: what they render to is on record, and Kubernetes knows every field."""

from typing import Any

import kubernetes_validate
import pytest

from tests.deploy import chart, crds
from tests.deploy.chart import GOLDEN, HELM, Manifest, Rendered

pytestmark = chart.needs_helm

VERSIONS = ("1.28", "1.29", "1.30", "1.31", "1.32", "1.33", "1.34", "1.37")
CASES = {"default": {}, **chart.examples()}


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def renders(version: str) -> dict[str, Rendered]:
    values = [case | {"kubeVersion": version} for case in CASES.values()]
    return dict(zip(CASES, chart.render(values), strict=True))


def test_kubernetes_knows_every_field(renders: dict[str, Rendered], version: str) -> None:
    for one in renders.values():
        assert not one.error
        for whole in one.manifests.values():
            for manifest in (whole, *chart.pods(whole)):
                if crds.knows(manifest):
                    crds.validate(manifest)
                else:
                    kubernetes_validate.validate(manifest, version, strict=True)


def test_what_the_examples_render_to_is_on_record() -> None:
    recorded = {file.stem: file.read_text("utf-8") for file in GOLDEN.glob("*.yaml")}
    assert chart.golden() == recorded, "look at the difference: python -m tests.deploy.chart golden"


def test_every_kind_that_the_chart_can_make_is_in_an_example() -> None:
    kinds = {
        m["kind"] for one in chart.render(list(CASES.values())) for m in one.manifests.values()
    }
    written = {
        line.removeprefix("kind: ")
        for file in (HELM / "templates").rglob("*.yaml")
        for line in file.read_text("utf-8").splitlines()
        if line.startswith("kind: ")
    }
    monitors = {"ServiceMonitor", "PodMonitor"}  # of one template
    assert kinds == written - {"{{ $kind }}"} | monitors


def spoil(manifest: Manifest, *path: str | int) -> Manifest:
    """The same with one key misspelt."""
    *way, last = path
    here: Any = manifest
    for key in way:
        here = here[key]
    here[f"{last}s"] = here.pop(last)
    return manifest


@pytest.mark.parametrize(
    ("example", "kind", "path"),
    [
        ("multi-node", "LeaderWorkerSet/group", ("leaderWorkerTemplate", "restartPolicy")),
        ("tp4", "ScaledObject", ("triggers", 0, "metricType")),
        ("tp4", "PodMonitor", ("podMetricsEndpoints", 0, "interval")),
        ("pool", "InferencePool", ("endpointPickerRef", "failureMode")),
        ("pool", "HTTPRoute", ("rules", 0, "backendRefs")),
    ],
)
def test_a_misspelt_field_of_a_custom_resource_is_seen(
    example: str, kind: str, path: tuple[str | int, ...]
) -> None:
    (one,) = chart.render([CASES[example]])
    manifest = one.manifests[kind]
    crds.validate(manifest)
    with pytest.raises(crds.jsonschema.ValidationError):
        crds.validate(manifest | {"spec": spoil(manifest["spec"], *path)})
