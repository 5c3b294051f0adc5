"""The Transformer again, written from the papers: float64, one sequence, one head and one position at a time.

Nothing of mini_tfm computes here. A sequence is given at its true length, so there is no padding and no mask: what the
library does about both must come out the same. Equation numbers are those of arXiv 1706.03762.
"""

import math

import numpy as np

from mini_tfm.config import Config


def softmax(scores):
    e = [math.exp(s - max(scores)) for s in scores]
    return [x / sum(e) for x in e]


def norm(config, w, name, x):
    """arXiv 1607.06450, eq. 4; arXiv 1910.07467, eq. 4."""
    rows = []
    for row in x:
        if config.norm == "layer":
            mean = sum(row) / len(row)
            deviation = math.sqrt(sum((a - mean) ** 2 for a in row) / len(row) + config.norm_eps)
            rows.append((row - mean) / deviation * w[name + ".weight"] + w[name + ".bias"])
        else:
            rows.append(row / math.sqrt(sum(a * a for a in row) / len(row) + config.norm_eps) * w[name + ".weight"])
    return np.array(rows)


def linear(w, name, x):
    y = x @ w[name + ".weight"]
    return y + w[name + ".bias"] if name + ".bias" in w else y


def activation(kind, x):
    one = {
        "relu": lambda a: max(a, 0.0),
        "gelu": lambda a: a * 0.5 * (1 + math.erf(a / math.sqrt(2))),  # arXiv 1606.08415
        "gelu_tanh": lambda a: 0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
        "silu": lambda a: a / (1 + math.exp(-a)),
    }[kind]
    return np.array([[one(a) for a in row] for row in x])


def feed_forward(config, w, name, x):
    """Eq. 2."""
    return linear(w, name + ".out", activation(config.activation, linear(w, name + ".in", x)))


def sinusoid(pos, d_model):
    """Section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos of the same."""
    return [(math.sin if j % 2 == 0 else math.cos)(pos / 10000 ** (2 * (j // 2) / d_model)) for j in range(d_model)]


def rotate(x, pos, base):
    """arXiv 2104.09864, eq. 34, for the pairs (i, i + D / 2): each turns by pos * base^(-2i / D)."""
    half = len(x) // 2
    y = np.empty(len(x))
    for i in range(half):
        angle = pos * base ** (-2 * i / len(x))
        y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        y[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return y


def bucket(config, distance, bidirectional):
    """arXiv 1910.10683, section 2.1: half of the buckets for one distance each, half growing with its logarithm."""
    n, start = config.relative_buckets, 0
    if bidirectional:
        n //= 2
        start = n if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(0, -distance)
    if distance < n // 2:
        return start + distance
    grown = math.log(distance / (n // 2)) / math.log(config.relative_max_distance / (n // 2)) * (n - n // 2)
    return start + min(n - 1, n // 2 + int(grown + 1e-9))


def attention(config, w, name, x, memory, site, causal):
    """Eq. 1 and section 3.2.2: queries from x (T, d), keys and values from memory (S, d)."""
    size = config.d_head
    q, k, v = linear(w, name + ".q", x), linear(w, name + ".k", memory), linear(w, name + ".v", memory)
    heads = []
    for h in range(config.n_heads):
        kv = h * config.n_kv_heads // config.n_heads
        one_q = q[:, h * size : (h + 1) * size]
        one_k, one_v = (y[:, kv * size : (kv + 1) * size] for y in (k, v))
        if config.positions == "rotary" and site != "cross":
            one_q, one_k = (np.array([rotate(row, at, config.rotary_base) for at, row in enumerate(y)]) for y in (one_q, one_k))
        rows = []
        for i in range(len(x)):
            seen = i + 1 if causal else len(memory)
            scores = [one_q[i] @ one_k[j] * config.attention_scale for j in range(seen)]
            if config.positions == "relative" and site != "cross":
                table = w[site + ".relative_bias.weight"]
                scores = [s + table[bucket(config, j - i, site == "encoder"), h] for j, s in enumerate(scores)]
            rows.append(sum(p * one_v[j] for j, p in enumerate(softmax(scores))))
        heads.append(np.array(rows))
    return linear(w, name + ".o", np.concatenate(heads, axis=1))


def sublayer(config, w, name, x, f):
    """Section 5.4, LayerNorm(x + Sublayer(x)); or arXiv 2002.04745, x + Sublayer(LayerNorm(x))."""
    if config.norm_position == "post":
        return norm(config, w, name + "_norm", x + f(x))
    return x + f(norm(config, w, name + "_norm", x))


def embed(config, w, stack, tokens):
    rows = []
    for pos, token in enumerate(tokens):
        row = w["embedding.weight"][token] * (math.sqrt(config.d_model) if config.embedding_scale else 1)
        if config.positions == "sinusoidal":
            row = row + sinusoid(pos, config.d_model)
        elif config.positions == "learned":
            row = row + w[stack + ".positions.weight"][pos]
        rows.append(row)
    return np.array(rows)


def encode(config: Config, w, source):
    x = embed(config, w, "encoder", source)
    for i in range(config.n_encoder_layers):
        name = f"encoder.{i}."
        x = sublayer(config, w, name + "attention", x, lambda y, n=name: attention(config, w, n + "attention", y, y, "encoder", False))
        x = sublayer(config, w, name + "feed_forward", x, lambda y, n=name: feed_forward(config, w, n + "feed_forward", y))
    return norm(config, w, "encoder.norm", x) if config.norm_position == "pre" else x


def logits(config: Config, w, source, target):
    """(T, V) for one source (None without an encoder) and one target, both at their true length."""
    memory = encode(config, w, source) if source is not None else None
    x = embed(config, w, "decoder", [config.bos_id, *target[:-1]])
    for i in range(config.n_decoder_layers):
        name = f"decoder.{i}."
        x = sublayer(config, w, name + "attention", x, lambda y, n=name: attention(config, w, n + "attention", y, y, "decoder", True))
        if memory is not None:
            x = sublayer(config, w, name + "cross", x, lambda y, n=name: attention(config, w, n + "cross", y, memory, "cross", False))
        x = sublayer(config, w, name + "feed_forward", x, lambda y, n=name: feed_forward(config, w, n + "feed_forward", y))
    x = norm(config, w, "decoder.norm", x) if config.norm_position == "pre" else x
    return x @ (w["embedding.weight"].T if config.tie_embeddings else w["output.weight"])
