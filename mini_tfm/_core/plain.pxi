# The short way past the checks, for what is nearly always given, and the arrays of results
#
# A `plain_...` says that `_checks` would pass its argument as it is. It may say no to anything: that only costs the long way.


cdef extern from "Python.h":
    # Of an exact int neither can fail but by its size.
    long long PyLong_AsLongLongAndOverflow(object x, int *overflow) noexcept
    unsigned long long PyLong_AsUnsignedLongLong(object x) noexcept
    void *PyErr_Occurred() noexcept
    void PyErr_Clear() noexcept


cdef inline void *ptr(cnp.ndarray x) noexcept:
    """Where a checked array's values are."""
    return cnp.PyArray_DATA(x)


cdef inline void *ptr_or_null(x) noexcept:
    return NULL if x is None else cnp.PyArray_DATA(<cnp.ndarray>x)


cdef inline bint is_double(cnp.ndarray x) noexcept:
    """Which kernels a checked array asks for: those for float64, or for float32."""
    return cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64


# Arrays


cdef inline bint plain(x) noexcept:
    """A plain C-contiguous, aligned array of float32 or float64."""
    return (
        cnp.PyArray_CheckExact(x)
        and (cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_FLOAT32 or cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_FLOAT64)
        and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray>x)
    )


cdef inline bint plain_rows(x) noexcept:
    """As `plain`, with a last axis."""
    return plain(x) and cnp.PyArray_NDIM(<cnp.ndarray>x) >= 1


cdef inline bint plain_matrix(x) noexcept:
    """As `plain`, with two axes."""
    return plain(x) and cnp.PyArray_NDIM(<cnp.ndarray>x) == 2


cdef inline bint plain_like_rows(y, cnp.ndarray x, ptrdiff_t d) noexcept:
    """As `plain`, with x's dtype and shape (n, d)."""
    return plain_matrix(y) and cnp.PyArray_TYPE(<cnp.ndarray>y) == cnp.PyArray_TYPE(x) and cnp.PyArray_DIM(<cnp.ndarray>y, 1) == d


cdef inline bint plain_like(y, cnp.ndarray x) noexcept:
    """As `plain`, with x's dtype and shape."""
    return plain(y) and cnp.PyArray_TYPE(<cnp.ndarray>y) == cnp.PyArray_TYPE(x) and cnp.PyArray_SAMESHAPE(<cnp.ndarray>y, x)


cdef inline bint plain_vector(y, cnp.ndarray x, ptrdiff_t n) noexcept:
    """As `plain`, with x's dtype and shape (n,)."""
    return (
        plain(y)
        and cnp.PyArray_TYPE(<cnp.ndarray>y) == cnp.PyArray_TYPE(x)
        and cnp.PyArray_NDIM(<cnp.ndarray>y) == 1
        and cnp.PyArray_DIM(<cnp.ndarray>y, 0) == n
    )


cdef inline bint plain_double(y, cnp.ndarray x, int leading) noexcept:
    """As `plain`, of float64 whatever x's dtype, with the shape of x's first axes."""
    return (
        plain(y)
        and cnp.PyArray_TYPE(<cnp.ndarray>y) == cnp.NPY_FLOAT64
        and cnp.PyArray_NDIM(<cnp.ndarray>y) == leading
        and same_leading(y, x, leading)
    )


cdef inline bint same_leading(cnp.ndarray x, cnp.ndarray y, int n) noexcept:
    """Whether the first n axes, which both have, are of the same lengths."""
    cdef int axis
    for axis in range(n):
        if cnp.PyArray_DIM(x, axis) != cnp.PyArray_DIM(y, axis):
            return False
    return True


cdef inline bint plain_result(y, cnp.ndarray x, ptrdiff_t n) noexcept:
    """As `plain`, with x's dtype and shape, but for a last axis of n."""
    return (
        plain(y)
        and cnp.PyArray_TYPE(<cnp.ndarray>y) == cnp.PyArray_TYPE(x)
        and cnp.PyArray_NDIM(<cnp.ndarray>y) == cnp.PyArray_NDIM(x)
        and same_leading(x, y, cnp.PyArray_NDIM(x) - 1)
        and last_axis(y) == n
    )


