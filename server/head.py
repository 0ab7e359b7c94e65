"""HEAD, which load balancers probe with: every route that answers GET answers it, with the same
status and headers and without a body."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Head:
    """ASGI layer next to the routes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                # The end: a stream sees that nobody is there any more.
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app({**scope, "method": "GET"}, receive, send_head)
