"""A small run with all there is to keep, for the tests that stop it and go on with it."""

import csv
import hashlib
import json

import numpy as np

import mini_tfm as mt
from mini_tfm.config import Config
from mini_tfm.data import TextStreams
from mini_tfm.train import Trainer
from mini_tfm.transformer import Transformer

STEPS = 12
FIT = {"validate_every": 2, "validation_batches": 2, "save_every": 3, "save_total_limit": 2, "save_best": True}


def data(seed=1, batch_size=4):
    """An epoch is 5 steps or so: 90 tokens, 4 streams of 2 segments of 4."""
    text = np.random.default_rng(0).integers(3, 13, 90)
    return TextStreams([text], segment_length=4, n_segments=2, batch_size=batch_size, seed=seed)


def make_trainer(dtype=np.float32, **options):
    config = Config(vocab_size=13, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=12)
    usual = {"learning_rate": 3e-3, "warmup_steps": 3, "total_steps": STEPS, "dropout": 0.1, "source_dropout": 0.2, "seed": 4}
    options = {**usual, "gradient_accumulation_steps": 3, "early_stopping_patience": 4, **options}
    return Trainer(Transformer(config, seed=1, dtype=dtype), mt.memory("recurrent:tokens=2"), **options)


def fit(trainer, folder, **options):
    """To the end, or to where it is cut."""
    logs = {"jsonl_log": folder.parent / f"{folder.name}.jsonl", "csv_log": folder.parent / f"{folder.name}.csv"}
    return trainer.fit(data(), validation=data(seed=2), folder=folder, progress=False, **{**FIT, **logs, **options})


def sha(*arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def state(trainer):
    """All that a run is, by SHA-256: there is no random state but the seed and the step, which is the cursor in the data."""
    weights = trainer.model.weights
    return {
        "weights": sha(*(weights[name] for name in sorted(weights))),
        "optimizer": sha(trainer.optimizer.m, trainer.optimizer.v, np.array([trainer.optimizer.step_count])),
        "random and cursor": [trainer.options.seed, trainer.step_count, trainer.tokens_seen],
        "losses": sha(np.array(trainer.losses)),
        "validations": trainer.validations,
        "best": trainer.best,
        "rate": trainer.learning_rate,
    }


def log_lines(folder):
    """Of both logs of a run, without the seconds, which differ from run to run."""
    lines = [json.loads(line) for line in (folder.parent / f"{folder.name}.jsonl").read_text().splitlines()]
    with (folder.parent / f"{folder.name}.csv").open(newline="") as file:
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines], rows