cdef inline bint plain_integers(x) noexcept:
    """A plain C-contiguous, aligned array of int64."""
    return (
        cnp.PyArray_CheckExact(x)
        and cnp.PyArray_ISSIGNED(<cnp.ndarray>x)
        and cnp.PyArray_ITEMSIZE(<cnp.ndarray>x) == sizeof(int64_t)
        and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray>x)
    )


cdef inline bint all_within(cnp.ndarray x, int64_t low, int64_t high) noexcept:
    """Whether plain integers are all from low to high - 1."""
    return within(<const int64_t *>ptr(x), cnp.PyArray_SIZE(x), low, high)


cdef inline bint within(const int64_t *at, ptrdiff_t n, int64_t low, int64_t high) noexcept:
    """The same of n numbers in a row."""
    cdef uint64_t width = <uint64_t>high - <uint64_t>low
    cdef ptrdiff_t i
    cdef bint outside = False
    for i in range(n):
        outside |= <uint64_t>at[i] - <uint64_t>low >= width
    return not outside


cdef inline bint plain_mask(x, ptrdiff_t n, ptrdiff_t m) noexcept:
    """A plain C-contiguous array (n, m) of bool."""
    return (
        cnp.PyArray_CheckExact(x)
        and cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_BOOL
        and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray>x)
        and cnp.PyArray_NDIM(<cnp.ndarray>x) == 2
        and cnp.PyArray_DIM(<cnp.ndarray>x, 0) == n
        and cnp.PyArray_DIM(<cnp.ndarray>x, 1) == m
    )


cdef inline bint plain_heads_of(x, int dtype) noexcept:
    """A plain, aligned array (B, H, N, D) of a dtype whose rows of D may lie anywhere. Aligned: strides are whole."""
    return (
        cnp.PyArray_CheckExact(x)
        and cnp.PyArray_TYPE(<cnp.ndarray>x) == dtype
        and cnp.PyArray_ISBEHAVED_RO(<cnp.ndarray>x)
        and cnp.PyArray_NDIM(<cnp.ndarray>x) == 4
        and (
            cnp.PyArray_DIM(<cnp.ndarray>x, 3) <= 1
            or cnp.PyArray_STRIDE(<cnp.ndarray>x, 3) == cnp.PyArray_ITEMSIZE(<cnp.ndarray>x)
            or cnp.PyArray_SIZE(x) == 0
        )
    )


cdef inline bint plain_heads(x) noexcept:
    """The same of float32 or float64."""
    return plain_heads_of(x, cnp.NPY_FLOAT32) or plain_heads_of(x, cnp.NPY_FLOAT64)


cdef extern from "core.h" nogil:
    enum:
        MT_KEPT_REAL
        MT_KEPT_BFLOAT16
        MT_KEPT_INT8


cdef inline bint plain_kept(x, cnp.ndarray like) noexcept:
    """The same of the dtype of `like`, or, where that is float32, of uint16, bfloat16, or int8."""
    cdef int dtype = cnp.PyArray_TYPE(like)
    return plain_heads_of(x, dtype) or (dtype == cnp.NPY_FLOAT32 and (plain_heads_of(x, cnp.NPY_UINT16) or plain_heads_of(x, cnp.NPY_INT8)))


cdef inline int kept_as(cnp.ndarray x) noexcept:
    """What the rows of `plain_kept` are kept in."""
    cdef int dtype = cnp.PyArray_TYPE(x)
    return MT_KEPT_INT8 if dtype == cnp.NPY_INT8 else MT_KEPT_BFLOAT16 if dtype == cnp.NPY_UINT16 else MT_KEPT_REAL


