"""What an encoder-decoder finds in an input longer than it was trained to read: the table of docs/long-input.md.

Letters without meaning, among them one @ and behind it the answer of 8 letters. A small model is trained, without any memory, on
inputs of up to a segment of 32 tokens. Then it is asked about inputs up to 256 times as long, cut off after a segment, or read
into a memory that replaces what cross-attention sees, with and without overlap (arXiv 2305.01625). An answer counts if it is right
from its first to its last letter. Last, each model is trained on, with the memory, on inputs of up to 4 segments (the paper's section
3.3, with rows that are found): what it is asked for is in none of the segments that the decoder is given.

    python benchmarks/long_input.py                  about 7 minutes on two cores
    python benchmarks/long_input.py --seeds 1 --steps 50 --more-steps 5 --inputs 4 --lengths 32 64
"""

import argparse

import numpy as np

import mini_tfm as mt
from mini_tfm.text import ByteTokenizer

SEGMENT, ANSWER, LETTERS = 32, 8, "abcdefghijklmnop"
MEMORY = "store:top_k=16,site=cross,merge=replace"


def puzzle(rng, length):
    """A text of so many letters, and the answer in it."""
    letters = rng.choice(list(LETTERS), length)
    at = int(rng.integers(0, length - ANSWER))
    letters[at] = "@"
    return "".join(letters), "".join(letters[at + 1 : at + 1 + ANSWER])


def trained(seed, steps):
    rng, tokenizer = np.random.default_rng([seed, 0]), ByteTokenizer()
    config = mt.Config(vocab_size=tokenizer.vocab_size, d_model=64, n_heads=4, n_encoder_layers=2, n_decoder_layers=2, d_ff=128,
                       positions="relative", relative_buckets=64)  # fmt: skip
    trainer = mt.Trainer(mt.Transformer(config, seed=seed), learning_rate=2e-3, warmup_steps=100, total_steps=steps)
    for _ in range(steps):
        lengths = rng.integers(ANSWER + 1, SEGMENT + 1, 64)
        texts = [puzzle(rng, length) for length in lengths]
        source = np.zeros((64, SEGMENT), np.int64)
        for row, (text, _) in zip(source, texts, strict=True):
            row[: len(text)] = tokenizer.encode(text)
        target = np.array([[*tokenizer.encode(answer), config.eos_id] for _, answer in texts])
        loss = trainer.step(source, target, lengths)
    print(f"seed {seed}: loss {loss:.4f} after {steps} steps", flush=True)
    return trainer.model


def trained_on(model, seed, steps):
    """A copy of the model after more steps, on inputs of 33 to 128 tokens in segments, which the decoder sees through the memory alone."""
    rng, tokenizer, n = np.random.default_rng([seed, 2]), ByteTokenizer(), 4
    model = mt.Transformer(model.config, weights={name: weight.copy() for name, weight in model.weights.items()})
    trainer = mt.Trainer(model, mt.memory(MEMORY), learning_rate=5e-4, warmup_steps=min(20, steps), total_steps=steps)
    for _ in range(steps):
        lengths = rng.integers(SEGMENT + 1, n * SEGMENT + 1, 16)
        texts = [puzzle(rng, length) for length in lengths]
        source, target = np.zeros((16, n + 1, SEGMENT), np.int64), np.zeros((16, n + 1, ANSWER + 1), np.int64)
        for row, (text, _) in zip(source, texts, strict=True):
            row.reshape(-1)[: len(text)] = tokenizer.encode(text)
        source[:, n, 0] = model.config.eos_id  # the segment in which the answer is asked for says nothing
        target[:, n] = [[*tokenizer.encode(answer), model.config.eos_id] for _, answer in texts]
        source_lengths = np.clip(lengths[:, None] - SEGMENT * np.arange(n + 1), 0, SEGMENT)
        source_lengths[:, n] = 1
        loss = trainer.step(source, target, source_lengths, np.tile([0] * n + [ANSWER + 1], (16, 1)))
    print(f"seed {seed}: loss {loss:.4f} after {steps} steps with the memory", flush=True)
    return model


def share_right(model, length, n_inputs, seed, memory, overlap=0.0):
    pipe, rng, right = mt.Pipeline(model, ByteTokenizer(), memory, SEGMENT, overlap=overlap), np.random.default_rng([seed, 1, length]), 0
    for _ in range(n_inputs):
        text, answer = puzzle(rng, length)
        pipe.reset()
        right += pipe.generate(text[:SEGMENT] if memory is None else text, max_new_tokens=ANSWER) == answer
    return right / n_inputs


# (trained on, memory, overlap)
WAYS = {
    "cut off": (False, None, 0.0),
    "memory, no overlap": (False, MEMORY, 0.0),
    "memory, overlap 0.5": (False, MEMORY, 0.5),
    "trained with it, no overlap": (True, MEMORY, 0.0),
    "trained with it, overlap 0.5": (True, MEMORY, 0.5),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--more-steps", type=int, default=300, help="with the memory")
    parser.add_argument("--inputs", type=int, default=64, help="of each length and seed")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512, 2048, 8192])
    given = parser.parse_args()
    models = [trained(seed, given.steps) for seed in range(given.seeds)]
    further = [trained_on(model, seed, given.more_steps) for seed, model in enumerate(models)]
    print("| tokens | " + " | ".join(WAYS) + " |\n|---|" + "---|" * len(WAYS))
    for length in given.lengths:
        shares = [
            [share_right(model, length, given.inputs, seed, *way) for seed, model in enumerate(further if with_it else models)]
            for with_it, *way in WAYS.values()
        ]
        cells = [f"{100 * np.mean(each):.0f} % ({' / '.join(f'{100 * share:.0f}' for share in each)})" for each in shares]
        print(f"| {length:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
