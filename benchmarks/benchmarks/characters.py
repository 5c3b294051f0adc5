"""A character model of nanoGPT's size on real text: the loss on held-out text that a recipe reaches, here and in PyTorch.

The text is what Python's `help()` says of the language, 465,000 characters of English that every installation has; its last
tenth is held out. Both libraries start from the same weights, see the same batches and follow the same recipe.
"""

import math
import pydoc_data.topics

import numpy as np

import mini_tfm as mt
from mini_tfm.data import Batch

from .common import LIBRARIES, library
from .training import TorchModel

BATCH, BLOCK, SPECIAL = 12, 64, 3
STEPS, WARM_UP, RATE, BETAS, EPS, DECAY, CLIP = 2000, 100, 1e-3, (0.9, 0.99), 1e-8, 0.1, 1.0


def corpus():
    """Ids of the characters to train on and of those held out, and how many different ones there are."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)[1] + SPECIAL
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], int(ids.max()) + 1


def batches(ids, steps, seed=0):
    starts = np.random.default_rng(seed).integers(0, len(ids) - BLOCK, (steps, BATCH))
    return ids[starts[..., None] + np.arange(BLOCK)][:, :, None]  # (steps, batch, one segment, block)


def new_model(vocabulary, seed=0):
    config = mt.Config(vocab_size=vocabulary, d_model=128, n_encoder_layers=0, n_decoder_layers=4, n_heads=4, d_ff=512)
    return mt.Transformer(config, seed=seed)


def trainer(vocabulary, steps):
    options = {"learning_rate": RATE, "schedule": "cosine", "warmup_steps": min(WARM_UP, steps), "total_steps": steps}
    return mt.Trainer(new_model(vocabulary), betas=BETAS, eps=EPS, weight_decay=DECAY, clip=CLIP, **options)


def mini_tfm(vocabulary, steps):
    ours = trainer(vocabulary, steps)
    return lambda target: ours.step(None, target), lambda target: ours.evaluate(Batch(None, target))


def torch(vocabulary, steps):
    torch = library("torch")
    model = TorchModel(torch, new_model(vocabulary), 0.0)
    parameters = list(model.w.values())
    groups = [
        {"params": [w for w in parameters if w.ndim > 1], "weight_decay": DECAY},
        {"params": [w for w in parameters if w.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS, fused=True)
    warm_up = min(WARM_UP, steps)

    def factor(step):
        return (step + 1) / warm_up if step < warm_up else 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, factor)

    def step(target):
        adamw.zero_grad()
        loss = model.loss(None, torch.from_numpy(target))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        adamw.step()
        schedule.step()
        return float(loss.detach())

    def evaluate(target):
        with torch.no_grad():
            return float(model.loss(None, torch.from_numpy(target)))

    return step, evaluate


def losses(name, seed=0):
    """(steps,) while training, and the mean over 40 batches of held-out text after it: nats a character."""
    train, held_out, vocabulary = corpus()
    step, evaluate = {"mini_tfm": mini_tfm, "torch": torch}[name](vocabulary, STEPS)
    while_training = np.array([step(target) for target in batches(train, STEPS, seed)])
    return while_training, float(np.mean([evaluate(target) for target in batches(held_out, 40, seed=1)]))


class CharacterModel:
    params = (LIBRARIES,)
    param_names = ["library"]
    timeout = 900

    def setup(self, name):
        library(name)

    def track_loss_held_out(self, name):
        return losses(name)[1]

    track_loss_held_out.unit = "nats / character"
