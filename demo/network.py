"""The network as it is trained: InternViT, pixel shuffle, MLP and a Qwen2 decoder.

Parameter names are those of the native (``-hf``) format, so exporting is writing. Serving has an
implementation of its own; tests compare the two. Attention is written out (matmul, softmax,
matmul), which trains about twice as fast here as the fused kernel's backward pass.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from demo.pictures import CELLS, HEADS, PATCH, TILE
from demo.tokenizer import VOCAB


@dataclass(frozen=True)
class Shape:
    """Dimensions of the demo model; the tokens of one tile are (112 / 14 / 2)² = 16."""

    vision_width: int = 192
    vision_layers: int = 4
    vision_heads: int = 6
    vision_mlp: int = 768
    width: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    mlp: int = 512
    head_dim: int = 32
    theta: float = 10_000.0
    vocab: int = VOCAB


TOKENS_PER_TILE = (CELLS // 2) ** 2
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1) * 255
STD = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1) * 255


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """``[..., L, d]`` each, ``q`` scaled already; ``mask`` is added to the scores."""
    scores = q @ k.mT
    if mask is not None:
        scores.add_(mask)
    return torch.softmax(scores, -1) @ v


class VisionAttention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        width = s.vision_width
        self.heads = s.vision_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.projection_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, w = x.shape
        q, k, v = (
            layer(x).view(b, n, self.heads, -1).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = q * q.shape[-1] ** -0.5
        return self.projection_layer(attend(q, k, v, None).transpose(1, 2).reshape(b, n, w))


class VisionMlp(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(s.vision_width, s.vision_mlp)
        self.fc2 = nn.Linear(s.vision_mlp, s.vision_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.attention = VisionAttention(s)
        self.mlp = VisionMlp(s)
        self.layernorm_before = nn.LayerNorm(s.vision_width, eps=1e-6)
        self.layernorm_after = nn.LayerNorm(s.vision_width, eps=1e-6)
        self.lambda_1 = nn.Parameter(torch.ones(s.vision_width))
        self.lambda_2 = nn.Parameter(torch.ones(s.vision_width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.lambda_1 * self.attention(self.layernorm_before(x))
        return x + self.lambda_2 * self.mlp(self.layernorm_after(x))


class PatchEmbeddings(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, s.vision_width, PATCH, PATCH)

    def forward(self, pixels: Tensor) -> Tensor:
        b = pixels.shape[0]
        patches = pixels.view(b, 3, CELLS, PATCH, CELLS, PATCH).permute(0, 2, 4, 1, 3, 5)
        weight = self.projection.weight.flatten(1)
        return functional.linear(
            patches.reshape(b, CELLS * CELLS, -1), weight, self.projection.bias
        )


class VisionEmbeddings(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, s.vision_width) * 0.02)
        self.position_embeddings = nn.Parameter(
            torch.randn(1, CELLS * CELLS + 1, s.vision_width) * 0.1
        )
        self.patch_embeddings = PatchEmbeddings(s)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embeddings(pixels)
        first = self.cls_token.expand(patches.shape[0], -1, -1)
        return torch.cat([first, patches], 1) + self.position_embeddings


class Encoder(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.layer = nn.ModuleList(VisionLayer(s) for _ in range(s.vision_layers))


class VisionTower(nn.Module):
    """uint8 tiles ``[T, 3, 112, 112]`` to patch features ``[T, 64, width]``."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(s)
        self.encoder = Encoder(s)

    def forward(self, tiles: Tensor) -> Tensor:
        kind = self.embeddings.cls_token.dtype
        x = self.embeddings(((tiles.float() - MEAN) / STD).to(kind))
        for layer in self.encoder.layer:
            x = layer(x)
        return x[:, 1:]


