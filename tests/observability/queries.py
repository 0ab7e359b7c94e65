"""The queries of the dashboard's file, as Grafana would send them."""

import json

from tests.observability.dashboard import FILE

_DASHBOARD = json.loads(FILE.read_text())

QUERIES = sorted(
    {target["expr"] for panel in _DASHBOARD["panels"] for target in panel.get("targets", ())}
    | {annotation["expr"] for annotation in _DASHBOARD["annotations"]["list"]}
)


def filled(query: str, window: str = "5m") -> str:
    """With everything chosen."""
    return (
        query.replace("$__rate_interval", window).replace("$job", ".+").replace("$instance", ".+")
    )
