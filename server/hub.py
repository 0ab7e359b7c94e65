"""Checkpoints by their names on a model hub, such as OpenGVLab/InternVL3-2B: fetched once, into the
cache that other programs of the hub share, and found there again without a network.

Only what is read is fetched: no code, and no weights in a form that could hold some.
"""

import os
import re
import secrets
from pathlib import Path
from typing import Any

from wire.settings import SettingError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SMALL = ("*.json", "*.jinja", "merges.txt", "tokenizer.model")
_WEIGHTS = ("*.safetensors",)
# In a folder that a checkpoint is fetched into: which one, and that it is there as a whole.
_BEGUN, _COMPLETE = ".internvl-fetch", ".internvl-fetched"


def is_name(text: str) -> bool:
    """Whether this names a model of a hub. No path does that exists, or begins with a folder that
    does, or with a dot, a slash or a tilde: mistyped ones are not asked for anywhere."""
    return _NAME.fullmatch(text) is not None and not Path(text).parent.exists()


def fetch(name: str, revision: str, *, weights: bool = True) -> Path:
    """The folder of a checkpoint, downloaded if it is not in the cache; without ``weights`` only
    its small files. ``revision`` is a branch, tag or commit; "" is the newest.

    Raises SettingError where it cannot be had.
    """
    try:
        return _download(name, revision, None, [*_SMALL, *(_WEIGHTS if weights else ())])
    except OSError as error:
        raise SettingError(f"--model: {name} is no folder here, and {error}") from None


def fetch_to(folder: Path, name: str, revision: str) -> None:
    """Download a checkpoint into a folder of its own, if it is not there, or go on where that was
    interrupted. Several processes may do so at once.

    Raises SettingError where it cannot be had, and where something else is in the folder.
    """
    if is_complete(folder, name, revision):
        return
    said = _said(name, revision)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begun = _note(folder / _BEGUN)
        if begun != said:
            if begun or not all(file.name.startswith(_BEGUN) for file in folder.iterdir()):
                raise SettingError(f"--to: {folder} has something else in it")
            # At once: whoever comes at the same time must not find half of it.
            fresh = folder / f"{_BEGUN}.{secrets.token_hex(8)}"
            fresh.write_text(said, encoding="utf-8")
            fresh.replace(folder / _BEGUN)
        _download(name, revision, folder, [*_SMALL, *_WEIGHTS])
        (folder / _COMPLETE).write_text(said, encoding="utf-8")
    except OSError as error:
        raise SettingError(f"--to: {error}") from None


def is_complete(folder: Path, name: str, revision: str) -> bool:
    """Whether ``fetch_to`` has done just this."""
    return _note(folder / _COMPLETE) == _said(name, revision)


def _said(name: str, revision: str) -> str:
    return f"{name} {revision or 'newest'}\n"


def _note(file: Path) -> str:
    """What was noted; "" if nothing was."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise SettingError(f"--to: {error}") from None


def _download(name: str, revision: str, folder: Path | None, patterns: list[str]) -> Path:
    """Raises OSError with a message for people."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Imported late: only who names a model of a hub waits for it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        wanted: dict[str, Any] = {"revision": revision or None, "local_dir": folder}
        wanted["allow_patterns"] = patterns
        found = snapshot_download(name, **wanted)
        if folder is not None:
            # Of a hub that cannot be asked, it takes whatever is in the folder for the whole.
            for file in snapshot_download(name, **wanted, dry_run=True):
                if file.will_download:
                    raise OSError(f"{file.filename} is not there")
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[:1] or [type(error).__name__]
        raise OSError(f"{name} cannot be fetched: {reason[0]}") from None
    return Path(found)
