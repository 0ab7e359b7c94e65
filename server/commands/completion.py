"""``internvl completion``: what a shell needs to complete the words of this command."""

import argparse
import sys
from pathlib import Path
from typing import Any

from server.flags import flag
from wire.settings import each_setting

SHELLS = ("bash", "zsh", "fish", "tcsh")
_FOLDERS = ("model", "against", "critic_model", "allowed_local_media_path")
_FILES = ("media", "input", "tls_certificate", "tls_key")


def add(commands: Any, whole: argparse.ArgumentParser) -> None:
    """Add the command's parser, for the ``whole`` it is a part of."""
    parser = commands.add_parser(
        "completion",
        help="print what a shell completes words by",
        description="Print a script for a shell, by which it completes the words of this command: "
        'eval "$(internvl completion bash)".',
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh, fish or tcsh")
    parser.set_defaults(run=lambda options: _print(whole, options.shell))


def _print(whole: argparse.ArgumentParser, shell: str) -> int:
    # Imported late: it is needed once a shell.
    import shtab

    values: dict[str, list[str]] = {}
    for _, field, kind in each_setting():
        values[flag(field)] = ["true", "false"] if kind is bool else field.metadata["choices"]
    for action in _actions(whole):
        name = action.option_strings[0] if action.option_strings else ""
        if values.get(name):
            action.choices = values[name]
        elif action.dest in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path or action.dest in _FILES or action.dest.endswith("_file"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    sys.stdout.write(shtab.complete(whole, shell) + "\n")
    return 0


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Of this one and those below."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found += _actions(below)
        else:
            found.append(action)
    return found
