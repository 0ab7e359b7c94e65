"""What a request demands of the form of its answer, as one grammar."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from server.chat import tools
from server.chat.grounding import boxes_grammar
from server.schemas.chat import ChatRequest, Tool
from server.schemas.generation import BoxesFormat, Generation
from server.tokenizer import Tokenizer
from wire.errors import InvalidRequest
from wire.grammar import rule
from wire.sampling import Grammar


@dataclasses.dataclass(frozen=True)
class Demand:
    """A grammar, and the field of the request that asks for it. ``parts`` are demands that it was
    put together from, any of which can be what is wrong with it."""

    field: str
    grammar: Grammar
    parts: "tuple[Demand, ...]" = ()


def demanded(request: Generation, tokenizer: Tokenizer) -> Demand | None:
    """The grammar of a request, if it has one. Raises InvalidRequest if it has two."""
    try:
        formats = list(_formats(request, tokenizer))
        demands = formats + list(_demands(request))
        if isinstance(request, ChatRequest):
            demands = _with_tools(request, formats, demands, tokenizer)
    except RecursionError:
        raise InvalidRequest("The request holds a JSON schema that is nested too deep.") from None
    if len(demands) > 1:
        first, second = demands[0].field, demands[1].field
        raise InvalidRequest(
            f"{first} and {second} both say what the answer must be; send one of them.",
            param=second,
        )
    return demands[0] if demands else None


def callable_tools(request: ChatRequest) -> list[Tool]:
    """The tools that may be called. Raises InvalidRequest where a choice has no such tool, and for
    a name that would end a call."""
    choice, offered = request.tool_choice, request.tools or []
    for number, tool in enumerate(offered):
        if tools.CALL_END in tool.function.name:
            where = f"tools[{number}].function.name"
            raise InvalidRequest(f"{where} must not hold the tag that ends a call.", param=where)
    if choice is None or choice.mode == "none":
        return [] if choice else offered
    if choice.mode == "required" and not offered:
        raise InvalidRequest("tool_choice demands a call, but there are no tools.", param="tools")
    if choice.names is None:
        return offered
    names = {tool.function.name for tool in offered}
    if not names.issuperset(choice.names) or not choice.names:
        raise InvalidRequest(
            "tool_choice must name functions that are among the tools.", param="tool_choice"
        )
    return [tool for tool in offered if tool.function.name in choice.names]


def _with_tools(
    request: ChatRequest, formats: list[Demand], demands: list[Demand], tokenizer: Tokenizer
) -> list[Demand]:
    """``demands``, ``formats`` among them, of an answer that may or must have calls. As OpenAI has
    it, a format is that of the text: where a call must be made there is none, and where one may be
    made the answer is either."""
    calls = list(_demanded_call(request, tokenizer))
    if calls:
        return [demand for demand in demands if demand not in formats] + calls
    if not demands:
        return list(_strict_tools(request, tokenizer))
    is_json = demands == formats and demands[0].grammar.kind.startswith("json_")
    if is_json and callable_tools(request):
        return [_either(request, demands[0], tokenizer)]
    return demands


def _either(request: ChatRequest, form: Demand, tokenizer: Tokenizer) -> Demand:
    text = tools.call_grammar(
        [tool.function for tool in callable_tools(request)],
        tokenizer,
        many=request.parallel_tool_calls is not False,
        answer=rule(form.grammar),
    )
    return Demand(form.field, Grammar("lark", text), (form, *_parts(request)))


def _formats(request: Generation, tokenizer: Tokenizer) -> Iterator[Demand]:
    form = request.response_format
    if form is not None and form.type == "json_object":
        yield Demand("response_format", Grammar("json_object"))
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise InvalidRequest(
                "response_format.json_schema is missing.",
                param="response_format.json_schema",
                code="missing_required_parameter",
            )
        schema, strict = form.json_schema.definition, form.json_schema.strict
        grammar = Grammar("json_object") if schema is None else _schema(schema, bool(strict))
        yield Demand("response_format.json_schema.schema", grammar)
    if form is not None and form.type == "internvl_boxes":
        boxes = form.internvl_boxes or BoxesFormat.model_validate({})
        text = boxes_grammar(tokenizer, boxes.labels, boxes.max_boxes)
        if text is None:
            raise InvalidRequest(
                "response_format.type: the served checkpoint has no tokens for boxes.",
                param="response_format.type",
                code="unsupported_parameter",
            )
        yield Demand("response_format", Grammar("lark", text))


def _demands(request: Generation) -> Iterator[Demand]:
    asked = request.structured_outputs
    if asked is not None:
        if asked.json_object:
            yield Demand("structured_outputs.json_object", Grammar("json_object"))
        yield from _constraints(
            "structured_outputs.", asked.definition, asked.regex, asked.choice, asked.grammar
        )
    yield from _constraints(
        "guided_",
        request.guided_json,
        request.guided_regex,
        request.guided_choice,
        request.guided_grammar,
    )


def _demanded_call(request: ChatRequest, tokenizer: Tokenizer) -> Iterator[Demand]:
    choice = request.tool_choice
    if choice is not None and choice.mode == "required":
        functions = [tool.function for tool in callable_tools(request)]
        many = not choice.single and request.parallel_tool_calls is not False
        text = tools.call_grammar(functions, tokenizer, many=many)
        yield Demand("tool_choice", Grammar("lark", text), _parts(request))


def _strict_tools(request: ChatRequest, tokenizer: Tokenizer) -> Iterator[Demand]:
    """That calls keep to their schemas, if there are any."""
    functions = [tool.function for tool in callable_tools(request)]
    text = tools.free_grammar(functions, tokenizer)
    if text is not None:
        yield Demand("tools", Grammar("lark", text), _parts(request))


def _parts(request: ChatRequest) -> "tuple[Demand, ...]":
    called = callable_tools(request)
    return tuple(
        Demand(
            f"tools[{number}].function.parameters",
            Grammar("lark", f"start: {tools.arguments_rule(tool.function)}"),
        )
        for number, tool in enumerate(request.tools or ())
        if tool in called
    )


def _constraints(
    prefix: str,
    schema: dict[str, Any] | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
) -> Iterator[Demand]:
    if schema is not None:
        yield Demand(f"{prefix}json", _schema(schema, True))
    if regex is not None:
        yield Demand(f"{prefix}regex", Grammar("regex", regex))
    if choice is not None:
        yield Demand(f"{prefix}choice", Grammar("choice", json.dumps(choice, ensure_ascii=False)))
    if grammar is not None:
        yield Demand(f"{prefix}grammar", Grammar("lark", grammar))


def _schema(schema: dict[str, Any], strict: bool) -> Grammar:
    return Grammar("json_schema", json.dumps(schema, ensure_ascii=False), strict)
