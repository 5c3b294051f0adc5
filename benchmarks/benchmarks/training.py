"""A step of training, forward, backward and AdamW, beside the same model in PyTorch: eager or compiled, whichever is quicker.

The two start from the same weights and see the same batches; without dropout their losses are the same. With it each draws
its own masks at the same places: embeddings, attention weights, hidden layers, sublayers' outputs. With bfloat16 ours rounds the
factors of products (`Trainer(bfloat16=True)`), PyTorch runs the loss under its autocast; left out where the processor has no such
products.
"""

import resource

import numpy as np

import mini_tfm as mt
from mini_tfm import _core

from .common import LIBRARIES, Workers, _AgainstTorch, _Task, relative_error

RATE, BETAS, EPS = 1e-3, (0.9, 0.98), 1e-9
STEPS = 5  # whose losses are compared
COMPILE = True


def encoder_decoder(d, layers, heads, d_ff, vocabulary, batch, length, dropout, bfloat16=False):
    config = {
        "d_model": d,
        "n_encoder_layers": layers,
        "n_decoder_layers": layers,
        "n_heads": heads,
        "d_ff": d_ff,
        "vocab_size": vocabulary,
    }
    return {"config": config, "shape": (batch, 1, length), "dropout": dropout, "bfloat16": bfloat16}


def recurrent(d, layers, heads, d_ff, vocabulary, batch, segments, length, rows):
    config = {"d_model": d, "n_encoder_layers": 0, "n_decoder_layers": layers, "n_heads": heads, "d_ff": d_ff, "vocab_size": vocabulary}
    return {"config": config, "shape": (batch, segments, length), "dropout": 0.0, "bfloat16": False, "rows": rows}


# The names say: d_model, layers, batch x tokens of source and target, dropout, what factors of products are rounded to.
ROWS = {
    "d 128, 2 + 2, 16 x (128 + 128)": encoder_decoder(128, 2, 4, 512, 256, 16, 128, 0.0),
    "d 128, 2 + 2, 16 x (128 + 128), dropout 0.1": encoder_decoder(128, 2, 4, 512, 256, 16, 128, 0.1),
    "d 128, 2 + 2, 16 x (128 + 128), dropout 0.1, bfloat16": encoder_decoder(128, 2, 4, 512, 256, 16, 128, 0.1, True),
    "d 256, 4 + 4, 16 x (256 + 256)": encoder_decoder(256, 4, 8, 1024, 256, 16, 256, 0.0),
    "d 256, 4 + 4, 16 x (256 + 256), dropout 0.1": encoder_decoder(256, 4, 8, 1024, 256, 16, 256, 0.1),
    "d 256, 4 + 4, 16 x (256 + 256), dropout 0.1, bfloat16": encoder_decoder(256, 4, 8, 1024, 256, 16, 256, 0.1, True),
    "d 512, 6 + 6, 4 x (128 + 128)": encoder_decoder(512, 6, 8, 2048, 8000, 4, 128, 0.0),
    "d 512, 6 + 6, 4 x (128 + 128), dropout 0.1": encoder_decoder(512, 6, 8, 2048, 8000, 4, 128, 0.1),
    "d 512, 6 + 6, 4 x (128 + 128), dropout 0.1, bfloat16": encoder_decoder(512, 6, 8, 2048, 8000, 4, 128, 0.1, True),
    "RMT: d 128, 4, 32 x 4 segments of 32, 12 rows": recurrent(128, 4, 4, 512, 256, 32, 4, 32, 12),
}
TINY_ROWS = {
    "tiny": encoder_decoder(16, 1, 2, 24, 13, 3, 5, 0.0),
    "tiny, dropout": encoder_decoder(16, 1, 2, 24, 13, 3, 5, 0.1),
    "tiny, bfloat16": encoder_decoder(16, 1, 2, 24, 13, 3, 5, 0.0, True),
    "tiny RMT": recurrent(16, 2, 2, 24, 13, 3, 3, 4, 2),
}
ALL = {**ROWS, **TINY_ROWS}


def make_model(row):
    model = mt.Transformer(mt.Config(**row["config"]), seed=0)
    model.add_memory_weights(make_memory(row))
    return model


def make_memory(row):
    return mt.memory("recurrent", tokens=row["rows"]) if "rows" in row else None


