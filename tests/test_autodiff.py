"""The tape: every rule against finite differences, and what it refuses to differentiate."""

import numpy as np
import pytest
from variants import assert_gradients

from mini_tfm import autodiff
from mini_tfm.autodiff import Var, backward
from mini_tfm.errors import InvalidType, InvalidValue

RNG = np.random.default_rng(0)


def real(*shape, low=-2.0, high=2.0):
    return RNG.uniform(low, high, shape)


def apart(*shape):
    """Values no two of which are close: no maximum changes hands, no corner of |x| is near."""
    size = int(np.prod(shape))
    return (RNG.permutation(size) - size / 2 + 0.25).reshape(shape) * 0.3


# name -> (function of the arrays, arrays). Shapes that broadcast, scalars, and axes of every kind.
UFUNCS = {
    "add": (lambda a, b: a + b, [real(2, 3), real(3)]),
    "add, outer": (lambda a, b: a + b, [real(4, 1), real(1, 3)]),
    "add, rank": (lambda a, b: a + b, [real(2, 1, 3), real(2, 1)]),
    "add, number": (lambda a: 2 + a + 1.5, [real(2, 3)]),
    "add, itself": (lambda a: a + a, [real(2, 3)]),
    "subtract": (lambda a, b: a - b, [real(3), real(2, 3)]),
    "subtract, from number": (lambda a: 1 - a, [real(3)]),
    "multiply": (lambda a, b: a * b, [real(2, 3), real(2, 1)]),
    "multiply, itself": (lambda a: a * a, [real(2, 3)]),
    "multiply, by array": (lambda a: np.arange(3.0) * a, [real(2, 3)]),
    "divide": (lambda a, b: a / b, [real(2, 3), real(3, low=0.5)]),
    "divide, number by": (lambda a: 3 / a, [real(2, 3, low=0.5)]),
    "power": (lambda a, b: a**b, [real(2, 3, low=0.5), real(3)]),
    "power, square": (lambda a: a**2, [real(2, 3)]),
    "power, cube": (lambda a: a**3, [real(2, 3)]),
    "power, half": (lambda a: a**0.5, [real(2, 3, low=0.5)]),
    "power, inverse": (lambda a: a**-1.0, [real(2, 3, low=0.5)]),
    "power, of two": (lambda a: 2**a, [real(2, 3)]),
    "maximum": (np.maximum, [apart(2, 3), apart(3) + 0.1]),
    "minimum": (np.minimum, [apart(2, 3), apart(2, 1) + 0.1]),
    "maximum, zero": (lambda a: np.maximum(a, 0), [apart(2, 3)]),
    "negative": (lambda a: -a, [real(2, 3)]),
    "exp": (np.exp, [real(2, 3)]),
    "expm1": (np.expm1, [real(2, 3)]),
    "log": (np.log, [real(2, 3, low=0.2)]),
    "log1p": (np.log1p, [real(2, 3, low=-0.5)]),
    "sqrt": (np.sqrt, [real(2, 3, low=0.2)]),
    "square": (np.square, [real(2, 3)]),
    "tanh": (np.tanh, [real(2, 3)]),
    "sin": (np.sin, [real(2, 3)]),
    "cos": (np.cos, [real(2, 3)]),
    "absolute": (abs, [apart(2, 3)]),
    "matmul": (lambda a, b: a @ b, [real(2, 3), real(3, 4)]),
    "matmul, batch": (lambda a, b: a @ b, [real(5, 2, 3), real(5, 3, 4)]),
    "matmul, broadcast": (lambda a, b: a @ b, [real(5, 1, 2, 3), real(6, 3, 4)]),
    "matmul, vector right": (lambda a, b: a @ b, [real(5, 2, 3), real(3)]),
    "matmul, vector left": (lambda a, b: a @ b, [real(3), real(5, 3, 4)]),
    "matmul, vector and matrix": (lambda a, b: a @ b, [real(3), real(3, 4)]),
    "matmul, vectors": (lambda a, b: a @ b, [real(3), real(3)]),
    "matmul, array left": (lambda a: np.arange(6.0).reshape(2, 3) @ a, [real(3, 4)]),
}
CONDITION = RNG.random((2, 3)) < 0.5
FUNCTIONS = {
    "sum": (np.sum, [real(2, 3)]),
    "sum, axis": (lambda a: a.sum(axis=1), [real(2, 3, 4)]),
    "sum, axes": (lambda a: np.sum(a, axis=(0, -1)), [real(2, 3, 4)]),
    "sum, keepdims": (lambda a: a.sum(axis=-1, keepdims=True), [real(2, 3)]),
    "sum, reduce": (lambda a: np.add.reduce(a, axis=0), [real(2, 3)]),
    "mean": (np.mean, [real(2, 3)]),
    "mean, axis": (lambda a: a.mean(axis=-1, keepdims=True), [real(2, 3)]),
    "mean, axes": (lambda a: np.mean(a, (0, 2)), [real(2, 3, 4)]),
    "max": (np.max, [apart(2, 3)]),
    "max, axis": (lambda a: a.max(axis=1), [apart(2, 3, 4)]),
    "max, axes": (lambda a: np.max(a, axis=(0, 2), keepdims=True), [apart(2, 3, 4)]),
    "max, reduce": (lambda a: np.maximum.reduce(a, axis=0), [apart(2, 3)]),
    "reshape": (lambda a: np.reshape(a, (3, -1)) * np.arange(2), [real(2, 3)]),
    "reshape, method": (lambda a: a.reshape(3, 2) + a.reshape((3, 2)), [real(2, 3)]),
    "ravel": (np.ravel, [real(2, 3)]),
    "expand_dims": (lambda a: np.expand_dims(a, (0, 2)), [real(2, 3)]),
    "squeeze": (lambda a: np.squeeze(a, 1), [real(2, 1, 3)]),
    "transpose": (lambda a: a.T @ np.ones((2, 2)), [real(2, 3)]),
    "transpose, axes": (lambda a: np.transpose(a, (2, 0, 1)), [real(2, 3, 4)]),
    "transpose, negative axes": (lambda a: np.transpose(a, (-1, 0, 1)), [real(2, 3, 4)]),
    "transpose, method": (lambda a: a.transpose(1, 2, 0) + a.transpose((1, 2, 0)), [real(2, 3, 4)]),
    "swapaxes": (lambda a: a.swapaxes(-1, 0), [real(2, 3, 4)]),
    "moveaxis": (lambda a: np.moveaxis(a, 0, -1), [real(2, 3, 4)]),
    "moveaxis, several": (lambda a: np.moveaxis(a, (0, 1), (-1, 0)), [real(2, 3, 4)]),
    "broadcast_to": (lambda a: np.broadcast_to(a, (4, 2, 3)), [real(2, 1)]),
    "cumsum": (lambda a: np.cumsum(a, axis=1), [real(2, 3, 2)]),
    "cumsum, flat": (np.cumsum, [real(2, 3)]),
    "concatenate": (lambda a, b: np.concatenate([a, b, a], axis=1), [real(2, 3), real(2, 1)]),
    "concatenate, with array": (lambda a: np.concatenate([np.ones((1, 3)), a]), [real(2, 3)]),
    "stack": (lambda a, b: np.stack([a, b, a], axis=-1), [real(2, 3), real(2, 3)]),
    "split": (lambda a: np.split(a, [1, 3], axis=1)[1] * np.split(a, 2, axis=-1)[0], [real(2, 4)]),
    "where": (lambda a, b: np.where(CONDITION, a, b), [real(2, 3), real(3)]),
    "where, number": (lambda a: np.where(CONDITION, a, 0), [real(2, 1)]),
    "take": (lambda a: np.take(a, [2, 0, 2], axis=1), [real(2, 3)]),
    "take, flat": (lambda a: np.take(a, np.array([5, 1, 1])), [real(2, 3)]),
    "take_along_axis": (lambda a: np.take_along_axis(a, np.array([[2, 2], [0, 1]]), 1), [real(2, 3)]),
    "take_along_axis, broadcast": (lambda a: np.take_along_axis(a, np.array([[2, 1]]), 1), [real(2, 3)]),
    "pad": (lambda a: np.pad(a, ((1, 0), (0, 2))), [real(2, 3)]),
    "pad, everywhere": (lambda a: np.pad(a, 2, constant_values=3.0), [real(2, 3)]),
    "einsum": (lambda a, b: np.einsum("bij,jk->bik", a, b), [real(2, 3, 4), real(4, 2)]),
    "einsum, summed alone": (lambda a, b: np.einsum("ij,k->i", a, b), [real(2, 3), real(4)]),
    "einsum, one operand": (lambda a: np.einsum("ijk->kj", a), [real(2, 3, 4)]),
    "einsum, three": (lambda a, b, c: np.einsum("ij,jk,ik->i", a, b, c), [real(2, 3), real(3, 4), real(2, 4)]),
    "item, slice": (lambda a: a[:, 1:], [real(2, 3)]),
    "item, number": (lambda a: a[1] * a[-1, 2], [real(2, 3)]),
    "item, none": (lambda a: a[..., None, :2], [real(2, 3)]),
    "item, step": (lambda a: a[::-1, ::2], [real(2, 3)]),
    "item, rows twice": (lambda a: a[np.array([0, 0, 1])], [real(2, 3)]),
    "item, list": (lambda a: a[[0, 0], [1, 1]], [real(2, 3)]),
    "item, mask": (lambda a: a[CONDITION], [real(2, 3)]),
    "item, slice and rows": (lambda a: a[:, np.array([[0, 2], [2, 2]])], [real(2, 3)]),
}


