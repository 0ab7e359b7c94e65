"""/v1/requests: what is being answered."""

import msgspec
from fastapi import APIRouter, Request, Response

from server.auth import Tenant
from server.lifecycle import Service
from server.schemas.common import Aborted
from wire.errors import NotFound

router = APIRouter()


@router.delete("/v1/requests/{name}")
async def abort_request(name: str, request: Request) -> Response:
    """End a request that is being answered, by the id of its answer or by its X-Request-Id."""
    service: Service = request.app.state.service
    tenant: Tenant = request.state.tenant
    if not service.handles.abort(tenant.id, name):
        # Nor is it told whether somebody else has such a request.
        raise NotFound(
            "No request of this name is being answered.", param="name", code="request_not_found"
        )
    return Response(msgspec.json.encode(Aborted(name)), media_type="application/json")
