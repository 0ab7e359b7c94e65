"""Pictures become tiles on a device as Pillow makes them, and tiles the numbers of the model."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gpu import ours
from benchmarks.gpu.harness import Bench
from model.triton import pixels
from preprocessing.media import TileSettings
from preprocessing.tiling import tile

# Width and height: enlarged, shrunk, both at once (in both orders), the same, and as thin as a
# picture can be.
SIZES = [(97, 61), (301, 40), (64, 32), (11, 250), (1, 1), (1, 90), (333, 3)]


def picture(width: int, height: int) -> np.ndarray:
    """Noise with white and black in it, beside which the cubic overshoots."""
    random = np.random.default_rng(width * 1000 + height)
    samples = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    samples[random.random((height, width)) < 0.2] = 255
    samples[random.random((height, width)) < 0.2] = 0
    return samples


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_are_those_of_pillow(size: tuple[int, int], device: torch.device) -> None:
    samples = picture(*size)
    settings = TileSettings(side=32, min_tiles=1, max_tiles=6, use_thumbnail=True)
    planes, count, columns, rows = tile(Image.fromarray(samples), settings)
    found = pixels.tiles(
        torch.from_numpy(samples).to(device), columns, rows, 32, thumbnail=count > 1
    )
    expected = np.frombuffer(planes, np.uint8).reshape(count, 3, 32, 32)
    assert np.array_equal(found.cpu().numpy(), expected)


def test_weights_are_those_of_pillow_for_any_pair_of_sizes() -> None:
    """Of large pictures one row is enough: both directions use the same weights."""
    random = np.random.default_rng(0)
    pairs = random.integers([1, 1], [9000, 3000], (150, 2)).tolist()
    for source, size in [(4000, 1792), (3000, 448), *pairs]:
        line = random.integers(0, 256, (1, source), dtype=np.uint8)
        expected = Image.fromarray(line).resize((size, 1), Image.Resampling.BICUBIC)
        begin, factors = pixels.weights(source, size)
        places = np.minimum(begin + np.arange(len(factors))[:, None], source - 1)
        total = (line[0, places].astype(np.int64) * factors).sum(0) + (1 << 21)
        assert abs(total).max() < 1 << 31
        assert np.array_equal(np.clip(total >> 22, 0, 255), np.asarray(expected)[0]), (source, size)


def test_what_a_visit_to_a_gpu_does_goes_through(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.triton.missing", lambda device: None)
    bench = Bench(device, dry=True)
    ours.resize(bench)
    assert bench.results[0]["passed"]
    assert len(bench.results) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_patches_are_normalised_and_cut_as_the_model_does(
    dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    tiles = torch.randint(0, 256, (2, 3, 70, 70), dtype=torch.uint8, device=device)
    mean = torch.tensor([123.675, 116.28, 103.53], device=device)
    std = torch.tensor([58.395, 57.12, 57.375], device=device)
    normal = (tiles.float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = torch.nn.functional.unfold(normal, 14, stride=14).transpose(1, 2).to(dtype)
    found = pixels.patches(tiles, mean, std, 14, dtype)
    # The interpreter cuts bfloat16 off instead of rounding it.
    exact = {"rtol": 1e-2 if dtype == torch.bfloat16 and device.type == "cpu" else 0, "atol": 0}
    torch.testing.assert_close(found, expected, **exact)
