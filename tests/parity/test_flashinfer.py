"""FlashInfer's wrapper, on the CPU with a module that does what the library documents: what it is
told of rows and pages, that it is tried and asked for by name, and when it plans."""

import dataclasses
import logging
import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import choose
from model.attention.flashinfer import FlashInferAttention
from model.schema import TextConfig
from tests.parity.test_attention import BATCHES, config, expected_and_found, written_out

CPU = torch.device("cpu")


class BatchPrefillWithPagedKVCacheWrapper:
    """As flashinfer.ai documents it, in float64; and strict where it only says what it wants."""

    shift = 0
    group = 8
    log: list[str]

    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert float_workspace_buffer.nbytes >= 128 << 20
        assert not use_cuda_graph
        self.layout, self.planned = kv_layout, False

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        q_data_type: torch.dtype = torch.float16,
    ) -> None:
        self.log.append("plan")
        numbers = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        for part in numbers:
            assert part.dtype == torch.int32
            assert part.ndim == 1
            assert part.is_contiguous()
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert qo_indptr[0] == paged_kv_indptr[0] == 0
        assert paged_kv_indptr[-1] == len(paged_kv_indices)
        assert bool((qo_indptr.diff() > 0).all())
        assert bool((paged_kv_indptr.diff() > 0).all())
        assert bool((paged_kv_last_page_len >= 1).all())
        assert bool((paged_kv_last_page_len <= page_size).all())
        assert num_qo_heads % num_kv_heads == 0
        if num_qo_heads // num_kv_heads > self.group:
            raise RuntimeError("nvcc: no such group\nand more")
        self.numbers, self.causal, self.dtype = numbers, causal, q_data_type
        self.shapes = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self.planned = True

    def run(self, q: Tensor, paged_kv_cache: Tensor) -> Tensor:
        self.log.append("run")
        assert self.planned
        assert self.layout == "HND"
        heads, kv_heads, head_dim, page_size = self.shapes
        queries, pages, indices, last = self.numbers
        assert q.shape == (queries[-1], heads, head_dim)
        assert paged_kv_cache.shape[1:] == (2, kv_heads, page_size, head_dim)
        assert q.dtype == paged_kv_cache.dtype == self.dtype
        assert q.is_contiguous()
        assert paged_kv_cache.is_contiguous()
        assert self.causal, "only what is asked for"
        rows = []
        for row in range(len(last)):
            mine = paged_kv_cache[indices[pages[row] : pages[row + 1]].long()]
            length = (len(mine) - 1) * page_size + int(last[row])
            key, value = mine.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
            new = q[queries[row] : queries[row + 1]]
            rows.append(written_out(new, key.roll(self.shift, 0), value))
        return torch.cat(rows).to(q.dtype)


def wide(heads: int, kv_heads: int, head_dim: int = 64) -> TextConfig:
    return dataclasses.replace(config(heads, kv_heads), head_dim=head_dim)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType("flashinfer")
    wrapper = type("Wrapper", (BatchPrefillWithPagedKVCacheWrapper,), {"log": []})
    module.BatchPrefillWithPagedKVCacheWrapper = wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(FlashInferAttention, "devices", ("cpu",))
    return wrapper


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (7, 1), (5, 1), (12, 2)])
@pytest.mark.usefixtures("library")
def test_attention_equals_the_formula(rows: str, heads: int, kv_heads: int) -> None:
    backend = FlashInferAttention(wide(heads, kv_heads))
    assert backend.supports(CPU, torch.bfloat16, 16) is None
    asked = BATCHES[rows]
    expected, found = expected_and_found(backend, asked, 16, torch.float32, free_blocks=math.nan)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_every_block_size_is_tried_as_it_is(block_size: int) -> None:
    backend = FlashInferAttention(wide(4, 2, 128))
    assert backend.supports(CPU, torch.float16, block_size) is None
    rows = BATCHES["everything at once"]
    expected, found = expected_and_found(backend, rows, block_size, torch.float16)
    torch.testing.assert_close(found, expected, atol=4e-3, rtol=0)


def test_a_step_is_planned_once_and_never_before_the_last_plan_is_copied(library: Any) -> None:
    backend = FlashInferAttention(wide(4, 2))
    assert backend.supports(CPU, torch.bfloat16, 16) is None
    library.log.clear()
    # A step that is computed while the next is planned: its numbers are still to be copied.
    backend._planned = types.SimpleNamespace(  # type: ignore[assignment]
        synchronize=lambda: library.log.append("copied")
    )
    expected_and_found(backend, [(2, 2), (1, 1)], 16, torch.float32)
    assert library.log == ["copied", "plan", "run"]


@pytest.mark.usefixtures("library")
def test_it_is_chosen_by_its_name_alone(caplog: pytest.LogCaptureFixture) -> None:
    chosen = choose("flashinfer", wide(4, 2), CPU, torch.bfloat16, 64)
    assert isinstance(chosen, FlashInferAttention)
    assert not chosen.graph_safe
    with caplog.at_level(logging.DEBUG):
        assert choose("auto", wide(4, 2), CPU, torch.bfloat16, 64).name != "flashinfer"
    assert "flashinfer" not in caplog.text


def test_what_it_cannot_do_is_refused_with_the_reason(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(text: TextConfig, dtype: torch.dtype = torch.bfloat16) -> str:
        with pytest.raises(ValueError, match="flashinfer: ") as refused:
            choose("flashinfer", text, CPU, dtype, 64)
        return str(refused.value).partition("flashinfer: ")[2]

    assert refusal(wide(4, 2, 80)) == "it knows no heads of 80"
    assert refusal(wide(4, 2), torch.float32) == "it does not compute in torch.float32"
    assert refusal(wide(9, 1)) == "it fails here (nvcc: no such group)"
    library.shift = 1
    assert "it is wrong by" in refusal(wide(4, 2))
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert "it is not installed" in refusal(wide(4, 2))
    monkeypatch.setattr(FlashInferAttention, "devices", ("cuda",))
    assert refusal(wide(4, 2)) == "it needs cuda"
