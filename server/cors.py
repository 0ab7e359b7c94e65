"""Which web pages may use the API: none, unless the settings name their origins. Cookies play no
part: a page has to have a key like everybody else. The browser's question before has none."""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from server.errors import error_response
from wire.errors import ClientError


class OriginRefused(ClientError):
    """A browser asks for a page that may not use the API, or for what no page may do."""

    status = 403
    type = "permission_error"
    code = "origin_not_allowed"


class Cors(CORSMiddleware):
    """Starlette's, with our form of an error."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to the question."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        refusal = error_response(
            OriginRefused("Pages of this origin may not send this request to this server.")
        )
        refusal.headers["Vary"] = response.headers["Vary"]
        return refusal