@pytest.mark.parametrize("name", [*UFUNCS, *FUNCTIONS])
def test_gradients_are_those_of_finite_differences(name):
    function, inputs = {**UFUNCS, **FUNCTIONS}[name]
    weights = {str(i): x.astype(np.float64) for i, x in enumerate(inputs)}
    plain = function(*weights.values())
    shares = np.random.default_rng(1).standard_normal(np.shape(plain))

    leaves = {key: Var(x) for key, x in weights.items()}
    result = function(*leaves.values())
    np.testing.assert_allclose(result.value, plain, rtol=1e-14, atol=1e-15)
    backward(result, grads=[shares])
    for key, leaf in leaves.items():
        assert leaf.grad.shape == weights[key].shape and leaf.grad.dtype == np.float64
    assert_gradients(
        lambda arrays: float(np.sum(function(*arrays.values()) * shares)), weights, {key: leaf.grad for key, leaf in leaves.items()}
    )


def test_every_rule_has_a_case():
    """A rule added to the tape is a rule to be tested."""
    told = {name.split(",")[0] for name in (*UFUNCS, *FUNCTIONS)}
    rules = {ufunc.__name__ for ufunc, rule in autodiff._UFUNC_VJPS.items() if rule}
    without_gradient = {"zeros_like", "ones_like", "argmax", "argsort", "shape", "ndim"}
    rules |= {function.__name__ for function in autodiff._FUNCTIONS} - without_gradient
    assert rules - told == set()


