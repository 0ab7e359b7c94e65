"""Our own kernels: their tests on the device, and pictures resized there against Pillow."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.harness import Bench
from model import triton as kernels
from preprocessing.grid import choose_grid

SIDE = 448


def kernel_tests() -> list[str]:
    """Arguments of pytest. The project's settings and fixtures of all tests are left out: they name
    packages that a GPU's host does not have."""
    root = Path(__file__).parents[2]
    folder = root / "tests" / "kernels"
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    return [
        *("-q", "-c", os.devnull, "--rootdir", str(root), "--confcutdir", str(folder)),
        *("--maxfail", "10", "-p", "no:cacheprovider", *workers, str(folder)),
    ]


def tests(bench: Bench) -> None:
    """``tests/kernels``, compiled for this device. What a dry run would interpret, CI does."""
    if bench.dry:
        bench.skip("tests/kernels", "needs a GPU")
        return
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *kernel_tests()],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        print(run.stdout[-4000:])
    bench.check("tests/kernels", run.returncode == 0)


def _by_pillow(picture: np.ndarray, columns: int, rows: int, side: int) -> np.ndarray:
    """The tiles and the thumbnail, uint8 ``[columns * rows + 1, 3, side, side]``."""
    image = Image.fromarray(picture)
    bicubic = Image.Resampling.BICUBIC
    grid = np.asarray(image.resize((columns * side, rows * side), bicubic))
    cut = grid.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    whole = np.asarray(image.resize((side, side), bicubic)).transpose(2, 0, 1)
    return np.concatenate((cut.reshape(-1, 3, side, side), whole[None]))


def resize(bench: Bench) -> None:
    """9: bytes that differ from Pillow's in pictures of random sizes, and the time of one of 12
    megapixels that is on the device already."""
    if (reason := kernels.missing(bench.device)) is not None:
        bench.skip("resize", reason)
        return
    from model.triton import pixels

    random, side = np.random.default_rng(0), bench.pick(SIDE, 28)
    different = 0
    for _ in range(bench.pick(200, 2)):
        width, height = random.integers(1, bench.pick(3000, 60), 2).tolist()
        picture = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        columns, rows = choose_grid(width, height, side, 1, bench.pick(12, 2))
        on_device = torch.from_numpy(picture).to(bench.device)
        found = pixels.tiles(on_device, columns, rows, side, thumbnail=True).cpu().numpy()
        different += int((found != _by_pillow(picture, columns, rows, side)).sum())
    bench.check("no byte differs from Pillow's", different == 0)
    shape = bench.pick((3000, 4000, 3), (30, 40, 3))
    picture = torch.zeros(shape, dtype=torch.uint8, device=bench.device)
    took = bench.seconds(lambda: pixels.tiles(picture, 4, 3, side, thumbnail=True))
    bench.record("12 megapixels to 13 tiles", took * 1e3, "ms", most=0.3)
