"""Grafana's dashboard. ``python -m tests.observability.dashboard`` writes its file again, and a
test keeps that current."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.observability.panels import ROWS, Panel, every

FILE = Path(__file__).parents[2] / "helm/files/dashboards/internvl.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24


def dashboard() -> dict[str, Any]:
    """All of it."""
    return {
        "uid": "internvl",
        "title": "InternVL Server",
        "description": "Traffic, latency, memory and pictures of InternVL servers. Names of "
        "metrics: docs/metrics.md; alerts and what to do: docs/observability.md.",
        "tags": ["internvl", "inference"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [_restarts()]},
        "templating": {"list": list(_variables())},
        "panels": list(_panels()),
    }


def _restarts() -> dict[str, Any]:
    return {
        "name": "Engines replaced",
        "datasource": SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "red",
        "expr": f"increase({every('engine_restarts_total')}[1m]) > 0",
        "titleFormat": "engine replaced",
        "textFormat": "{{instance}}",
    }


def _variables() -> Iterator[dict[str, Any]]:
    yield {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
    }
    chosen = ""
    for name, label, what in (
        ("job", "Job", "job"),
        ("model", "Model", "model"),
        ("instance", "Replica", "instance"),
    ):
        query = f"label_values(internvl_build_info{{{chosen}}}, {what})"
        yield {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "current": {"text": ["All"], "value": ["$__all"]},
        }
        chosen += f'{", " if chosen else ""}{what}=~"${name}"'


def _panels() -> Iterator[dict[str, Any]]:
    number, top = 1, 0
    for title, panels in ROWS.items():
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1},
            "panels": [],
        }
        number, top, left = number + 1, top + 1, 0
        for index, panel in enumerate(panels):
            place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            yield _panel(number, panel, place)
            number, left = number + 1, left + panel.width
            if left == WIDTH or index == len(panels) - 1:
                top, left = top + panel.height, 0


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    steps += [{"color": "yellow", "value": panel.warn}] if panel.warn is not None else []
    steps += [{"color": "red", "value": panel.bad}] if panel.bad is not None else []
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.number:
        options: dict[str, Any] = {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "area",
        }
    else:
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "line" if panel.bad is not None else "off"},
        }
        options = {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["mean", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {
        "id": number,
        "type": "stat" if panel.number else "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": query,
                "legendFormat": name,
            }
            for index, (name, query) in enumerate(panel.queries.items())
        ],
    }


def text() -> str:
    """The file."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
