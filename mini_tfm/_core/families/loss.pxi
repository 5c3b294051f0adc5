# Cross entropy, of logits and of an output layer


cdef extern from "core.h" nogil:
    struct mt_output_layer:
        const void *x
        const void *weight
        const void *bias
        const int64_t *targets
        ptrdiff_t n, d, vocab, chunk
        int transposed, bfloat16
        int64_t ignore_index
        double label_smoothing

    int mt_cross_entropy(
        int is_double, const void *logits, const int64_t *targets, int64_t ignore_index, double label_smoothing, void *losses,
        void *lse, ptrdiff_t n, ptrdiff_t vocab
    )
    int mt_cross_entropy_backward(
        int is_double, const void *logits, const int64_t *targets, const void *lse, const void *dlosses, int64_t ignore_index,
        double label_smoothing, void *dlogits, ptrdiff_t n, ptrdiff_t vocab
    )
    int mt_linear_cross_entropy(int is_double, const mt_output_layer *layer, void *losses, void *lse)
    int mt_linear_cross_entropy_backward(
        int is_double, const mt_output_layer *layer, const void *lse, const void *dlosses, void *dx, void *dweight,
        void *dbias
    )


cdef bint plain_targets(x, ptrdiff_t n, ptrdiff_t vocab, int64_t ignored) noexcept:
    """Plain integers (n,) from 0 to vocab - 1, or `ignored`."""
    if not (plain_integers(x) and cnp.PyArray_NDIM(x) == 1 and cnp.PyArray_DIM(x, 0) == n):
        return False
    cdef const int64_t *at = <const int64_t *>ptr(x)
    cdef ptrdiff_t i
    cdef bint outside = False
    for i in range(n):
        outside |= (<uint64_t>at[i] >= <uint64_t>vocab) & (at[i] != ignored)
    return not outside


cdef bint plain_losses(logits, targets, ignore_index, label_smoothing, int64_t *ignored) noexcept:
    return (
        plain_matrix(logits)
        and plain_integer(ignore_index, INT64_MIN, INT64_MAX, ignored)
        and plain_number(label_smoothing, 0.0)
        and <double>label_smoothing <= 1.0
        and plain_targets(targets, cnp.PyArray_DIM(logits, 0), cnp.PyArray_DIM(logits, 1), ignored[0])
    )


def cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0):
    """losses (N,), lse (N,) of logits (N, V) against targets (N,); 0 in ignored rows."""
    cdef int failed
    cdef int64_t ignored
    if not plain_losses(logits, targets, ignore_index, label_smoothing, &ignored):
        logits, targets, ignored, label_smoothing = _checks.cross_entropy(logits, targets, ignore_index, label_smoothing)
    cdef double smoothing = label_smoothing
    cdef ptrdiff_t n = n_rows(logits)
    cdef ptrdiff_t vocab = last_axis(logits)
    losses, lse = new_leading(logits, cnp.PyArray_TYPE(logits)), new_leading(logits, cnp.NPY_FLOAT64)
    cdef bint wide = is_double(logits)
    cdef void *px = ptr(logits)
    cdef const int64_t *pt = <const int64_t *>ptr(targets)
    cdef void *po = ptr(losses)
    cdef void *pl = ptr(lse)
    with nogil:
        failed = mt_cross_entropy(wide, px, pt, ignored, smoothing, po, pl, n, vocab)
    raise_if(failed)
    return losses, lse


def cross_entropy_backward(logits, targets, lse, dlosses, ignore_index=-100, label_smoothing=0.0):
    """dlogits (N, V) = (softmax(logits) - smoothed one-hot) * dlosses."""
    cdef int failed
    cdef int64_t ignored
    if not plain_losses(logits, targets, ignore_index, label_smoothing, &ignored):
        logits, targets, ignored, label_smoothing = _checks.cross_entropy(logits, targets, ignore_index, label_smoothing)
    cdef double smoothing = label_smoothing
    cdef ptrdiff_t n = n_rows(logits)
    cdef ptrdiff_t vocab = last_axis(logits)
    if not (plain_double(lse, logits, 1) and plain_vector(dlosses, logits, n)):
        lse, dlosses = _checks.of_losses(logits, lse, dlosses)
    dlogits = new_like(logits)
    cdef bint wide = is_double(logits)
    cdef void *px = ptr(logits)
    cdef const int64_t *pt = <const int64_t *>ptr(targets)
    cdef void *pl = ptr(lse)
    cdef void *pd = ptr(dlosses)
    cdef void *po = ptr(dlogits)
    with nogil:
        failed = mt_cross_entropy_backward(wide, px, pt, pl, pd, ignored, smoothing, po, n, vocab)
    raise_if(failed)
    return dlogits


