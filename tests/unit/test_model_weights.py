"""Loading: strict about names and shapes, streamed, safetensors only."""

import ctypes
import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import CheckpointError, InternVL, build_model, count_parameters, load_config
from tests.checkpoints import SIX_B_LIKE, Shape, Tensors, make_checkpoint

BODY = "model.language_model."


def load(folder: Path, dtype: torch.dtype = torch.float32) -> InternVL:
    return build_model(load_config(folder), folder, device=torch.device("cpu"), dtype=dtype)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        load(folder)
    return str(raised.value)


def drop(key: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[key]

    return change


def put(key: str, *shape: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[key] = torch.zeros(shape)

    return change


@pytest.mark.parametrize("shape", [Shape(), SIX_B_LIKE], ids=["300M-like", "6B-like"])
@pytest.mark.parametrize("format", ["hf", "chat"])
def test_every_parameter_is_filled(tmp_path: Path, format: str, shape: Shape) -> None:
    folder = make_checkpoint(tmp_path, format=format, shape=shape)
    model = load(folder, torch.bfloat16)
    parameters = list(model.parameters())
    assert all(p.device.type == "cpu" and p.dtype == torch.bfloat16 for p in parameters)
    assert not any(p.requires_grad for p in parameters)
    stored = sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    assert model.parameter_count == stored == count_parameters(load_config(folder))


def test_progress_counts_up_to_the_whole(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    seen: list[tuple[int, int]] = []
    build_model(
        load_config(folder),
        folder,
        device=torch.device("cpu"),
        dtype=torch.float32,
        progress=lambda done, total: seen.append((done, total)),
    )
    done = [pair[0] for pair in seen]
    assert done == sorted(done)
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == 4 * count_parameters(load_config(folder))


def test_what_is_missing_unexpected_or_misshapen_is_listed(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors[BODY + "norm.weight"]
        tensors[BODY + "norm.weight2"] = torch.zeros(3)
        key = BODY + "layers.1.self_attn.k_proj.weight"
        tensors[key] = tensors[key][:-1].contiguous()

    message = refusal(make_checkpoint(tmp_path, change=change))
    assert f"missing (1): {BODY}norm.weight;" in message
    assert f"unexpected (1): {BODY}norm.weight2" in message
    assert "layers.1.self_attn.k_proj.weight is [31, 64] instead of [32, 64]" in message


def test_long_lists_are_cut(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for index in range(20):
            tensors[f"extra.{index}"] = torch.zeros(1)

    message = refusal(make_checkpoint(tmp_path, change=change))
    assert "unexpected (20):" in message
    assert "and 12 more" in message


@pytest.mark.parametrize(
    "key",
    [
        "x." + BODY + "norm.weight",
        BODY + "norm.weight.x",
        BODY + "layers.0.self_attn.lora.q_proj.weight",
        "model.vision_tower.encoder.layers.0.lambda_1",
        "language_model.model.norm.weight",
    ],
)
def test_a_key_that_only_contains_a_known_one_is_unexpected(tmp_path: Path, key: str) -> None:
    assert "unexpected" in refusal(make_checkpoint(tmp_path, change=put(key, 64)))


@pytest.mark.parametrize(
    "key",
    [
        BODY + "layers.0.self_attn.rotary_emb.inv_freq",
        BODY + "rotary_emb.inv_freq",
        "model.vision_tower.layernorm.weight",
        "model.vision_tower.embeddings.mask_token",
    ],
)
def test_keys_that_are_not_needed_may_be_there(tmp_path: Path, key: str) -> None:
    load(make_checkpoint(tmp_path, change=put(key, 8)))


def test_layers_above_the_selected_one_are_not_loaded(tmp_path: Path) -> None:
    for format in ("hf", "chat"):
        shape = Shape(vision_layers=4, select_layer=-3)
        model = load(make_checkpoint(tmp_path / format, format=format, shape=shape))
        assert len(model.vision.layers) == 2


@pytest.mark.parametrize("format", ["hf", "chat"])
@pytest.mark.parametrize("flag", [True, None])
def test_a_stored_head_wins_over_the_tie_flag(
    tmp_path: Path, format: str, flag: bool | None
) -> None:
    folder = make_checkpoint(tmp_path, format=format, config={"tie_word_embeddings": flag})
    model = load(folder)
    assert model.decoder.head is not None
    assert not torch.equal(model.decoder.head.weight, model.decoder.embedding.weight)


def test_a_missing_head_is_the_embedding_only_where_the_config_ties(tmp_path: Path) -> None:
    tied = load(make_checkpoint(tmp_path / "tied", shape=Shape(tied=True)))
    assert tied.decoder.head is None
    hidden = torch.randn(2, 64)
    assert torch.equal(tied.logits(hidden), hidden @ tied.decoder.embedding.weight.T)
    folder = make_checkpoint(tmp_path / "untied", change=drop("lm_head.weight"))
    assert "missing (1): lm_head.weight" in refusal(folder)


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    whole = load(make_checkpoint(tmp_path / "whole"))
    sharded = load(make_checkpoint(tmp_path / "sharded", shards=4))
    for (name, a), (_, b) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors does not exist" in refusal(folder)


def test_an_index_that_promises_more_than_the_files_hold_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    assert "ghost" in refusal(folder)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "a", shards=2)
    make_checkpoint(tmp_path / "b")
    index = {"weight_map": {"x": "../b/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is elsewhere" in refusal(folder)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "refused because loading them can run code" in refusal(folder)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "model.safetensors cannot be read" in refusal(folder)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    key = BODY + "layers.0.mlp.up_proj.weight"
    tensors[key] = tensors[key].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    message = refusal(folder)
    assert "has type I8" in message
    assert "which config.json does not account for" in message


def test_keys_of_another_format_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "chat", format="chat")
    other = make_checkpoint(tmp_path / "hf")
    (other / "model.safetensors").replace(folder / "model.safetensors")
    assert "language_model.model.embed_tokens.weight" in refusal(folder)


def test_loading_takes_no_more_memory_than_the_weights_and_one_file(tmp_path: Path) -> None:
    shape = Shape(size=512, mlp=2048, layers=12, head_dim=64, heads=8)
    folder = make_checkpoint(tmp_path, shape=shape, shards=6, dtype=torch.bfloat16)
    largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    seen = []

    def anonymous() -> int:
        """Bytes of this process that are in no file."""
        status = Path("/proc/self/status").read_text("ascii")
        return next(int(row.split()[1]) << 10 for row in status.splitlines() if "RssAnon" in row)

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or it is freed memory that is taken
    before = anonymous()
    model = build_model(
        load_config(folder),
        folder,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        progress=lambda done, total: seen.append(anonymous() - before),
    )
    weights = model.parameter_count * 2
    assert weights > 2 * largest > 10 << 20
    assert max(seen) < weights + largest
