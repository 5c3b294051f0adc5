# Weights packed once, and products with them


cdef extern from "core.h" nogil:
    size_t mt_packed_bytes(int is_double, const mt_packed *w)
    int mt_pack(int is_double, const mt_packed *w, const void *weight, const void *gate, int transposed)
    void mt_unpack(int is_double, const mt_packed *w, void *weight, void *gate)
    int mt_repack(int is_double, const mt_packed *w, const void *values, const void *scales, const void *gate, const void *gate_scales)
    void mt_unpack_kept(int is_double, const mt_packed *w, void *values, void *scales, void *gate, void *gate_scales)
    int mt_packed_linear(int is_double, const void *x, const mt_packed *w, const mt_epilogue *then, void *out, ptrdiff_t n)
    int mt_linear_top_k(
        int is_double, const void *x, const mt_packed *w, const void *bias, void *scores, int64_t *ids, void *lse, ptrdiff_t n,
        ptrdiff_t k
    )


cdef extern from "room.h":
    void *mt_take_room(size_t n_bytes)
    void mt_give_room_back(void *piece)


cdef class PackedWeight:
    """A weight as the kernels of one instruction set read it; owns its memory. Made by pack(), for products of any rows."""

    cdef mt_packed at
    cdef size_t n_bytes
    cdef object kind, real, grouped
    cdef bint wide

    def __cinit__(self):
        self.at.memory = NULL

    def __init__(self):
        raise InvalidType("PackedWeight: expected one made by pack(), got a call of the class")

    def __dealloc__(self):
        mt_give_room_back(self.at.memory)

    @property
    def shape(self):
        """(d_in, d_out)."""
        return self.at.d_in, self.at.d_out

    @property
    def dtype(self):
        """"float32", "float64", "bfloat16" or "int8"."""
        return self.kind

    @property
    def gated(self):
        """Whether a gate of the same shape is packed with it."""
        return bool(self.at.gated)

    @property
    def group(self):
        """Rows that share a scale in int8, else None."""
        return self.grouped

    @property
    def nbytes(self):
        """Bytes of memory that it owns."""
        return self.n_bytes

    def unpack(self):
        """The weight (d_in, d_out) that products are made with, or (weight, gate)."""
        weight = np.empty(self.shape, self.real)
        gate = np.empty(self.shape, self.real) if self.at.gated else None
        cdef void *pw = ptr(weight)
        cdef void *pg = ptr_or_null(gate)
        with nogil:
            mt_unpack(self.wide, &self.at, pw, pg)
        return weight if gate is None else (weight, gate)

    def kept(self):
        """[(values, scales)] of the weight and its gate, as `repack` takes them."""
        if self.at.kind == 0:
            reals = self.unpack()
            return [(np.ascontiguousarray(one.T), None) for one in (reals if self.at.gated else [reals])]
        cdef ptrdiff_t n_groups = (self.at.d_in + self.at.group - 1) // self.at.group
        found = []
        for _ in range(1 + self.at.gated):
            scales = None if self.at.kind == 1 else np.empty((self.at.d_out, n_groups), self.real)
            found.append((np.empty((self.at.d_out, self.at.d_in), "u2" if self.at.kind == 1 else "i1"), scales))
        cdef void *pv = ptr(found[0][0])
        cdef void *ps = ptr_or_null(found[0][1])
        cdef void *pg = ptr(found[1][0]) if self.at.gated else NULL
        cdef void *pt = ptr_or_null(found[1][1]) if self.at.gated else NULL
        with nogil:
            mt_unpack_kept(self.wide, &self.at, pv, ps, pg, pt)
        return found


reference_types.PackedWeight.register(PackedWeight)


cdef PackedWeight own_weight(weight):
    """A checked weight, which may be the twin's."""
    if not isinstance(weight, PackedWeight):
        raise InvalidType(f"weight: expected a PackedWeight of the compiled pack(), got one of {type(weight).__module__}")
    return weight


cdef PackedWeight room_for(str dtype, group, bint gated, tuple shape):
    """A PackedWeight of shape (d_in, d_out) whose memory nothing is in yet."""
    cdef PackedWeight w = PackedWeight.__new__(PackedWeight)
    w.kind, w.grouped, w.wide = dtype, group, dtype == "float64"
    w.real = np.dtype("float64" if w.wide else "float32")
    w.at.d_in, w.at.d_out = shape
    w.at.group, w.at.gated = group or 1, gated
    w.at.kind = {"float32": 0, "float64": 0, "bfloat16": 1, "int8": 2}[dtype]
    w.n_bytes = mt_packed_bytes(w.wide, &w.at)
    w.at.memory = mt_take_room(w.n_bytes + 64)
    if w.at.memory == NULL:
        raise MemoryError("mini_tfm: no memory for a packed weight")
    return w


