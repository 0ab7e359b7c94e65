"""tokenizer.json of a SentencePiece model, for checkpoints (InternLM2's and InternLM3's) that ship
nothing else and would have their own code run to read it.

Run as a program, with the checkpoint's folder: the result goes to standard output.
"""

import base64
import json
import sys
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as spm

SPACE = "\u2581"
_BPE = 2
_NORMAL = 1


def convert(folder: Path) -> dict[str, Any]:
    """The content of a tokenizer.json for ``folder``'s tokenizer.model.

    Raises ValueError for a model of another kind than byte-pair encoding, OSError.
    """
    model = spm.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    if model.trainer_spec.model_type != _BPE:
        raise ValueError("tokenizer.model is not of byte-pair encoding")
    settings = _read(folder / "tokenizer_config.json")
    added = _added(folder, settings)
    pieces = [piece.piece for piece in model.pieces]
    for number, token in added.items():
        if number < len(pieces):  # the checkpoint's name for it, of two that differ
            pieces[number] = token["content"]
    unknown = model.trainer_spec.unk_id
    dummy = model.normalizer_spec.add_dummy_prefix
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if dummy:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "added_tokens": [_token(number, token) for number, token in sorted(added.items())],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model.normalizer_spec)},
        "pre_tokenizer": None,
        "post_processor": _begin(pieces, model.trainer_spec.bos_id, settings),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": _merges(model),
            "unk_token": pieces[unknown],
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
        },
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _added(folder: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The tokens beside the model's, by id; older folders list them in files of their own."""
    found = {
        int(number): token for number, token in settings.get("added_tokens_decoder", {}).items()
    }
    if found:
        return found
    special = _read(folder / "special_tokens_map.json")
    names = {_name(value) for value in special.values() if not isinstance(value, list)}
    names |= {_name(value) for value in special.get("additional_special_tokens", ())}
    listed = _read(folder / "added_tokens.json")
    return {number: {"content": name, "special": name in names} for name, number in listed.items()}


def _name(value: Any) -> str:
    return value["content"] if isinstance(value, dict) else str(value)


def _token(number: int, token: dict[str, Any]) -> dict[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": number, "content": token["content"]} | {
        flag: bool(token.get(flag, False)) for flag in flags
    }


def _normalizers(spec: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        # The library goes by graphemes: what stands under an accent may be left as it is.
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        for pattern, content in ((r"\A +| +\z", ""), (" {2,}", " ")):
            steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def _begin(pieces: list[str], bos: int, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What puts the beginning of a text before it, unless the checkpoint does without."""
    if bos < 0 or not settings.get("add_bos_token", True):
        return None
    first = {"SpecialToken": {"id": pieces[bos], "type_id": 0}}
    single, pair = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, single],
        "pair": [first, single, first, pair],
        "special_tokens": {pieces[bos]: {"id": pieces[bos], "ids": [bos], "tokens": [pieces[bos]]}},
    }


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, pieces with the highest score first."""
    numbers = {p.piece: n for n, p in enumerate(model.pieces) if p.type == _NORMAL}
    found = []
    for piece, number in numbers.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in numbers and right in numbers:
                rank = -model.pieces[number].score
                found.append((rank, numbers[left], numbers[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


if __name__ == "__main__":
    json.dump(convert(Path(sys.argv[1])), sys.stdout)
