"""The kernels a third time, as dumb as they can be: Python floats, loops, dense masks, nothing shared with the library.

Everything is float64. These define what the tests expect for ordinary finite values; infinities and NaN have a table of
their own in test_special_values.py.
"""

import math

import numpy as np


def each_row(function, x, *more):
    """`function` of every row of the last axis (and of the same rows of `more`), put together in x's shape."""
    y = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:-1]):
        y[at] = function(*(a[at].astype(np.float64).tolist() for a in (x, *more)))
    return y


def gemm(a, b):
    out = np.zeros((a.shape[0], b.shape[1]))
    for k in range(a.shape[1]):
        out += a[:, k, None].astype(np.float64) * b[None, k].astype(np.float64)
    return out


def log_sum_exp(row):
    top = max(row)
    return top + math.log(math.fsum(math.exp(x - top) for x in row))


def softmax(x):
    def row(row):
        lse = log_sum_exp(row)
        return [math.exp(value - lse) for value in row]

    return each_row(row, x)


def log_softmax(x):
    def row(row):
        lse = log_sum_exp(row)
        return [value - lse for value in row]

    return each_row(row, x)


def softmax_backward(y, dy):
    def row(y, dy):
        inner = math.fsum(a * b for a, b in zip(y, dy, strict=True))
        return [a * (b - inner) for a, b in zip(y, dy, strict=True)]

    return each_row(row, y, dy)


def normed(row, eps, centre):
    """The normalised row, its mean and its rstd; `centre` tells the two norms apart."""
    mean = math.fsum(row) / len(row) if centre else 0.0
    rstd = 1.0 / math.sqrt(math.fsum((x - mean) ** 2 for x in row) / len(row) + eps)
    return [(x - mean) * rstd for x in row], mean, rstd


def norm(x, weight, bias, eps, centre):
    """y, mean, rstd."""
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
    rows = [normed(row.tolist(), eps, centre) for row in flat]
    y = np.array([row for row, _, _ in rows]).reshape(x.shape) * weight + (0.0 if bias is None else bias)
    return y, np.array([mean for _, mean, _ in rows]), np.array([rstd for _, _, rstd in rows])


def norm_jacobian(row, eps, centre):
    """d normed[i] / d x[j], (d, d), by the quotient rule written out."""
    d = len(row)
    n, _, rstd = normed(row, eps, centre)
    kept = np.eye(d) - (1.0 / d if centre else 0.0)
    return rstd * (kept - np.outer(n, n) / d)


def norm_backward(dy, x, weight, eps, centre):
    """dx, dweight, dbias."""
    dx, dweight, dbias = np.zeros(x.shape), np.zeros(x.shape[-1]), np.zeros(x.shape[-1])
    for at in np.ndindex(x.shape[:-1]):
        row, g = x[at].astype(np.float64).tolist(), dy[at].astype(np.float64)
        dx[at] = (g * weight) @ norm_jacobian(row, eps, centre)
        dweight += g * normed(row, eps, centre)[0]
        dbias += g
    return dx, dweight, dbias


def phi(x):
    """The normal distribution function."""
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x)) if x > 0 else math.exp(x) / (1.0 + math.exp(x))


ACTIVATIONS = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * phi(x),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * sigmoid(x),
}


def gelu_tanh_slope(x):
    u, du = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3), math.sqrt(2.0 / math.pi) * (1.0 + 3 * 0.044715 * x**2)
    return 0.5 * (1.0 + math.tanh(u)) + 0.5 * x * (1.0 - math.tanh(u) ** 2) * du


SLOPES = {
    "relu": lambda x: 1.0 if x > 0 else 0.0,
    "gelu": lambda x: phi(x) + x * math.exp(-x * x / 2.0) / math.sqrt(2.0 * math.pi),
    "gelu_tanh": gelu_tanh_slope,
    "silu": lambda x: sigmoid(x) * (1.0 + x * sigmoid(-x)),
}


def cross_entropy(logits, targets, ignore_index, smoothing):
    """losses, lse: the expectation of -log softmax under the smoothed one-hot distribution."""
    losses, lse = np.zeros(len(logits)), np.zeros(len(logits))
    for n, (row, target) in enumerate(zip(logits.astype(np.float64).tolist(), targets.tolist(), strict=True)):
        if target != ignore_index:
            lse[n] = log_sum_exp(row)
            wanted = [smoothing / len(row) + (1.0 - smoothing if v == target else 0.0) for v in range(len(row))]
            losses[n] = math.fsum(p * (lse[n] - x) for p, x in zip(wanted, row, strict=True))
    return losses, lse