cdef inline ptrdiff_t kept_axis(cnp.ndarray x, cnp.ndarray like) noexcept:
    """The last axis that `plain_kept` rows of as many numbers as those of `like` have: of int8, the scale's four bytes more."""
    return last_axis(like) + (<ptrdiff_t>sizeof(float) if kept_as(x) == MT_KEPT_INT8 else 0)


cdef inline bint plain_sequence(x) noexcept:
    """As `plain_heads`, of three axes (B, N, D)."""
    return (
        cnp.PyArray_CheckExact(x)
        and (cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_FLOAT32 or cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_FLOAT64)
        and cnp.PyArray_ISBEHAVED_RO(<cnp.ndarray>x)
        and cnp.PyArray_NDIM(<cnp.ndarray>x) == 3
        and (cnp.PyArray_DIM(<cnp.ndarray>x, 2) <= 1 or cnp.PyArray_STRIDE(<cnp.ndarray>x, 2) == cnp.PyArray_ITEMSIZE(<cnp.ndarray>x))
    )


cdef inline bint plain_heads_like(y, cnp.ndarray x) noexcept:
    """As `plain_heads`, with x's dtype and shape."""
    return plain_heads(y) and cnp.PyArray_TYPE(<cnp.ndarray>y) == cnp.PyArray_TYPE(x) and cnp.PyArray_SAMESHAPE(<cnp.ndarray>y, x)


cdef inline bint written_apart(cnp.ndarray out, x) noexcept:
    """Whether `out`, plain, may be written, and shares no memory with x, plain or None."""
    if not cnp.PyArray_ISWRITEABLE(out):
        return False
    if x is None:
        return True
    cdef char *at = <char *>cnp.PyArray_DATA(out)
    cdef char *first = <char *>cnp.PyArray_DATA(<cnp.ndarray>x)
    cdef char *end = first + cnp.PyArray_ITEMSIZE(<cnp.ndarray>x)
    cdef ptrdiff_t reach
    cdef int axis
    for axis in range(cnp.PyArray_NDIM(<cnp.ndarray>x)):
        reach = (cnp.PyArray_DIM(<cnp.ndarray>x, axis) - 1) * cnp.PyArray_STRIDE(<cnp.ndarray>x, axis)
        if reach < 0:
            first += reach
        else:
            end += reach
    return at + cnp.PyArray_NBYTES(out) <= first or end <= at


# Numbers


cdef inline bint plain_bool(x) noexcept:
    return x is True or x is False


cdef inline bint plain_number(x, double low) noexcept:
    """A finite Python float >= low."""
    return type(x) is float and low <= <double>x <= DBL_MAX


cdef inline bint plain_share(x) noexcept:
    """A Python float in [0, 1)."""
    return type(x) is float and 0.0 <= <double>x < 1.0


cdef inline bint plain_integer(x, int64_t low, int64_t high, int64_t *value) noexcept:
    """A Python int from low to high, put into value."""
    cdef int overflow = 0
    if type(x) is not int:
        return False
    value[0] = PyLong_AsLongLongAndOverflow(x, &overflow)
    return overflow == 0 and low <= value[0] <= high


cdef inline bint plain_seed(x, uint64_t *value) noexcept:
    """A Python int from 0 to 2**64 - 1, put into value."""
    if type(x) is not int:
        return False
    value[0] = PyLong_AsUnsignedLongLong(x)
    if value[0] == <uint64_t>-1 and PyErr_Occurred() != NULL:
        PyErr_Clear()
        return False
    return True


# Sizes and results


cdef inline ptrdiff_t last_axis(cnp.ndarray x) noexcept:
    return cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1)


cdef inline ptrdiff_t n_rows(cnp.ndarray x) noexcept:
    """Product of the leading axes."""
    cdef ptrdiff_t n = 1
    cdef int axis
    for axis in range(cnp.PyArray_NDIM(x) - 1):
        n *= cnp.PyArray_DIM(x, axis)
    return n