@pytest.mark.parametrize("name", [*UFUNCS, *FUNCTIONS])
def test_gradients_have_the_dtype_of_their_array(name):
    function, inputs = {**UFUNCS, **FUNCTIONS}[name]
    leaves = [Var(x.astype(np.float32)) for x in inputs]
    result = function(*leaves)
    backward(result)
    assert [leaf.grad.dtype for leaf in leaves] == [np.float32] * len(leaves)
    assert [leaf.grad.shape for leaf in leaves] == [x.shape for x in inputs]


def test_float32_is_not_widened_on_the_way():
    x = Var(np.ones((2, 3), np.float32))
    for result in (x * 0.5, x + 1, 2 / x, x**2, np.tanh(x), x.mean(), np.where(x > 0, x, 0), x @ np.ones((3, 2), np.float32)):
        assert result.dtype == np.float32


def test_a_mixed_product_gives_each_array_its_own_dtype():
    a, b = Var(np.ones(3, np.float32)), Var(np.ones(3, np.float64))
    backward(a * b)
    assert (a.grad.dtype, b.grad.dtype) == (np.float32, np.float64)


def test_ties_share_the_gradient_of_max():
    x = Var(np.array([1.0, 3.0, 3.0]))
    backward(x.max())
    np.testing.assert_array_equal(x.grad, [0, 0.5, 0.5])


def test_a_value_used_many_times_gathers_every_gradient():
    x = Var(np.array([2.0, 3.0]))
    y = x * x  # used four times below, directly and through others
    z = y + y
    loss = (z * y + np.exp(-y) + z).sum()  # 2 y^2 + exp(-y) + 2 y, y = x^2
    backward(loss)
    y_value = x.value**2
    np.testing.assert_allclose(x.grad, (4 * y_value - np.exp(-y_value) + 2) * 2 * x.value, rtol=1e-14)


