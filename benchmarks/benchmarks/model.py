"""The model at work: encoding, generating, a training step. Its weights are random: speed does not depend on them."""

import numpy as np

import mini_tfm as mt
from mini_tfm.stream import Stream

from .common import LIBRARIES, _AgainstTorch, _Task, relative_error

MODELS = {
    "1.0 M": {"vocab_size": 1000, "d_model": 128, "n_heads": 4, "n_encoder_layers": 2, "n_decoder_layers": 2},
    "52 M": {"vocab_size": 8000, "d_model": 512, "n_heads": 8, "n_encoder_layers": 6, "n_decoder_layers": 6},
}
NEW_TOKENS = 64
TRAINED_ON = {"1.0 M": (16, 128), "52 M": (4, 128)}  # (batch, tokens) of source and target
RATE = 1e-3


def make_model(name, dtype="float32"):
    return mt.Transformer(mt.Config(**MODELS[name]), seed=0, dtype=dtype)


def in_double(model):
    return mt.Transformer(model.config, dtype="float64", weights={name: w.astype(np.float64) for name, w in model.weights.items()})


def tokens(name, *shape, seed=0):
    return np.random.default_rng(seed).integers(3, MODELS[name]["vocab_size"], shape)


class Encode:
    """(batch, source) tokens; `ragged` rows are between a half and all of it long."""

    params = (list(MODELS), [(1, 32), (32, 64)], ["full", "ragged"])
    param_names = ["model", "shape", "lengths"]

    def setup(self, name, shape, lengths):
        self.model, self.tokens = make_model(name), tokens(name, *shape)
        self.lengths = np.random.default_rng(1).integers(shape[1] // 2, shape[1] + 1, shape[0]) if lengths == "ragged" else None
        self.hidden = self.model.encode(self.tokens, self.lengths)

    def time_encode(self, name, shape, lengths):
        self.model.encode(self.tokens, self.lengths)

    def track_error_encode(self, name, shape, lengths):
        return relative_error(self.hidden, in_double(self.model).encode(self.tokens, self.lengths))

    track_error_encode.unit = "max |error| / max |value|"


class Generate:
    """64 new tokens, greedy, for (batch, source) tokens."""

    params = (list(MODELS), [(1, 32), (8, 64)])
    param_names = ["model", "shape"]
    timeout = 300

    def setup(self, name, shape):
        self.model, self.source = make_model(name), tokens(name, *shape)
        self._generate(4)

    def _generate(self, count=NEW_TOKENS):
        return self.model.generate(self.source, max_new_tokens=count, stop_at_eos=False)

    def time_generate(self, name, shape):
        self._generate()

    def track_tokens_per_second(self, name, shape):
        from .common import seconds

        return shape[0] * NEW_TOKENS / min(seconds(self._generate) for _ in range(3))

    track_tokens_per_second.unit = "tokens/s"

    def track_error_generate(self, name, shape):
        """How much less likely, in nats, a token was than the likeliest, by the decoder that sees all at once, in float64."""
        made = np.array(self._generate())
        scores = in_double(self.model).logits(self.source, made)
        return float(np.max(scores.max(axis=-1) - np.take_along_axis(scores, made[..., None], -1)[..., 0]))

    track_error_generate.unit = "nats"


class TrainingStep(_Task):
    """Forward, backward and AdamW on a batch of `TRAINED_ON`. torch trains the same model from the same weights."""

    params = (list(MODELS), LIBRARIES)
    param_names = ["model", "library"]
    timeout = 300
    gradient = in_place = True

    def make(self, name):
        return (name, *(tokens(name, *TRAINED_ON[name], seed=seed) for seed in (1, 2)))

    def setup(self, name, library):
        (self.step,) = self.ways(name, library).values()
        self.first_loss = self.step()

    def time_step(self, name, library):
        self.step()

    def track_error_loss(self, name, library):
        """Of the first step's loss and of the one after it, which has the gradient in it."""
        want = self._step(in_double(make_model(name)), *self.make(name)[1:])
        return relative_error((self.first_loss, self.step()), (want(), want()))

    track_error_loss.unit = "|error| / |loss|"

    def mini_tfm(self, kernels, name, source, target):
        return self._step(make_model(name), source, target)

    def _step(self, model, source, target):
        trainer = mt.Trainer(model, learning_rate=RATE, clip=None, weight_decay=0.0)
        return lambda: trainer.step(source, target)

    def torch(self, torch, name, source, target):
        ours = make_model(name)
        theirs, embedding = as_torch(torch, ours)
        adamw = torch.optim.AdamW([*theirs.parameters(), embedding], lr=RATE, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0, fused=True)
        inputs = torch.from_numpy(Stream(ours, None, len(target)).shifted(target.numpy()))
        length, d = target.shape[1], ours.config.d_model
        positions = torch.from_numpy(mt.sinusoidal_positions(max(length, source.shape[1]), d))
        mask = torch.nn.Transformer.generate_square_subsequent_mask(length)

        def embed(ids):
            return torch.nn.functional.embedding(ids, embedding) * d**0.5 + positions[: ids.shape[1]]

        def step():
            adamw.zero_grad()
            hidden = theirs(embed(source), embed(inputs), tgt_mask=mask, tgt_is_causal=True)
            loss = torch.nn.functional.cross_entropy((hidden @ embedding.T).flatten(0, 1), target.flatten())
            loss.backward()
            adamw.step()
            return float(loss.detach())

        return step


class TrainingStepAgainstTorch(_AgainstTorch):
    kernel = TrainingStep
    pairs = 7


def as_torch(torch, model):
    """torch.nn.Transformer with the weights of `model` (the paper's architecture, norms first), and its embedding."""
    config = model.config
    w = {name: torch.from_numpy(value.copy()) for name, value in model.weights.items()}
    theirs = torch.nn.Transformer(
        config.d_model,
        config.n_heads,
        config.n_encoder_layers,
        config.n_decoder_layers,
        config.d_ff,
        dropout=0.0,
        layer_norm_eps=config.norm_eps,
        batch_first=True,
        norm_first=True,
    )
    loaded = {}
    for stack, count in (("encoder", config.n_encoder_layers), ("decoder", config.n_decoder_layers)):
        for kind in ("weight", "bias"):
            flip = (lambda x: x.T) if kind == "weight" else (lambda x: x)  # torch keeps (d_out, d_in)
            loaded[f"{stack}.norm.{kind}"] = w[f"{stack}.norm.{kind}"]
            for i in range(count):
                name, place = f"{stack}.{i}", f"{stack}.layers.{i}"
                sublayers = [("attention", "self_attn"), *([("cross", "multihead_attn")] if stack == "decoder" else [])]
                for number, (site, attention) in enumerate(sublayers, 1):
                    loaded[f"{place}.{attention}.in_proj_{kind}"] = torch.cat([flip(w[f"{name}.{site}.{part}.{kind}"]) for part in "qkv"])
                    loaded[f"{place}.{attention}.out_proj.{kind}"] = flip(w[f"{name}.{site}.o.{kind}"])
                    loaded[f"{place}.norm{number}.{kind}"] = w[f"{name}.{site}_norm.{kind}"]
                loaded[f"{place}.norm{len(sublayers) + 1}.{kind}"] = w[f"{name}.feed_forward_norm.{kind}"]
                for part, linear in (("in", "linear1"), ("out", "linear2")):
                    loaded[f"{place}.{linear}.{kind}"] = flip(w[f"{name}.feed_forward.{part}.{kind}"])
    theirs.load_state_dict(loaded)
    return theirs, torch.nn.Parameter(w["embedding.weight"])
