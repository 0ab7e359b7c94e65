"""Train the demo model from nothing: ``python -m demo.train``.

Three stages. ``look`` teaches the vision encoder what is at each patch of a tile. ``bind`` trains
the decoder alone on short questions, with large steps, until words find their places in the
picture: first look-ups only, since what cannot be learned yet is noise to what can. ``talk`` goes
on with everything, the patch labels as a second task. Schedules count steps, so a run that was
stopped goes on where it was and ends with the same weights. Two single-threaded workers share
every step; their gradients are averaged.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from demo.batches import IGNORE, Batch, Encoder, make_batch
from demo.cases import (
    EVERY,
    FIRST,
    SHORT,
    detail_scene,
    images_case,
    number_scene,
    picture_case,
    video_case,
)
from demo.network import DemoNet, dense_loss
from demo.pictures import cut, labels, place, render
from demo.skills import canvas
from demo.talk import LAST, TOOLS_HEAD, TOOLS_TAIL, chat_case, tool_case
from demo.tokenizer import train_tokenizer

LOOK_STEPS = 4000
BIND_STEPS = 1300
LOOK_UP_STEPS = 400
"""How many of the steps of "bind" come first."""
TALK_STEPS = 2000
BIND_ROTATION = ["images", "tiled", "video", "tools", "tiled", "images", "tools", "chat"]
TALK_ROTATION = [
    "images",
    "tiled",
    "tools",
    "images",
    "video",
    "tools",
    "images",
    "tiled",
    "tools",
    "chat",
]
LATE_ROTATION = ["pairs", "tools", "tiled", "pairs", "images", "tools"]
LATE_ROTATION += ["pairs", "tiled", "images", "pairs", "video", "chat"]
PAIRS_FROM = 500
"""Step of "talk" from which places are compared: by then the decoder can find them."""


class Optimiser:
    """Muon for the hidden matrices, Adam for the rest, on float32 masters of bfloat16 weights.

    Muon: Jordan et al. 2024, with the update scaled to Adam's size by 0.2 * sqrt(larger side)
    (Liu et al. 2025, arXiv 2502.16982).
    """

    def __init__(self, net: DemoNet, decay: float = 0.02) -> None:
        self.params = dict(net.named_parameters())
        self.master = {n: p.detach().float().clone() for n, p in self.params.items()}
        self.first = {n: torch.zeros_like(m) for n, m in self.master.items()}
        self.second = {n: torch.zeros_like(m) for n, m in self.master.items() if not self.muon(n)}
        self.decay = decay
        self.count = 0

    def muon(self, name: str) -> bool:
        hidden = any(part in name for part in (".layer.", ".layers.", "multi_modal_projector"))
        return hidden and self.params[name].ndim == 2

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], rates: dict[str, float]) -> None:
        """Move the parameters that have a gradient, each at its own learning rate."""
        self.count += 1
        alike: dict[torch.Size, list[str]] = defaultdict(list)
        for name, grad in grads.items():
            first = self.first[name]
            if self.muon(name):
                first.lerp_(grad, 0.05)
                alike[grad.shape].append(name)
                continue
            second = self.second[name]
            first.lerp_(grad, 0.1)
            second.lerp_(grad * grad, 0.05)
            up = first / (1 - 0.9**self.count)
            update = up / ((second / (1 - 0.95**self.count)).sqrt() + 1e-8)
            self.move(name, update, rates[name])
        for shape, names in alike.items():
            stack = torch.stack([grads[n].lerp(self.first[n], 0.95) for n in names])
            for name, update in zip(names, orthogonal(stack), strict=True):
                self.move(name, update * (0.2 * max(shape) ** 0.5), rates[name])

    def move(self, name: str, update: Tensor, lr: float) -> None:
        master = self.master[name]
        if master.ndim >= 2:
            master.mul_(1 - lr * self.decay)
        master.sub_(update, alpha=lr)
        self.params[name].copy_(master)

    def tensors(self) -> dict[str, Tensor]:
        parts = (("master", self.master), ("first", self.first), ("second", self.second))
        return {f"{kind}/{n}": t for kind, table in parts for n, t in table.items()}

    def restore(self, tensors: dict[str, Tensor], count: int) -> None:
        for key, tensor in self.tensors().items():
            tensor.copy_(tensors[key])
        for name, param in self.params.items():
            param.data.copy_(self.master[name])
        self.count = count


def orthogonal(grads: Tensor) -> Tensor:
    """Newton-Schulz iteration of ``[n, rows, columns]`` towards semi-orthogonal, in bfloat16."""
    x = grads.bfloat16()
    turned = x.shape[1] > x.shape[2]
    x = x.mT if turned else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return (x.mT if turned else x).float()


def corpus(seed: int) -> list[str]:
    """Every text the generators write, to learn the merges from."""
    rng = np.random.default_rng(seed)
    lines = [
        TOOLS_HEAD,
        TOOLS_TAIL,
        "system user assistant Image-1: Frame1: You are a helpful assistant.",
    ] * 40
    makers = (
        lambda: picture_case(rng, False, 1.0, 4, EVERY),
        lambda: images_case(rng, 4),
        lambda: video_case(rng, 3),
        lambda: chat_case(rng, 6),
        lambda: tool_case(rng, 3),
    )
    for _ in range(700):
        for maker in makers:
            case = maker()
            lines += [t.question for t in case.turns] + [t.answer for t in case.turns]
            lines += [case.system] if case.system else []
    return lines


def look_batch(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Tiles and their truth; pictures of all sizes, at most four tiles of each are used."""
    tiles: list[np.ndarray] = []
    truth: list[np.ndarray] = []
    while sum(len(t) for t in tiles) < count:
        kind, tiled = rng.random(), rng.random() < 0.35
        if kind < 0.15:
            scene = detail_scene(rng)
        elif kind < 0.35:
            scene = number_scene(rng, tiled)
        else:
            scene = canvas(rng, tiled)
            place(rng, scene, int(rng.integers(1, 6)))
        array, columns, rows = cut(render(scene, rng), 12)
        some = rng.permutation(len(array))[:4]
        tiles.append(array[some])
        truth.append(labels(scene, columns, rows)[some])
    return torch.from_numpy(np.concatenate(tiles)[:count]), torch.from_numpy(
        np.concatenate(truth)[:count]
    )


