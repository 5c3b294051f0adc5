# The best rows of a bank


cdef extern from "core.h" nogil:
    struct mt_bank:
        const void *rows
        ptrdiff_t[3] stride
        int kind
        const float *scales
        const uint8_t *valid
        const uint8_t *codes
        ptrdiff_t[2] code_stride

    int mt_search(
        int is_double, const void *queries, const mt_bank *bank, void *scores, int64_t *index, ptrdiff_t batch, ptrdiff_t n,
        ptrdiff_t m, ptrdiff_t d, ptrdiff_t k
    )


from mini_tfm.reference.search import encode_rows  # in NumPy for every instruction set


cdef int plain_row_kind(bank, cnp.ndarray queries) noexcept:
    """The number C knows the rows' type by, or -1: such rows do not go with these queries."""
    if not (cnp.PyArray_CheckExact(bank) and cnp.PyArray_ISNOTSWAPPED(<cnp.ndarray>bank) and cnp.PyArray_NDIM(<cnp.ndarray>bank) == 3):
        return -1
    cdef int type = cnp.PyArray_TYPE(<cnp.ndarray>bank)
    if type == cnp.PyArray_TYPE(queries):
        return 0
    if cnp.PyArray_TYPE(queries) != cnp.NPY_FLOAT32:
        return -1
    return 1 if type == cnp.NPY_FLOAT16 else 2 if type == cnp.NPY_INT8 else -1


cdef bint plain_codes(codes, cnp.ndarray bank) noexcept:
    """Codes (B, M, C) of uint8 of the bank's rows; the bytes of one lie together."""
    return (
        cnp.PyArray_CheckExact(codes)
        and cnp.PyArray_TYPE(<cnp.ndarray>codes) == cnp.NPY_UINT8
        and cnp.PyArray_NDIM(<cnp.ndarray>codes) == 3
        and same_leading(codes, bank, 2)
        and cnp.PyArray_DIM(<cnp.ndarray>codes, 2) == (cnp.PyArray_DIM(bank, 2) + 63) // 64 * 64 + 16
        and cnp.PyArray_STRIDE(<cnp.ndarray>codes, 2) == 1
    )


cdef bint plain_search(queries, bank, k, valid, scales, codes, int *kind, int64_t *wanted) noexcept:
    if not (plain(queries) and cnp.PyArray_NDIM(queries) == 3 and plain_integer(k, 0, INT32_MAX, wanted)):
        return False
    kind[0] = plain_row_kind(bank, queries)
    if kind[0] < 0 or cnp.PyArray_DIM(bank, 0) != cnp.PyArray_DIM(queries, 0) or cnp.PyArray_DIM(bank, 2) != cnp.PyArray_DIM(queries, 2):
        return False
    if valid is not None and not plain_mask(valid, cnp.PyArray_DIM(bank, 0), cnp.PyArray_DIM(bank, 1)):
        return False
    if (scales is None) == (kind[0] == 2) or (scales is not None and not plain_scales(scales, bank)):
        return False
    return codes is None or (kind[0] < 2 and cnp.PyArray_TYPE(queries) == cnp.NPY_FLOAT32 and plain_codes(codes, bank))


cdef inline bint plain_scales(scales, cnp.ndarray bank) noexcept:
    return plain_matrix(scales) and cnp.PyArray_TYPE(scales) == cnp.NPY_FLOAT32 and same_leading(scales, bank, 2)


def search(queries, bank, k, valid=None, *, scales=None, codes=None):
    """The k best rows of bank (Bq, M, d) for queries (Bq, N, d): scores, index (Bq, N, k), best first; -1 where none is left."""
    cdef int64_t wanted
    cdef int failed, axis
    cdef mt_bank c_bank
    if not plain_search(queries, bank, k, valid, scales, codes, &c_bank.kind, &wanted):
        queries, bank, wanted, valid, scales, codes, c_bank.kind = _checks.search(queries, bank, k, valid, scales, codes)
    for axis in range(3):
        c_bank.stride[axis] = cnp.PyArray_STRIDE(bank, axis)
    c_bank.rows = ptr(bank)
    c_bank.scales = <const float *>ptr_or_null(scales)
    c_bank.valid = <const uint8_t *>ptr_or_null(valid)
    c_bank.codes = <const uint8_t *>ptr_or_null(codes)
    for axis in range(2):
        c_bank.code_stride[axis] = 0 if codes is None else cnp.PyArray_STRIDE(codes, axis)
    scores, index = new_array(queries, 2, wanted, cnp.PyArray_TYPE(queries)), new_array(queries, 2, wanted, cnp.NPY_INT64)
    cdef bint wide = is_double(queries)
    cdef void *pq = ptr(queries)
    cdef void *ps = ptr(scores)
    cdef int64_t *pi = <int64_t *>ptr(index)
    cdef ptrdiff_t batch = cnp.PyArray_DIM(queries, 0)
    cdef ptrdiff_t n = cnp.PyArray_DIM(queries, 1)
    cdef ptrdiff_t d = cnp.PyArray_DIM(queries, 2)
    cdef ptrdiff_t m = cnp.PyArray_DIM(bank, 1)
    with nogil:
        failed = mt_search(wide, pq, &c_bank, ps, pi, batch, n, m, d, wanted)
    raise_if(failed)
    return scores, index
