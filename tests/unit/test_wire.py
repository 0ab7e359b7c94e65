"""Messages, digests, errors and sampling checks."""

import dataclasses
import importlib
import pkgutil
import typing

import msgspec
import pytest

import wire
from wire import errors, messages
from wire.digest import media_digest
from wire.errors import ClientError, InvalidRequest, ServerError, ServiceError
from wire.geometry import PromptFormat, VisionGeometry
from wire.messages import (
    Abort,
    EngineOutput,
    EngineRequest,
    EngineStats,
    Fault,
    Flush,
    FromEngine,
    LogLevel,
    Profile,
    Profiled,
    Progress,
    Ready,
    StepReport,
    ToEngine,
    VisionItem,
)
from wire.sampling import MAX_SEED, SamplingParams
from wire.settings import EngineSettings

READY = Ready(
    geometry=VisionGeometry(448, 256, mean=(0.1, 0.2, 0.3)),
    prompt_format=PromptFormat("hf", None, False),
    max_model_len=4096,
    max_positions=4096,
    vocab_size=1000,
    eos_token_ids=(1, 2),
    block_size=16,
    blocks_total=100,
    device="cpu",
    dtype="float32",
    attention="sdpa",
    parameters=12345,
    vision_token_bytes=512,
)
SAMPLES: dict[object, list[msgspec.Struct]] = {
    ToEngine: [
        EngineRequest(
            "id",
            [1, 2, 3],
            SamplingParams(temperature=0.5, seed=-7, stop_token_ids=(4,)),
            [VisionItem(b"\x00digest\xff", 1, 256, 1, 0)],
            b"salt",
            [6, 7],
        ),
        Abort(["a", "b"]),
        Flush(),
        LogLevel("debug"),
        Profile(on=True, of="model"),
    ],
    FromEngine: [
        StepReport([EngineOutput("id", [5], "stop", 5)], EngineStats(running=3, preemptions=1)),
        Progress("weights", 3, 10),
        READY,
        Fault("step", "why", ["id"]),
        Profiled(b"seen"),
    ],
}


@pytest.mark.parametrize("union", SAMPLES, ids=["to engine", "from engine"])
def test_every_message_of_a_direction_survives_the_trip(union: object) -> None:
    decoder = msgspec.msgpack.Decoder(union)
    for message in SAMPLES[union]:
        assert decoder.decode(msgspec.msgpack.encode(message)) == message
    assert {type(message) for message in SAMPLES[union]} == set(typing.get_args(union))


def test_the_engines_settings_survive_the_trip() -> None:
    settings = EngineSettings(model="somewhere", block_size=8, gpu_memory_utilization=0.5)
    data = msgspec.msgpack.encode(settings)
    assert msgspec.msgpack.decode(data, type=EngineSettings) == settings


def test_messages_cannot_be_changed() -> None:
    for message in [m for group in SAMPLES.values() for m in group]:
        for field in msgspec.structs.fields(message):
            with pytest.raises(AttributeError):
                setattr(message, field.name, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineSettings().block_size = 3  # type: ignore[misc]


def test_a_field_of_the_wrong_type_is_refused() -> None:
    data = msgspec.msgpack.encode({"type": "abort", "ids": [1]})
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(data, type=ToEngine)


def test_a_tile_has_three_bytes_per_pixel() -> None:
    assert VisionGeometry(448, 256).tile_bytes == 602_112


def test_a_digest_depends_on_every_part_and_on_where_one_ends() -> None:
    digests = [
        media_digest(parts)
        for parts in ([b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"abc", b""], [], [b"abd"])
    ]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 32 for digest in digests)
    assert media_digest([bytearray(b"ab"), memoryview(b"c")]) == digests[0]


ERRORS = [
    error
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, ServiceError)
]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_has_a_status_of_its_branch(error: type[ServiceError]) -> None:
    if issubclass(error, ClientError):
        assert 400 <= error.status < 500
    else:
        assert issubclass(error, ServerError) or error is ServiceError
        assert 500 <= error.status < 600


def test_an_error_carries_what_the_envelope_needs() -> None:
    error = InvalidRequest("top_p is wrong", param="top_p", code="special", retry_after=3)
    assert (error.message, error.param, error.code, error.retry_after, error.status) == (
        "top_p is wrong",
        "top_p",
        "special",
        3,
        400,
    )
    assert InvalidRequest("x").code == "invalid_value"


@pytest.mark.parametrize(
    ("field", "allowed", "refused"),
    [
        ("temperature", [0.0, 2.0], [-0.01, 2.01, float("nan"), float("inf")]),
        ("top_p", [0.01, 1.0], [0.0, 1.01, -1.0, float("nan")]),
        ("min_p", [0.0, 1.0], [-0.01, 1.01, float("nan")]),
        ("top_k", [0, 1, 2**31 - 1], [-1, 2**31]),
        ("seed", [-MAX_SEED - 1, 0, MAX_SEED], [MAX_SEED + 1, -MAX_SEED - 2]),
        ("max_tokens", [1, 2**31 - 1], [0, -1]),
        ("min_tokens", [0, 16], [-1, 17]),
        ("repetition_penalty", [0.01, 10.0], [0.0, 1e-3, float("nan")]),
        ("presence_penalty", [-2.0, 2.0], [-2.1, 2.1]),
        ("frequency_penalty", [-2.0, 2.0], [-2.1, float("inf")]),
    ],
)
def test_sampling_values_outside_their_range_are_refused_by_name(
    field: str, allowed: list[float], refused: list[float]
) -> None:
    for value in allowed:
        SamplingParams(**{field: value}).check()
    for value in refused:
        with pytest.raises(InvalidRequest) as caught:
            SamplingParams(**{field: value}).check()
        assert caught.value.param == ("max_completion_tokens" if field == "max_tokens" else field)


def test_greedy_is_temperature_zero_or_a_single_candidate() -> None:
    assert SamplingParams(temperature=0.0, top_k=5).greedy
    assert SamplingParams(temperature=1.5, top_k=1).greedy
    assert not SamplingParams(temperature=0.1).greedy


def test_every_message_type_is_described() -> None:
    for module in pkgutil.iter_modules(wire.__path__):
        assert importlib.import_module(f"wire.{module.name}").__doc__
    for value in vars(messages).values():
        if isinstance(value, type) and issubclass(value, msgspec.Struct):
            assert value.__doc__
