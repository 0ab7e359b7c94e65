"""What the operator is told at the console: how loading goes, then what to do with the server."""

import asyncio
import importlib.util
import json
import os
from pathlib import Path

from server.lifecycle import Service
from server.progress import Loading
from wire.logs import say

REFRESH = 0.2
# What listens on all addresses, and the one of them that works on this machine.
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104 - not bound


async def announce(service: Service, host: str, port: int, scheme: str = "http") -> None:
    """Tell the operator how loading goes, and then what to do with the server."""
    address = f"{scheme}://{_reachable(host)}:{port}"
    everywhere = " and every other address of this machine" if host in EVERYWHERE else ""
    say(f"listening on {address}{everywhere}, loading {service.name}")
    loading = Loading()
    while not service.settled.is_set():
        loading.show(service.progress)
        await asyncio.sleep(REFRESH)
    loading.end()
    if service.model is None:
        return
    ready = service.model.ready
    say(
        f"ready: {service.model.name}, {ready.parameters / 1e6:.1f} M parameters, {ready.dtype} on "
        f"{ready.device}, attention by {ready.attention}, context {ready.max_model_len} tokens, "
        f"cache for {ready.blocks_total * ready.block_size}"
    )
    if service.critic is not None:
        critic = service.critic.ready
        say(
            f"critic: {critic.parameters / 1e6:.1f} M parameters, {critic.dtype} on {critic.device}"
        )
    if service.media.missing:
        lacking = ", ".join(service.media.missing)
        say(f"WARNING: pictures are decoded without these layers of the sandbox: {lacking}")
    page = f"chat page at {address}/, " if service.settings.server.chat_page else ""
    say(f"{page}API at {address}/v1; try:\n\n{example(address, service)}\n")


def example(address: str, service: Service) -> str:
    """A command to paste into a shell: with a picture from the repository where there is one."""
    text: list[object] = [{"type": "text", "text": "What is in this picture?"}]
    picture = _picture()
    if picture is None:
        text = [{"type": "text", "text": "Hello! What can you do?"}]
    else:
        text.insert(0, {"type": "image_url", "image_url": {"url": "data:image/png;base64,PICTURE"}})
    body = {"model": service.name, "messages": [{"role": "user", "content": text}]}
    # Escaped for printf, then for the single quotes around it.
    form = json.dumps(body).replace("\\", "\\\\").replace("%", "%%").replace("'", "'\\''")
    form = form.replace("base64,PICTURE", "base64,%s")
    key = " -H 'Authorization: Bearer YOUR_KEY'" if service.keys.needed else ""
    data = "" if picture is None else f" \"$(base64 < '{picture}' | tr -d '\\n')\""
    return (
        f"printf '{form}'{data} |\n"
        f"  curl -s {address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d @-"
    )


def _picture() -> str | None:
    """A picture of the demo package, as short as it can be named from here."""
    spec = importlib.util.find_spec("demo")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(place, "samples").glob("*.png")):
            near = os.path.relpath(file)
            return near if not near.startswith("..") else str(file)
    return None


def _reachable(host: str) -> str:
    """An address that works on this machine for one that is listened on."""
    near = EVERYWHERE.get(host, host)
    return f"[{near}]" if ":" in near else near
