"""``internvl verify``: a model's answers beside transformers'."""

import argparse
import os
from pathlib import Path
from typing import Any

from server.checkpoint import with_model
from server.commands.rank import SHARED
from server.flags import add_flag, given, some
from wire.loading import load
from wire.settings import SettingError, each_setting


def add(commands: Any) -> None:
    """Add the command's parser."""
    verify = commands.add_parser(
        "verify",
        help="compare a model's answers with transformers'",
        description="Send fixed pictures and prompts through this server's pipeline and through "
        "transformers' own, and print how tiles, pixels, prompts, logits and greedy tokens differ. "
        "Ends with 1 if something is out of bounds, with 2 if it cannot be computed.",
    )
    verify.add_argument("model", metavar="MODEL", help="a checkpoint folder")
    verify.add_argument(
        "--against",
        metavar="FOLDER",
        help="what transformers reads instead: the same model, such as in the other format",
    )
    verify.add_argument(
        "--tokens", type=some, default=16, metavar="N", help="greedy tokens to compare [16]"
    )
    verify.add_argument(
        "--cases",
        nargs="+",
        metavar="CASE",
        help="compute no other cases than these, such as text, picture or frames",
    )
    verify.add_argument("--out", type=Path, metavar="FILE", help="write what was found as JSON")
    for name, field, kind in each_setting():
        if name == "engine" and field.name not in ("model", *SHARED, "rank_host", "rank_timeout"):
            add_flag(verify, field, kind)
    verify.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compare. Raises SettingError."""
    from server.verify import CASES_OF, verify

    flags = given(options)
    against, tokens, out = (flags.pop(name, None) for name in ("against", "tokens", "out"))
    names = flags.pop("cases", list(CASES_OF))
    settings = with_model(load(flags, {}))
    other = settings if against is None else with_model(load({"model": against}, {}))
    unknown = [name for name in names if name not in CASES_OF]
    if unknown:
        raise SettingError(f"--cases: {unknown[0]!r} is none of {', '.join(CASES_OF)}")
    # Known before hours have gone into it.
    if out is not None and (out.is_dir() or not os.access(out.parent, os.W_OK)):
        raise SettingError(f"--out: {out} cannot be written")
    return verify(settings, Path(other.engine.model), names, tokens, out)
