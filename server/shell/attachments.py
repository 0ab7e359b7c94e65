"""Pictures and videos of this machine, or of an address, as parts of a message."""

import base64
import mimetypes
from pathlib import Path
from typing import Any

MOST = 256 << 20
_VIDEOS = (".mkv", ".webm", ".mp4", ".mov", ".avi", ".m4v", ".mpg", ".mpeg")


class NoAttachment(Exception):
    """It cannot be read; the message says why, in a line."""


def attachment(name: str, kind: str = "") -> dict[str, Any]:
    """The part for a file or a URL. ``kind`` is "image" or "video"; "" goes by the name. Raises
    NoAttachment."""
    kind = kind or ("video" if _is_video(name) else "image")
    url = name if name.startswith(("http://", "https://", "data:")) else _data_url(name, kind)
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def _is_video(name: str) -> bool:
    if name.startswith("data:"):
        return name.startswith("data:video/")
    return name.partition("?")[0].lower().endswith(_VIDEOS)


def _data_url(name: str, kind: str) -> str:
    try:
        path = Path(name).expanduser()
        if not path.is_file():
            raise NoAttachment(f"{name} is no file")
        if path.stat().st_size > MOST:
            raise NoAttachment(f"{name} has more than {MOST >> 20} MiB")
        data = path.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise NoAttachment(f"{name} cannot be read: {reason}") from None
    usual = {"image": "image/png", "video": "video/mp4"}[kind]
    mime = mimetypes.guess_type(path.name)[0] or usual
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
