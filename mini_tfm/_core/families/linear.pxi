# Matrix products


cdef extern from "core.h" nogil:
    int mt_gemm(
        int is_double, const void *a, const void *b, void *c, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, int trans_a, int trans_b,
        int accumulate, const void *bias
    )
    int mt_gemm_bfloat16(
        int is_double, const void *a, const void *b, void *c, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, int trans_a, int trans_b,
        int accumulate, const void *bias
    )


cdef bint plain_product(a, b, bint t_a, bint t_b, out, bint add, bias) noexcept:
    if not (plain_matrix(a) and plain_matrix(b) and cnp.PyArray_TYPE(a) == cnp.PyArray_TYPE(b)):
        return False
    if cnp.PyArray_DIM(a, 1 - t_a) != cnp.PyArray_DIM(b, t_b):
        return False
    if bias is not None and (add or not plain_vector(bias, a, cnp.PyArray_DIM(b, 1 - t_b))):
        return False
    if out is None:
        return not add
    return (
        plain_matrix(out)
        and cnp.PyArray_TYPE(out) == cnp.PyArray_TYPE(a)
        and cnp.PyArray_DIM(out, 0) == cnp.PyArray_DIM(a, t_a)
        and cnp.PyArray_DIM(out, 1) == cnp.PyArray_DIM(b, 1 - t_b)
        and written_apart(out, a)
        and written_apart(out, b)
        and written_apart(out, bias)
    )


def gemm(a, b, *, trans_a=False, trans_b=False, out=None, accumulate=False, bias=None, bfloat16=False):
    """out (M, N) = op(a) @ op(b) + bias, or out += ... when `accumulate`; bfloat16: a and b rounded to it."""
    cdef int t_a, t_b, add, failed, rounds
    cdef ptrdiff_t m, n, k
    if plain_bool(trans_a) and plain_bool(trans_b) and plain_bool(accumulate) and plain_product(a, b, trans_a, trans_b, out, accumulate, bias):
        t_a, t_b, add = trans_a, trans_b, accumulate
        m, k, n = cnp.PyArray_DIM(a, t_a), cnp.PyArray_DIM(a, 1 - t_a), cnp.PyArray_DIM(b, 1 - t_b)
    else:
        a, b, t_a, t_b, add, bias, m, n, k = _checks.gemm(a, b, trans_a, trans_b, out, accumulate, bias)
    rounds = bfloat16 is not False and _checks.bfloat16(bfloat16, "a", a)
    if out is None:
        out = new_matrix(a, m, n)
    cdef bint wide = is_double(a)
    cdef void *pa = ptr(a)
    cdef void *pb = ptr(b)
    cdef void *po = ptr(out)
    cdef void *pc = ptr_or_null(bias)
    with nogil:
        if rounds:
            failed = mt_gemm_bfloat16(wide, pa, pb, po, m, n, k, t_a, t_b, add, pc)
        else:
            failed = mt_gemm(wide, pa, pb, po, m, n, k, t_a, t_b, add, pc)
    raise_if(failed)
    return out
