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


def norm(config, w, name, x, kind=None):
    """arXiv 1607.06450, eq. 4; arXiv 1910.07467, eq. 4."""
    rows = []
    for row in x:
        if (kind or config.norm) == "layer":
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
    """Eq. 2; arXiv 2002.05202, eq. 6 with biases."""
    if config.gated:
        return linear(w, name + ".out", activation(config.activation, linear(w, name + ".gate", x)) * linear(w, name + ".in", x))
    return linear(w, name + ".out", activation(config.activation, linear(w, name + ".in", x)))


def sinusoid(config, pos):
    """Section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos of the same; or all sines first, and
    fairseq's frequencies, which end with 1 / 10000."""
    d, pairs = config.d_model, []
    for i in range(d // 2):
        power = i / (d // 2 - 1) if config.sinusoids == "fairseq" else 2 * i / d
        pairs.append((math.sin(pos / 10000**power), math.cos(pos / 10000**power)))
    if config.sinusoids == "interleaved":
        return [x for pair in pairs for x in pair]
    return [pair[0] for pair in pairs] + [pair[1] for pair in pairs]


def frequency(config, base, i):
    """arXiv 2104.09864, section 3.2.2; scaled as arXiv 2407.21783's code or arXiv 2309.00071, section 3.2."""
    plain, scaling = base ** (-2 * i / config.rotary_dims), config.rotary_scaling
    if scaling is None:
        return plain
    wavelength = 2 * math.pi / plain
    if scaling.kind == "llama3":
        low, high = (scaling.original_positions / factor for factor in (scaling.low_factor, scaling.high_factor))
        if wavelength > low:
            return plain / scaling.factor
        if wavelength < high:
            return plain
        smooth = (scaling.original_positions / wavelength - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
        return (1 - smooth) * plain / scaling.factor + smooth * plain
    assert scaling.kind == "yarn"
    ends = [
        config.rotary_dims * math.log(scaling.original_positions / (2 * math.pi * turns)) / (2 * math.log(base))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    ]
    first, last = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), config.rotary_dims - 1)
    divided = min(max((i - first) / (last - first), 0), 1)
    return divided * plain / scaling.factor + (1 - divided) * plain


def rotate(config, x, pos, is_local):
    """arXiv 2104.09864, eq. 34, for the pairs (i, i + n) of the first 2 n numbers."""
    half, y = config.rotary_dims // 2, x.copy()
    for i in range(half):
        if is_local and config.local_rotary_base:
            angle = pos * config.local_rotary_base ** (-2 * i / config.rotary_dims)
        else:
            angle = pos * frequency(config, config.rotary_base, i)
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
    (n_heads, n_kv_heads, size, scale), layer = config.heads(site), int(name.split(".")[1])
    is_local = site == "decoder" and config.window is not None and (config.local_layers is None or layer in config.local_layers)
    q, k, v = linear(w, name + ".q", x), linear(w, name + ".k", memory), linear(w, name + ".v", memory)
    heads = []
    for h in range(n_heads):
        kv = h * n_kv_heads // n_heads
        one_q = q[:, h * size : (h + 1) * size]
        one_k, one_v = (y[:, kv * size : (kv + 1) * size] for y in (k, v))
        if config.qk_norm:
            one_q, one_k = norm(config, w, name + ".q_norm", one_q, "rms"), norm(config, w, name + ".k_norm", one_k, "rms")
        if config.positions == "rotary" and site != "cross":
            one_q, one_k = (np.array([rotate(config, row, at, is_local) for at, row in enumerate(y)]) for y in (one_q, one_k))
        rows = []
        for i in range(len(x)):
            seen = i + 1 if causal else len(memory)
            scores = [one_q[i] @ one_k[j] * scale for j in range(seen)]
            if config.attention_cap:
                scores = [config.attention_cap * math.tanh(s / config.attention_cap) for s in scores]
            if config.positions == "relative" and site != "cross":
                table = w[site + ".relative_bias.weight"]
                scores = [s + table[bucket(config, j - i, site == "encoder"), h] for j, s in enumerate(scores)]
            first = max(0, i + 1 - config.window) if is_local else 0
            rows.append(sum(p * one_v[first + j] for j, p in enumerate(softmax(scores[first:]))))
        heads.append(np.array(rows))
    return linear(w, name + ".o", np.concatenate(heads, axis=1))


def ssru(w, name, x):
    """Kim et al., 2019 (ACL Anthology D19-5632): a gate of its own for each number, and what was there before fades."""
    fresh, forget, state, rows = linear(w, name + ".in", x), linear(w, name + ".forget", x), np.zeros(x.shape[1]), []
    for one, gate in zip(fresh, 1 / (1 + np.exp(-forget)), strict=True):
        state = gate * state + (1 - gate) * one
        rows.append([max(a, 0.0) for a in state])
    return np.array(rows)


def sublayer(config, w, name, x, f):
    """Section 5.4, LayerNorm(x + Sublayer(x)); or arXiv 2002.04745, x + Sublayer(LayerNorm(x))."""
    if config.norm_position == "post":
        return norm(config, w, name + "_norm", x + f(x))
    if config.norm_position == "output":
        return x + norm(config, w, name + "_norm", f(x))
    if config.norm_position == "sandwich":
        return x + norm(config, w, name + "_output_norm", f(norm(config, w, name + "_norm", x)))
    return x + f(norm(config, w, name + "_norm", x))


def embed(config, w, stack, tokens):
    rows = []
    for pos, token in enumerate(tokens):
        row = w["embedding.weight"][token] * (math.sqrt(config.d_model) if config.embedding_scale else 1)
        if config.positions == "sinusoidal":
            row = row + sinusoid(config, config.position_offset + pos)
        elif config.positions == "learned":
            row = row + w[stack + ".positions.weight"][config.position_offset + pos]
        if config.token_types and stack == "encoder":
            row = row + w["encoder.token_types.weight"][0]
        rows.append(row)
    return norm(config, w, stack + ".embedding_norm", rows) if config.embedding_norm else np.array(rows)


def encode(config: Config, w, source):
    x = embed(config, w, "encoder", source)
    for i in range(config.n_encoder_layers):
        name = f"encoder.{i}."
        x = sublayer(config, w, name + "attention", x, lambda y, n=name: attention(config, w, n + "attention", y, y, "encoder", False))
        x = sublayer(config, w, name + "feed_forward", x, lambda y, n=name: feed_forward(config, w, n + "feed_forward", y))
    return norm(config, w, "encoder.norm", x) if config.final_norm else x


def logits(config: Config, w, source, target):
    """(T, V) for one source (None without an encoder) and one target, both at their true length."""
    memory = encode(config, w, source) if source is not None else None
    first = source[-1] if config.continues_source and len(source) else config.bos_id
    x = embed(config, w, "decoder", [first, *target[:-1]])
    for i in range(config.n_decoder_layers):
        name = f"decoder.{i}."
        if config.decoder_mixer == "ssru":
            x = sublayer(config, w, name + "ssru", x, lambda y, n=name: ssru(w, n + "ssru", y))
        else:
            x = sublayer(config, w, name + "attention", x, lambda y, n=name: attention(config, w, n + "attention", y, y, "decoder", True))
        if memory is not None:
            x = sublayer(config, w, name + "cross", x, lambda y, n=name: attention(config, w, n + "cross", y, memory, "cross", False))
        x = sublayer(config, w, name + "feed_forward", x, lambda y, n=name: feed_forward(config, w, n + "feed_forward", y))
    x = norm(config, w, "decoder.norm", x) if config.final_norm else x
    scores = x * (config.output_scale or 1) @ (w["embedding.weight"].T if config.tie_embeddings else w["output.weight"])
    scores = scores + w["output.bias"] if config.output_bias else scores
    return config.output_cap * np.tanh(scores / config.output_cap) if config.output_cap else scores
