"""The critic: VisualPRM, a model in an engine of its own, which reads a question with its pictures
and an answer to it step by step, and says of each step how likely it is right.

It is a second engine process, not a second model in the first one: that one plans steps, counts
blocks and restarts for one model, and a critic that dies or hangs must not take answers along that
are being written. Both processes are looked after alike (``engine.client.ProcessEngine``).
"""

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.client import EngineClient
from preprocessing.media import TiledMedia, TileSettings
from preprocessing.turns import few_at_a_time
from server.chat.conversation import Conversation
from server.chat.prompt import Prompt, PromptBuilder, Segment, Turn, Video
from server.chat.showing import Gallery
from server.schemas.chat import BestOf
from server.tokenizer import Tokenizer
from wire.errors import ContextTooLong, EngineFailed, InvalidRequest, Unavailable
from wire.geometry import VisionGeometry
from wire.messages import EngineRequest, Ready
from wire.sampling import Lookup, SamplingParams
from wire.settings import CriticSettings

# What the model says of a step: that all is right up to it, or not.
RIGHT, WRONG = "+", "-"

SYSTEM = """\
You are an advanced AI assistant, designed to serve as a process supervision model. In this task, \
I will provide a problem statement followed by the first step of the solution process. For each \
subsequent turn, I will give you a new step in the solution. Your role is to assess whether the \
solution process is correct up to the current step.

- In the **first round**, I will input the problem and the first step of the solution process.
- In **each subsequent round**, I will provide the next step in the solution.

For each step, you should:

- Respond with **"+"** if you believe the solution process is correct up to this step.
- Respond with **"-"** if you detect any issues or errors in the process up to this step.

Please note:
- Only respond with **"+"** or **"-"**. Do not provide any additional explanations, comments, or \
justifications.

Your task is to verify the accuracy and correctness of each step in the given solution process."""
"""The words that VisualPRM was trained with; they are part of its input's format."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What answers are judged about: a question, and the pictures and videos before it."""

    media: tuple[int | Video, ...]
    question: str
    gallery: Gallery


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of one answer: how likely each of its ``steps`` is right, none if it was too long to be read;
    and the tokens that were read, and found in the cache."""

    steps: list[float]
    tokens: int = 0
    cached: int = 0

    @property
    def score(self) -> float | None:
        """The mean of the steps'."""
        return sum(self.steps) / len(self.steps) if self.steps else None


@dataclasses.dataclass(frozen=True)
class Contest:
    """How the answers of a request are compared; a model that does so has a ``case``."""

    asked: BestOf
    critic: "Critic | None" = None
    case: Case | None = None


