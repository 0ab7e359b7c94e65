"""What may be told of this server to whoever may use it: no path, no address, and no secret."""

import platform
from typing import Any

from server.chat.prepare import ServedModel
from server.lifecycle import Service
from server.schemas.info import EngineInfo, ModelInfo, ServerInfo, Setting
from server.version import installed_version
from wire.settings import each_setting

PACKAGES = (
    *("fastapi", "starlette", "uvicorn", "pydantic", "msgspec", "tokenizers", "llguidance"),
    *("pillow", "av", "torch", "triton"),
)
SET = "\N{HORIZONTAL ELLIPSIS}"


def server_info(service: Service) -> ServerInfo:
    """As it is now."""
    versions = {name: installed_version(name) for name in PACKAGES}
    model = service.model
    return ServerInfo(
        version=installed_version(),
        state=service.state,
        model=_model(model) if model else None,
        engine=_engine(model) if model else None,
        versions={"python": platform.python_version()}
        | {name: version for name, version in versions.items() if version != "unknown"},
        settings={
            field.name: _told(field, getattr(getattr(service.settings, group), field.name))
            for group, field, _ in each_setting()
        },
    )


def _model(model: ServedModel) -> ModelInfo:
    ready = model.ready
    return ModelInfo(
        name=model.name,
        created=model.created,
        parameters=ready.parameters,
        max_model_len=ready.max_model_len,
        vocab_size=ready.vocab_size,
        eos_token_ids=list(ready.eos_token_ids),
        geometry=ready.geometry,
        prompt_format=ready.prompt_format,
        grammars=ready.grammars,
    )


def _engine(model: ServedModel) -> EngineInfo:
    ready = model.ready
    return EngineInfo(
        device=ready.device,
        dtype=ready.dtype,
        attention=ready.attention,
        block_size=ready.block_size,
        blocks_total=ready.blocks_total,
    )


def _told(field: Any, value: Any) -> Setting:
    """Anything but a text of which anything could be the value."""
    if isinstance(value, bool | int | float) or field.metadata["choices"]:
        told: Setting = value
    elif isinstance(value, str):
        told = value if value == field.default else SET
    elif all(isinstance(entry, int | float) for entry in value):
        told = list(value)
    else:
        told = SET
    return told
