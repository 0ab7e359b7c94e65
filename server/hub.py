"""Checkpoints by their names on a model hub, such as OpenGVLab/InternVL3-2B: fetched once, into the
cache that other programs of the hub share, and found there again without a network.

Only what is read is fetched: no code, and no weights in a form that could hold some.
"""

import os
import re
from pathlib import Path

from wire.settings import SettingError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SMALL = ("*.json", "*.jinja", "merges.txt", "tokenizer.model")
_WEIGHTS = ("*.safetensors",)


def is_name(text: str) -> bool:
    """Whether this names a model of a hub. No path does that exists, or begins with a folder that
    does, or with a dot, a slash or a tilde: mistyped ones are not asked for anywhere."""
    return _NAME.fullmatch(text) is not None and not Path(text).parent.exists()


def fetch(name: str, revision: str, *, weights: bool = True) -> Path:
    """The folder of a checkpoint, downloaded if it is not in the cache; without ``weights`` only
    its small files. ``revision`` is a branch, tag or commit; "" is the newest.

    Raises SettingError where it cannot be had.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Imported late: only who names a model of a hub waits for it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*_SMALL, *(_WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise SettingError(
            f"--model: {name} is no folder here, and cannot be fetched: {reason[0]}"
        ) from None
