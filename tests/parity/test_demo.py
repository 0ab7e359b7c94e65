"""The embedded checkpoint, both formats, against transformers."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from demo import CHECKPOINT, CHECKPOINT_CHAT
from demo.batches import Encoder
from demo.pictures import Scene, cut, place, render
from tests.parity.direct import load, run
from tests.parity.reference import Reference

# As in test_transformers: fp32 on both sides, sums in different orders, logits up to 30.
TOLERANCE = 1e-3


@pytest.mark.parametrize("folder", [CHECKPOINT, CHECKPOINT_CHAT], ids=lambda path: path.name)
def test_the_demo_checkpoint_computes_what_transformers_computes(folder) -> None:
    encoder = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    ours, theirs = load(folder), Reference(CHECKPOINT)
    rng = np.random.default_rng(11)
    for width, height in ((100, 100), (300, 200)):
        scene = Scene(width, height, (255, 255, 255))
        place(rng, scene, 3)
        tiles = torch.from_numpy(cut(render(scene, rng), 12)[0])
        ids = [*encoder.head("user"), *encoder.picture(len(tiles), "")]
        ids += [*encoder.text("What is in this picture?"), *encoder.close()]
        ids += encoder.head("assistant")
        expected = theirs.logits(ids, tiles)
        found = run(ours, ids, tiles, encoder.context)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        assert int(found[-1].argmax()) == int(expected[-1].argmax())
