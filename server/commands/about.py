"""The commands that only print: ``internvl key``, ``settings`` and ``version``."""

import argparse
import sys
from typing import Any

from server.flags import settings_page


def add(commands: Any) -> None:
    """Add the commands' parsers."""
    key = commands.add_parser(
        "key",
        help="make an API key",
        description="Make an API key: the key itself goes to standard error, its entry for "
        "--api-keys-file to standard output.",
    )
    key.add_argument("name", metavar="NAME", help="whose it is: up to 64 of A-Z a-z 0-9 _ -")
    key.set_defaults(run=_key)
    commands.add_parser("settings", help="print all settings as Markdown").set_defaults(
        run=_settings
    )
    commands.add_parser("version", help="print the version").set_defaults(run=_version)


def _key(options: argparse.Namespace) -> int:
    from server.keys import new_key

    key, entry = new_key(options.name)
    print(f"The key, shown only now: {key}", file=sys.stderr)
    print(entry)
    return 0


def _settings(_: argparse.Namespace) -> int:
    print(settings_page(), end="")
    return 0


def _version(_: argparse.Namespace) -> int:
    from server.version import installed_version

    print(installed_version())
    return 0
