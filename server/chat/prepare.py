"""From a validated request to everything that is needed to generate and to answer: pictures
fetched and tiled, prompt built, sampling settled. Called once per request, before the engine
hears of it; every refusal a client can cause after validation is raised here."""

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import msgspec

from preprocessing.allowance import Allowance
from preprocessing.media import Treatment
from server.auth import Tenant
from server.chat.conversation import Conversation, Viewing, read_conversation
from server.chat.critic import Contest, Critic, question_of
from server.chat.demands import Demand, callable_tools, demanded
from server.chat.grounding import BoxReader
from server.chat.positions import Asked, place, read_delta
from server.chat.prompt import Ending, PromptBuilder, Segment
from server.chat.sampling import Defaults, either, fit_sampling, read_sampling
from server.chat.showing import Canvas, Gallery, Media, Room, show
from server.chat.usage import Meter, Shown, account
from server.files import FileStore
from server.grammars import GrammarChecker
from server.handles import Handle
from server.limits import GUESS, Spending
from server.schemas.chat import ChatRequest, Prediction
from server.schemas.generation import Generation
from server.tokenizer import Tokenizer
from wire.channel import Buffer
from wire.errors import InvalidRequest, NotFound
from wire.geometry import VisionGeometry
from wire.messages import EngineRequest, Ready, VisionItem
from wire.positions import all_saved
from wire.sampling import Grammar, SamplingParams
from wire.settings import MediaSettings, Settings
from wire.spans import span

_T = TypeVar("_T")

# Of answers that are compared, if neither the request nor the checkpoint has one above 0: what the
# model's authors are reported to draw them with.
COMPARED_TEMPERATURE = 0.7
# Of finding out which of many tools is wrong: each can take as long to compile as all together.
BLAME_TIMEOUT = 2.0


class Run(Protocol):
    """Calls a function here or in a thread."""

    async def __call__(self, function: Callable[..., _T], /, *arguments: Any) -> _T:
        """What ``function`` returns."""


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """Everything the front end knows of the model; made when the engine is ready."""

    name: str
    created: int
    ready: Ready
    tokenizer: Tokenizer
    prompts: PromptBuilder
    defaults: Defaults
    has_priorities: bool
    delta: Asked = 1.0

    @classmethod
    def load(cls, name: str, created: int, ready: Ready, settings: Settings) -> "ServedModel":
        """Read the tokenizer and settle the prompt's form. Slow: call it in a thread."""
        folder = Path(settings.engine.model)
        template = ready.prompt_format
        if settings.server.system_prompt != "auto":
            none = settings.server.system_prompt == "none"
            system = None if none else settings.server.system_prompt
            template = msgspec.structs.replace(template, system=system)
        if settings.server.image_labels != "auto":
            always = settings.server.image_labels == "always"
            template = msgspec.structs.replace(template, number_images=always)
        tokenizer = Tokenizer.load(folder)
        prompts = PromptBuilder(
            tokenizer, template, ready.geometry.tokens_per_tile, ready.max_model_len
        )
        has_priorities = settings.engine.scheduling_policy == "priority"
        defaults = Defaults.load(folder)
        delta = read_delta(settings.server.v2pe_delta)
        return cls(name, created, ready, tokenizer, prompts, defaults, has_priorities, delta)


@dataclasses.dataclass(frozen=True)
class PreparedChat:
    """A request that can be generated and answered. ``buffers`` travel beside ``engine``, the
    request of the first of ``n`` choices, and ``meter`` counts for all. ``echo`` stands before what
    is generated, which ``continues`` a message if that was asked for. A copy of ``boxes`` reads a
    choice. With a ``contest`` one of the choices is the answer."""

    engine: EngineRequest
    buffers: list[Buffer]
    n: int
    model: ServedModel
    stops: tuple[str, ...]
    show_stop: bool
    boxes: BoxReader
    parse_tools: bool
    max_calls: int | None
    called_reason: str
    skip_special_tokens: bool
    token_ids: bool
    echo: str
    continues: bool
    stream: bool
    include_usage: bool
    resumable: bool
    shown: list[Shown]
    meter: Meter
    media_seconds: float
    spending: Spending
    shows_logprobs: bool = True
    contest: Contest | None = None
    handle: Handle = dataclasses.field(default_factory=Handle)


