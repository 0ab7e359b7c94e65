"""``internvl fetch``: a checkpoint of a model hub comes into a folder, or into the hub's cache."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from server import hub
from wire.settings import SettingError

_AGAIN = 2.0  # seconds


def add(commands: Any) -> None:
    """Add the command's parser."""
    fetch = commands.add_parser(
        "fetch",
        help="fetch a checkpoint from a model hub",
        description="Fetch what is read of a checkpoint, no code, and print its folder. What was "
        "fetched before is not asked for again. HF_ENDPOINT names another hub, HF_TOKEN or "
        "HF_TOKEN_PATH a token for it.",
    )
    fetch.add_argument("name", metavar="NAME", help="such as OpenGVLab/InternVL3-2B")
    fetch.add_argument("--revision", default="", help="a branch, tag or commit [the newest]")
    fetch.add_argument(
        "--to", type=Path, metavar="FOLDER", help="a folder of its own [the hub's cache]"
    )
    fetch.add_argument(
        "--wait", action="store_true", help="fetch nothing: wait until somebody else has, with --to"
    )
    fetch.set_defaults(run=_fetch)


def _fetch(options: argparse.Namespace) -> int:
    name, revision, folder = options.name, options.revision, options.to
    if not hub.is_name(name):
        raise SettingError(f"{name} is no name of a model on a hub")
    if folder is None:
        if options.wait:
            raise SettingError("--wait: --to says for what")
        folder = hub.fetch(name, revision)
    elif options.wait:
        print(f"waiting until {name} is in {folder}", file=sys.stderr)
        while not hub.is_complete(folder, name, revision):
            time.sleep(_AGAIN)
    else:
        hub.fetch_to(folder, name, revision)
    print(folder)
    return 0
