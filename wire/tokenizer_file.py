"""A checkpoint's tokenizer.json, also where the checkpoint ships none."""

import logging
import subprocess
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

CONVERT_TIMEOUT = 300.0


class TokenizerError(Exception):
    """The checkpoint's tokenizer cannot be used; the message is for the operator."""


def read_tokenizer_json(folder: Path) -> str:
    """The text of a tokenizer.json. Slow where it must be made. Raises TokenizerError, OSError."""
    file = folder / "tokenizer.json"
    return file.read_text(encoding="utf-8") if file.exists() else _convert(folder)


def _convert(folder: Path) -> str:
    """tokenizer.json of a checkpoint that ships none.

    In a process of its own: transformers loads torch along the way, and no converter's memory
    stays.
    """
    if (folder / "vocab.json").exists():
        command = [sys.executable, "-c", _CONVERTER, str(folder)]
    elif (folder / "tokenizer.model").exists():
        command = [sys.executable, "-m", "wire.spm", str(folder)]
    else:
        raise TokenizerError(f"{folder} has no tokenizer")
    logger.info("no tokenizer.json in the checkpoint; converting its tokenizer")
    try:
        done = subprocess.run(
            command, capture_output=True, check=True, text=True, timeout=CONVERT_TIMEOUT
        )
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise TokenizerError(
            f"{folder} has no tokenizer.json and its tokenizer cannot be converted: {reason[0]}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise TokenizerError(
            f"{folder} has no tokenizer.json and its tokenizer cannot be converted within "
            f"{CONVERT_TIMEOUT:g} seconds"
        ) from error
    return done.stdout


_CONVERTER = """
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], use_fast=True, local_files_only=True)
sys.stdout.write(tokenizer.backend_tokenizer.to_str())
"""
