# Whether an array has changed


cdef extern from "core.h" nogil:
    int mt_checksum(int is_double, const void *x, ptrdiff_t n, uint64_t *sum)


def checksum(x):
    """A number of 64 bits of the values and where they stand: an int."""
    if not plain(x):
        x = _checks.real("x", x)
    cdef ptrdiff_t n = cnp.PyArray_SIZE(x)
    cdef uint64_t total = 0
    cdef int failed
    cdef bint wide = is_double(x)
    cdef void *px = ptr(x)
    with nogil:
        failed = mt_checksum(wide, px, n, &total)
    raise_if(failed)
    return total