def make_step(row, dtype="float32"):
    """A function of a batch (source or None, target) that takes a step and gives its loss."""
    single = make_model(row)
    model = mt.Transformer(single.config, dtype=dtype, weights={name: w.astype(dtype) for name, w in single.weights.items()})
    options = {"learning_rate": RATE, "schedule": "constant", "betas": BETAS, "eps": EPS, "clip": None, "weight_decay": 0.0}
    trainer = mt.Trainer(model, make_memory(row), dropout=row["dropout"], bfloat16=row["bfloat16"], **options)
    return trainer.step


def make_batch(row, seed=1):
    source, target = np.random.default_rng(seed).integers(3, row["config"]["vocab_size"], (2, *row["shape"]))
    return (source, target) if row["config"]["n_encoder_layers"] else (None, target)


class Step(_Task):
    params = (list(ROWS), LIBRARIES)
    timeout = 900
    gradient = in_place = True

    def make(self, size):
        return ALL[size], *make_batch(ALL[size])

    def setup(self, size, library):
        self.step = next(iter(self.ways(size, library).values()))
        self.step()

    def time_step(self, size, library):
        self.step()

    def track_error_loss(self, size, library):
        """Of the losses of some steps without dropout, which have the gradients in them."""
        row = {**ALL[size], "dropout": 0.0}
        exact = {**row, "bfloat16": False}
        batch = make_batch(row)
        if library == "mini_tfm":
            step = make_step(row)
        else:
            from .common import library as import_library

            step = torch_step(import_library("torch"), row)
        want = make_step(exact, "float64")
        return relative_error([step(*batch) for _ in range(STEPS)], [want(*batch) for _ in range(STEPS)])

    track_error_loss.unit = "|error| / |loss|"

    def mini_tfm(self, kernels, row, source, target):
        if row["bfloat16"] and not _core.show_config()["isa"].endswith("bf16"):
            raise NotImplementedError("this processor has no products of bfloat16")
        step = make_step(row)
        return lambda: step(source, target)

    def torch(self, torch, row, source, target):
        source, target = (None if x is None else x.numpy() for x in (source, target))
        ways = {}
        for how in ("eager", "compiled") if COMPILE else ("eager",):
            step = torch_step(torch, row, how == "compiled")
            ways[how] = lambda step=step: step(source, target)
        try:
            ways[how]()
        except Exception:  # no compiler: eager is the best there is
            del ways[how]
        return ways


def peak_of_steps(name, library):
    """Bytes of RAM that this process has had at most, after three steps; of torch's eager ones."""
    global COMPILE
    COMPILE = False  # a compiler's RAM is another matter
    ways = Step().ways(name, library)
    for _ in range(3):
        next(iter(ways.values()))()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_in_a_process(name, library, n_threads):
    worker = Workers.start(n_threads)
    try:
        return worker.ask("run", peak_of_steps, name, library)
    finally:
        worker.close()


class StepAgainstTorch(_AgainstTorch):
    kernel = Step
    pairs = 7
    timeout = 900


# The same in PyTorch


