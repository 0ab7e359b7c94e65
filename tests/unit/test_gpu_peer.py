"""What a GPU's host is carried, and the comparison there, with a peer that is this server."""

import dataclasses
import json
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from benchmarks.cases import gpu_cases
from benchmarks.gpu import beside, carry
from benchmarks.gpu.beside import engine_alone
from benchmarks.gpu.checkpoint import make_peers_checkpoint
from benchmarks.gpu.offline import CASES
from benchmarks.table import DEFAULT, MARKS, TUNED, marks
from server.bench.client import Case
from tests.checkpoints import Shape
from tests.servers import ROOT

CODE, PTX = 2, 1


def entry(kind: int, architecture: int, content: bytes) -> bytes:
    header = struct.pack("<HHIQIIHHI", kind, 0, 64, len(content), 0, 0, 0, 0, architecture)
    return header.ljust(64, b"\xee") + content


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_code_for_other_gpus_is_zeros() -> None:
    chance = struct.pack("<IHHQ", 0xBA55ED50, 7, 16, 24) + bytes(range(24))
    library = b"head" + chance
    for content in (b"90 code" * 3, b"90 more"):
        library += container(
            entry(CODE, 80, b"80 code!"), entry(CODE, 90, content), entry(PTX, 90, b"90 ptx")
        )
    library += b"tail"
    packed = carry.only_for(library, 90)
    assert packed == library.replace(b"80 code!", bytes(8)).replace(b"90 ptx", bytes(6))
    assert carry.only_for(library, 80).count(b"80 code!") == 2
    assert b"90" not in carry.only_for(library, 80)


def test_each_environment_sees_its_own_packages_first(tmp_path: Path) -> None:
    for room in ("common", "ours", "vllm"):
        folder = tmp_path / "made" / "site" / room
        folder.mkdir(parents=True)
        (folder / f"only_{room}.py").touch()
        # The host has a package of this name too.
        (folder / "msgspec.py").write_text(f"where = {room!r}")
    packed = tmp_path / "packed.tar.xz"
    with tarfile.open(packed, "w:xz") as archive:
        archive.add(tmp_path / "made" / "site", "site")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    carry.unpack(packed, tmp_path / "there", here)
    with pytest.raises(RuntimeError, match=rf"packed for Python 2\.7, and this is {here}"):
        carry.unpack(packed, tmp_path / "nowhere", "2.7")
    for room, other in (("ours", "vllm"), ("vllm", "ours")):
        python = str(tmp_path / "there" / room / "bin" / "python")
        program = (
            f"import msgspec, only_common, only_{room}, torch\n"
            f"print(msgspec.where, torch.__version__)\nimport only_{other}"
        )
        said = subprocess.run(
            [python, "-I", "-c", program], capture_output=True, text=True, check=False
        )
        assert said.stdout.split() == [room, torch.__version__]
        assert f"No module named 'only_{other}'" in said.stderr


def test_videos_can_be_imported_without_their_library(tmp_path: Path) -> None:
    """Decode workers read them by PyAV, which is not carried."""
    (tmp_path / "av.py").write_bytes((ROOT / "benchmarks/gpu/absent_av.py").read_bytes())
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "import av, preprocessing.worker\n"
        "print(av.__file__)"
    )
    said = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == str(tmp_path / "av.py")


