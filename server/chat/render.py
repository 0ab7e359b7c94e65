"""The prompt of a chat request as the engine would get it, without decoding a pixel: what stands
for pictures and videos is counted from their headers."""

from contextlib import suppress

import msgspec

from server.chat.detokenize import Detokenizer
from server.chat.preview import Sketch
from server.schemas.preview import PartRender, Render
from server.tokenizer import Tokenizer
from wire.errors import ContextTooLong


def prompt_ids(sketch: Sketch) -> list[int]:
    """All tokens, whether they fit or not. Slow: call it in a thread. Raises InvalidRequest for a
    budget that is too small."""
    fitter = sketch.fitter()
    views = fitter.asked()
    with suppress(ContextTooLong):
        views = fitter.fitted()
    return sketch.canvas.prompt(views).ids


def render(sketch: Sketch) -> Render:
    """Slow: call it in a thread. Raises InvalidRequest for a budget that is too small, and
    ContextTooLong where the parts cannot be made to fit beside the text and the answer."""
    views = sketch.fitter().fitted()
    prompt = sketch.canvas.prompt(views)
    parts, items = [], iter(prompt.items)
    for at in sketch.canvas.order:
        shown = [next(items) for _ in views[at].shots]
        told = msgspec.structs.asdict(sketch.part(at, views[at]))
        parts.append(PartRender(**told, spans=[(item.offset, item.length) for item in shown]))
    return Render(
        model=sketch.model.name,
        prompt=whole_text(sketch.model.tokenizer, prompt.ids),
        token_ids=prompt.ids,
        prompt_tokens=len(prompt.ids),
        max_model_len=sketch.canvas.context,
        parts=parts,
    )


def whole_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What these tokens say, with the names of special ones."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    return detokenizer.push(ids) + detokenizer.flush()
