"""Settings from the command line, the environment, a file and defaults, in this order. A value
that cannot be parsed is fatal wherever it came from."""

import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wire.handshake import read_secret
from wire.settings import (
    CriticSettings,
    EngineSettings,
    MediaSettings,
    ServerSettings,
    SettingError,
    Settings,
    TracingSettings,
    each_setting,
)
from wire.settings_file import read_settings

ENV_PREFIX = "INTERNVL_"
_MOST_PROCESSES = 64


def load(cli: Mapping[str, str], env: Mapping[str, str], file: Path | None = None) -> Settings:
    """Build the settings from the three sources; raises SettingError naming the culprit.

    ``cli`` holds only the flags that were given, as text, keyed by field name.
    """
    table = read_settings(file) if file is not None else {}
    known = {field.name for _, field, _ in each_setting()}
    for names, where in ((cli, ""), (table, f" in {file}")):
        for name in names:
            if name not in known:
                raise SettingError(f"unknown setting {name!r}{where}")
    groups = ("server", "media", "engine", "critic", "tracing")
    given: dict[str, dict[str, Any]] = {name: {} for name in groups}
    for group, field, kind in each_setting():
        variable = ENV_PREFIX + field.name.upper()
        if field.name in cli:
            source, raw = "--" + field.name.replace("_", "-"), cli[field.name]
        elif variable in env:
            source, raw = variable, env[variable]
        elif field.name in table:
            source, raw = f"{field.name} in {file}", table[field.name]
        else:
            continue
        given[group][field.name] = _parse(source, raw, kind, field.metadata)
    server = ServerSettings(**given["server"])
    _check_weights(server)
    if server.root_path and not re.fullmatch("(/[A-Za-z0-9._~-]+)+", server.root_path):
        raise SettingError("root_path must begin with a slash, and not end with one")
    engine = EngineSettings(**given["engine"])
    check_ranks(engine)
    if engine.async_scheduling == "on" and engine.speculative_tokens > 0:
        raise SettingError("speculative_tokens goes with async_scheduling 'auto' or 'off'")
    critic = CriticSettings(**given["critic"])
    tracing = TracingSettings(**given["tracing"])
    return Settings(server, MediaSettings(**given["media"]), engine, critic, tracing)


def _check_weights(server: ServerSettings) -> None:
    weights = server.api_key_weights
    if not all(0 < weight < math.inf for weight in weights):
        raise SettingError("api_key_weights must be numbers above 0")
    if weights and len(weights) != len(server.api_key):
        raise SettingError(
            f"api_key_weights has {len(weights)} numbers for {len(server.api_key)} keys"
        )


def check_ranks(engine: EngineSettings) -> None:
    """Raise SettingError where the ranks cannot be spread as the settings say."""
    size, nodes = engine.processes, engine.nodes
    product = f"{engine.tensor_parallel_size} x {engine.pipeline_parallel_size}"
    names = f"tensor_parallel_size x pipeline_parallel_size: {product} processes"
    if size > _MOST_PROCESSES:
        raise SettingError(f"{names} are more than {_MOST_PROCESSES}")
    if size % nodes:
        raise SettingError(f"{names} cannot be spread evenly over {nodes} nodes")
    if nodes > 1:
        read_secret(engine.rank_secret_file)


def _parse(source: str, raw: Any, kind: Any, metadata: types.MappingProxyType[Any, Any]) -> Any:
    try:
        value = _convert(raw, kind)
    except (TypeError, ValueError):
        name = kind.__name__ if isinstance(kind, type) else "list"
        # Lists and tables are not repeated: there may be a key in them.
        said = repr(raw) if isinstance(raw, str | int | float) else f"a {type(raw).__name__}"
        raise SettingError(f"{source}: {said} is not a valid {name}") from None
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if choices and value not in choices:
        raise SettingError(f"{source}: {value!r} is not one of {', '.join(choices)}")
    # Negated comparisons, so that NaN is outside every range.
    too_low = low is not None and not value >= low
    too_high = high is not None and not value <= high
    if too_low or too_high:
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise SettingError(f"{source}: {value} must be {bounds}")
    return value


def _convert(raw: Any, kind: Any) -> Any:
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(raw, bool):
            return raw
        if str(raw).lower() not in words:
            raise ValueError(raw)
        return words[str(raw).lower()]
    if typing.get_origin(kind) is tuple:
        each, _ = typing.get_args(kind)
        items = raw.split(",") if isinstance(raw, str) else raw if isinstance(raw, list) else [raw]
        if not all(isinstance(item, str | int | float) for item in items):
            raise TypeError(raw)
        return tuple(each(text) for item in items if (text := str(item).strip()))
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise TypeError(raw)
    if kind is int and isinstance(raw, float):
        raise TypeError(raw)
    return kind(raw)