def test_gathering_does_not_write_into_shared_gradients():
    """`a + b` hands one array to both: what a gathers afterwards must not reach b."""
    a, b = Var(np.ones(3)), Var(np.ones(3))
    shared = a + b
    backward((shared * 2 + a * 5 + a * 7).sum())
    np.testing.assert_array_equal(a.grad, [14, 14, 14])
    np.testing.assert_array_equal(b.grad, [2, 2, 2])


def test_a_diamond_is_walked_once_a_node():
    x = Var(np.array(1.0))
    y = x
    for _ in range(60):  # 2 ** 60 paths
        y = y + y
    backward(y)
    assert x.grad == 2.0**60


def test_a_long_chain_does_not_exhaust_the_stack():
    x = y = Var(np.array(1.0))
    for _ in range(20_000):
        y = y + 1
    backward(y)
    assert x.grad == 1


def test_leaves_of_an_arena_are_added_to_in_place():
    arena = np.array([10.0, 20.0, 30.0, 40.0])
    first, second = Var(np.array([1.0, 2.0]), arena[:2]), Var(np.array([3.0, 4.0]), arena[2:])
    backward((first * second).sum() + first.sum())
    np.testing.assert_array_equal(arena, [14, 25, 31, 42])
    assert first.grad.base is arena


def test_several_outputs_and_their_gradients():
    x = Var(np.array([1.0, 2.0]))
    y = x * 3
    backward(y, y * x, grads=[np.array([1.0, 10.0]), None])
    np.testing.assert_array_equal(x.grad, [3 + 6, 30 + 12])


def test_a_branch_without_a_gradient_is_left_alone():
    x, unused = Var(np.ones(2)), Var(np.ones(2))
    _ = unused * x
    backward(x * 2)
    assert unused.grad is None


def test_detach_stops_the_gradient():
    x = Var(np.array([2.0]))
    backward(x * (x * x).detach())
    np.testing.assert_array_equal(x.grad, [4.0])


def test_nothing_is_recorded_on_plain_arrays(monkeypatch):
    from mini_tfm import ops

    monkeypatch.setattr(autodiff, "record", lambda *_: pytest.fail("recorded"))
    monkeypatch.setattr(ops, "record", lambda *_: pytest.fail("recorded"))
    x = np.ones((1, 2, 3, 4))
    results = [np.tanh(x) + x.sum(), ops.softmax(x), ops.activation(x, "gelu"), ops.sigmoid(x), ops.dropout(x, 0.5, 1)]
    results += [ops.linear(x, np.ones((4, 2)), np.ones(2)), ops.norm(x, np.ones(4), np.ones(4), 1e-5, "layer")]
    results += [ops.rotary(x, np.arange(3), np.array([1.0])), ops.attention(x, [ops.Block(x, x)], 1.0)]
    assert all(isinstance(result, np.ndarray) for result in results)


def test_results_without_a_gradient_are_plain():
    x = Var(np.array([[1.0, -2.0]]))
    for result in (x > 0, x == x, np.isfinite(x), np.sign(x), np.argmax(x), np.argsort(x, axis=-1), np.zeros_like(x), np.ones_like(x)):
        assert not isinstance(result, Var)
    assert np.shape(x) == (1, 2) and np.ndim(x) == 2 and len(x) == 1 and x.size == 2


@pytest.mark.parametrize("call", [np.arctan, np.linalg.norm, np.sort, np.prod, np.floor], ids=lambda call: call.__name__)
def test_an_unsupported_function_is_refused_by_name(call):
    with pytest.raises(InvalidType, match=rf"np\.{call.__name__}.*supported:.*tanh|np\.multiply: reduce"):
        call(Var(np.ones((2, 2))))


