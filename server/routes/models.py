"""/v1/models."""

import datetime

from fastapi import APIRouter, Request, Response

from server.chat.prepare import ServedModel
from server.lifecycle import Service
from server.routes.body import whole
from server.schemas.common import Model, ModelList
from wire.errors import NotFound

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The one model that is served."""
    service: Service = request.app.state.service
    model = _describe(service.served())
    return whole(ModelList([model], model.id, model.id), ())


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, request: Request) -> Response:
    """The served model, by its name."""
    service: Service = request.app.state.service
    served = service.served()
    if model != served.name:
        raise NotFound(
            f"This server does not serve that model; it serves {served.name!r}.",
            param="model",
            code="model_not_found",
        )
    return whole(_describe(served), ())


def _describe(model: ServedModel) -> Model:
    created = datetime.datetime.fromtimestamp(model.created, datetime.UTC)
    # Of text. With pictures that take fewer positions than tokens (v2pe_delta) it may be more.
    length = model.ready.context()
    return Model(model.name, model.created, length, model.name, created.isoformat(), length)
