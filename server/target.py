"""The server that a command asks: one that was started for it, or one that is there."""

import dataclasses
import re
import subprocess
import time
from typing import Any

import httpx
import msgspec

from server.progress import Loading
from server.terminal import plain
from wire.errors import Unservable
from wire.logs import say
from wire.messages import Progress

_POLL = 0.2


class Unreachable(Unservable):
    """No server answers, or the one that was started has ended."""


class _Health(msgspec.Struct):
    reason: str = ""
    progress: Progress | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """Where it is, the key that it wants, if any, and its process if it was started here."""

    url: str
    key: str = ""
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def options(self) -> dict[str, Any]:
        """For a client of httpx."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # A proxy of the environment leads elsewhere than to this machine.
        return {"base_url": self.url, "headers": headers, "trust_env": self.process is None}

    @property
    def shown(self) -> str:
        """The address for people, and for files: without a password."""
        return re.sub("//[^/]*@", "//", self.url)

    @property
    def ended(self) -> bool:
        """Whether it was started here and is no more."""
        return self.process is not None and self.process.poll() is not None

    def wait_ready(self) -> None:
        """Until the model is loaded, and say how that goes. Raises Unreachable."""
        loading, told = Loading(brief=True), ""
        with httpx.Client(**self.options, timeout=30) as client:
            while (health := self._health(client)) is not None:
                loading.show(health.progress)
                if health.reason != told and self.process is None:
                    told = health.reason
                    say(f"waiting for {self.shown}: {plain(told)}")
                time.sleep(_POLL)
        loading.end()

    def _health(self, client: httpx.Client) -> _Health | None:
        """None when it is ready, as far as one can tell."""
        try:
            answer = client.get("/ready")
        except httpx.RequestError as error:
            if self.process is not None:
                raise Unreachable("the server ended before it was ready") from None
            raise Unreachable(f"no server answers at {self.shown}: {plain(str(error))}") from None
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            return None  # other servers have no such path
        try:
            return msgspec.json.decode(answer.content, type=_Health)
        except msgspec.MsgspecError:
            return _Health()

    def model(self) -> str:
        """The name of the first model it has. Raises Unreachable."""
        try:
            with httpx.Client(**self.options, timeout=30) as client:
                answer = client.get("/v1/models")
                if answer.status_code == httpx.codes.OK:
                    return str(answer.json()["data"][0]["id"])
        except httpx.RequestError as error:
            raise Unreachable(f"no server answers at {self.shown}: {plain(str(error))}") from None
        except (ValueError, LookupError, TypeError):
            raise Unreachable(f"{self.shown} does not say which models it has") from None
        raise Unreachable(f"{self.shown} answers {answer.status_code}: {said(answer.content)}")


class _Detail(msgspec.Struct):
    message: str


class _Refusal(msgspec.Struct):
    error: _Detail


def said(body: bytes) -> str:
    """What the error in an answer's body says, as one line that a terminal may be shown."""
    try:
        text = msgspec.json.decode(body, type=_Refusal).error.message
    except msgspec.MsgspecError:
        text = body[:300].decode(errors="replace")
    return plain(" ".join(text.split()))
