"""Boxes in what a model writes, ``<ref>label</ref><box>[[x1, y1, x2, y2], ...]</box>``, in
thousandths of a picture's width and height: how they are found, and the grammar of an answer of
nothing else.

The marks are tokens of their own. The visible text leaves them out, and what is only spelled like
one is text, so boxes are read from the tokens.
"""

import re
from collections.abc import Sequence

from server.schemas.answer import Box
from server.schemas.generation import MAX_LABEL_LENGTH
from server.tokenizer import Tokenizer
from wire.grammar import quote

REF, REF_END, BOX, BOX_END = MARKS = ("<ref>", "</ref>", "<box>", "</box>")
SCALE = 1000
"""Of the numbers: the right and the lower edge of every picture."""

# Bytes of a label, and of one box with its blanks, that are waited for: a reader takes up no more,
# whatever a model writes.
_LABEL, _LIST = 1024, 128
_NUMBER = rb"\s*(-?[0-9]{1,6}(?:\.[0-9]{1,6})?)\s*"
_FOUR = re.compile(rb"\[" + rb",".join([_NUMBER] * 4) + rb"\]")
_PICTURE = re.compile(rb"Image-([0-9]{1,5})")  # as the prompt names pictures
_PICTURE_LENGTH = len("Image-00000")


def boxes_grammar(
    tokenizer: Tokenizer, labels: Sequence[str] | None = None, most: int | None = None
) -> str | None:
    """The Lark grammar of one or more boxes, ``most`` at most, each list behind its label, spelled
    as models are taught. None if the checkpoint has no tokens for the marks."""
    found = {name: token for token, name in tokenizer.added.items()}
    if not found.keys() >= set(MARKS):
        return None
    ref, ref_end, box, box_end = (f"<[{found[mark]}]>" for mark in MARKS)
    more = {None: "next*", 1: ""}.get(most, f"next{{0,{(most or 1) - 1}}}")
    inner, outer = r"[^\x00-\x1f\x7f<>]", r"[^\x00-\x20\x7f<>]"
    label = f"/{outer}({inner}{{0,{MAX_LABEL_LENGTH - 2}}}{outer})?/"
    number = f"(0|[1-9][0-9]{{0,2}}|{SCALE})"
    return "\n".join(
        [
            f'start: first {more} "]" {box_end}',
            f'first: {ref} label {ref_end} {box} "[" FOUR',
            f'next: ", " FOUR | "]" {box_end} first',
            "label: " + (label if labels is None else " | ".join(map(quote, labels))),
            rf"FOUR: /\[{number}(, {number}){{3}}\]/",
        ]
    )


class BoxReader:
    """Finds boxes in tokens as they arrive. Four numbers in brackets are a box as soon as the
    bracket is closed; anything else between the marks is passed over. Time is linear, memory
    constant.

    ``sizes`` are width and height of the request's pictures. Which one a box is in is known if
    there is one only and no video (``alone``), or the request said which it is ``about``, or
    pictures are ``named`` in the prompt, as "Image-1" and so on, and the answer has mentioned one:
    the last one before the box.

    All its attributes are immutable: ``copy.copy`` makes an independent one that goes on from here.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sizes: Sequence[tuple[int, int]] = (),
        *,
        alone: bool = True,
        named: bool = False,
        about: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._marks = {token: name for token, name in tokenizer.added.items() if name in MARKS}
        self._sizes = tuple(sizes)
        self._picture = 0 if len(sizes) == 1 and alone else about
        self._named = named and self._picture is None
        self._inside = ""  # the mark that was opened, if any
        self._held = b""  # of a label or a list that has begun
        self._tail = b""  # of the text, where a picture's name may have begun
        self._label: str | None = None
        self._count = 0

    def skip(self, tokens: Sequence[int]) -> None:
        """Go through what an answer continues. Boxes in it are not reported."""
        self.push(tokens)
        self._count = 0

    def push(self, tokens: Sequence[int]) -> list[Box]:
        """The boxes that are complete with these tokens."""
        boxes: list[Box] = []
        if not (self._inside or self._named) and self._marks.keys().isdisjoint(tokens):
            return boxes  # as nearly always
        for token in tokens:
            mark = self._marks.get(token)
            if mark is not None:
                self._read_mark(mark)
                continue
            data = self._tokenizer.token_bytes(token)
            if self._inside == BOX:
                self._read_list(data, boxes)
            else:
                self._read_text(data)
        return boxes

    def _read_mark(self, mark: str) -> None:
        if mark == REF_END and self._inside == REF:
            self._label = self._held.strip().decode("utf-8", "replace") or None
        elif mark != BOX or self._inside == BOX:
            self._label = None  # it is for one list
        self._inside = mark if mark in (REF, BOX) else ""
        self._held = self._tail = b""

    def _read_text(self, data: bytes) -> None:
        if self._inside == REF:
            self._held += data
            if len(self._held) > _LABEL:
                self._inside, self._held = "", b""
        if self._named:
            self._tail += data
            for found in _PICTURE.finditer(self._tail):
                number = int(found[1])
                self._picture = number - 1 if 1 <= number <= len(self._sizes) else None
            self._tail = self._tail[-_PICTURE_LENGTH:]

    def _read_list(self, data: bytes, boxes: list[Box]) -> None:
        *closed, self._held = (self._held + data).split(b"]")
        for text in closed:
            at = text.rfind(b"[")
            if at < 0:  # the list itself is closed
                self._end_list()
                return
            found = _FOUR.fullmatch(text[at:] + b"]")
            if found:
                boxes.append(self._box(found.groups()))
        if len(self._held) > _LIST:
            self._end_list()

    def _end_list(self) -> None:
        self._inside, self._held, self._label = "", b"", None

    def _box(self, texts: Sequence[bytes]) -> Box:
        numbers = [float(text) if b"." in text else int(text) for text in texts]
        pixels = None
        if self._picture is not None:
            width, height = self._sizes[self._picture]
            x1, x2 = sorted(_pixel(numbers[i], width) for i in (0, 2))
            y1, y2 = sorted(_pixel(numbers[i], height) for i in (1, 3))
            pixels = [x1, y1, x2, y2]
        box = Box(self._count, self._label, numbers, pixels, self._picture)
        self._count += 1
        return box


def _pixel(number: float, size: int) -> int:
    return min(max(round(number * size / SCALE), 0), size)