def test_kernels_tests_want_no_package_of_the_others() -> None:
    """As on a GPU's host, where few of what tests use is installed."""
    program = (
        "import pytest, sys\n"
        "names = 'openai', 'trustme', 'httpx2', 'anthropic', 'playwright'\n"
        "sys.modules.update(dict.fromkeys(names))\n"
        "from benchmarks.gpu.ours import kernel_tests\n"
        "sys.exit(pytest.main([*kernel_tests(), '--collect-only', '-p', 'no:asyncio', '-n', '0']))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert "test_paged_attention.py" in said.stdout


def test_every_mark_is_of_a_case_that_is_sent() -> None:
    named = {case.name for shape in ("8B", "1B") for case in gpu_cases(shape)}
    for peer in (DEFAULT, TUNED):
        mine = [mark for mark in MARKS if mark.applies(peer)]
        assert marks(peer)
        assert {mark.case for mark in mine} <= named
        assert len({(mark.case, mark.metric) for mark in mine}) == len(mine)


SHAPE = Shape(image_size=56, tile_size=56, vocab=1200, positions=4096)


def test_a_checkpoint_is_whole_to_others(tmp_path: Path) -> None:
    for format in ("hf", "chat"):
        folder = make_peers_checkpoint(tmp_path / format, SHAPE, format, "cpu")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.decode([1130]) == "~1130"
        assert tokenizer.convert_tokens_to_ids("<video>") == len(tokenizer) - 1 == 1199
        assert tokenizer.model_max_length == SHAPE.positions
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert config.get_text_config().num_hidden_layers == SHAPE.layers
        assert config.vision_config.hidden_size == SHAPE.vision_size
        processor = json.loads((folder / "preprocessor_config.json").read_text())
        assert processor["size"] in (56, {"height": 56, "width": 56})
        if format == "hf":
            assert config.image_token_id == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")


def small_cases(shape: str) -> list[Case]:
    return [
        dataclasses.replace(case, output_tokens=4, picture=case.picture // 24, height=126)
        if case.picture
        else dataclasses.replace(case, output_tokens=4, input_tokens=64)
        for case in gpu_cases(shape)
    ]


# In place of a Python with vLLM: the same command line, by this server. The tuned one breaks down,
# and so does its engine alone.
PEER = """#!/bin/sh
case "$*" in *api-server-count* | *offline*) echo "no GPU" >&2; exit 3;; esac
[ "$2" = vllm.entrypoints.cli.main ] || exit 4
exec {python} -m server --model "$4" --port "$8" --device cpu
"""


def test_the_comparison_goes_on_without_a_server_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_peers_checkpoint(tmp_path / "8B-chat", SHAPE, "chat", "cpu")
    python = tmp_path / "python"
    python.write_text(PEER.format(python=sys.executable))
    python.chmod(0o755)
    out = tmp_path / "result.json"
    words = f"--out {out} --vllm {python} --work {tmp_path} --logs {tmp_path} --device cpu"
    chosen = "--cases text-c1 12mp-c1 --requests 1 --seed 3 --rounds 1"
    monkeypatch.setattr("benchmarks.gpu.beside.gpu_cases", small_cases)
    monkeypatch.setattr("benchmarks.gpu.beside.engine_alone", alone)
    beside.main([*words.split(), *chosen.split()])
    found = json.loads(out.read_text())
    records = {(entry["server"], entry["case"]): entry for entry in found["records"]}
    assert "vllm-tuned did not get ready; see vllm-tuned.log" in records[TUNED, "start"]["error"]
    assert "no GPU" in (tmp_path / "vllm-tuned.log").read_text()
    for case in ("8B-text-c1", "8B-12mp-c1"):
        ours, theirs = records["ours", case], records[DEFAULT, case]
        assert ours["output_tokens"] == theirs["output_tokens"] > 0
        # This peer adds the system sentence, which a fair one does not.
        assert 0 < theirs["prompt_tokens"] - ours["prompt_tokens"] < 200
    said = capsys.readouterr().out
    assert "≥ 1 " in said
    assert "8B-text-c1: the servers were sent different numbers of tokens" in said
    assert str(tmp_path) not in out.read_text()
    assert found["engines"]["ours"].keys() == {f"{case}, 1 at once" for case in CASES}
    assert "see vllm-alone.log" in found["engines"]["vllm"]["error"]


def alone(python: Path, checkpoint: Path, *flags: str, log: Path) -> dict[str, float]:
    """With answers of two tokens, one request at a time."""
    return engine_alone(python, checkpoint, *flags, "--tokens", "2", "--counts", "1", log=log)
