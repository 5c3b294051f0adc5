"""The first steps of a user, on an installed package: train, save, load, read into a store, generate. Run in an empty folder."""

import sys

import numpy as np

import mini_tfm as mt
from mini_tfm.text import ByteTokenizer

assert mt.__file__.startswith(sys.prefix), mt.__file__
assert set(mt.list_memories()) >= {"window", "recurrent", "store"}
mt.show_config()
config = mt.Config(vocab_size=ByteTokenizer.vocab_size, d_model=32, n_encoder_layers=1, n_decoder_layers=1, segment_length=16)
model = mt.Transformer(config, seed=0)
trainer = mt.Trainer(model, mt.memory("window:size=16+store:top_k=4"), learning_rate=3e-3)
tokens = np.tile(np.frombuffer(b"abcdefgh" * 2, np.uint8).astype(np.int64) + 3, (4, 3, 1))
losses = [trainer.step(tokens, tokens) for _ in range(30)]
assert losses[-1] < 0.5 * losses[0], losses
model.save("model")
again = mt.load("model")
assert (again.logits(tokens[0], tokens[0]) == model.logits(tokens[0], tokens[0])).all()
pipe = mt.Pipeline(again, ByteTokenizer(), "window:size=16+store:path=notes.mdb,top_k=4")
pipe.read("abcdefgh" * 8)
print("loss", round(losses[0], 2), "->", round(losses[-1], 2), "and it goes on:", repr(pipe.generate("abcd", max_new_tokens=8)))
