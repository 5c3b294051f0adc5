"""The fused operations: what they compute is tested in core/, here that their gradients are the gradients."""

import math

import numpy as np
import pytest
from variants import assert_gradients

from mini_tfm import ops
from mini_tfm._core import Block
from mini_tfm.autodiff import Var, backward, value_of

B, H, T, S, D = 2, 4, 3, 5, 4


def real(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


IDS = np.array([[1, 3, 1], [0, 1, 5]])
TARGETS = np.array([2, 0, 4, 3])
WEIGHTS = np.array([1.0, 0.0, 2.5, 0.3])
VALID = np.array([[True, True, False, True, True], [False, True, True, False, True]])
INDEX = np.random.default_rng(0).integers(-1, S, (B, H, T, 3))

# name -> (function of the arrays, arrays); every array is differentiated.
CASES = {
    "linear": (lambda x, w, b: ops.linear(x, w, b), [real(2, 3, 4), real(4, 5), real(5)]),
    "linear, no bias": (ops.linear, [real(2, 3, 4), real(4, 5)]),
    "linear, transposed": (lambda x, w: ops.linear(x, w, transposed=True), [real(2, 3, 4), real(5, 4)]),
    "linear, one weight twice": (lambda x, w: ops.linear(ops.linear(x, w), w, transposed=True), [real(3, 4), real(4, 6)]),
    "linear, computed weight": (lambda x, w: ops.linear(x, np.tanh(w)), [real(3, 4), real(4, 6)]),
    "softmax": (ops.softmax, [real(2, 3, 5)]),
    "sigmoid": (ops.sigmoid, [real(2, 3)]),
    "layer norm": (lambda x, w, b: ops.norm(x, w, b, 1e-5, "layer"), [real(2, 3, 6), real(6), real(6, seed=1)]),
    "layer norm, large eps": (lambda x, w, b: ops.norm(x, w, b, 0.5, "layer"), [real(4, 6), real(6), real(6, seed=1)]),
    "layer norm, no bias": (lambda x, w: ops.norm(x, w, None, 1e-5, "layer"), [real(2, 3, 6), real(6)]),
    "rms norm": (lambda x, w: ops.norm(x, w, None, 1e-5, "rms"), [real(2, 3, 6), real(6)]),
    "relu": (lambda x: ops.activation(x, "relu"), [real(3, 5)]),
    "gelu": (lambda x: ops.activation(x, "gelu"), [real(3, 5)]),
    "gelu_tanh": (lambda x: ops.activation(x, "gelu_tanh"), [real(3, 5)]),
    "silu": (lambda x: ops.activation(x, "silu"), [real(3, 5)]),
    "embedding": (lambda table: ops.embedding(table, IDS), [real(6, 4)]),
    "embedding, used twice": (lambda table: ops.embedding(table, IDS) * ops.embedding(table, IDS[::-1]), [real(6, 4)]),
    "embedding, tied": (lambda table: ops.linear(ops.embedding(table, IDS), table, transposed=True), [real(6, 4)]),
    "cross entropy": (lambda x: ops.cross_entropy(x, TARGETS), [real(4, 5)]),
    "cross entropy, weights": (lambda x: ops.cross_entropy(x, TARGETS, WEIGHTS), [real(4, 5)]),
    "cross entropy, smoothing": (lambda x: ops.cross_entropy(x, TARGETS, WEIGHTS, 0.1), [real(4, 5)]),
    "linear cross entropy": (lambda x, w: ops.linear_cross_entropy(x, w, TARGETS), [real(4, 3), real(3, 5)]),
    "linear cross entropy, bias, weights, smoothing": (
        lambda x, w, b: ops.linear_cross_entropy(x, w, TARGETS, WEIGHTS, 0.1, bias=b),
        [real(4, 3), real(3, 5), real(5)],
    ),
    "linear cross entropy, transposed": (
        lambda x, w, b: ops.linear_cross_entropy(x, w, TARGETS.reshape(2, 2), WEIGHTS.reshape(2, 2), bias=b, transposed=True),
        [real(2, 2, 3), real(5, 3), real(5)],
    ),
    "linear cross entropy, tied": (
        lambda table: ops.linear_cross_entropy(ops.embedding(table, np.array([1, 0, 4, 2])), table, TARGETS, transposed=True),
        [real(5, 4)],
    ),
    "recurrence": (lambda x, forget: ops.recurrence(x, forget, real(B, D, seed=2).astype(x.dtype)), [real(B, 7, D), real(B, 7, D, seed=1)]),
    "recurrence, one step": (
        lambda x, forget: ops.recurrence(x, forget, np.zeros((B, D), x.dtype)),
        [real(B, 1, D), real(B, 1, D, seed=1)],
    ),
    "rms norm of heads": (lambda x, w: ops.norm(np.swapaxes(x, 1, 2), w, None, 1e-5, "rms"), [real(B, T, H, 6), real(6)]),
    "add": (ops.add, [real(3, 5), real(3, 5, seed=1)]),
    "dropout": (lambda x: ops.dropout(x, 0.4, 7), [real(6, 7)]),
    "rotary": (lambda x: ops.rotary(x, np.array([3, 0, -2]), np.array([1.0, 0.1])), [real(B, H, T, D)]),
    "rotary, rows": (lambda x: ops.rotary(x, np.arange(B * T).reshape(B, T), np.array([1.0, 0.1])), [real(B, H, T, D)]),
    "attention": (lambda q, k, v: ops.attention(q, [Block(k, v)], 0.5), [real(B, H, T, D), real(B, H, S, D), real(B, H, S, D, seed=1)]),
    "attention, causal": (
        lambda q, k, v: ops.attention(q, [Block(k, v, causal=True)], 0.5),
        [real(B, H, T, D), real(B, H, S, D), real(B, H, S, D, seed=1)],
    ),
    "attention, masked": (
        lambda q, k, v: ops.attention(q, [Block(k, v, valid=VALID, lengths=np.array([4, 0]))], 0.5),
        [real(B, H, T, D), real(B, H, S, D), real(B, H, S, D, seed=1)],
    ),
    "attention, grouped": (
        lambda q, k, v: ops.attention(q, [Block(k, v, valid=VALID)], 0.5),
        [real(B, H, T, D), real(B, 2, S, D), real(B, 2, S, D, seed=1)],
    ),
    "attention, dense bias": (
        lambda q, k, v, bias: ops.attention(q, [Block(k, v, bias=bias)], 0.5),
        [real(B, H, T, D), real(B, H, S, D), real(B, H, S, D, seed=1), real(1, H, T, S)],
    ),
    "attention, distance bias": (
        lambda q, k, v, table: ops.attention(q, [Block(k, v, bias=ops.DistanceBias(table, T, S), causal=True)], 0.5),
        [real(B, H, T, D), real(B, H, S, D), real(B, H, S, D, seed=1), real(H, T + S - 1)],
    ),
    "attention, capped": (
        lambda q, k, v, bias: ops.attention(q, [Block(k, v, bias=bias)], 0.5, cap=0.7),
        [real(B, H, T, D), real(B, H, S, D), real(B, H, S, D, seed=1), real(B, H, T, S)],
    ),
    "attention, chosen rows": (
        lambda q, k, v, bias: ops.attention(q, [Block(k, v, index=INDEX, valid=VALID, bias=bias)], 0.5),
        [real(B, H, T, D), real(B, H, S, D), real(B, H, S, D, seed=1), real(B, H, T, 3)],
    ),
    "attention, two blocks of one bank": (
        lambda q, k, v: ops.attention(q, [Block(k, v, causal=True), Block(v, k, valid=VALID)], 0.5),
        [real(B, H, T, D), real(B, H, S, D), real(B, H, S, D, seed=1)],
    ),
    "attention, keys alone": (
        lambda k: ops.attention(real(B, H, T, D), [Block(k, real(B, H, S, D, seed=1))], 0.5),
        [real(B, H, S, D)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name):
    function, inputs = CASES[name]
    weights = {str(i): x for i, x in enumerate(inputs)}
    plain = function(*inputs)
    shares = np.random.default_rng(1).standard_normal(np.shape(plain))
    leaves = {key: Var(x) for key, x in weights.items()}
    result = function(*leaves.values())
    np.testing.assert_array_equal(result.value, plain)
    backward(result, grads=[shares])
    gradients = {key: leaf.grad for key, leaf in leaves.items()}
    assert_gradients(lambda arrays: float(np.sum(function(*arrays.values()) * shares)), weights, gradients)


@pytest.mark.parametrize("name", CASES)
def test_an_arena_gets_the_same_gradient_added(name):
    """Parameters are views of one flat array of gradients, into which the kernels write directly."""
    function, inputs = CASES[name]
    free = [Var(x) for x in inputs]
    backward(function(*free))
    arena = [Var(x, np.full_like(x, 3)) for x in inputs]
    kept = [leaf.grad for leaf in arena]
    backward(function(*arena))
    for leaf, array, other in zip(arena, kept, free, strict=True):
        assert leaf.grad is array
        np.testing.assert_allclose(array, 3 + other.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_each_argument_alone_has_the_gradient_it_has_together(name):
    function, inputs = CASES[name]
    together = [Var(x) for x in inputs]
    backward(function(*together))
    for i, leaf in enumerate(together):
        alone = Var(inputs[i])
        backward(function(*[alone if j == i else x for j, x in enumerate(inputs)]))
        np.testing.assert_allclose(alone.grad, leaf.grad, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in CASES if name != "attention, keys alone"])  # its others are float64
def test_float32_stays_float32(name):
    function, inputs = CASES[name]
    leaves = [Var(x.astype(np.float32)) for x in inputs]
    result = function(*leaves)
    backward(result)
    assert {result.dtype, *(leaf.grad.dtype for leaf in leaves)} == {np.dtype(np.float32)}


def test_cross_entropy_is_the_weighted_mean():
    logits = real(4, 5)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    losses = -log_probs[np.arange(4), TARGETS]
    np.testing.assert_allclose(ops.cross_entropy(logits, TARGETS), losses.mean(), rtol=1e-14)
    np.testing.assert_allclose(ops.cross_entropy(logits, TARGETS, WEIGHTS), (losses * WEIGHTS).sum() / WEIGHTS.sum(), rtol=1e-14)
    # arXiv 1512.00567, section 7: the target's share of 1 is 1 - e, and e is spread over all classes.
    smooth = 0.9 * losses - 0.1 * log_probs.mean(axis=1)
    np.testing.assert_allclose(ops.cross_entropy(logits, TARGETS, None, 0.1), smooth.mean(), rtol=1e-14)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_linear_cross_entropy_is_cross_entropy_of_linear(transposed, smoothing):
    """And so are its gradients, over more classes than one chunk has."""
    arrays = [real(2, 3, 8), real(2500, 8) if transposed else real(8, 2500), real(2500)]
    targets, weights = np.array([[0, 1023, 1024], [2499, 7, 7]]), np.array([[1.0, 0.5, 2.0], [1.0, 0.0, 3.0]])
    fused, apart = [Var(x) for x in arrays], [Var(x) for x in arrays]
    loss = ops.linear_cross_entropy(fused[0], fused[1], targets, weights, smoothing, bias=fused[2], transposed=transposed)
    logits = np.reshape(ops.linear(*apart, transposed=transposed), (-1, 2500))
    expected = ops.cross_entropy(logits, targets.ravel(), weights.ravel(), smoothing)
    np.testing.assert_allclose(loss.value, expected.value, rtol=1e-13)
    backward(loss)
    backward(expected)
    for a, b in zip(fused, apart, strict=True):
        np.testing.assert_allclose(a.grad, b.grad, rtol=1e-9, atol=1e-14)


def test_cross_entropy_without_any_weight_is_zero_and_has_no_gradient():
    logits = Var(real(4, 5))
    loss = ops.cross_entropy(logits, TARGETS, np.zeros(4))
    backward(loss)
    assert loss.value == 0
    np.testing.assert_array_equal(logits.grad, 0)


def test_dropout_keeps_the_mean_and_repeats_itself():
    x = np.ones((200, 200))
    y = ops.dropout(x, 0.25, 3)
    assert set(np.unique(y)) == {0.0, 1 / 0.75}
    assert abs(y.mean() - 1) < 0.02
    np.testing.assert_array_equal(y, ops.dropout(x, 0.25, 3))
    assert (y != ops.dropout(x, 0.25, 4)).any()
    assert ops.dropout(x, 0.0, 3) is x


def test_the_sigmoid_does_not_overflow():
    np.testing.assert_array_equal(ops.sigmoid(np.array([-1e5, 0.0, 1e5])), [0, 0.5, 1])


@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (1, 7), (6, 1), (5, 5), (3, 8), (9, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_distance_bias_is_the_dense_bias_it_stands_for(n_queries, n_keys, causal):
    q, k, v = real(2, 3, n_queries, 4), real(2, 3, n_keys, 4), real(2, 3, n_keys, 4, seed=1)
    table = real(3, n_queries + n_keys - 1)
    dense = np.empty((1, 3, n_queries, n_keys))
    for h in range(3):
        for i in range(n_queries):
            for j in range(n_keys):
                dense[0, h, i, j] = table[h, j - i + n_queries - 1]

    short, long = Var(table), Var(dense)
    shares = real(2, 3, n_queries, 4, seed=2)
    outputs = []
    for bias in (ops.DistanceBias(short, n_queries, n_keys), long):
        outputs.append(ops.attention(Var(q), [Block(k, v, bias=bias, causal=causal)], 0.7))
        backward(outputs[-1], grads=[shares])
    np.testing.assert_allclose(outputs[0].value, outputs[1].value, rtol=1e-12, atol=1e-14)
    expected = np.zeros_like(table)
    for h in range(3):
        for i in range(n_queries):
            for j in range(n_keys):
                expected[h, j - i + n_queries - 1] += long.grad[0, h, i, j]
    np.testing.assert_allclose(short.grad, expected, rtol=1e-12, atol=1e-14)
    assert np.abs(expected).max() > 1e-3 or n_keys == 1 or causal  # there is a gradient to compare


def t5_bucket(distance, n_buckets, max_distance, bidirectional):
    """The rule of arXiv 1910.10683, section 2.1, one distance (key - query) at a time.

    Half of the buckets are for keys after the query where those can be seen. Of a side's n buckets, the first n / 2
    are one distance each; bucket n / 2 + i begins at n / 2 * (max_distance / (n / 2)) ** (i / (n / 2)); the last has
    everything from there on, so too all beyond max_distance.
    """
    if bidirectional:
        side = n_buckets // 2
        start, far = (side, distance) if distance > 0 else (0, -distance)
    else:
        side, start, far = n_buckets, 0, max(0, -distance)
    near = side // 2
    if far < near:
        return start + far
    bucket = near
    for i in range(1, side - near):
        begins = near * (max_distance / near) ** (i / (side - near))
        if far >= begins - 1e-9 * begins:  # a boundary that is a whole number belongs to the farther bucket
            bucket = near + i
    return start + bucket


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 6), (16, 20), (64, 500), (4, 100), (12, 13)])
def test_relative_buckets_are_those_of_t5(n_buckets, max_distance, bidirectional):
    distances = np.arange(-3 * max_distance, 3 * max_distance + 1)
    expected = [t5_bucket(int(distance), n_buckets, max_distance, bidirectional) for distance in distances]
    found = ops.relative_buckets(distances, n_buckets, max_distance, bidirectional)
    np.testing.assert_array_equal(found, expected)
    assert (found.min(), found.max()) == (0, n_buckets - 1)


def test_some_buckets_of_t5_by_hand():
    """32 buckets up to 128, both ways: 16 a side, 8 of them exact, then 8 (16) ** (i / 8) = 8, 11.3, 16, 22.6, 32, ..."""
    distances = np.array([0, -1, -7, -8, -11, -12, -15, -16, -22, -23, -91, -127, -1000, 1, 7, 8, 12, 1000])
    expected = [0, 1, 7, 8, 8, 9, 9, 10, 10, 11, 15, 15, 15, 17, 23, 24, 25, 31]
    np.testing.assert_array_equal(ops.relative_buckets(distances, 32, 128, True), expected)


def test_buckets_grow_with_distance():
    buckets = ops.relative_buckets(-np.arange(10_000), 32, 128, False)
    assert (np.diff(buckets) >= 0).all() and buckets[16] == 16 and math.isclose(buckets[-1], 31)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [None, "dense", "distance"])