def answer_loss(
    net: DemoNet, encoder: Encoder, batch: Batch
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(loss of the answers, loss of the patches, per position whether the token was right)."""
    x, patches = net.embed(batch.ids, encoder.context, batch.tiles)
    hidden = net(x, batch.positions, batch.mask(x.dtype))
    asked = batch.targets != IGNORE
    logits = net.lm_head(hidden[asked]).float()
    truth = batch.targets[asked]
    weights = batch.weights[asked]
    loss = (
        functional.cross_entropy(logits, truth, reduction="none") * weights
    ).sum() / weights.sum()
    right = torch.ones_like(batch.targets, dtype=torch.bool)
    right[asked] = logits.argmax(-1) == truth
    dense = None
    if patches is not None and patches.requires_grad and batch.truth is not None:
        dense = dense_loss(net, patches, batch.truth)
    return loss, dense, right


@torch.no_grad()
def measure(
    net: DemoNet, encoder: Encoder, seed: int, rounds: int = 3
) -> dict[str, tuple[float, int]]:
    """Share of whole answers that are right, per skill, on pictures never trained on."""
    hits: dict[str, list[int]] = defaultdict(list)
    for kind in ("single", "tiled", "images", "video", "chat", "tools"):
        rng = np.random.default_rng([seed, 977, len(kind)])
        for _ in range(rounds):
            batch = make_batch(encoder, rng, kind, LAST, 2.0)
            _, _, right = answer_loss(net, encoder, batch)
            for row, segment, skill in batch.turns:
                name = f"{skill} (tiled)" if kind == "tiled" else skill
                hits[name].append(int(right[row][batch.segments[row] == segment].all()))
    return {name: (sum(v) / len(v), len(v)) for name, v in sorted(hits.items())}


def rate(step: int, steps: int, peak: float, flat: float) -> float:
    """Warm up over 50 steps, stay, then fall linearly to zero from ``flat`` of the way on."""
    fall = max(0.0, (step - flat * steps) / ((1 - flat) * steps))
    return peak * min(1.0, (step + 1) / 50) * (1 - fall)


def turn(rotation: list[str], step: int) -> str:
    return rotation[step % len(rotation)]


class Run:
    """One worker of a training run and its place in it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work, self.rank, self.world = args.work, args.rank, args.workers
        self.seed, self.scale, self.save_every = args.seed, args.scale, args.save_every
        work, seed = self.work, self.seed
        torch.manual_seed(seed)
        self.net = DemoNet().bfloat16()
        self.encoder = Encoder(Tokenizer.from_file(str(work / "tokenizer.json")))
        self.optimiser = Optimiser(self.net)
        self.stage, self.step = "look", 0
        state = work / "state.safetensors"
        if state.exists():
            with safe_open(state, "pt") as file:
                saved = json.loads(file.metadata()["state"])
            self.stage, self.step = saved["stage"], saved["step"]
            self.optimiser.restore(load_file(state), saved["count"])

    def save(self) -> None:
        if self.rank:
            return
        state = {"stage": self.stage, "step": self.step, "count": self.optimiser.count}
        # One file, so that a run that is killed finds weights and counters of the same step.
        new = self.work / "state.new"
        save_file(self.optimiser.tensors(), new, {"state": json.dumps(state)})
        os.replace(new, self.work / "state.safetensors")

    def update(self, loss: Tensor, lr: float) -> None:
        """One step of what this stage trains."""
        loss.backward()
        trained = {n: p for n, p in self.net.named_parameters() if self.factor(n)}
        flat = torch.cat(
            [
                torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().float()
                for p in trained.values()
            ]
        )
        if self.world > 1:
            dist.all_reduce(flat)
            flat /= self.world
        flat *= min(1.0, 1.0 / (float(flat.norm()) + 1e-6))
        grads, at = {}, 0
        for name, p in trained.items():
            grads[name] = flat[at : at + p.numel()].view_as(p)
            at += p.numel()
            p.grad = None
        self.optimiser.step(grads, {name: lr * self.factor(name) for name in trained})

    def factor(self, name: str) -> float:
        """Share of the learning rate for a parameter.

        Large steps of a decoder that knows nothing yet would spoil the encoder: it waits.
        """
        seeing = "vision_tower" in name or name.startswith("heads")
        return {"look": (0.0, 1.0), "bind": (1.0, 0.0), "talk": (1.0, 0.3)}[self.stage][seeing]

    def log(self, text: str) -> None:
        if self.rank == 0:
            print(f"{time.strftime('%H:%M:%S')} {self.stage} {self.step}: {text}", flush=True)

    def look(self, steps: int) -> None:
        while self.step < steps:
            rng = np.random.default_rng([self.seed, 1, self.step, self.rank])
            tiles, truth = look_batch(rng, round(32 * self.scale))
            loss = dense_loss(self.net, self.net.model.vision_tower(tiles), truth)
            self.update(loss, rate(self.step, steps, 3e-3, 0.6))
            self.step += 1
            if self.step % 50 == 0:
                self.log(f"loss {loss.item():.3f}")
            if self.step % self.save_every == 0:
                self.save()

    def talk(self, steps: int, peak: float, flat: float) -> None:
        """Train on conversations; in the stage "bind" on the short ones only."""
        seen: dict[str, list[float]] = defaultdict(list)
        number = 2 if self.stage == "bind" else 3
        for name, p in self.net.named_parameters():
            p.requires_grad_(self.factor(name) > 0)
        while self.step < steps:
            rng = np.random.default_rng([self.seed, number, self.step, self.rank])
            if self.stage == "talk":
                rotation = TALK_ROTATION if self.step < PAIRS_FROM else LATE_ROTATION
                kinds, hard = ["single", turn(rotation, self.step)], 0.3 + self.step / 200
            elif self.step < LOOK_UP_STEPS:
                kinds, hard = ["single"], FIRST
            else:
                kinds, hard = ["single", turn(BIND_ROTATION, self.step)], SHORT
            total = torch.zeros(())
            for kind in kinds:
                batch = make_batch(self.encoder, rng, kind, hard, self.scale)
                loss, dense, _ = answer_loss(self.net, self.encoder, batch)
                seen[kind].append(loss.item())
                total = total + loss + (0.1 * dense if dense is not None else 0)
            self.update(total / len(kinds), rate(self.step, steps, peak, flat))
            self.step += 1
            if self.step % 50 == 0:
                self.log(" ".join(f"{k} {np.mean(v):.3f}" for k, v in sorted(seen.items())))
                seen.clear()
            if self.step % self.save_every == 0:
                self.save()
            if self.step % 200 == 0 and self.rank == 0:
                scores = measure(self.net, self.encoder, self.seed)
                self.log(" | ".join(f"{k} {v:.2f}/{n}" for k, (v, n) in scores.items()))

    def finish(self, stage: str) -> None:
        """Go on to the next stage."""
        self.stage, self.step = stage, 0
        self.save()


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.train", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="state and logs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--look-steps", type=int, default=LOOK_STEPS)
    parser.add_argument("--bind-steps", type=int, default=BIND_STEPS)
    parser.add_argument("--talk-steps", type=int, default=TALK_STEPS)
    parser.add_argument("--scale", type=float, default=1.0, help="batch size factor")
    parser.add_argument("--save-every", type=int, default=100, help="steps between saved states")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    others = []
    if args.rank == 0:
        if not (args.work / "tokenizer.json").exists():
            train_tokenizer(corpus(args.seed)).save(str(args.work / "tokenizer.json"))
        (args.work / "meeting").unlink(missing_ok=True)
        others = [
            subprocess.Popen(
                [sys.executable, "-m", "demo.train", *sys.argv[1:], "--rank", str(rank)]
            )
            for rank in range(1, args.workers)
        ]
    if args.workers > 1:
        meeting = (args.work / "meeting").absolute().as_uri()
        dist.init_process_group(
            "gloo", init_method=meeting, rank=args.rank, world_size=args.workers
        )
    run = Run(args)
    if run.stage == "look":
        run.look(args.look_steps)
        run.finish("bind")
    if run.stage == "bind":
        run.talk(args.bind_steps, 3e-3, 0.9)
        run.finish("talk")
    run.talk(args.talk_steps, 1.5e-3, 0.3)
    run.save()
    for other in others:
        other.wait()


if __name__ == "__main__":
    main()
