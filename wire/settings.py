"""Every setting of the server, once.

A setting is a field of a frozen dataclass, grouped by the component that owns it; a component is
handed its own group and no other. The field's help text is the only description: the command
line, the environment mirror (``INTERNVL_`` + the name in capitals) and docs/settings.md are
generated from it. wire.loading reads them from there.
"""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from wire.critic import CriticSettings as CriticSettings
from wire.knob import QUANTIZATIONS, knob
from wire.knob import SettingError as SettingError
from wire.media import MediaSettings as MediaSettings
from wire.tracing import TracingSettings as TracingSettings


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """HTTP front end."""

    host: str = knob("127.0.0.1", "Address to listen on; 0.0.0.0 for all interfaces.")
    port: int = knob(8000, "TCP port to listen on; 0 picks a free one.", low=0, high=65535)
    root_path: str = knob(
        "",
        "Path under which a proxy offers the server, for example /vision. It is taken off a "
        "request's path where it stands there; a proxy may also have done so.",
    )
    tls_certificate: str = knob(
        "",
        "PEM file with the certificate, and those between it and the root, to serve HTTPS with. "
        "It is read again when it changes, and at SIGHUP.",
    )
    tls_key: str = knob("", "PEM file with the certificate's key; default: it is in the same file.")
    cors_origins: tuple[str, ...] = knob(
        (),
        "Origins whose web pages may use the API, such as https://chat.example.org; "
        "comma-separated, * for all; default: none.",
    )
    chat_page: bool = knob(
        True, "Offer the chat page at /. The page needs no API key, what it asks for does."
    )
    served_model_name: str = knob("", "Model name in the API; default: the checkpoint's name.")
    api_key: tuple[str, ...] = knob(
        (), "Key a client must send as bearer token; comma-separated for several.", secret=True
    )
    api_keys_file: str = knob(
        "",
        "TOML file of further API keys: name, hash and limits of each. `internvl key NAME` makes "
        "an entry. It is read again when it changes, and at SIGHUP.",
    )
    admin_port: int = knob(
        0,
        "TCP port for operators: drain, abort, flush, log level, profile, use of keys; 0: none. "
        "Needs admin_key_file.",
        low=0,
        high=65535,
    )
    admin_host: str = knob("127.0.0.1", "Address to listen on for operators.")
    admin_key_file: str = knob(
        "", "TOML file of the keys that operators send, in the form of api_keys_file."
    )
    open_metrics: bool = knob(
        False,
        "Answer /metrics without an API key, where others need one. It names the keys, unless "
        "there is an admin_port.",
    )
    api_key_weights: tuple[float, ...] = knob(
        (),
        "Under the fair scheduling policy, the part of the engine that each API key gets when all "
        "want more: a number above 0 per key, in the order of the keys; default: equal parts.",
    )
    cache_per_key: bool = knob(
        True,
        "Let requests find only what was cached for the same API key, prompts and pictures: "
        "otherwise the time of an answer tells one client what another has sent.",
    )
    max_request_bytes: int = knob(
        64 << 20, "Largest request body in bytes; larger ones get 413.", low=1024
    )
    body_timeout: float = knob(
        60.0, "Seconds in which a request body must arrive; slower ones get 408.", low=0.1
    )
    send_timeout: float = knob(
        30.0,
        "Seconds a client may leave its answer unread; then the request ends.",
        low=0.1,
    )
    max_unread_tokens: int = knob(
        1 << 15,
        "Tokens, and log-probabilities, that are kept for a client that reads its answer more "
        "slowly than it is written; with more the request ends.",
        low=64,
    )
    head_timeout: float = knob(
        30.0,
        "Seconds in which the head of a request must arrive, from its first byte or the opening "
        "of the connection; slower connections are closed.",
        low=0.1,
    )
    max_concurrent_requests: int = knob(
        256, "Requests in the server at once; more get 429 with Retry-After.", low=1
    )
    max_num_queued_reqs: int = knob(
        512,
        "Requests that may wait for their first token, each choice counted; more get 429 with "
        "Retry-After.",
        low=1,
    )
    max_num_queued_tokens: int = knob(
        1 << 20,
        "Prompt tokens, pictures' included, that may wait for their first token; more get 429 "
        "with Retry-After.",
        low=1,
    )
    resume_grace: float = knob(
        30.0,
        "Seconds that a resumable stream goes on, or holds up a drain, while nobody reads it.",
        low=0,
    )
    resume_ttl: float = knob(
        120.0, "Seconds for which a resumable stream can be read when it is over.", low=0
    )
    resume_bytes: int = knob(
        64 << 20, "Bytes that are kept of all resumable streams together.", low=1 << 20
    )
    resume_key_bytes: int = knob(32 << 20, "The same of the streams of one API key.", low=1 << 20)
    drain_timeout: float = knob(
        30.0, "Seconds that running requests may finish in after SIGTERM.", low=0
    )
    keep_alive_interval: float = knob(
        15.0, "Seconds of silence after which a stream gets an SSE comment.", low=0.1
    )
    response_store_bytes: int = knob(
        128 << 20,
        "Memory for the answers of /v1/responses and their conversations, pictures in requests "
        "included, which can be asked for or gone on from; 0 keeps none.",
        low=0,
    )
    response_store_ttl: float = knob(
        3600.0, "Seconds that such an answer is kept for at most.", low=1
    )
    file_store_bytes: int = knob(
        256 << 20,
        "Memory for the files that clients upload to /v1/files; 0 keeps none. Where there is no "
        "room, those go that were used longest ago, of the API key that takes most.",
        low=0,
    )
    max_file_bytes: int = knob(
        64 << 20, "Largest file that may be uploaded to /v1/files in bytes.", low=1024
    )
    file_ttl: float = knob(
        86400.0, "Seconds that an uploaded file is kept for at most.", low=1, high=2592000
    )
    system_prompt: str = knob(
        "auto",
        "System sentence used when the client sends none: 'auto' (the checkpoint's), 'none', "
        "or a text.",
    )
    image_labels: str = knob(
        "auto",
        "'Image-1: ' before each picture when there are several: 'auto' follows the checkpoint's "
        "format.",
        choices=("auto", "always", "never"),
    )
    v2pe_delta: str = knob(
        "1",
        "Positions that each token of a picture takes, for requests that say nothing: less than 1 "
        "leaves more of the context to them; 'auto' is the largest with which prompt and answer "
        "end inside the positions that the model was trained with.",
        choices=("auto", "1", *(f"1/{2**power}" for power in range(1, 9))),
    )
    strict_fields: bool = knob(
        False,
        "Refuse requests with fields that this server does not know; otherwise a header of the "
        "answer, X-InternVL-Ignored-Fields, names them.",
    )
    log_level: str = knob(
        "info", "Least severe level logged.", choices=("debug", "info", "warning", "error")
    )
    log_format: str = knob(
        "text", "Lines of the log: text, or an object of JSON each.", choices=("text", "json")
    )


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Model, memory and scheduling."""

    model: str = knob(
        "",
        "Checkpoint folder (internvl_chat or -hf), or the name of one on the model hub, such as "
        "OpenGVLab/InternVL3-2B; default: the demo model.",
    )
    revision: str = knob("", "Branch, tag or commit of a model of the hub; default: the newest.")
    device: str = knob("auto", "Where the model runs.", choices=("auto", "cpu", "cuda"))
    dtype: str = knob(
        "auto",
        "Weights and activations; 'auto' is the checkpoint's type on CUDA and float32 on the CPU "
        "for small models.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = knob(
        "none",
        "Weights, and activations too but for four bits, in fewer bits. 'fp8': the decoder's "
        "layers, on CUDA from compute capability 8.9 on; 'fp8-all': those of encoder and "
        "projector too; 'int8': the decoder's layers, and all "
        "layers on a CPU with compiled C; 'bnb-8bit', 'bnb-4bit': the decoder's layers as the "
        "model cards load them, by bitsandbytes, which must be installed; 'awq': those of an AWQ "
        "checkpoint stay in the four bits they are stored in, which 'none' expands when loading.",
        choices=QUANTIZATIONS,
    )
    attention_backend: str = knob(
        "auto",
        "Attention implementation; 'auto': on CUDA the first of those listed that is installed and "
        "passes a small test, on the CPU 'native' for bfloat16 and 'sdpa' for others; 'flashinfer' "
        "by its name alone: it compiles when it starts and goes without CUDA graphs for steps.",
        choices=(
            "auto",
            "fa3",
            "flash_attn",
            "torch_varlen",
            "triton",
            "native",
            "sdpa",
            "flashinfer",
        ),
    )
    max_model_len: int = knob(
        0, "Most tokens of prompt plus completion; 0: the model's own limit.", low=0
    )
    max_num_seqs: int = knob(64, "Sequences in one step.", low=1)
    max_num_batched_tokens: int = knob(2048, "Tokens computed in one step.", low=1)
    scheduling_policy: str = knob(
        "fcfs",
        "Which request starts next: the one that came first, the one with the least 'priority', or "
        "one of the API key that was served least for its weight.",
        choices=("fcfs", "priority", "fair"),
    )
    max_tiles: int = knob(
        0,
        "Tiles that a request may ask one picture to be cut into, the thumbnail not counted; 0: "
        "the model's own number, which is also what a picture gets that asks for nothing.",
        low=0,
        high=64,
    )
    step_budget_ms: float = knob(
        -1.0,
        "Milliseconds that a step may take by prediction while somebody generates: prompts and "
        "pictures are computed in pieces that keep to it. 0: any time; -1: 50 on CUDA, 200 on the "
        "CPU.",
        low=-1,
        high=3_600_000,
    )
    max_num_encoder_tiles: int = knob(16, "Picture tiles encoded in one step.", low=1)
    encoder_chunk_tiles: int = knob(
        0,
        "Picture tiles in one pass of the encoder; 0: 16 on CUDA; on the CPU 1 in bfloat16, or 4.",
        low=0,
    )
    encoder_cache_bytes: int = knob(
        256 << 20, "Memory for encoded pictures that wait for their prefill.", low=1
    )
    block_size: int = knob(64, "Tokens per block of the KV cache.", low=1, high=1024)
    enable_prefix_caching: bool = knob(
        True, "Keep the keys and values of finished requests for others with the same beginning."
    )
    async_scheduling: str = knob(
        "auto",
        "Plan and launch a step while the one before is still being computed; 'auto': on CUDA.",
        choices=("auto", "on", "off"),
    )
    speculative_tokens: int = knob(
        -1,
        "Tokens that a step may compute on trial, because they came next before in the same text, "
        "beside few sequences; it keeps those that are right. Not with async_scheduling 'on'. 0: "
        "none; -1: 5 on the CPU, none on CUDA.",
        low=-1,
        high=64,
    )
    cuda_graphs: bool = knob(
        True,
        "On CUDA, capture steps in which every row has one new token, and passes of the encoder, "
        "once at the start, and replay them.",
    )
    num_kv_blocks: int = knob(0, "Blocks of the KV cache; 0: sized from kv_cache_memory.", low=0)
    kv_cache_memory: int = knob(
        0, "Bytes for the KV cache, of each process; 0: measured from what is free.", low=0
    )
    gpu_memory_utilization: float = knob(
        0.9, "Share of the GPU's memory that the server may use.", low=0.05, high=1.0
    )
    cpu_memory_utilization: float = knob(
        0.8,
        "Share of the main memory that is free at the start, a container's limit considered, that "
        "an engine on the CPU may use. The rest is for pictures that are decoded.",
        low=0.05,
        high=1.0,
    )
    request_tile_bytes: int = knob(
        512 << 20,
        "Memory for the tiles of requests that are being answered, in the API process and again "
        "in each process of the engine; a request that finds no room waits.",
        low=1,
    )
    engine_timeout: float = knob(
        300.0,
        "Seconds in which an engine with work must finish a step, or a loading one make progress; "
        "a slower one is taken for hung and replaced. A big model on a CPU may need more.",
        low=1,
    )
    threads: int = knob(
        0,
        "CPU threads of each process of the engine; 0: one per core, which the processes of a host "
        "share, or one for a small model.",
        low=0,
    )
    tensor_parallel_size: int = knob(
        1,
        "Processes that each layer of the model is split over, with a GPU each on CUDA.",
        low=1,
        high=64,
    )
    symmetric_memory: bool = knob(
        False,
        "With several GPUs that reach each other's memory, add up what few rows need there, "
        "without NCCL. No GPU has run this yet.",
    )
    pipeline_parallel_size: int = knob(
        1,
        "Stages that the layers are shared out over, one behind the other, of "
        "tensor_parallel_size processes each. For models that do not fit otherwise: it makes "
        "nothing faster.",
        low=1,
        high=64,
    )
    nodes: int = knob(
        1,
        "Hosts that these processes are spread over evenly, this one included; `internvl rank` "
        "runs on each of the others. Needs rank_secret_file.",
        low=1,
        high=64,
    )
    rank_host: str = knob(
        "0.0.0.0",  # noqa: S104 - with several nodes only, and who comes must know a secret
        "Address where the processes of other hosts are awaited, in a network that nobody else "
        "can reach.",
    )
    rank_port: int = knob(29500, "TCP port for the same.", low=1, high=65535)
    rank_timeout: float = knob(
        600.0, "Seconds in which the processes of other hosts must have come.", low=1
    )
    rank_secret_file: str = knob(
        "",
        "File with what the processes of other hosts must know: 16 bytes or more, the same on "
        "each host.",
    )

    @property
    def processes(self) -> int:
        """That the model is split over, on all nodes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclasses.dataclass(frozen=True)
