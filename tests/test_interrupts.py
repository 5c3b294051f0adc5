"""Ctrl-C at any moment of generating, reading, scoring and training: it stops, and what was there is as it was."""

import pytest
from helpers import in_a_process

TIMES = 8  # of each work and thread count

PROGRAM = """
import os, random, signal, sys, threading
import numpy as np
import mini_tfm as mt
from mini_tfm.text.tokenizers import ByteTokenizer

work, times, threads, seed = sys.argv[1], *map(int, sys.argv[2:])
mt.set_num_threads(threads)
rng = random.Random(seed)
config = dict(vocab_size=259, d_model=64, n_heads=4, n_encoder_layers=2, n_decoder_layers=2, d_ff=128)
model = mt.Transformer(mt.Config(**config), seed=1)
text = "the quick brown fox jumps over the lazy dog and back again " * 4


def begun():
    pipe = mt.Pipeline(model, ByteTokenizer(), "window:size=32+store:top_k=4", segment_length=24)
    pipe.read(text[:100])
    return pipe


pipe = begun()
ids = np.random.default_rng(0).integers(3, 200, (4, 24))
trainer = mt.Trainer(model, learning_rate=1e-3)
WORKS = {
    "generate": lambda: pipe.generate(text[:60], max_new_tokens=20),
    "beams": lambda: pipe.generate(text[:60], max_new_tokens=12, num_beams=3),
    "score": lambda: pipe.score(text),
    "read": lambda: pipe.read(text),
    "train": lambda: trainer.step(ids, ids),
}
before = (pipe.generate(text[:60], max_new_tokens=20), pipe.score(text)["bits_per_byte"])
stopped = 0
while stopped < times:
    try:
        threading.Timer(0.002 + rng.random() * 0.03, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            WORKS[work]()
    except KeyboardInterrupt:
        stopped += 1
    if work == "train":
        loss = trainer.step(ids, ids)
        assert np.isfinite(float(loss)), loss
        continue
    if work == "read":  # segments that were read are remembered, and whole
        assert np.isfinite(pipe.score(text)["bits_per_byte"])
        pipe = begun()
    assert (pipe.generate(text[:60], max_new_tokens=20), pipe.score(text)["bits_per_byte"]) == before
print(stopped)
"""


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("work", ["generate", "beams", "score", "read", "train"])
def test_ctrl_c_at_any_moment(work, n_threads):
    assert in_a_process(PROGRAM, work, TIMES, n_threads, 7).stdout.split() == [str(TIMES)]
