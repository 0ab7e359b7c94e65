"""What /server_info answers."""

import msgspec

from wire.geometry import PromptFormat, VisionGeometry

Setting = bool | int | float | str | list[float] | None


class ModelInfo(msgspec.Struct):
    """Facts of the served model. ``max_model_len`` bounds prompt and answer together;
    ``grammars`` says whether answers can be held to one."""

    name: str
    created: int
    parameters: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    geometry: VisionGeometry
    prompt_format: PromptFormat
    grammars: bool


class EngineInfo(msgspec.Struct):
    """What computes it, and the size of its KV cache."""

    device: str
    dtype: str
    attention: str
    block_size: int
    blocks_total: int


class ServerInfo(msgspec.Struct):
    """``versions`` are those of this server and of what it is built on. ``settings`` have
    numbers, switches and choices as they are; of texts, which can be paths or secrets, only that
    they were set ("…"), or the default."""

    version: str
    state: str
    model: ModelInfo | None
    engine: EngineInfo | None
    versions: dict[str, str]
    settings: dict[str, Setting]
