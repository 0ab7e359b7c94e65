"""Our side of ``internvl verify``: the cases through engine and model, as a server computes them.

    python -m engine.verify SETTINGS_AS_JSON FOLDER

Says ``Ready`` on its standard output when the model is loaded, computes when a line comes on its
standard input, and leaves ``wire.cases.OURS`` in the folder.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.core import EngineCore
from engine.runner import ModelRunner
from model import CheckpointError, InternVL
from wire.cases import CASES, OURS, TOKENS, Case, Cases, positions
from wire.settings import EngineSettings


class Watched(ModelRunner):
    """A runner whose model can be listened to."""

    @property
    def model(self) -> InternVL:
        """What computes."""
        return self._model


def compute(settings: EngineSettings, runner: Watched, cases: list[Case]) -> dict[str, Tensor]:
    """fp32 logits ``[positions, vocab]`` of each case by its name, and its greedy tokens."""
    core, found = EngineCore(settings, runner, runner.ready()), {}
    for case in cases:
        print(f"ours: {case.name}", file=sys.stderr, flush=True)
        with _hidden_states(runner.model) as passes:
            core.add(case.request, case.buffers)
            tokens: list[int] = []
            while (report := core.step()) is not None:
                for output in report.outputs:
                    if output.finish_reason == "error":
                        raise RuntimeError(f"{case.name}: {output.error}")
                    tokens += output.token_ids
        prompt = torch.cat(passes)[: len(case.request.prompt)]
        with torch.inference_mode():
            logits = runner.model.logits(prompt[positions(len(prompt))])
        found[case.name] = logits.float().cpu().clone()
        found[case.name + TOKENS] = torch.tensor(tokens)
    return found


@contextmanager
def _hidden_states(model: InternVL) -> Iterator[list[Tensor]]:
    """Of every token that is computed meanwhile, pass by pass."""
    passes: list[Tensor] = []
    wanted: Tensor | None = None

    def leave_none_out(_: object, given: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal wanted
        *others, wanted = given
        return (*others, None)

    def keep(_: object, __: object, hidden: Tensor) -> Tensor:
        passes.append(hidden.clone())
        return hidden if wanted is None else hidden[wanted]

    hooks = model.register_forward_pre_hook(leave_none_out), model.register_forward_hook(keep)
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def main() -> int:
    """0, or 2 if the checkpoint cannot be served so."""
    settings = msgspec.json.decode(sys.argv[1], type=EngineSettings)
    folder = Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        runner = Watched(settings)
    except (CheckpointError, ValueError, torch.OutOfMemoryError) as error:
        print(f"this cannot be served: {error}", file=sys.stderr)
        return 2
    answers.write(msgspec.json.encode(runner.ready()) + b"\n")
    answers.flush()
    if not sys.stdin.readline():
        return 1
    given = msgspec.msgpack.decode((folder / CASES).read_bytes(), type=Cases)
    computed = [case for case in given.cases if case.computed]
    save_file(compute(settings, runner, computed), folder / OURS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
