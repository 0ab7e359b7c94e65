"""What transformers makes of a conversation before the model sees it: tiles by its image processor
(the one on Pillow, which needs no torchvision), and the prompt as one text.

Native checkpoints have a processor and a chat template; for original ones the text is put together
as the ``chat`` of their own code does, which is not run.
"""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from wire.cases import Case, Picture
from wire.tokenizer_file import read_tokenizer_json

Grid = tuple[int, int]

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# The original checkpoints' conversations (conversation.py in their repository): the system
# sentence, and what follows the end of a turn. Said once more: a wrong word in ``model`` is seen.
_INTERNVL = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
    "联合开发的多模态大语言模型。"
)
_EARLY = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_CONVERSATIONS = {
    "internvl2_5": (_INTERNVL, "\n"),
    "Hermes-2": (_EARLY, ""),
    "internlm2-chat": (_EARLY, ""),
}
# What the native checkpoints' template does, for folders without one.
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\\n' }}{% elif content['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Official:
    """For the checkpoint in a folder. ``most`` bounds the tiles of a picture; 0: the checkpoint's
    own number. ``notes`` say where transformers could not be asked."""

    def __init__(self, folder: Path, most: int) -> None:
        values = json.loads((folder / "config.json").read_text("utf-8"))
        self.notes: list[str] = []
        self._values = values
        self._chat = "llm_config" in values
        self._tokenizer = self._load_tokenizer(folder)
        if self._chat:
            side = values.get("force_image_size") or values["vision_config"]["image_size"]
            dynamic = values.get("dynamic_image_size", False)
            low, high = values.get("min_dynamic_patch", 1), values.get("max_dynamic_patch", 6)
            self._thumbnail = values.get("use_thumbnail", False)
            self._processor = GotOcr2ImageProcessorPil(
                size={"height": side, "width": side},
                min_patches=low if dynamic else 1,
                max_patches=high if dynamic else 1,
                **_IMAGENET,
            )
        else:
            self._thumbnail = True
            self._processor = GotOcr2ImageProcessorPil(**_image_processor(folder, values))
        patch = values["vision_config"].get("patch_size", 14)
        patch = patch[0] if isinstance(patch, list) else patch
        across = self._processor.size.height // patch * values.get("downsample_ratio", 0.5)
        self._per_tile = int(across) ** 2
        own = self._processor.max_patches
        self._most = min(own, most or own)

    @property
    def image_token(self) -> int:
        """The id that stands for a part of a picture."""
        found: int = self._tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        return found

    def tiles(self, picture: Picture, *, frame: bool) -> tuple[Tensor, Grid]:
        """uint8 ``[T, 3, side, side]``, and columns and rows. A frame is one tile."""
        shape = (picture.height, picture.width, 3)
        image = np.frombuffer(picture.pixels, np.uint8).reshape(shape).transpose(2, 0, 1)
        size, most = self._processor.size, 1 if frame else self._most
        least = min(self._processor.min_patches, most)
        parts = self._processor.crop_image_to_patches(
            image,
            least,
            most,
            use_thumbnail=self._thumbnail,
            patch_size=size,
            resample=self._processor.resample,
        )
        canvas = get_optimal_tiled_canvas(shape[:2], (size.height, size.width), least, most)
        return torch.from_numpy(np.stack(parts)), canvas

    def pixels(self, tiles: Tensor) -> Tensor:
        """What the model takes, fp32, for uint8 tiles."""
        processor = self._processor
        scaled = processor.rescale(tiles.numpy(), 1 / 255)
        normal = [processor.normalize(t, processor.image_mean, processor.image_std) for t in scaled]
        return torch.from_numpy(np.stack(normal)).float()

    def prompt(self, case: Case, counts: list[int]) -> list[int]:
        """The ids, with so many tiles of each picture and then of each frame."""
        text = self._original(case) if self._chat else self._native(case)
        tiles = iter(counts)

        def shown(_: re.Match[str]) -> str:
            return "<img>" + "<IMG_CONTEXT>" * (next(tiles) * self._per_tile) + "</img>"

        ids: list[int] = self._tokenizer(re.sub("<image>", shown, text))["input_ids"]
        return ids

    def _original(self, case: Case) -> str:
        sentence, after = _CONVERSATIONS[self._values.get("template") or "internvl2_5"]
        system = self._values.get("system_message")
        numbers = itertools.count(1)
        several = len(case.pictures) > 1
        body = "".join(
            (f"Image-{next(numbers)}: " if several else "") + "<image>\n" for _ in case.pictures
        )
        body += "".join(f"Frame{number}: <image>\n" for number, _ in enumerate(case.frames, 1))
        return (
            f"<|im_start|>system\n{sentence if system is None else system}<|im_end|>{after}"
            f"<|im_start|>user\n{body}{case.text}<|im_end|>{after}<|im_start|>assistant\n"
        )

    def _native(self, case: Case) -> str:
        content: list[dict[str, str]] = [{"type": "image"} for _ in case.pictures]
        content += [{"type": "video"}] if case.frames else []
        content.append({"type": "text", "text": case.text})
        text: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._tokenizer.chat_template or _TEMPLATE,
            add_generation_prompt=True,
            tokenize=False,
        )
        frames = (f"Frame{number}: <image>" for number, _ in enumerate(case.frames, 1))
        return text.replace("<IMG_CONTEXT>", "<image>").replace("<video>", "\n".join(frames))

    def _load_tokenizer(self, folder: Path) -> Any:
        try:
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever it raises for what it does not know
            reason = str(error).partition("\n")[0]
            self.notes.append(
                f"transformers has no tokenizer for this folder ({reason}): the text of the prompt "
                "is theirs, its ids are made by tokenizer.json or what the server converts to it"
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(read_tokenizer_json(folder))
        )
        template = folder / "chat_template.jinja"
        tokenizer.chat_template = template.read_text("utf-8") if template.exists() else None
        return tokenizer


def _image_processor(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a native checkpoint's image processor."""
    side = values["vision_config"].get("image_size", 448)
    side = side[0] if isinstance(side, list) else side
    found: dict[str, Any] = {"size": {"height": side, "width": side}, "max_patches": 12}
    processor, image_processor = (
        folder / "processor_config.json",
        folder / "preprocessor_config.json",
    )
    stated: dict[str, Any] = {}
    if processor.exists():
        stated = json.loads(processor.read_text("utf-8")).get("image_processor", {})
    if not stated and image_processor.exists():
        stated = json.loads(image_processor.read_text("utf-8"))
    names = ("size", "min_patches", "max_patches", "image_mean", "image_std", "resample")
    return _IMAGENET | found | {name: stated[name] for name in names if name in stated}
