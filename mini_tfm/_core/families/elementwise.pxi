# Activations and dropout


cdef extern from "core.h" nogil:
    void mt_activation(int is_double, const void *x, void *y, ptrdiff_t n, int kind)
    void mt_activation_backward(int is_double, const void *x, const void *dy, void *dx, ptrdiff_t n, int kind)
    void mt_dropout(int is_double, const void *x, void *y, ptrdiff_t n, double p, uint64_t seed)


cdef dict KINDS = {kind: _checks.activation_kind(kind) for kind in _checks.ACTIVATIONS}


cdef int kind_number(kind) except -1:
    return KINDS[kind] if type(kind) is str and kind in KINDS else _checks.activation_kind(kind)


def activation(x, kind, *, out=None):
    """y = kind(x), kind one of "relu", "gelu", "gelu_tanh", "silu"."""
    if not plain(x):
        x = _checks.real("x", x)
    cdef int number = kind_number(kind)
    y = new_like(x) if out is None else _checks.optional_output(out, x, ("x", x))
    cdef ptrdiff_t n = cnp.PyArray_SIZE(x)
    cdef bint wide = is_double(x)
    cdef void *px = ptr(x)
    cdef void *py = ptr(y)
    with nogil:
        mt_activation(wide, px, py, n, number)
    return y


def activation_backward(x, dy, kind, *, out=None):
    """dx = dy * kind'(x)."""
    if not (plain(x) and plain_like(dy, x)):
        x = _checks.real("x", x)
        dy = _checks.real("dy", dy, like=x, shape=x.shape)
    cdef int number = kind_number(kind)
    dx = new_like(x) if out is None else _checks.optional_output(out, x, ("x", x), ("dy", dy))
    cdef ptrdiff_t n = cnp.PyArray_SIZE(x)
    cdef bint wide = is_double(x)
    cdef void *px = ptr(x)
    cdef void *pdy = ptr(dy)
    cdef void *pdx = ptr(dx)
    with nogil:
        mt_activation_backward(wide, px, pdy, pdx, n, number)
    return dx


def dropout(x, p, seed):
    """x / (1 - p) where the hash of (seed, flat index) keeps the element, else 0; on dy it is its own backward."""
    cdef uint64_t key
    if not (plain(x) and plain_share(p) and plain_seed(seed, &key)):
        x, p, key = _checks.dropout(x, p, seed)
    cdef double probability = p
    y = new_like(x)
    cdef ptrdiff_t n = cnp.PyArray_SIZE(x)
    cdef bint wide = is_double(x)
    cdef void *px = ptr(x)
    cdef void *py = ptr(y)
    with nogil:
        mt_dropout(wide, px, py, n, probability, key)
    return y