async def prepare(
    request: ChatRequest,
    identity: str,
    model: ServedModel,
    media: Media,
    limits: MediaSettings,
    grammars: GrammarChecker,
    run: Run,
    tenant: Tenant,
    files: FileStore,
    room: Room,
    critic: Critic | None = None,
) -> PreparedChat:
    """Check, fetch, tokenise; ``run`` does what takes longer for longer texts, ``room`` waits for
    room for tiles. Raises ClientErrors, and Unavailable; when one picture fails, the others
    stop."""
    judge = _critic(request, critic)
    sampling = await settle(request, model, grammars, run, tenant)
    conversation, canvas = await read_prompt(request, model, limits, run, tenant, files)
    if judge is not None:
        question_of(conversation)
    began = time.monotonic()
    with span("media") if conversation.parts else contextlib.nullcontext():
        gallery = await show(media, conversation, canvas, limits.decode_workers + 2, room)
    media_seconds = time.monotonic() - began
    frames = [video.frames for video in gallery.videos]
    with span("prompt"):
        prompt = await run(model.prompts.build, canvas.segments, gallery.pictures, frames)
        predicted = b""
        if request.prediction is not None and model.ready.speculates:
            predicted = await run(_predicted, request.prediction, model)
    shown = account(gallery, conversation, canvas.segments, model.ready.geometry.tokens_per_tile)
    visual = [one.facts.tokens for one in shown]
    items = place(prompt.items, canvas.delta, len(prompt.ids) + canvas.reserve, model.ready)
    context = model.ready.context(all_saved(items))
    sampling = fit_sampling(sampling, request, len(prompt.ids), context, visual)
    boxes = _box_reader(request, gallery, model)
    if request.continues:
        await run(boxes.skip, model.prompts.last_turn(prompt.ids))
    contest = None
    if request.best_of is not None:
        contest = Contest(request.best_of)
        if judge is not None:
            if not judge.sees_as(model.ready.geometry):
                viewing = _viewing(request, judge.ready.geometry, limits, tenant, files)
                beside = functools.partial(room, beside=gallery.size)
                conversation, gallery = await _show_again(
                    request, judge, viewing, media, limits, run, beside
                )
            case = await run(judge.case, conversation, gallery)
            contest = Contest(request.best_of, judge, case)
        if request.best_of.critic != "visualprm":
            # Zero: those of the drawn tokens alone.
            logprobs = max(sampling.logprobs, 0)
            sampling = msgspec.structs.replace(sampling, logprobs=logprobs)
    options = request.stream_options
    named = request.tool_choice is not None and request.tool_choice.single
    return PreparedChat(
        engine=engine_request(request, identity, prompt.ids, items, sampling, tenant, predicted),
        buffers=[picture.tiles for picture in prompt.buffers],
        n=request.choices,
        model=model,
        stops=tuple(request.stop or ()),
        show_stop=bool(request.include_stop_str_in_output),
        boxes=boxes,
        parse_tools=_offers_tools(request),
        max_calls=1 if named or request.parallel_tool_calls is False else None,
        called_reason="stop" if named else "tool_calls",  # as OpenAI has it
        skip_special_tokens=request.skip_special_tokens is not False,
        token_ids=bool(request.return_token_ids),
        echo=_echo(request, conversation),
        continues=request.continues,
        stream=bool(request.stream),
        include_usage=bool(options is not None and options.include_usage),
        resumable=bool(options is not None and options.resumable),
        shown=shown,
        meter=Meter(items, shown),
        media_seconds=media_seconds,
        spending=spending(request, sampling, len(prompt.ids), items, tenant),
        shows_logprobs=request.likeliest >= 0,
        contest=contest,
    )


def _critic(request: ChatRequest, critic: Critic | None) -> Critic | None:
    """The model that shall judge the answers, if one shall. Raises InvalidRequest for what cannot
    be judged as it is asked for, and Unavailable."""
    if request.best_of is None or request.best_of.critic == "logprob":
        return None
    name = request.best_of.critic
    if callable_tools(request):
        raise InvalidRequest(
            f"tools: the critic {name!r} compares texts, not calls; 'logprob' compares both.",
            param="tools",
        )
    if name == "vote":
        return None
    if critic is None:
        raise InvalidRequest(
            "best_of.critic: this server was started without --critic-model; it has the critics "
            "'logprob' and 'vote'.",
            param="best_of.critic",
            code="unsupported_parameter",
        )
    _ = critic.ready  # raises where there is none
    return critic


