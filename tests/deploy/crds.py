"""Shapes of the custom resources that the chart makes: the fields it uses and no others, each with
its type, as their definitions upstream have them. A field that is added to a template is added
here, after a look at its definition; pods' templates are left to the schemas of Kubernetes itself.
"""

from typing import Any

import jsonschema

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
PERCENT_OR_COUNT: Schema = {"anyOf": [COUNT, {"type": "string", "pattern": "^[0-9]+%$"}]}
ANY_OBJECT: Schema = {"type": "object"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
DURATION: Schema = {"type": "string", "pattern": "^([0-9]+(h|m|s|ms))+$"}


def _object(*needed: str, **properties: Schema) -> Schema:
    """With these properties alone, of which ``needed`` are required."""
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": list(needed),
    }


def _list(items: Schema, least: int = 1) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


_SELECTOR = _object("matchLabels", matchLabels=TEXTS)
_ENDPOINT = _object(
    "port",
    port=TEXT,
    path=TEXT,
    interval=DURATION,
    scheme={"enum": ["http", "https"]},
    tlsConfig=_object(insecureSkipVerify={"type": "boolean"}),
)
_OBJECTIVE = _object(
    "poolRef",
    priority={"type": "integer"},
    # The default of its group is llm-d's own pool, so it has to be said.
    poolRef=_object("group", "name", group={"const": "inference.networking.k8s.io"}, name=TEXT),
)

SPECS: dict[tuple[str, str], Schema] = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): _object(
        "leaderWorkerTemplate",
        replicas=COUNT,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        rolloutStrategy=_object(
            "type",
            type={"const": "RollingUpdate"},
            rollingUpdateConfiguration=_object(
                maxSurge=PERCENT_OR_COUNT, maxUnavailable=PERCENT_OR_COUNT
            ),
        ),
        leaderWorkerTemplate=_object(
            "workerTemplate",
            size={"type": "integer", "minimum": 1},
            restartPolicy={"enum": ["None", "RecreateGroupOnPodRestart"]},
            leaderTemplate=ANY_OBJECT,
            workerTemplate=ANY_OBJECT,
        ),
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): _object(
        "scaleTargetRef",
        "triggers",
        scaleTargetRef=_object("name", apiVersion=TEXT, kind=TEXT, name=TEXT),
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        pollingInterval=COUNT,
        fallback=_object("failureThreshold", "replicas", failureThreshold=COUNT, replicas=COUNT),
        advanced=_object(horizontalPodAutoscalerConfig=_object(behavior=ANY_OBJECT)),
        triggers=_list(
            _object(
                "type",
                "metadata",
                type={"enum": ["prometheus", "cpu"]},
                name=TEXT,
                metricType={"enum": ["AverageValue", "Value", "Utilization"]},
                metadata=TEXTS,
            )
        ),
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _object(
        "selector", "endpoints", selector=_SELECTOR, endpoints=_list(_ENDPOINT)
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): _object(
        "selector", "podMetricsEndpoints", selector=_SELECTOR, podMetricsEndpoints=_list(_ENDPOINT)
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _object(
        "groups",
        groups=_list(
            _object(
                "name",
                name=TEXT,
                interval=DURATION,
                rules=_list(
                    {
                        "type": "object",
                        "required": ["expr"],
                        "properties": {"alert": TEXT, "record": TEXT, "for": DURATION},
                    }
                ),
            )
        ),
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _object(
        "parentRefs",
        parentRefs=_list(
            _object("name", name=TEXT, namespace=TEXT, sectionName=TEXT, port=COUNT, kind=TEXT)
        ),
        hostnames=_list(TEXT),
        rules=_list(
            _object(
                matches=_list(
                    _object(path=_object(type={"const": "PathPrefix"}, value={"pattern": "^/"}))
                ),
                timeouts=_object(request=DURATION, backendRequest=DURATION),
                backendRefs=_list(_object("name", name=TEXT, group=TEXT, kind=TEXT, port=COUNT)),
            )
        ),
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): _object(
        "endpointPickerRef",
        "selector",
        "targetPorts",
        selector=_SELECTOR,
        targetPorts=_list(_object("number", number=COUNT)),
        endpointPickerRef=_object(
            "name",
            name=TEXT,
            port=_object("number", number=COUNT),
            failureMode={"enum": ["FailOpen", "FailClose"]},
        ),
    ),
    ("llm-d.ai/v1alpha2", "InferenceObjective"): _OBJECTIVE,
    ("inference.networking.x-k8s.io/v1alpha2", "InferenceObjective"): _OBJECTIVE,
}


def knows(manifest: dict[str, Any]) -> bool:
    """Whether it is one of these."""
    return (manifest["apiVersion"], manifest["kind"]) in SPECS


def validate(manifest: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError."""
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    schema = SPECS[manifest["apiVersion"], manifest["kind"]]
    jsonschema.Draft202012Validator(schema).validate(manifest["spec"])