class Critic:
    """Judges answers once it is started. Belongs to one event loop."""

    def __init__(self, engine: EngineClient, settings: CriticSettings) -> None:
        self.engine = engine
        self._settings = settings
        self._prompts: PromptBuilder | None = None
        self._verdicts: tuple[int, int] = (0, 0)

    async def start(self) -> None:
        """Load the model. Raises Unavailable if its engine does not start, and TokenizerError where
        it cannot say what a critic has to say."""
        await self.engine.start()
        await asyncio.to_thread(self._load, await self.engine.wait_ready())

    def _load(self, ready: Ready) -> None:
        template = ready.prompt_format
        asked = self._settings.critic_system_prompt
        named = {"auto": SYSTEM, "checkpoint": template.system, "none": None}
        template = msgspec.structs.replace(template, system=named.get(asked, asked))
        tokenizer = Tokenizer.load(Path(self._settings.critic_model))
        tokens, context = ready.geometry.tokens_per_tile, ready.max_model_len
        prompts = PromptBuilder(tokenizer, template, tokens, context)
        self._verdicts = prompts.first_token(RIGHT), prompts.first_token(WRONG)
        self._prompts = prompts

    @property
    def prompts(self) -> PromptBuilder:
        """Raises Unavailable before it is started."""
        if self._prompts is None:
            raise _gone()
        return self._prompts

    @property
    def ready(self) -> Ready:
        """What there is to know of its engine, or of the last one while the next is loaded. Raises
        Unavailable where there is none and will be none."""
        ready = self.engine.ready
        if ready is None or self.engine.state not in ("ready", "starting"):
            raise _gone()
        return ready

    def sees_as(self, geometry: VisionGeometry) -> bool:
        """Whether its pictures are cut as those of another model."""
        return TileSettings.of(self.ready.geometry) == TileSettings.of(geometry) and (
            self.ready.geometry.tile_limit == geometry.tile_limit
        )

    def segments(self, conversation: Conversation, steps: Sequence[str]) -> list[Segment]:
        """The prompt in which every step but the last is followed by what was said of it; the last
        one too, but the turn is left open. Raises InvalidRequest and ContextTooLong."""
        media, question = question_of(conversation)
        return self._render(media, question, len(conversation.pictures), steps)

    def case(self, conversation: Conversation, gallery: Gallery) -> Case:
        """Raises InvalidRequest for a conversation that is no question, and ContextTooLong for one
        that leaves no room for an answer."""
        case = Case(*question_of(conversation), gallery)
        if self._prompt(case, [""]) is None:
            raise ContextTooLong(
                self.ready.max_model_len,
                "this is the critic's, and the question with its pictures is too long for it.",
                param="messages",
            )
        return case

    async def judge(
        self, asked: EngineRequest, case: Case, answers: Sequence[str]
    ) -> list[Verdict]:
        """Of each answer to the request ``asked``, in one forward pass for each that differs. The
        first goes alone: the others find in the cache what all begin with. Raises Unavailable."""
        texts = list(dict.fromkeys(answers))
        numbered = list(enumerate(texts))

        async def judged(answer: tuple[int, str]) -> Verdict:
            return await self._judge(asked, case, *answer)

        verdicts = [await judged(numbered[0])]
        verdicts += await few_at_a_time(judged, numbered[1:], len(numbered))
        found = dict(zip(texts, verdicts, strict=True))
        # What was read once is counted once.
        return [
            found[text] if text not in answers[:index] else Verdict(found[text].steps)
            for index, text in enumerate(answers)
        ]

    async def _judge(self, asked: EngineRequest, case: Case, number: int, text: str) -> Verdict:
        steps = steps_of(text, self._settings.critic_max_steps)
        prompt = await asyncio.to_thread(self._prompt, case, steps)
        if prompt is None:
            return Verdict([])
        lookup = Lookup(tuple(self.prompts.openings(prompt.ids)), self._verdicts)
        request = EngineRequest(
            id=f"{asked.id}-critic-{number}",
            prompt=prompt.ids,
            sampling=SamplingParams(temperature=0.0, max_tokens=1, lookup=lookup),
            items=prompt.items,
            cache_salt=asked.cache_salt,
            priority=asked.priority,
            tenant=asked.tenant,
            weight=asked.weight,
        )
        buffers = [picture.tiles for picture in prompt.buffers]
        try:
            async with contextlib.aclosing(self.engine.submit(request, buffers)) as outputs:
                async for output in outputs:
                    if output.prompt_logprobs is not None:
                        likely = [dict(found.top) for found in output.prompt_logprobs]
                        right, wrong = self._verdicts
                        scores = [_share(found[right], found[wrong]) for found in likely]
                        return Verdict(scores, len(prompt.ids), output.cached_tokens)
        except (EngineFailed, Unavailable):
            raise _gone() from None
        raise _gone()

    def _prompt(self, case: Case, steps: Sequence[str]) -> Prompt[TiledMedia] | None:
        """None if it does not fit in the critic's context."""
        pictures = case.gallery.pictures
        frames = [video.frames for video in case.gallery.videos]
        try:
            segments = self._render(case.media, case.question, len(pictures), steps)
        except ContextTooLong:
            return None
        prompt = self.prompts.build(segments, pictures, frames)
        return prompt if len(prompt.ids) < self.ready.max_model_len else None

    def _render(
        self, media: Sequence[int | Video], question: str, pictures: int, steps: Sequence[str]
    ) -> list[Segment]:
        first, *others = steps
        begin = ("### Question:\n", *media, f"{question}\n\n### Solution Process:\n{first}")
        said = Turn("assistant", (RIGHT,))
        turns = [Turn("user", begin), said]
        for step in others:
            turns += [Turn("user", (step,)), said]
        return self.prompts.render(turns, pictures, ending="continue")


def _gone() -> Unavailable:
    return Unavailable(
        "The critic cannot be asked now; 'logprob' and 'vote' do without it.",
        param="best_of.critic",
        retry_after=5,
    )


def _share(right: float, wrong: float) -> float:
    """Of the probability of two tokens that the first one has, by their log-probabilities."""
    return 1 / (1 + math.exp(min(wrong - right, 700.0)))


def question_of(conversation: Conversation) -> tuple[tuple[int | Video, ...], str]:
    """The pictures and videos of a conversation that is one question, and its text. Raises
    InvalidRequest for any other."""
    turns = [turn for turn in conversation.turns if turn.role != "system"]
    if len(turns) != 1 or turns[0].role != "user":
        raise InvalidRequest(
            "messages: the critic 'visualprm' judges answers to a single question: one message of "
            "the user, and system messages, which it does not read.",
            param="messages",
        )
    parts = turns[0].content
    media = tuple(part for part in parts if not isinstance(part, str))
    return media, "".join(part for part in parts if isinstance(part, str))


def steps_of(answer: str, most: int) -> list[str]:
    """The steps of an answer: what blank lines divide, at least one; of more than ``most`` as many
    neighbours are joined as it takes, the same number everywhere but at the end."""
    steps = [step for step in answer.strip().split("\n\n") if step.strip()] or [""]
    together = math.ceil(len(steps) / most)
    return ["\n\n".join(steps[at : at + together]) for at in range(0, len(steps), together)]