class Settings:
    """All groups. Build it with ``wire.loading.load``."""

    server: ServerSettings = ServerSettings()
    media: MediaSettings = dataclasses.field(default_factory=MediaSettings)
    engine: EngineSettings = EngineSettings()
    critic: CriticSettings = dataclasses.field(default_factory=CriticSettings)
    tracing: TracingSettings = dataclasses.field(default_factory=TracingSettings)

    @property
    def critic_engine(self) -> EngineSettings:
        """Of the critic's engine, next to the first one: one process, whatever that one has."""
        critic = self.critic
        return dataclasses.replace(
            self.engine,
            model=critic.critic_model,
            revision=critic.critic_revision,
            device=critic.critic_device,
            quantization=critic.critic_quantization,
            max_model_len=critic.critic_max_model_len,
            kv_cache_memory=critic.critic_kv_cache_memory,
            gpu_memory_utilization=critic.critic_gpu_memory_utilization,
            cpu_memory_utilization=critic.critic_cpu_memory_utilization,
            num_kv_blocks=0,
            max_tiles=0,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            nodes=1,
        )


def each_setting() -> Iterator[tuple[str, "dataclasses.Field[Any]", Any]]:
    """Yield (group name, field, its type) for every setting, in documentation order."""
    groups = {
        "server": ServerSettings,
        "media": MediaSettings,
        "engine": EngineSettings,
        "critic": CriticSettings,
        "tracing": TracingSettings,
    }
    for name, group in groups.items():
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            yield name, field, hints[field.name]
