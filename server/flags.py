"""Settings as flags of the command line, and as docs/settings.md lists them."""

import argparse
import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from wire.loading import ENV_PREFIX
from wire.settings import each_setting

_ALIASES = {"tensor_parallel_size": ("--tp",), "pipeline_parallel_size": ("--pp",)}
GROUPS = {
    "server": "HTTP",
    "media": "pictures",
    "engine": "model, memory and scheduling",
    "critic": "critic",
    "tracing": "traces",
}

# Who may come in, and from where: not for a server to ask that is started for one command.
DOOR = (
    *("host", "port", "root_path", "tls_certificate", "tls_key", "cors_origins", "open_metrics"),
    *("api_key", "api_keys_file", "api_key_weights", "admin_port", "admin_host", "admin_key_file"),
)


def add_flag(group: Any, field: "dataclasses.Field[Any]", kind: Any) -> None:
    """The flag of a setting, for a parser or a group of one."""
    choices = field.metadata["choices"]
    group.add_argument(
        flag(field),
        *_ALIASES.get(field.name, ()),
        dest=field.name,
        nargs="?" if kind is bool else None,
        const="true" if kind is bool else None,
        metavar=_metavar(kind, choices),
        help=f"{field.metadata['help']} [{_default(field)}]".replace("%", "%%"),
    )


def add_settings(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """The flags of all settings but some, in their groups."""
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for group, field, kind in each_setting():
        if field.name not in without:
            add_flag(groups[group], field, kind)


def add_config(parser: argparse.ArgumentParser) -> None:
    """The flag that names a file of settings."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="read settings from a TOML or YAML file"
    )


def given(options: argparse.Namespace) -> dict[str, Any]:
    """What was said on the command line, by name."""
    return {
        name: value
        for name, value in vars(options).items()
        if value is not None and name not in ("command", "config", "run")
    }


def some(text: str) -> int:
    """A number above 0, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def forget_secrets() -> None:
    """No process that is started needs to know them."""
    for _, field, _ in each_setting():
        if field.metadata["secret"]:
            os.environ.pop(ENV_PREFIX + field.name.upper(), None)


def flag(field: "dataclasses.Field[Any]") -> str:
    """The name of a setting on the command line."""
    return "--" + field.name.replace("_", "-")


def _metavar(kind: Any, choices: tuple[str, ...] | None) -> str:
    if choices:
        return "{" + ",".join(choices) + "}"
    return {bool: "BOOL", int: "N", float: "X", str: "TEXT"}.get(kind, "LIST")


def _default(field: "dataclasses.Field[Any]") -> str:
    value = field.default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value) if value != "" else "none"


def settings_page() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Written by `internvl settings` from `wire/settings.py`; a test keeps it current.",
        "",
        "Each setting is a flag of `internvl serve`, an environment variable and a key of the file",
        "that `--config` names: TOML, or YAML where its name ends with `.yaml` or `.yml`. The flag",
        "wins, then the variable, then the file. A value that cannot be read is an error wherever",
        "it comes from.",
    ]
    group = ""
    for name, field, _ in each_setting():
        if name != group:
            group = name
            lines += ["", f"## {GROUPS[name][0].upper()}{GROUPS[name][1:]}", ""]
            lines += ["| flag | environment | default | meaning |", "| --- | --- | --- | --- |"]
        meaning = field.metadata["help"] + _bounds(field)
        lines.append(
            f"| `{flag(field)}` | `{ENV_PREFIX}{field.name.upper()}` | {_default(field)} | "
            f"{meaning} |"
        )
    return "\n".join(lines) + "\n"


def _bounds(field: "dataclasses.Field[Any]") -> str:
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    if choices:
        return " One of " + ", ".join(f"`{choice}`" for choice in choices) + "."
    if low is None:
        return ""
    return f" At least {low}." if high is None else f" Between {low} and {high}."