def torch_step(torch, row, compiled=False):
    """A step of the same model from the same weights, on a batch of arrays."""
    model = TorchModel(torch, make_model(row), row["dropout"])
    adamw = torch.optim.AdamW(model.w.values(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    loss_of = torch.compile(model.loss) if compiled else model.loss
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=row["bfloat16"])

    def step(source, target):
        adamw.zero_grad()
        with autocast:
            loss = loss_of(None if source is None else torch.from_numpy(source), torch.from_numpy(target))
        loss.backward()
        adamw.step()
        return float(loss.detach())

    return step


class TorchModel:
    """A model of ours with norms in front, sinusoidal positions and tied embeddings, in PyTorch as one would write it for speed.

    Projections of one input are one product; with `recurrent`'s rows as memory, in front to be read and behind to be written.
    """

    def __init__(self, torch, model, dropout):
        self.torch, self.config, self.dropout = torch, model.config, dropout
        raw, self.w = {name: torch.from_numpy(w.copy()) for name, w in model.weights.items()}, {}
        groups = {"attention.": ("qkv", ["q", "k", "v"]), "cross.": ("kv", ["k", "v"])}
        for name, value in raw.items():
            stem, _, kind = name.rpartition(".")
            site, part = stem[: stem.rfind(".") + 1], stem.rpartition(".")[2]
            joined, members = next((g for s, g in groups.items() if site.endswith(s)), ("", []))
            if part in members:
                if part != members[0]:
                    continue
                value, stem = torch.cat([raw[f"{site}{member}.{kind}"] for member in members], dim=-1), site + joined
            linear = kind == "weight" and value.ndim == 2 and stem != "embedding"
            self.w[f"{stem}.{kind}"] = torch.nn.Parameter(value.T.contiguous() if linear else value)
        self.positions = torch.from_numpy(mt.sinusoidal_positions(1024, model.config.d_model))
        self.rows = self.w.get("memory.recurrent.tokens")

    def loss(self, source, target):
        """Of (B, n, S) or no source, and (B, n, T) target ids."""
        torch, w, functional = self.torch, self.w, self.torch.nn.functional
        hidden, state, first = [], None, torch.full((len(target), 1), self.config.bos_id)
        if self.rows is not None:
            state = self.rows.expand(len(target), -1, -1)
        for t in range(target.shape[1]):
            encoded = None if source is None else self._encode(source[:, t])
            inputs = torch.cat([first, target[:, t, :-1]], dim=1)
            out, state = self._decode(inputs, encoded, state)
            hidden.append(out)
            first = target[:, t, -1:] if source is None else first
        logits = functional.linear(torch.stack(hidden, dim=1), w["embedding.weight"])
        return functional.cross_entropy(logits.flatten(0, 2), target.flatten())

    def _encode(self, tokens):
        x = self._embed(tokens)
        for i in range(self.config.n_encoder_layers):
            x = x + self._drop(self._attend(f"encoder.{i}.attention", self._norm(f"encoder.{i}.attention_norm", x)))
            x = x + self._drop(self._feed_forward(f"encoder.{i}.feed_forward", self._norm(f"encoder.{i}.feed_forward_norm", x)))
        return self._norm("encoder.norm", x)

    def _decode(self, tokens, encoded, state):
        x, mask = self._embed(tokens), None
        if state is not None:
            rows = state.shape[1]
            x = self.torch.cat([state, x, state], dim=1)
            mask = self.torch.ones(x.shape[1], x.shape[1], dtype=self.torch.bool).tril()
            mask[:, :rows] = True
        for i in range(self.config.n_decoder_layers):
            name = f"decoder.{i}."
            x = x + self._drop(self._attend(name + "attention", self._norm(name + "attention_norm", x), mask=mask, causal=mask is None))
            if encoded is not None:
                x = x + self._drop(self._attend(name + "cross", self._norm(name + "cross_norm", x), encoded))
            x = x + self._drop(self._feed_forward(name + "feed_forward", self._norm(name + "feed_forward_norm", x)))
        x = self._norm("decoder.norm", x)
        return (x, None) if state is None else (x[:, rows:-rows], x[:, -rows:])

    def _embed(self, tokens):
        x = self.torch.nn.functional.embedding(tokens, self.w["embedding.weight"]) * self.config.d_model**0.5
        return self._drop(x + self.positions[: tokens.shape[1]])

    def _attend(self, name, x, encoded=None, *, mask=None, causal=False):
        if encoded is None:
            q, k, v = self._linear(name + ".qkv", x).chunk(3, dim=-1)
        else:
            q, (k, v) = self._linear(name + ".q", x), self._linear(name + ".kv", encoded).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2) for part in (q, k, v))
        attention = self.torch.nn.functional.scaled_dot_product_attention
        out = attention(q, k, v, mask, self.dropout, causal, scale=self.config.attention_scale)
        return self._linear(name + ".o", out.transpose(1, 2).flatten(2))

    def _feed_forward(self, name, x):
        return self._linear(name + ".out", self._drop(self.torch.nn.functional.relu(self._linear(name + ".in", x))))

    def _linear(self, name, x):
        return self.torch.nn.functional.linear(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def _norm(self, name, x):
        functional, w = self.torch.nn.functional, self.w
        return functional.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], self.config.norm_eps)

    def _drop(self, x):
        return self.torch.nn.functional.dropout(x, self.dropout) if self.dropout else x
