"""infini, gated_delta and titans give what their papers' equations give, token by token in plain NumPy."""

import sys
from pathlib import Path

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.testing.trial import Reader, random_segments, small_model

sys.path.insert(0, str(Path(__file__).parent))
from plain import GROUP, HEAD, HEADS, KV_HEADS, D, causal, heads, inputs, model, outputs, sigmoid


def with_parameters(name):
    """A model, and random values for the memory's parameters in place of those they begin with: {name: array}."""
    made, memory = model(), mt.memory(name)
    made.add_memory_weights(memory, seed=1)
    prefix, rng = f"memory.{memory.name}.", np.random.default_rng(2)
    mine = {key.removeprefix(prefix): value for key, value in made.weights.items() if key.startswith(prefix)}
    for value in mine.values():
        value[...] += 0.5 * rng.standard_normal(value.shape)
    return made, memory, {key: value[0] for key, value in mine.items()}  # of the one layer


def elu_plus_one(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def direction(x):
    x = x * sigmoid(x)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def infini(rule):
    """(learn, answer) of one key head, whose function is a dict."""

    def learn(f, k, v, x, rate):
        k = elu_plus_one(k)
        M, z = f.setdefault("M", np.zeros((HEAD, HEAD))), f.setdefault("z", np.zeros(HEAD))
        known = k @ M / (k @ z)[:, None] if rule == "delta" and z.any() else 0
        f["M"], f["z"] = M + k.T @ (v - known), z + k.sum(axis=0)

    def answer(f, q):
        q = elu_plus_one(q)
        return q @ f["M"] / (q @ f["z"])[:, None]

    return learn, answer


def gated_delta():
    def learn(f, k, v, x, rate):
        M = f.setdefault("M", np.zeros((HEAD, HEAD)))
        for t, k_t in enumerate(direction(k)):
            alpha = np.exp(-np.exp(rate["log_rate"]) * np.log1p(np.exp(x[t] @ rate["alpha"] + rate["alpha_bias"])))
            beta = sigmoid(x[t] @ rate["beta"] + rate["beta_bias"])
            M = alpha * (np.eye(HEAD) - beta * np.outer(k_t, k_t)) @ M + beta * np.outer(k_t, v[t])
        f["M"] = M

    return learn, lambda f, q: direction(q) @ f["M"]


def titans(depth, chunk):
    """The gradients are those of finite differences: of a loss that is written down once more."""

    def of(Ms, k):
        if depth == 1:
            return k @ Ms[0]
        z = k @ Ms[0]
        return (z * sigmoid(z)) @ Ms[1]

    def gradient(Ms, k, v):
        found = []
        for i, M in enumerate(Ms):
            slope = np.zeros_like(M)
            for at in np.ndindex(M.shape):
                sides = []
                for step in (1e-5, -1e-5):
                    moved = [each.copy() for each in Ms]
                    moved[i][at] += step
                    sides.append(0.5 * ((of(moved, k) - v) ** 2).sum())
                slope[at] = (sides[0] - sides[1]) / 2e-5
            found.append(slope)
        return found

    def learn(f, k, v, x, rate):
        begin = [rate[name] for name in ("M1", "M2")] if depth == 2 else [np.zeros((HEAD, HEAD))]
        Ms = f.setdefault("M", begin)
        Ss = f.setdefault("S", [np.zeros_like(M) for M in Ms])
        for t, k_t in enumerate(direction(k)):
            alpha, eta, theta = (sigmoid(x[t] @ rate[name] + rate[name + "_bias"]) for name in ("alpha", "eta", "theta"))
            if t % chunk == 0:
                at = Ms
            slopes = gradient(at, k_t, v[t])
            Ss = [eta * S - (1 - eta) * theta / chunk * slope for S, slope in zip(Ss, slopes, strict=True)]
            Ms = [(1 - alpha) * M + S for M, S in zip(Ms, Ss, strict=True)]
        f["M"], f["S"] = Ms, Ss

    return learn, lambda f, q: of(f["M"], direction(q))


PAPERS = {
    "infini:rule=linear": infini("linear"),
    "infini:rule=delta": infini("delta"),
    "gated_delta": gated_delta(),
    "titans:chunk=1": titans(1, 1),
    "titans:chunk=4": titans(1, 4),
    "titans:depth=2,chunk=1": titans(2, 1),
    "titans:depth=2,chunk=3": titans(2, 3),
}


@pytest.mark.parametrize("length", [4, 10])
@pytest.mark.parametrize("name", PAPERS)
def test_each_segment_is_answered_by_what_was_learned_before_it(name, length):
    made, memory, parameters = with_parameters(name)
    learn, answer = PAPERS[name]
    x, functions = inputs(made), [{} for _ in range(KV_HEADS)]
    share = sigmoid(parameters["gate"])
    for start, got in zip(range(0, len(x), length), outputs(made, memory, length), strict=True):
        rows = x[start : start + length]
        q, k, v = (heads(made, rows, part) for part in "qkv")
        expected = causal(made, rows)
        for h in range(HEADS) if start else ():
            expected[h] = share[h] * answer(functions[GROUP[h]], q[h]) + (1 - share[h]) * expected[h]
        np.testing.assert_allclose(got, expected, atol=1e-7)
        for g, function in enumerate(functions):
            rate = {key: value[..., g] if value.shape in ((D, KV_HEADS), (KV_HEADS,)) else value[g] for key, value in parameters.items()}
            learn(function, k[g], v[g], rows, rate)


@pytest.mark.parametrize("name", ["infini", "gated_delta", "titans", "titans:depth=2"])
def test_its_size_does_not_depend_on_what_was_read(name):
    made = small_model("decoder-only")
    made.add_memory_weights(memory := mt.memory(name))
    reader = Reader(made, memory, 1)
    sizes = [reader.run.nbytes() for tokens in random_segments(1, 6) if reader.read(tokens) is not None]
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("name", ["gated_delta", "titans:chunk=16", "titans:chunk=1", "titans:depth=2,chunk=16"])
def test_it_stays_finite_where_every_token_is_the_same(name):
    """The keys of a segment all point the same way: steps that are taken together must not overshoot."""
    made = mt.Transformer(mt.Config(vocab_size=24, d_model=32, n_heads=2, n_encoder_layers=0, n_decoder_layers=1), seed=0)
    made.add_memory_weights(memory := mt.memory(name))
    reader = Reader(made, memory, 1)
    for _ in range(30):
        out = reader.read(np.full((1, 64), 5))
    held = max(np.abs(value).max() for key, value in reader.run.states[0].items() if ".M" in key)
    assert np.isfinite(out).all() and held < 100
