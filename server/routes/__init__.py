"""One module per group of routes; a handler only calls into the rest of the server."""

from server.routes import (
    chat,
    completions,
    files,
    info,
    messages,
    models,
    ops,
    preview,
    responses,
    running,
    streams,
    tokens,
    web,
)

MODULES = (
    chat,
    completions,
    messages,
    preview,
    responses,
    streams,
    tokens,
    files,
    running,
    models,
    info,
    ops,
    web,
)
