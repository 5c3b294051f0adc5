# Activations, sums, recurrences and dropout


cdef extern from "core.h" nogil:
    void mt_activation(int is_double, const void *x, void *y, ptrdiff_t n, int kind)
    void mt_activation_backward(int is_double, const void *x, const void *dy, void *dx, ptrdiff_t n, int kind)
    void mt_add(int is_double, const void *x, const void *y, void *out, ptrdiff_t n)
    void mt_recurrence(
        int is_double, const mt_rows *x, const mt_rows *forget, void *state, void *out, ptrdiff_t batch, ptrdiff_t length, ptrdiff_t d
    )
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
    note_elements(MT_CALL_ACTIVATION, x, None, number, y)
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


def add(x, y):
    """x + y, of one shape."""
    if not (plain(x) and plain_like(y, x)):
        x = _checks.real("x", x)
        y = _checks.real("y", y, like=x, shape=x.shape)
    out = new_like(x)
    cdef ptrdiff_t n = cnp.PyArray_SIZE(x)
    cdef bint wide = is_double(x)
    cdef void *px = ptr(x)
    cdef void *py = ptr(y)
    cdef void *po = ptr(out)
    with nogil:
        mt_add(wide, px, py, po, n)
    note_elements(MT_CALL_ADD, x, y, -1, out)
    return out


cdef bint plain_recurrence(x, forget, state) noexcept:
    return (
        plain_sequence(x) and plain_sequence(forget) and cnp.PyArray_TYPE(forget) == cnp.PyArray_TYPE(x)
        and cnp.PyArray_SAMESHAPE(forget, x)
        and plain_matrix(state) and cnp.PyArray_TYPE(state) == cnp.PyArray_TYPE(x)
        and cnp.PyArray_DIM(state, 0) == cnp.PyArray_DIM(x, 0) and cnp.PyArray_DIM(state, 1) == cnp.PyArray_DIM(x, 2)
        and written_apart(state, x) and written_apart(state, forget)
    )


def recurrence(x, forget, state):
    """c (B, T, d): c_t = f_t * c_{t-1} + (1 - f_t) * x_t, f = sigmoid(forget); state (B, d), c before the first, becomes the last."""
    if not plain_recurrence(x, forget, state):
        x, forget = _checks.recurrence(x, forget, state)
    cdef ptrdiff_t batch = cnp.PyArray_DIM(x, 0)
    cdef ptrdiff_t length = cnp.PyArray_DIM(x, 1)
    cdef ptrdiff_t d = cnp.PyArray_DIM(x, 2)
    out = new_like(x)
    cdef bint wide = is_double(x)
    cdef mt_rows px = rows_of_sequence(x)
    cdef mt_rows pf = rows_of_sequence(forget)
    cdef void *ps = ptr(state)
    cdef void *po = ptr(out)
    with nogil:
        mt_recurrence(wide, &px, &pf, ps, po, batch, length, d)
    note_recurrence(x, forget, state, out)
    return out


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
