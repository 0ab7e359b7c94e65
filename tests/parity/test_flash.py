"""Attention through a library's kernel for rows of different lengths, on the CPU with a module that
does what the library documents: the gathering, the bounds of rows, the choice and its reasons."""

import logging
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import choose
from model.attention.flash import Fa3Attention, FlashAttention, FlashAttnAttention
from model.attention.sdpa import SdpaAttention
from tests.parity.test_attention import BATCHES, config, expected_and_found, written_out

CPU = torch.device("cpu")
MODULES = {Fa3Attention: "flash_attn_interface", FlashAttnAttention: "flash_attn"}


class Library:
    """``flash_attn_varlen_func`` as the FlashAttention project documents it, in float64."""

    def __init__(self, shift: int = 0, pair: bool = False) -> None:
        self.calls: list[tuple[int, int]] = []  # queries and keys
        self.shift, self.pair = shift, pair

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        causal: bool = False,
    ) -> Any:
        assert causal
        for starts, part, longest in (
            (cu_seqlens_q, q, max_seqlen_q),
            (cu_seqlens_k, k, max_seqlen_k),
        ):
            assert starts.dtype == torch.int32
            assert int(starts[-1]) == len(part)
            assert int(starts.diff().max()) == longest
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        self.calls.append((len(q), len(k)))
        rows = []
        for row in range(len(cu_seqlens_q) - 1):
            queries = q[cu_seqlens_q[row] : cu_seqlens_q[row + 1]]
            seen = slice(int(cu_seqlens_k[row]), int(cu_seqlens_k[row + 1]))
            rows.append(written_out(queries, k[seen].roll(self.shift, 0), v[seen]))
        mixed = torch.cat(rows).to(q.dtype)
        return (mixed, None) if self.pair else mixed


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlashAttention, "devices", ("cpu",))
    for name in MODULES.values():
        monkeypatch.setitem(sys.modules, name, None)


def install(monkeypatch: pytest.MonkeyPatch, name: str, library: Library) -> Library:
    module = types.ModuleType(name)
    module.flash_attn_varlen_func = library.flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return library


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (7, 1), (6, 2)])
def test_attention_equals_the_formula(
    monkeypatch: pytest.MonkeyPatch,
    kind: type[FlashAttention],
    rows: str,
    heads: int,
    kv_heads: int,
) -> None:
    library = install(monkeypatch, MODULES[kind], Library(pair=kind is Fa3Attention))
    backend = kind(config(heads, kv_heads))
    assert backend.supports(CPU, torch.bfloat16, 64) is None
    library.calls.clear()
    expected, found = expected_and_found(backend, BATCHES[rows], 16, torch.float32)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert bool(library.calls) == any(new > 1 for new, _ in BATCHES[rows])


def test_keys_are_gathered_for_few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.attention.flash._GATHERED", 50)
    library = install(monkeypatch, "flash_attn", Library())
    backend = FlashAttnAttention(config(4, 2))
    assert backend.supports(CPU, torch.bfloat16, 64) is None
    library.calls.clear()
    rows = [(2, 20), (3, 30), (2, 40), (2, 15), (1, 9), (2, 70), (2, 3), (40, 40), (60, 60)]
    expected, found = expected_and_found(backend, rows, 16, torch.float32)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    # Of the rows that begin in this step nothing is gathered. The first call wrote no older keys.
    assert library.calls[-6:] == [(100, 100), (5, 50), (2, 40), (2, 15), (2, 70), (2, 3)]


def test_auto_takes_the_first_that_computes_what_it_should(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, "flash_attn_interface", Library(shift=1))
    install(monkeypatch, "flash_attn", Library())
    with caplog.at_level(logging.DEBUG):
        chosen = choose("auto", config(4, 2), CPU, torch.bfloat16, 64)
    assert isinstance(chosen, FlashAttnAttention)
    assert chosen.name.startswith("flash_attn+")
    assert "fa3: it is wrong by" in caplog.text


def test_a_library_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    error: Exception = RuntimeError("no kernel image is available\nmore")

    backend = FlashAttnAttention(config(4, 2))
    assert "not installed" in str(backend.supports(CPU, torch.bfloat16, 64))
    library = install(monkeypatch, "flash_attn", Library())
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", fails)
    reason = backend.supports(CPU, torch.bfloat16, 64)
    assert reason == "it fails here (no kernel image is available)"
    error = AssertionError("only for Hopper")
    assert backend.supports(CPU, torch.bfloat16, 64) == "it fails here (only for Hopper)"
    assert "float32" in str(backend.supports(CPU, torch.float32, 64))
    monkeypatch.setattr(FlashAttention, "devices", ("cuda",))
    assert backend.supports(CPU, torch.bfloat16, 64) == "it needs cuda"
    assert not library.calls
    with pytest.raises(ValueError, match="flash_attn: it needs cuda"):
        choose("flash_attn", config(4, 2), CPU, torch.bfloat16, 64)


def test_what_always_works_is_the_last_choice() -> None:
    assert isinstance(choose("auto", config(4, 2), CPU, torch.float32, 64), SdpaAttention)
    # torch's own kernel exists for CUDA only; trying it on the CPU ends in the next choice.
    assert isinstance(choose("auto", config(4, 2), CPU, torch.bfloat16, 64), SdpaAttention)


def test_torch_has_the_kernel_that_is_called() -> None:
    schema = torch.ops.aten._flash_attention_forward.default._schema
    assert [(a.name, str(a.type)) for a in schema.arguments[:10]] == [
        ("query", "Tensor"),
        ("key", "Tensor"),
        ("value", "Tensor"),
        ("cum_seq_q", "Optional[Tensor]"),
        ("cum_seq_k", "Optional[Tensor]"),
        ("max_q", "int"),
        ("max_k", "int"),
        ("dropout_p", "float"),
        ("is_causal", "bool"),
        ("return_debug_mask", "bool"),
    ]
    assert all(a.has_default_value() for a in schema.arguments[10:])
