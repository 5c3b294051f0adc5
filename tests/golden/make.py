"""Makes the files that must load for ever: `python tests/golden/make.py FOLDER`, run once by the version whose formats they are.

    FOLDER/<name>/            a run: model, tokenizer, memory's text, optimizer
    FOLDER/<name>.json        what it computes: logits, and the loss of its next step
    FOLDER/notes.store        documents that the model `stream` has read

It uses what every version has. Files of a version that was released are never made again: 0.1.0 made those in `0.1.0`.
"""

import json
import sys
from pathlib import Path

import numpy as np

import mini_tfm as mt
from mini_tfm.tokenizer import ByteTokenizer, train_bpe

TEXT = "the cat sat on the mat, the cat sat. naïve café ☕ 😀 " * 3
RUNS = {  # tokenizer, memory, fields of the config
    "stream": ("bytes", "recurrent:tokens=2+window:size=8", {"segment_length": 12}),
    "t5": ("bytes", None, {"positions": "relative", "relative_buckets": 8, "relative_max_distance": 6, "norm": "rms", "bias": False}),
    "decoder": ("bpe", "window:size=6,sinks=2", {
        "n_encoder_layers": 0, "positions": "rotary", "norm": "rms", "activation": "silu", "tie_embeddings": False, "segment_length": 12,
        "n_heads": 4, "n_kv_heads": 1, "d_head": 2,
    }),
    "learned": ("bpe", None, {"positions": "learned", "max_positions": 20, "norm_position": "post"}),
}  # fmt: skip
READ = {"default": TEXT[:40], "other": TEXT[:70]}


def arguments(trainer, ids: np.ndarray, at: int) -> tuple:
    """Source and target of a step: one stream of two segments."""
    rows = ids[at : at + 48].reshape(2, 2, 12)
    return (rows if trainer.model.config.has_encoder else None), np.roll(rows, -1, axis=2)


def computed(trainer) -> dict:
    """Logits of two sequences, and the loss of the next step. The step changes the trainer."""
    model, ids = trainer.model, trainer.tokenizer.encode(TEXT)
    source = ids[None, :7] if model.config.has_encoder else None
    logits = model.logits(source, ids[None, 3:9])[0, -1]
    return {"logits": [round(float(x), 6) for x in logits], "loss": trainer.step(*arguments(trainer, ids, 11))}


def main(folder: Path) -> None:
    tokenizers = {"bytes": ByteTokenizer(), "bpe": train_bpe([TEXT] * 3, 280)}
    folder.mkdir(parents=True)
    for name, (kind, memory, fields) in RUNS.items():
        tokenizer = tokenizers[kind]
        sizes = {"d_model": 8, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 12}
        config = mt.Config(vocab_size=tokenizer.vocab_size, **{**sizes, **fields})
        strategy = None if memory is None else mt.memory(memory)
        trainer = mt.Trainer(mt.Transformer(config, seed=1), strategy, learning_rate=1e-3, seed=3, tokenizer=tokenizer)
        for step in range(3):
            trainer.step(*arguments(trainer, tokenizer.encode(TEXT), step))
        trainer.save(folder / name)
        (folder / f"{name}.json").write_text(json.dumps(computed(trainer)) + "\n")
    for document, text in READ.items():
        memory = mt.memory("store", path=str(folder / "notes.store"), document=document, top_k=3)
        mt.Pipeline(mt.load(folder / "stream"), ByteTokenizer(), memory=memory).read(text)
    (folder / "notes.store-lock").unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