def pack(weight, *, dtype="float32", transposed=False, gate=None, group=None):
    """A PackedWeight of weight (d_in, d_out), or (d_out, d_in) when transposed; gate: a second one, for gated feed-forwards."""
    cdef int t, failed
    weight, dtype, t, gate, group = _checks.pack(weight, dtype, transposed, gate, group)
    cdef PackedWeight w = room_for(dtype, group, gate is not None, weight.shape[::-1] if t else weight.shape)
    cdef void *pw = ptr(weight)
    cdef void *pg = ptr_or_null(gate)
    with nogil:
        failed = mt_pack(w.wide, &w.at, pw, pg, t)
    raise_if(failed)
    return w


def repack(values, scales=None, *, gate=None, gate_scales=None, group=None):
    """The PackedWeight whose `kept` gave values and scales, and those of a gate; group: its own, None: 256 in int8."""
    cdef int failed
    dtype, values, scales, gate, gate_scales, group = _checks.repack(values, scales, gate, gate_scales, group)
    cdef PackedWeight w = room_for(dtype, group, gate is not None, values.shape[::-1])
    cdef void *pv = ptr(values)
    cdef void *ps = ptr_or_null(scales)
    cdef void *pg = ptr_or_null(gate)
    cdef void *pt = ptr_or_null(gate_scales)
    with nogil:
        failed = mt_repack(w.wide, &w.at, pv, ps, pg, pt)
    raise_if(failed)
    return w


cdef inline bint plain_factor(x, PackedWeight w) noexcept:
    """An array (..., d_in) of what the weight multiplies."""
    return plain_rows(x) and is_double(x) == w.wide and last_axis(x) == w.at.d_in


cdef bint plain_epilogue(x, PackedWeight w, bias, gate_bias, residual) noexcept:
    return (
        (bias is None or plain_vector(bias, x, w.at.d_out))
        and (gate_bias is None or (w.at.gated and plain_vector(gate_bias, x, w.at.d_out)))
        and (residual is None or plain_result(residual, x, w.at.d_out))
    )


cdef bint plain_product_out(out, x, PackedWeight w, bias, gate_bias, residual) noexcept:
    return out is None or (
        plain_result(out, x, w.at.d_out)
        and written_apart(out, x)
        and written_apart(out, bias)
        and written_apart(out, gate_bias)
        and written_apart(out, residual)
    )


cdef dict activation_numbers = {None: -1, **{name: number for number, name in enumerate(_checks.ACTIVATIONS)}}


def packed_linear(x, weight, bias=None, *, gate_bias=None, activation=None, residual=None, out=None):
    """activation(x W + bias) + residual, or activation(x W_gate + gate_bias) * (x W + bias) + residual."""
    cdef mt_epilogue then
    cdef int failed
    cdef ptrdiff_t n
    if (
        isinstance(weight, PackedWeight)
        and (activation is None or (type(activation) is str and activation in activation_numbers))
        and plain_factor(x, weight)
        and plain_epilogue(x, weight, bias, gate_bias, residual)
        and plain_product_out(out, x, weight, bias, gate_bias, residual)
    ):
        kind, n = activation_numbers[activation], n_rows(x)
    else:
        x, bias, gate_bias, kind, residual, n = _checks.packed_linear(x, weight, bias, gate_bias, activation, residual, out)
    cdef PackedWeight w = own_weight(weight)
    if out is None:
        out = new_result(x, w.at.d_out)
    then.bias, then.gate_bias, then.residual = ptr_or_null(bias), ptr_or_null(gate_bias), ptr_or_null(residual)
    then.activation = kind
    cdef void *px = ptr(x)
    cdef void *po = ptr(out)
    with nogil:
        failed = mt_packed_linear(w.wide, px, &w.at, &then, po, n)
    raise_if(failed)
    note_linear(x, w, &w.at, &then, n, out, [bias, gate_bias, residual])
    return out


def linear_top_k(x, weight, k, bias=None, *, lse=False):
    """The k best of x W + bias in each row: scores, ids (..., k), best first; with lse also log sum exp over all, (...)."""
    cdef int failed
    cdef int64_t wanted
    if not (
        isinstance(weight, PackedWeight)
        and plain_factor(x, weight)
        and not (<PackedWeight>weight).at.gated
        and plain_integer(k, 0, INT32_MAX, &wanted)
        and plain_bool(lse)
        and plain_epilogue(x, weight, bias, None, None)
    ):
        x, wanted, bias, lse, _ = _checks.linear_top_k(x, weight, k, bias, lse)
    cdef PackedWeight w = own_weight(weight)
    cdef ptrdiff_t n = n_rows(x)
    cdef int leading = cnp.PyArray_NDIM(x) - 1
    scores, ids = new_array(x, leading, wanted, cnp.PyArray_TYPE(x)), new_array(x, leading, wanted, cnp.NPY_INT64)
    totals = new_leading(x, cnp.NPY_FLOAT64) if lse else None
    cdef void *px = ptr(x)
    cdef void *pb = ptr_or_null(bias)
    cdef void *ps = ptr(scores)
    cdef int64_t *pi = <int64_t *>ptr(ids)
    cdef void *pl = ptr_or_null(totals)
    with nogil:
        failed = mt_linear_top_k(w.wide, px, &w.at, pb, ps, pi, pl, n, wanted)
    raise_if(failed)
    return (scores, ids, totals) if lse else (scores, ids)
