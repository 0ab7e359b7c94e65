"""A chat request in the making, from a request of another API. It remembers where in the client's
own request everything stands, so that errors name the client's fields and not ours."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from server.schemas.chat import Bounds, ChatRequest
from server.schemas.generation import Generation
from server.schemas.validate import validated
from wire.errors import InvalidRequest, ServiceError

# A field's path in a message. A lone word is one only where it is what the error is about.
_PATH = re.compile(r"[a-z][a-z0-9_]*(?:\[\d+\]|\.[a-z_]+)*")


class Origins:
    """Where the fields of a chat request stand in the client's own: ``names`` from the one's path
    to the other's. What is below a path is below the other too."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = dict(names)

    def add(self, path: str, origin: str) -> None:
        """Say where ``path`` comes from."""
        self._names[path] = origin

    def of(self, path: str) -> str:
        """The client's own path."""
        head = path
        while head:
            if head in self._names:
                return self._names[head] + path[len(head) :]
            head = head[: max(head.rfind("."), head.rfind("["), 0)]
        return path

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Let the errors of the block name the client's fields."""
        try:
            yield
        except ServiceError as error:
            param = error.param

            def renamed(found: re.Match[str]) -> str:
                path = found[0]
                is_path = path == param or not path.isalnum()
                return self.of(path) if is_path else path

            error.message = _PATH.sub(renamed, error.message)
            error.param = None if param is None else self.of(param)
            raise


class Draft:
    """Collects messages, then makes the chat request."""

    def __init__(self, request: Generation, names: Mapping[str, str]) -> None:
        """What all APIs have in common is taken from ``request`` as it is."""
        common = request.model_fields_set & Generation.model_fields.keys() - request.ignored
        self.fields: dict[str, Any] = {name: getattr(request, name) for name in common}
        if request.logit_bias:  # whose keys were the text of numbers
            self.fields["logit_bias"] = {str(k): v for k, v in request.logit_bias.items()}
        self.origins = Origins(names)
        self._messages: list[dict[str, Any]] = []
        self._calls: dict[str, int] = {}

    @property
    def last_role(self) -> str | None:
        """Whose the last message is."""
        return self._messages[-1]["role"] if self._messages else None

    def message(self, role: str, where: str) -> None:
        """Begin a message, which stands at ``where``."""
        self.origins.add(f"messages[{len(self._messages)}]", where)
        self._messages.append({"role": role, "content": []})

    def text(self, text: str, where: str) -> None:
        """Add a text to the last message."""
        self._part({"type": "text", "text": text}, where)

    def picture(
        self, url: str, where: str, source: str, asked: Bounds, detail: str | None = None
    ) -> None:
        """Add a picture to the last message; its URL stands at ``source``."""
        bounds = asked.model_dump(include=set(Bounds.model_fields))
        picture = {"url": url, "detail": detail, **bounds}
        path = self._part({"type": "image_url", "image_url": picture}, where)
        self.origins.add(f"{path}.image_url", where)
        self.origins.add(f"{path}.image_url.url", source)

    def file(self, file_id: str, where: str, asked: Bounds, detail: str | None) -> None:
        """Add a picture or video that was uploaded to the last message."""
        bounds = asked.model_dump(include=set(Bounds.model_fields))
        file = {"file_id": file_id, "detail": detail, **bounds}
        path = self._part({"type": "file", "file": file}, where)
        self.origins.add(f"{path}.file", where)

    def call(
        self, identity: str, name: str, arguments: str | dict[str, Any], where: str, field: str
    ) -> None:
        """Add a call to the last message; ``field`` has its arguments."""
        calls = self._messages[-1].setdefault("tool_calls", [])
        path = f"messages[{len(self._messages) - 1}].tool_calls[{len(calls)}]"
        text = arguments if isinstance(arguments, str) else _dump(arguments, f"{where}.{field}")
        calls.append({"id": identity, "function": {"name": name, "arguments": text}})
        self.origins.add(path, where)
        self.origins.add(f"{path}.function", where)
        self.origins.add(f"{path}.function.arguments", f"{where}.{field}")
        self._calls.setdefault(identity, len(self._calls))

    def place(self, identity: str, where: str) -> int:
        """Which of all calls has this id, which stands at ``where``. A result says only by its
        place which call it is of. Raises InvalidRequest for one that nobody made."""
        if identity not in self._calls:
            raise InvalidRequest(
                f"{where} must be the id of a call in an earlier message.", param=where
            )
        return self._calls[identity]

    def finish(self, form: type[ChatRequest] = ChatRequest) -> ChatRequest:
        """The request. Raises InvalidRequest."""
        with self.origins.named():
            return validated(form, {**self.fields, "messages": self._messages})

    def _part(self, part: dict[str, Any], where: str) -> str:
        content = self._messages[-1]["content"]
        path = f"messages[{len(self._messages) - 1}].content[{len(content)}]"
        content.append(part)
        self.origins.add(path, where)
        return path


def _dump(value: dict[str, Any], where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise InvalidRequest(f"{where} is nested too deep.", param=where) from None