cdef bint take_output_layer(
    mt_output_layer *layer, x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk
) noexcept:
    """Whether the arguments are plain ones of an output layer; if so they are filled in, all but `bfloat16`."""
    cdef int64_t size
    if not (
        plain_matrix(x) and plain_matrix(weight) and cnp.PyArray_TYPE(x) == cnp.PyArray_TYPE(weight)
        and plain_bool(transposed)
        and plain_integer(ignore_index, INT64_MIN, INT64_MAX, &layer.ignore_index)
        and plain_number(label_smoothing, 0.0) and <double>label_smoothing <= 1.0
        and plain_integer(chunk, 1, INT32_MAX, &size)
    ):
        return False
    layer.x, layer.weight, layer.bias, layer.targets = ptr(x), ptr(weight), NULL, NULL
    layer.n, layer.d, layer.chunk = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), size
    layer.transposed, layer.label_smoothing = transposed is True, label_smoothing
    layer.vocab = cnp.PyArray_DIM(weight, 1 - layer.transposed)
    if cnp.PyArray_DIM(weight, layer.transposed) != layer.d or not plain_targets(targets, layer.n, layer.vocab, layer.ignore_index):
        return False
    if bias is not None and not plain_vector(bias, x, layer.vocab):
        return False
    layer.bias, layer.targets = ptr_or_null(bias), <const int64_t *>ptr(targets)
    return True


def linear_cross_entropy(
    x, weight, targets, *, bias=None, transposed=False, ignore_index=-100, label_smoothing=0.0, chunk=1024, bfloat16=False
):
    """losses (N,), lse (N,) of the logits x (N, d) weight (d, V) + bias (V,), which are never there all at once."""
    cdef int failed
    cdef mt_output_layer layer
    if not take_output_layer(&layer, x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk):
        given = _checks.linear_cross_entropy(x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk)
        x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk, _ = given
        checked_if(take_output_layer(&layer, x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk))
    layer.bfloat16 = bfloat16 is not False and _checks.bfloat16(bfloat16, "x", x)
    losses, lse = new_leading(x, cnp.PyArray_TYPE(x)), new_leading(x, cnp.NPY_FLOAT64)
    cdef bint wide = is_double(x)
    cdef void *po = ptr(losses)
    cdef void *pl = ptr(lse)
    with nogil:
        failed = mt_linear_cross_entropy(wide, &layer, po, pl)
    raise_if(failed)
    return losses, lse


cdef bint plain_dweight(dweight, cnp.ndarray x, cnp.ndarray weight, bias, lse, dlosses) noexcept:
    return dweight is None or (
        plain_like(dweight, weight)
        and written_apart(dweight, x)
        and written_apart(dweight, weight)
        and written_apart(dweight, bias)
        and written_apart(dweight, lse)
        and written_apart(dweight, dlosses)
    )


def linear_cross_entropy_backward(
    x, weight, targets, lse, dlosses, dweight=None, *,
    bias=None, transposed=False, ignore_index=-100, label_smoothing=0.0, chunk=1024, bfloat16=False
):
    """dx (N, d), dweight, dbias (V,) or None: dweight, of weight's shape, is added to in place unless it is None."""
    cdef int failed
    cdef mt_output_layer layer
    if not take_output_layer(&layer, x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk):
        given = _checks.linear_cross_entropy(x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk)
        x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk, _ = given
        checked_if(take_output_layer(&layer, x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk))
    if not (
        plain_double(lse, x, 1) and plain_vector(dlosses, x, layer.n) and plain_dweight(dweight, x, weight, bias, lse, dlosses)
    ):
        lse, dlosses = _checks.linear_cross_entropy_backward(x, weight, targets, bias, lse, dlosses, dweight)
    layer.bfloat16 = bfloat16 is not False and _checks.bfloat16(bfloat16, "x", x)
    dx, dbias = new_like(x), None if bias is None else new_like(bias)
    cdef bint wide = is_double(x)
    cdef void *pl = ptr(lse)
    cdef void *pd = ptr(dlosses)
    cdef void *pdx = ptr(dx)
    cdef void *pdw = ptr_or_null(dweight)
    cdef void *pdb = ptr_or_null(dbias)
    with nogil:
        failed = mt_linear_cross_entropy_backward(wide, &layer, pl, pd, pdx, pdw, pdb)
    raise_if(failed)
    return dx, dweight, dbias