cdef inline cnp.ndarray new_like(cnp.ndarray x):
    """An array of x's dtype and shape, not filled."""
    return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0)


cdef inline cnp.ndarray new_vector(cnp.npy_intp n, int dtype):
    """An array (n,), not filled."""
    return cnp.PyArray_EMPTY(1, &n, dtype, 0)


cdef inline cnp.ndarray new_matrix(cnp.ndarray x, ptrdiff_t n, ptrdiff_t m):
    """An array (n, m) of x's dtype, not filled."""
    cdef cnp.npy_intp[2] shape = [n, m]
    return cnp.PyArray_EMPTY(2, shape, cnp.PyArray_TYPE(x), 0)


cdef inline cnp.ndarray new_array(cnp.ndarray x, int leading, ptrdiff_t n, int dtype):
    """An array of x's first `leading` axes and one of n, not filled."""
    cdef cnp.npy_intp[65] shape
    cdef int axis
    for axis in range(leading):
        shape[axis] = cnp.PyArray_DIM(x, axis)
    shape[leading] = n
    return cnp.PyArray_EMPTY(leading + 1, shape, dtype, 0)


cdef inline cnp.ndarray new_result(cnp.ndarray x, ptrdiff_t n):
    """An array of x's dtype and shape, but for a last axis of n; not filled."""
    return new_array(x, cnp.PyArray_NDIM(x) - 1, n, cnp.PyArray_TYPE(x))


cdef inline cnp.ndarray new_leading(cnp.ndarray x, int dtype):
    """An array of x's shape without its last axis, not filled."""
    return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x) - 1, cnp.PyArray_DIMS(x), dtype, 0)


cdef int raise_if(int failed) except -1:
    if failed == -2:  # MT_STOPPED: what a signal handler has raised waits to be raised
        return -1
    if failed:
        raise MemoryError("mini_tfm: no memory for a kernel's workspace")
    return 0


cdef int checked_if(bint taken) except -1:
    """What `_checks` has let pass is plain: the short way must take it."""
    if not taken:
        raise SystemError("mini_tfm: arguments that were checked are not plain")
    return 0


# Rows of heads


cdef extern from "core.h" nogil:
    struct mt_rows:
        void *at
        ptrdiff_t[3] stride


cdef inline mt_rows rows_of(cnp.ndarray x) noexcept:
    """The rows of a checked array (B, H, N, D)."""
    cdef mt_rows rows
    cdef int axis
    rows.at = cnp.PyArray_DATA(x)
    for axis in range(3):
        rows.stride[axis] = cnp.PyArray_STRIDE(x, axis) // cnp.PyArray_ITEMSIZE(x)
    return rows


cdef inline mt_rows rows_of_sequence(cnp.ndarray x) noexcept:
    """The rows of a checked array (B, N, D), as those of one head."""
    cdef mt_rows rows
    cdef ptrdiff_t item = cnp.PyArray_ITEMSIZE(x)
    rows.at = cnp.PyArray_DATA(x)
    rows.stride[0], rows.stride[1], rows.stride[2] = cnp.PyArray_STRIDE(x, 0) // item, 0, cnp.PyArray_STRIDE(x, 1) // item
    return rows


cdef object rows_like(cnp.ndarray x):
    """A new array (B, H, N, D) of x's shape and dtype; if x's heads lie side by side, as products leave them, so do its own."""
    cdef cnp.npy_intp *n = cnp.PyArray_DIMS(x)
    cdef cnp.npy_intp[4] swapped = [n[0], n[2], n[1], n[3]]
    if llabs(cnp.PyArray_STRIDE(x, 1)) < llabs(cnp.PyArray_STRIDE(x, 2)):
        return cnp.PyArray_SwapAxes(cnp.PyArray_EMPTY(4, swapped, cnp.PyArray_TYPE(x), 0), 1, 2)
    return cnp.PyArray_EMPTY(4, n, cnp.PyArray_TYPE(x), 0)