@pytest.mark.parametrize("call", [np.asarray, np.array, np.float32, lambda x: np.add(np.ones(2), 1, out=x)])
def test_a_var_is_not_turned_into_an_array(call):
    with pytest.raises(InvalidType, match=r"\.value|out="):
        call(Var(np.ones(2)))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: np.multiply(x, 2, out=np.empty(2)),
        lambda x: np.add.accumulate(x),
        lambda x: np.multiply.outer(x, x),
        lambda x: np.multiply(x, 2, where=np.array([True, False])),
        lambda x: np.sum(x, where=np.array([True, False])),
        lambda x: np.mean(x, where=np.array([True, False])),
        lambda x: np.max(x, initial=5.0),
        lambda x: np.sum(x, out=np.empty(())),
        lambda x: np.pad(x, 1, mode="edge"),
        lambda x: np.einsum("i,i", x, x),
        lambda x: np.einsum("...,...->...", x, x),
        lambda x: np.einsum("ii->i", np.expand_dims(x, 0)),
    ],
)
def test_what_would_be_differentiated_wrongly_is_refused(call):
    with pytest.raises((InvalidType, InvalidValue), match=r"np\.\w+: "):
        call(Var(np.ones(2)))


@pytest.mark.parametrize("value", [np.arange(3), [1, 2], np.array([True]), "text"])
def test_a_var_holds_real_numbers(value):
    with pytest.raises(InvalidType, match="value: expected a floating-point array"):
        Var(value)


@pytest.mark.parametrize("grad", [np.zeros(2), np.zeros(3, np.float32), np.zeros((3, 1))])
def test_a_leafs_gradient_must_fit(grad):
    with pytest.raises(InvalidValue, match="grad: expected"):
        Var(np.zeros(3), grad)


def test_a_function_gives_the_same_bits_on_plain_arrays_and_on_vars():
    x = np.random.default_rng(0).standard_normal((7, 13)).astype(np.float32)
    for function in (
        np.mean,
        lambda a: a.mean(axis=0),
        lambda a: a**2,
        lambda a: a**0.5,
        lambda a: a.sum(axis=1),
        lambda a: 3 / (a * a),
        np.tanh,
    ):
        with np.errstate(invalid="ignore"):
            plain = np.asarray(function(x))
            assert function(Var(x)).value.tobytes() == plain.tobytes()


def test_a_graph_is_walked_once():
    """What it remembered is forgotten as it is used: a second time would go on with nothing."""
    x = Var(np.ones(2))
    y = x * 3
    loss = (y * y).sum()
    backward(loss)
    for again in (loss, (y * 2).sum()):
        with pytest.raises(InvalidValue, match="add up the losses"):
            backward(again)


def test_what_is_remembered_is_freed_on_the_way():
    import weakref

    x = Var(np.ones((100, 100)))
    y = x
    kept = []
    for _ in range(5):
        y = np.exp(y) * 0.1
        kept.append(weakref.ref(y.value))
    last = y
    del y
    backward(last.sum())
    assert [ref() is not None for ref in kept] == [False] * 4 + [True]


def test_many_parts_of_an_array_share_one_gradient(monkeypatch):
    """Each adds to it in place: no array of the whole size for each part."""
    made = []
    real = np.zeros
    x = Var(np.ones((50, 3)))
    total = sum((x[i] * float(i) for i in range(50)), Var(np.zeros(3)))
    monkeypatch.setattr(np, "zeros", lambda shape, *a, **k: made.append(shape) or real(shape, *a, **k))
    backward(total)
    assert len(made) == 1
    np.testing.assert_array_equal(x.grad, np.repeat(np.arange(50.0)[:, None], 3, 1))


def test_parts_are_added_to_a_gradient_that_others_share():
    a, b = Var(np.ones(3)), Var(np.ones(3))
    both = a + b
    backward((both * 1 + 0).sum() + a[1:].sum() * 10 + a[np.array([0, 0])].sum() * 100 + a[np.array([True, False, True])].sum())
    np.testing.assert_array_equal(a.grad, [202, 11, 12])
    np.testing.assert_array_equal(b.grad, [1, 1, 1])


@pytest.mark.parametrize("function", [np.maximum, np.minimum])
def test_where_an_extremum_is_nan_both_sides_get_its_gradient(function):
    a, b = Var(np.array([np.nan, 1.0, np.nan, 2.0])), Var(np.array([0.0, np.nan, np.nan, 2.0]))
    backward(np.sum(function(a, b)))
    np.testing.assert_array_equal(a.grad, [1, 1, 1, 1])
    np.testing.assert_array_equal(b.grad, [1, 1, 1, 0])