def cross_entropy_backward(logits, targets, dlosses, ignore_index, smoothing):
    dlogits = np.zeros(logits.shape)
    vocab = logits.shape[1]
    for n, target in enumerate(targets.tolist()):
        if target != ignore_index:
            row = logits[n].astype(np.float64).tolist()
            lse = log_sum_exp(row)
            for v in range(vocab):
                wanted = smoothing / vocab + (1.0 - smoothing if v == target else 0.0)
                dlogits[n, v] = (math.exp(row[v] - lse) - wanted) * float(dlosses[n])
    return dlogits


def logits(x, weight, bias, transposed):
    return gemm(x, weight.T if transposed else weight) + (0.0 if bias is None else bias.astype(np.float64))


def linear_cross_entropy(x, weight, targets, bias, transposed, ignore_index, smoothing):
    return cross_entropy(logits(x, weight, bias, transposed), targets, ignore_index, smoothing)


def linear_cross_entropy_backward(x, weight, targets, dlosses, bias, transposed, ignore_index, smoothing):
    """dx, dweight, dbias."""
    dlogits = cross_entropy_backward(logits(x, weight, bias, transposed), targets, dlosses, ignore_index, smoothing)
    dweight = gemm(x.T, dlogits)
    return gemm(dlogits, weight if transposed else weight.T), dweight.T if transposed else dweight, dlogits.sum(0)


def adamw(param, grad, m, v, lr, beta1, beta2, eps, weight_decay, step, grad_scale):
    """The new param, m and v."""
    new = np.zeros((3, len(param)))
    for i, (p, g, m_i, v_i) in enumerate(zip(param.tolist(), grad.tolist(), m.tolist(), v.tolist(), strict=True)):
        g *= grad_scale
        m_i = beta1 * m_i + (1.0 - beta1) * g
        v_i = beta2 * v_i + (1.0 - beta2) * g * g
        m_hat, v_hat = m_i / (1.0 - beta1**step), v_i / (1.0 - beta2**step)
        new[:, i] = p - lr * weight_decay * p - lr * m_hat / (math.sqrt(v_hat) + eps), m_i, v_i
    return new


def sinusoidal_positions(n, d_model):
    table = np.zeros((n, d_model))
    for position in range(n):
        for column in range(d_model):
            angle = position / 10000 ** (2 * (column // 2) / d_model)
            table[position, column] = math.cos(angle) if column % 2 else math.sin(angle)
    return table


def recurrence(x, forget, state):
    """c, and the last of them."""
    c, last = np.zeros(x.shape), state.astype(np.float64)
    for b, t, i in np.ndindex(x.shape):
        f = 1.0 / (1.0 + math.exp(-float(forget[b, t, i])))
        last[b, i] = c[b, t, i] = f * last[b, i] + (1.0 - f) * float(x[b, t, i])
    return c, last


def rotary(x, positions, frequencies, inverse):
    batch, _, length, _ = x.shape
    y, n = x.astype(np.float64), len(frequencies)
    for b, t, i in np.ndindex(batch, length, n):
        position = int(positions[b, t] if positions.ndim == 2 else positions[t])
        turn = np.exp((-1j if inverse else 1j) * position * frequencies[i])
        z = (x[b, :, t, i].astype(np.float64) + 1j * x[b, :, t, i + n]) * turn
        y[b, :, t, i], y[b, :, t, i + n] = z.real, z.imag
    return y


def search(queries, bank, k, valid, scales=None):
    """scores, index: every row is scored, times its scale, sorted by (-score, row)."""
    batch, n, _ = queries.shape
    scores, index = np.full((batch, n, k), -np.inf), np.full((batch, n, k), -1)
    scale = np.ones(bank.shape[:2]) if scales is None else scales.astype(np.float64)
    for b, i in np.ndindex(batch, n):
        rows = [
            (-math.fsum(x * y for x, y in zip(queries[b, i].tolist(), row.tolist(), strict=True)) * scale[b, j], j)
            for j, row in enumerate(bank[b])
            if valid is None or valid[b, j]
        ]
        for place, (score, j) in enumerate(sorted(rows)[:k]):
            scores[b, i, place], index[b, i, place] = -score, j
    return scores, index


def gradient(function, x, dy, step=1e-5):
    """d(sum(dy * function(x))) / dx by central differences, element by element, of a float64 function of a float64 x."""
    dx = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[at] += sign * step
            ends.append((dy * function(moved)).sum())
        dx[at] = (ends[0] - ends[1]) / (2 * step)
    return dx