@pytest.mark.parametrize("n_queries", [1, 5, 70])  # 64 queries are done at a time
def test_attention_mass_is_what_the_rows_received(causal, bias, n_queries):
    n_keys = n_queries + 2
    q, k, v = real(2, 4, n_queries, 3), real(2, 2, n_keys, 3), real(2, 2, n_keys, 3, seed=1)
    valid = np.random.default_rng(0).random((2, n_keys)) < 0.8
    table = {None: None, "dense": real(1, 4, n_queries, n_keys), "distance": real(4, n_queries + n_keys - 1)}[bias]
    given = ops.DistanceBias(table, n_queries, n_keys) if bias == "distance" else table
    block = Block(k, v, valid=valid, bias=given, causal=causal, lengths=np.array([n_keys, n_keys - 1]))
    _, lse = ops.attention_with_lse(q, [block], 0.6)
    asking = np.random.default_rng(1).random((2, n_queries)) < 0.9
    mass = ops.attention_mass(q, block, lse, 0.6, asking)

    expected = np.zeros((2, n_keys))
    for b, h, i in np.ndindex(2, 4, n_queries):
        if not asking[b, i]:
            continue
        scores = np.full(n_keys, -np.inf)
        for j in range(n_keys):
            if valid[b, j] and j < block.lengths[b] and (not causal or j <= i + 2):
                scores[j] = 0.6 * q[b, h, i] @ k[b, h // 2, j]
                if bias == "dense":
                    scores[j] += table[0, h, i, j]
                elif bias == "distance":
                    scores[j] += table[h, j - i + n_queries - 1]
        if np.isfinite(scores).any():
            p = np.exp(scores - scores.max())
            expected[b] += p / p.sum()
    np.testing.assert_allclose(mass, expected, rtol=1e-12, atol=1e-13)


def test_a_row_with_nothing_to_see_is_zero_and_has_no_gradient():
    q, k, v = Var(real(1, 2, 3, 4)), Var(real(1, 2, 5, 4)), Var(real(1, 2, 5, 4, seed=1))
    out = ops.attention(q, [Block(k, v, valid=np.zeros((1, 5), bool))], 0.5)
    backward(out)
    for x in (value_of(out), q.grad, k.grad, v.grad):
        np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_linear_layers_gather_where_they_are(transposed):
    """Several layers of one input, whose gradient others share; weights and biases in an arena, or none, or used twice."""
    rng = np.random.default_rng(0)
    value, w, b = rng.standard_normal((2, 3, 4)), rng.standard_normal((4, 4)), rng.standard_normal(4)
    for arena in (False, True):
        x, weight, bias = (Var(a, np.ones_like(a) if arena and a is not value else None) for a in (value, w, b))
        mid = x * 1.0
        same = mid + 0.0  # hands its gradient on as it is
        layers = [ops.linear(same, weight, bias, transposed=transposed) for _ in range(3)]
        backward((layers[0] * 2 + layers[1] * 3 + layers[2] * 5 + same * 7).sum() + mid.sum())
        right = w if transposed else w.T
        dy = np.full((2, 3, 4), 10.0)
        np.testing.assert_allclose(x.grad, dy @ right + 8, rtol=1e-13)
        dw = dy.reshape(-1, 4).T @ value.reshape(-1, 4) if transposed else value.reshape(-1, 4).T @ dy.reshape(-1, 4)
        np.testing.assert_allclose(weight.grad, dw + arena, rtol=1e-12)
        np.testing.assert_allclose(bias.grad, np.full(4, 60.0) + arena, rtol=1e-13)