class Projector(nn.Module):
    """Pixel shuffle (2 x 2 patches to one token, row by row) and the MLP."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(4 * s.vision_width)
        self.linear_1 = nn.Linear(4 * s.vision_width, s.width)
        self.linear_2 = nn.Linear(s.width, s.width)

    def forward(self, x: Tensor) -> Tensor:
        t, _, w = x.shape
        half = CELLS // 2
        x = x.view(t, half, 2, half, 2, w).permute(0, 1, 3, 2, 4, 5).reshape(t, half * half, 4 * w)
        return self.linear_2(functional.gelu(self.linear_1(self.layer_norm(x))))


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


class SelfAttention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.width, s.heads * s.head_dim)
        self.k_proj = nn.Linear(s.width, s.kv_heads * s.head_dim)
        self.v_proj = nn.Linear(s.width, s.kv_heads * s.head_dim)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        b, n, _ = x.shape
        s = self.s
        q = (self.q_proj(x) * s.head_dim**-0.5).view(b, n, s.heads, s.head_dim)
        k = self.k_proj(x).view(b, n, s.kv_heads, s.head_dim)
        q, k = (rotate(t.transpose(1, 2), cos, sin) for t in (q, k))
        v = self.v_proj(x).view(b, n, s.kv_heads, s.head_dim).transpose(1, 2)
        q = q.unflatten(1, (s.kv_heads, -1))
        out = attend(q, k[:, :, None], v[:, :, None], mask[:, None])
        return self.o_proj(out.flatten(1, 2).transpose(1, 2).reshape(b, n, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class Mlp(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.width, s.mlp, bias=False)
        self.up_proj = nn.Linear(s.width, s.mlp, bias=False)
        self.down_proj = nn.Linear(s.mlp, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn = SelfAttention(s)
        self.mlp = Mlp(s)
        self.input_layernorm = RmsNorm(s.width)
        self.post_attention_layernorm = RmsNorm(s.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.vocab, s.width)
        self.layers = nn.ModuleList(DecoderLayer(s) for _ in range(s.layers))
        self.norm = RmsNorm(s.width)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        half = torch.arange(0, self.s.head_dim, 2) / self.s.head_dim
        angle = positions[:, None, :, None].float() / self.s.theta**half
        angle = torch.cat([angle, angle], -1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)


class Model(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.vision_tower = VisionTower(s)
        self.multi_modal_projector = Projector(s)
        self.language_model = Decoder(s)


class DemoNet(nn.Module):
    """The whole network, and the per-patch heads that only training has (``heads.*``)."""

    def __init__(self, s: Shape = Shape()) -> None:
        super().__init__()
        self.shape = s
        self.model = Model(s)
        self.lm_head = nn.Linear(s.width, s.vocab, bias=False)
        self.heads = nn.Linear(s.vision_width, sum(HEADS.values()))
        self._initialise()

    def _initialise(self) -> None:
        for name, p in self.named_parameters():
            if p.ndim < 2 or "position" in name or "cls" in name:
                if name.endswith("bias"):
                    nn.init.zeros_(p)
                continue
            fan_in = p.numel() // p.shape[0]
            std = min(0.05, 1 / math.sqrt(fan_in))
            if (
                "o_proj" in name
                or "down_proj" in name
                or "projection_layer" in name
                or "fc2" in name
            ):
                std *= 0.4
            if "embed_tokens" in name:
                std = 0.05
            nn.init.normal_(p, std=std)

    def embed(
        self, ids: Tensor, image_id: int, tiles: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Token embeddings with pictures put in, and the patch features for the heads."""
        x = self.model.language_model.embed_tokens(ids)
        if tiles is None or not len(tiles):
            return x, None
        patches = self.model.vision_tower(tiles)
        features = self.model.multi_modal_projector(patches)
        spots = (ids == image_id).nonzero(as_tuple=True)
        return x.index_put(spots, features.flatten(0, 1).to(x.dtype)), patches

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        return self.model.language_model(x, positions, mask)


def dense_loss(net: DemoNet, patches: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of the per-patch labels ``[T, 64, heads]``; -1 is not counted."""
    logits = net.heads(patches).float().split(list(HEADS.values()), -1)
    return (
        torch.stack(
            [
                functional.cross_entropy(
                    part.flatten(0, 1), truth[:, :, k].flatten(), ignore_index=-1
                )
                for k, part in enumerate(logits)
            ]
        )
        .nan_to_num()
        .sum()
    )


assert TILE % PATCH == 0  # noqa: S101