async def _show_again(
    request: ChatRequest,
    critic: Critic,
    viewing: Viewing,
    media: Media,
    limits: MediaSettings,
    run: Run,
    room: Room,
) -> tuple[Conversation, Gallery]:
    """The conversation with its parts cut as the critic sees them. Raises as ``show``."""
    ready, budget = critic.ready, request.visual_budget
    conversation = await run(read_conversation, request.messages, viewing)
    cut = [
        [dataclasses.replace(part, geometry=ready.geometry) for part in parts]
        for parts in (conversation.pictures, conversation.videos)
    ]
    conversation = Conversation(conversation.turns, *cut)
    segments = await run(critic.segments, conversation, [""])
    canvas = Canvas(critic.prompts, segments, ready, budget, request.length[1])
    return conversation, await show(media, conversation, canvas, limits.decode_workers + 2, room)


def spending(
    request: Generation,
    sampling: SamplingParams,
    prompt: int,
    items: list[VisionItem],
    tenant: Tenant,
) -> Spending:
    """What the limits of the key count of a request whose prompt has so many tokens."""
    field, longest = request.length
    if longest is None:
        answer = min(request.usual_length or GUESS, GUESS)
    else:
        answer = min(longest, sampling.max_tokens)  # which was made to fit
    fields = request.prompt_field, None if longest is None else field
    visual = sum(item.length for item in items)
    return Spending(tenant.account, prompt, visual, answer * request.choices, fields)


def _priority(request: Generation, tenant: Tenant) -> int:
    """What the request asks for, but nothing better than its key has."""
    if tenant.priority is None:
        return either(request.priority, 0)
    return max(tenant.priority, either(request.priority, tenant.priority))


async def settle(
    request: Generation, model: ServedModel, grammars: GrammarChecker, run: Run, tenant: Tenant
) -> SamplingParams:
    """All that does not depend on the prompt. Raises ClientErrors."""
    check_model(request.model, model)
    if request.priority and not model.has_priorities:
        raise InvalidRequest(
            "priority must be 0 or left out: this server does not schedule by priority.",
            param="priority",
        )
    # Tokenising bad words takes longer than their number of bytes suggests.
    sampling = await (asyncio.to_thread if request.bad_words else run)(
        read_sampling, request, _defaults(request, model), model.ready, model.tokenizer
    )
    demand = await run(demanded, request, model.tokenizer)
    if demand is not None:
        with span("grammar"):
            await _check_demand(demand, model, grammars, tenant)
        sampling = _constrained(sampling, demand)
    return sampling


def engine_request(
    request: Generation,
    identity: str,
    prompt: list[int],
    items: list[VisionItem],
    sampling: SamplingParams,
    tenant: Tenant,
    prediction: bytes = b"",
) -> EngineRequest:
    """What the engine is asked."""
    return EngineRequest(
        id=identity,
        prompt=prompt,
        sampling=sampling,
        items=items,
        # Fingerprints have one length: no two pairs of them and a client's salt are alike.
        cache_salt=tenant.salt + (request.cache_salt or "").encode(),
        priority=_priority(request, tenant),
        tenant=tenant.id,
        weight=tenant.weight,
        prediction=prediction,
    )


def check_model(name: str | None, model: ServedModel) -> None:
    """Raise NotFound for a request that asks another model."""
    if name is not None and name != model.name:
        raise NotFound(
            f"This server does not serve that model; it serves {model.name!r}.",
            param="model",
            code="model_not_found",
        )


async def read_prompt(
    request: ChatRequest,
    model: ServedModel,
    limits: MediaSettings,
    run: Run,
    tenant: Tenant,
    files: FileStore,
) -> tuple[Conversation, Canvas]:
    """The conversation of a request, and the prompt that its parts stand in. Raises
    InvalidRequest, NotFound, ContextTooLong."""
    ending = _ending(request)
    viewing = _viewing(request, model.ready.geometry, limits, tenant, files)
    conversation = await run(read_conversation, request.messages, viewing)
    segments = await run(_render, request, conversation, model, ending)
    _, answer = request.length
    delta = either(request.v2pe_delta, model.delta)
    budget = request.visual_budget
    return conversation, Canvas(model.prompts, segments, model.ready, budget, answer, delta)


