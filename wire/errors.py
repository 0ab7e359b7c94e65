"""The error tree.

    ServiceError
    ├── ClientError            the caller can fix it (4xx)
    │   ├── InvalidRequest     400
    │   ├── ContextTooLong     400, code context_length_exceeded
    │   ├── MediaRefused       400, the part could not be fetched or decoded
    │   ├── Unauthorized       401
    │   ├── NotFound           404
    │   ├── BodyTooSlow        408
    │   ├── RequestAborted     499
    │   ├── ClientTooSlow      408, in a stream
    │   ├── BodyTooLarge       413
    │   └── TooManyRequests    429, with Retry-After
    └── ServerError            the caller cannot (5xx)
        ├── Unavailable        503, with Retry-After
        └── EngineFailed       500

Messages are written for the client: they name the field and what is allowed, and never hold a
path, an address or the text of somebody else's exception.
"""

from typing import Literal


class Unservable(Exception):
    """Something that an operator has to put right; the message says all there is to say."""


Code = Literal[
    "aborted_by_operator",
    "client_too_slow",
    "context_length_exceeded",
    "engine_error",
    "events_forgotten",
    "file_not_found",
    "internal_error",
    "invalid_api_key",
    "invalid_http",
    "invalid_json",
    "invalid_media",
    "invalid_request",
    "invalid_value",
    "media_forbidden",
    "media_timeout",
    "media_too_large",
    "media_unreachable",
    "method_not_allowed",
    "missing_required_parameter",
    "model_not_found",
    "no_token_left",
    "not_found",
    "origin_not_allowed",
    "previous_response_not_found",
    "profile_running",
    "queue_full_requests",
    "queue_full_tokens",
    "rate_limit_exceeded",
    "request_aborted",
    "request_exceeds_rate_limit",
    "request_not_found",
    "request_timeout",
    "request_too_large",
    "superseded",
    "too_many_frames",
    "too_many_images",
    "too_many_pictures",
    "too_many_requests",
    "too_many_videos",
    "unavailable",
    "unknown_parameter",
    "unsupported_media",
    "unsupported_media_type",
    "unsupported_parameter",
]
"""What a program may decide by; docs/api.md says when each comes. None is renamed or reused."""


class ServiceError(Exception):
    """An error with a place in the OpenAI envelope ``{"error": {message, type, param, code}}``."""

    status: int = 500
    type: str = "server_error"
    code: Code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: Code | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        if code is not None:
            self.code = code


class ClientError(ServiceError):
    """The request was wrong; sending it again unchanged gives the same answer."""

    status = 400
    type = "invalid_request_error"
    code: Code = "invalid_request"


class InvalidRequest(ClientError):
    """A field has a value that is not allowed."""

    code = "invalid_value"


class ContextTooLong(ClientError):
    """Prompt and requested completion do not fit in the context of so many tokens."""

    code = "context_length_exceeded"

    def __init__(self, context: int, message: str, *, param: str) -> None:
        # OpenAI's words; clients that cut a conversation short look for them, or for Anthropic's
        # "prompt is too long", and not for the code.
        super().__init__(
            f"This model's maximum context length is {context} tokens; {message}", param=param
        )


class MediaRefused(ClientError):
    """A picture could not be fetched or decoded, or was not allowed."""

    code = "invalid_media"


class Unauthorized(ClientError):
    """No key, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFound(ClientError):
    """No such route, model or object."""

    status = 404
    code = "not_found"


class BodyTooSlow(ClientError):
    """The request body did not arrive in time."""

    status = 408
    code = "request_timeout"


class ClientTooSlow(ClientError):
    """The answer is read more slowly than it is written. Comes inside a stream."""

    status = 408
    code = "client_too_slow"


class RequestAborted(ClientError):
    """Its owner ended the request while it was being answered."""

    status = 499
    code = "request_aborted"


class BodyTooLarge(ClientError):
    """The request body is larger than the server accepts."""

    status = 413
    code = "request_too_large"


class TooManyRequests(ClientError):
    """The server is full; the same request may succeed later."""

    status = 429
    type = "rate_limit_error"
    code: Code = "too_many_requests"


class ServerError(ServiceError):
    """The request was fine; the server could not answer it."""


class Unavailable(ServerError):
    """Starting, draining or without an engine; the same request may succeed later."""

    status = 503
    type = "service_unavailable"
    code = "unavailable"


class EngineFailed(ServerError):
    """The engine gave up on this request."""

    code = "engine_error"