def _viewing(
    request: ChatRequest,
    geometry: VisionGeometry,
    limits: MediaSettings,
    tenant: Tenant,
    files: FileStore,
) -> Viewing:
    treatment = cast(Treatment, request.preprocess or limits.preprocess)
    allowance = Allowance(limits.max_request_media_bytes)
    find = functools.partial(files.get, tenant.id)
    return Viewing(limits, geometry, treatment, tenant.salt, allowance, find)


def _defaults(request: Generation, model: ServedModel) -> Defaults:
    """What holds where the request says nothing: answers that are compared must differ."""
    defaults = model.defaults
    if isinstance(request, ChatRequest) and request.best_of is not None and request.choices > 1:
        temperature = defaults.temperature or COMPARED_TEMPERATURE
        top_k = defaults.top_k if defaults.top_k != 1 else 0
        return dataclasses.replace(defaults, temperature=temperature, top_k=top_k)
    return defaults


async def _check_demand(
    demand: Demand, model: ServedModel, grammars: GrammarChecker, tenant: Tenant
) -> None:
    """Raise InvalidRequest for a grammar that cannot be used."""
    if not model.ready.grammars:
        raise InvalidRequest(
            f"{demand.field}: the served checkpoint cannot be held to a grammar.",
            param=demand.field,
            code="unsupported_parameter",
        )

    async def problem_of(grammar: Grammar) -> str | None:
        return await grammars.problem(grammar, model.tokenizer, model.ready.vocab_size, tenant.id)

    problem = await problem_of(demand.grammar)
    if problem is None:
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(BLAME_TIMEOUT):
            for part in demand.parts:
                found = await problem_of(part.grammar)
                if found is not None:
                    demand, problem = part, found
                    break
    raise InvalidRequest(f"{demand.field} {problem}.", param=demand.field)


def _constrained(sampling: SamplingParams, demand: Demand) -> SamplingParams:
    if not sampling.stop_token_ids:
        raise InvalidRequest(
            f"ignore_eos: what {demand.field} demands has an end; send one of them.",
            param="ignore_eos",
        )
    return msgspec.structs.replace(sampling, grammar=demand.grammar)


def _box_reader(request: ChatRequest, gallery: Gallery, model: ServedModel) -> BoxReader:
    """Raises InvalidRequest for a picture that is not there."""
    pictures = gallery.pictures
    form = request.response_format and request.response_format.internvl_boxes
    about = form.image_index if form else None
    if about is not None and about >= len(pictures):
        where = "response_format.internvl_boxes.image_index"
        raise InvalidRequest(
            f"{where} must be less than the number of pictures, {len(pictures)}.", param=where
        )
    sizes = [(picture.width, picture.height) for picture in pictures]
    named = model.prompts.names(len(pictures))
    alone = not gallery.videos
    return BoxReader(model.tokenizer, sizes, alone=alone, named=named, about=about)


def _offers_tools(request: ChatRequest) -> bool:
    return bool(callable_tools(request))


def _ending(request: ChatRequest) -> Ending:
    """How the prompt shall end. Raises InvalidRequest."""
    if not request.continues:
        return "close" if request.asks is False else "ask"
    if request.asks:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt cannot both be true.",
            param="continue_final_message",
        )
    last = request.messages[-1]
    if last.role != "assistant" or last.tool_calls:
        raise InvalidRequest(
            "continue_final_message: the last message must be one of the assistant without "
            "tool_calls.",
            param="continue_final_message",
        )
    return "continue"


def _echo(request: ChatRequest, conversation: Conversation) -> str:
    """The text of a last message by the assistant, if it is to be repeated."""
    last = conversation.turns[-1]
    if not request.echo or last.role != "assistant":
        return ""
    return "".join(part for part in last.content if isinstance(part, str))


def _predicted(prediction: Prediction, model: ServedModel) -> bytes:
    return model.prompts.predict(prediction.text)


def _render(
    request: ChatRequest, conversation: Conversation, model: ServedModel, ending: Ending
) -> list[Segment]:
    choice = request.tool_choice
    demanded_call = choice is not None and choice.mode == "required"
    # The grammar holds a demanded call to the tools that are allowed; the others may be seen.
    tools = (request.tools or ()) if demanded_call else callable_tools(request)
    offered = [tool.model_dump(exclude_unset=True) for tool in tools]
    return model.prompts.render(conversation.turns, len(conversation.pictures), offered, ending)
