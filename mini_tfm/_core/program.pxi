# A decoding step, recorded and run again: the calls of kernels that Python made, without Python


cdef extern from "core.h" nogil:
    struct mt_packed:
        void *memory
        ptrdiff_t d_in, d_out, group
        int kind, gated

    struct mt_epilogue:
        const void *bias
        const void *gate_bias
        const void *residual
        int activation

    struct mt_block:
        mt_rows k, v
        int kept
        ptrdiff_t kv_heads, source
        const int64_t *owners
        ptrdiff_t owners_ld
        const uint8_t *valid
        const int64_t *lengths
        const int64_t *index
        ptrdiff_t width
        const void *bias
        ptrdiff_t[4] bias_stride
        int64_t offset, window
        int64_t prefix
        int causal
        mt_rows dk, dv
        void *dbias
        ptrdiff_t[4] dbias_stride

    struct mt_attention_sizes:
        ptrdiff_t batch, heads, length, d, n_blocks
        double scale, cap, dropout
        uint64_t seed


cdef extern from "program.h" nogil:
    enum:
        MT_CALL_LAYER_NORM
        MT_CALL_RMS_NORM
        MT_CALL_HEADS_NORM
        MT_CALL_LINEAR
        MT_CALL_ACTIVATION
        MT_CALL_ADD
        MT_CALL_RECURRENCE
        MT_CALL_ROTARY
        MT_CALL_KEEP
        MT_CALL_ATTENTION

    struct mt_call:
        int kind, is_double
        ptrdiff_t n, d
        const void *x
        void *y
        void *state
        const void *weight
        const void *bias
        double eps
        void *mean
        void *rstd
        mt_packed packed
        mt_epilogue then
        mt_rows from_ "from"
        mt_rows to
        const int64_t *positions
        int per_row
        const int64_t *at_b
        const double *frequencies
        ptrdiff_t half, heads
        int kept
        mt_block *blocks
        mt_attention_sizes sizes
        void *lse

    struct mt_now:
        ptrdiff_t batch, keys

    int mt_run_calls(const mt_call *calls, const uint64_t *grows, ptrdiff_t n, mt_now now)
    void mt_scale(int is_double, const void *x, double scale, void *y, ptrdiff_t n)
    void mt_keep(
        int is_double, int kept, const mt_rows *from_, const mt_rows *to, ptrdiff_t at, const int64_t *at_b, ptrdiff_t batch,
        ptrdiff_t heads, ptrdiff_t n, ptrdiff_t d
    )


cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1


cdef extern from "math.h" nogil:
    bint isfinite(double x)
    double INFINITY


cdef extern from "pythread.h":
    unsigned long PyThread_get_thread_ident() noexcept


cdef enum:
    MOST_CALLS = 4096
    INPUT = -1     # places of pointers: the step's input,
    OUTSIDE = -2   # what no call wrote,
    NOWHERE = -3   # NULL


cdef struct place:
    ptrdiff_t call      # which call wrote it, or one of the above
    ptrdiff_t offset    # bytes from there; of what is outside, the address


cdef class Calls:
    """What one step has called, in order. Keeps alive all that it points into, so that no two arrays had the same address."""

    cdef mt_call *calls
    cdef ptrdiff_t n
    cdef list kept, outputs   # of each call the array that it wrote, or None
    cdef ptrdiff_t batch
    cdef bint whole           # whether nothing was called that cannot be run again
    cdef cnp.ndarray input

    def __cinit__(self, cnp.ndarray x):
        self.calls = <mt_call *>calloc(MOST_CALLS, sizeof(mt_call))
        if self.calls == NULL:
            raise MemoryError("mini_tfm: no memory for a recorded step")
        self.n, self.kept, self.outputs, self.whole, self.input = 0, [], [], True, x
        self.batch = cnp.PyArray_DIM(x, 0)

    def __dealloc__(self):
        cdef ptrdiff_t i
        if self.calls != NULL:
            for i in range(self.n):
                free(self.calls[i].blocks)
        free(self.calls)

    cdef mt_call *new(self, int kind, bint wide, ptrdiff_t rows, ptrdiff_t d, output, list kept):
        """The next call, of so many rows of all streams together; NULL where it cannot be run again. output: the array it wrote, or None."""
        if self.n == MOST_CALLS or self.batch == 0 or rows % self.batch:
            self.whole = False
            return NULL
        cdef mt_call *call = &self.calls[self.n]
        self.n += 1
        self.kept.append(kept)
        self.outputs.append(output)
        call.kind, call.is_double, call.n, call.d = kind, wide, rows // self.batch, d
        return call

    cdef place of(self, const void *pointer) noexcept:
        """Where a pointer points to."""
        cdef place found
        cdef ptrdiff_t i
        cdef cnp.ndarray array
        cdef const char *start
        found.call, found.offset = OUTSIDE, <ptrdiff_t>pointer
        if pointer == NULL:
            found.call = NOWHERE
            return found
        for i in range(self.n - 1, INPUT - 1, -1):
            output = self.input if i == INPUT else self.outputs[i]
            if output is None:
                continue
            array = output
            start = <const char *>cnp.PyArray_DATA(array)
            if start <= <const char *>pointer < start + cnp.PyArray_NBYTES(array):
                found.call, found.offset = i, <const char *>pointer - start
                return found
        return found


cdef Calls recording = None  # what kernels note their calls in,
cdef unsigned long recording_thread = 0  # of this thread alone


cdef inline Calls recorder():
    """Where this call is to be noted; None, nearly always."""
    if recording is None or recording_thread != PyThread_get_thread_ident():
        return None
    return recording


cdef int note_linear(x, w, mt_packed *at, mt_epilogue *then, ptrdiff_t n, out, list kept) except -1:
    cdef Calls into = recorder()
    if into is None:
        return 0
    cdef mt_call *call = into.new(MT_CALL_LINEAR, is_double(x), n, at.d_in, out, [x, w, *kept])
    if call != NULL:
        call.packed, call.then, call.x, call.y = at[0], then[0], ptr(x), ptr(out)
    return 0


cdef int note_norm(int kind, x, weight, bias, double eps, ptrdiff_t n, ptrdiff_t d, y, mean, rstd) except -1:
    cdef Calls into = recorder()
    if into is None:
        return 0
    cdef mt_call *call = into.new(kind, is_double(x), n, d, y, [x, weight, bias, mean, rstd])
    if call != NULL:
        call.x, call.weight, call.bias, call.eps = ptr(x), ptr(weight), ptr_or_null(bias), eps
        call.y, call.mean, call.rstd = ptr(y), ptr_or_null(mean), ptr(rstd)
    return 0


cdef int note_heads_norm(Calls into, x, weight, double eps, y, rstd) except -1:
    cdef ptrdiff_t rows = cnp.PyArray_DIM(x, 0) * cnp.PyArray_DIM(x, 2)
    cdef mt_call *call = into.new(MT_CALL_HEADS_NORM, is_double(x), rows, last_axis(x), y, [x, weight, rstd])
    if call != NULL:
        call.from_, call.to, call.heads = rows_of(x), rows_of(y), cnp.PyArray_DIM(x, 1)
        call.weight, call.eps, call.rstd = ptr(weight), eps, ptr(rstd)
    return 0


cdef int note_elements(int kind, x, other, int activation, y) except -1:
    cdef Calls into = recorder()
    if into is None:
        return 0
    cdef ptrdiff_t d = last_axis(x) if cnp.PyArray_NDIM(x) else 1
    cdef mt_call *call = into.new(kind, is_double(x), n_rows(x), d, y, [x, other])
    if call != NULL:
        call.x, call.y, call.then.residual, call.then.activation = ptr(x), ptr(y), ptr_or_null(other), activation
    return 0


cdef int note_recurrence(x, forget, state, out) except -1:
    cdef Calls into = recorder()
    if into is None:
        return 0
    cdef mt_call *call = into.new(MT_CALL_RECURRENCE, is_double(x), n_rows(x), last_axis(x), out, [x, forget, state])
    if call != NULL:
        call.from_, call.to, call.state, call.y = rows_of_sequence(x), rows_of_sequence(forget), ptr(state), ptr(out)
    return 0


cdef int note_rotary(x, positions, frequencies, bint inverse, y) except -1:
    cdef Calls into = recorder()
    if into is None:
        return 0
    cdef ptrdiff_t length = cnp.PyArray_DIM(x, 2)
    cdef mt_call *call = into.new(MT_CALL_ROTARY, is_double(x), cnp.PyArray_DIM(x, 0) * length, last_axis(x), y, [x, positions, frequencies])
    if inverse:
        into.whole = False
    elif call != NULL:
        call.per_row = cnp.PyArray_NDIM(positions) == 2
        call.from_, call.to, call.heads = rows_of(x), rows_of(y), cnp.PyArray_DIM(x, 1)
        call.positions, call.frequencies = <const int64_t *>ptr(positions), <const double *>ptr(frequencies)
        call.half = cnp.PyArray_DIM(frequencies, 0)
    return 0


cdef int note_attention(mt_rows *q, mt_block *blocks, mt_attention_sizes *sizes, bint wide, out, lse, list kept) except -1:
    cdef Calls into = recorder()
    cdef ptrdiff_t i
    if into is None:
        return 0
    cdef mt_call *call = into.new(MT_CALL_ATTENTION, wide, sizes.batch * sizes.length, sizes.d, out, [lse, *kept])
    if call == NULL:
        return 0
    call.from_, call.to, call.lse, call.sizes, call.heads = q[0], rows_of(out), ptr(lse), sizes[0], sizes.heads
    call.blocks = <mt_block *>calloc(sizes.n_blocks + 1, sizeof(mt_block))
    if call.blocks == NULL:
        raise MemoryError("mini_tfm: no memory for a recorded step")
    for i in range(sizes.n_blocks):
        call.blocks[i] = blocks[i]
    return 0


cdef bint same_place(place a, place b) noexcept:
    return a.call == b.call and a.offset == b.offset


cdef class Ahead


cdef class Program:
    """A step of one token for each stream, noted twice and run again from then on.

    What is noted is every call of a norm, a packed product, `activation`, `add`, `recurrence`, `rotary`, `keep_rows` and `attention`, with
    the arrays they were given.
    Two steps in a row, of as many streams, must have called the same, each time with the arrays that calls before had given, or with
    those of the step before; otherwise something was computed that no kernel knows of, and the step is never `ready`. Arrays that stay the
    same but for what is in them (positions, masks, keys, lengths) are read anew. One program belongs to one caller.
    """

    cdef Calls first, second
    cdef uint64_t *grows
    cdef bint failed
    cdef object result

    def __cinit__(self):
        self.grows = NULL
        self.failed = False

    def __dealloc__(self):
        free(self.grows)

    @property
    def ready(self):
        """Whether `run` may be called."""
        return self.grows != NULL

    @property
    def batch(self):
        """The most streams that `run` takes."""
        return 0 if self.second is None else self.second.batch

    @property
    def hopeless(self):
        """Whether steps that were noted cannot be run again."""
        return self.failed

    def note(self, step, x):
        """step(x), noted. x (B, 1, d), contiguous; the step gives an array (B, 1, d) that a kernel has written."""
        global recording, recording_thread
        if recording is not None or self.failed or not plain(x):
            return step(x)
        cdef Calls calls = Calls(x)
        recording, recording_thread = calls, PyThread_get_thread_ident()
        try:
            y = step(x)
        finally:
            recording = None
        self.first, self.second = self.second, calls
        if self.first is not None:
            self.compare(y)
        return y.copy() if self.grows != NULL else y  # what runs write into is nobody else's

    cdef int compare(self, y) except -1:
        cdef Calls a = self.first, b = self.second
        cdef ptrdiff_t i
        if a.batch != b.batch:
            return 0
        self.failed = True
        if not (a.whole and b.whole and a.n == b.n and b.n and y is b.outputs[b.n - 1]):
            return 0
        cdef uint64_t *grows = <uint64_t *>calloc(b.n, sizeof(uint64_t))
        if grows == NULL:
            raise MemoryError("mini_tfm: no memory for a recorded step")
        for i in range(b.n):
            if not self.same_call(a, b, i, &grows[i]):
                free(grows)
                return 0
        self.failed, self.grows, self.result, self.first = False, grows, y, None
        return 0

    cdef bint same_call(self, Calls a, Calls b, ptrdiff_t i, uint64_t *grows) noexcept:
        cdef mt_call *x = &a.calls[i]
        cdef mt_call *y = &b.calls[i]
        if x.kind != y.kind or x.is_double != y.is_double or x.kept != y.kept:
            return False
        if x.n != y.n or x.d != y.d or x.heads != y.heads or x.half != y.half:
            return False
        if x.kind == MT_CALL_ATTENTION:
            return same_place(a.of(x.from_.at), b.of(y.from_.at)) and self.same_blocks(a, b, x, y, grows)
        return (
            same_place(a.of(x.x), b.of(y.x))
            and same_place(a.of(x.from_.at), b.of(y.from_.at)) and same_place(a.of(x.to.at), b.of(y.to.at))
            and same_place(a.of(x.state), b.of(y.state)) and x.at_b == y.at_b
            and same_place(a.of(x.weight), b.of(y.weight)) and same_place(a.of(x.bias), b.of(y.bias))
            and same_place(a.of(x.then.bias), b.of(y.then.bias)) and same_place(a.of(x.then.gate_bias), b.of(y.then.gate_bias))
            and same_place(a.of(x.then.residual), b.of(y.then.residual)) and x.then.activation == y.then.activation
            and x.packed.memory == y.packed.memory and x.positions == y.positions and x.per_row == y.per_row and x.frequencies == y.frequencies
        )

    cdef bint same_blocks(self, Calls a, Calls b, mt_call *x, mt_call *y, uint64_t *grows) noexcept:
        """Blocks that are what they were, or the own one with one more key, and the bias of that with its last key where it was.

        An own block with lengths, which is causal, has as many keys as its longest stream, and its bias where it was.
        """
        cdef ptrdiff_t i, more, moved
        cdef ptrdiff_t element = 8 if x.is_double else 4
        cdef bint uneven
        cdef mt_block *p
        cdef mt_block *q
        if x.sizes.n_blocks != y.sizes.n_blocks or x.sizes.n_blocks > 64 or x.sizes.scale != y.sizes.scale or x.sizes.cap != y.sizes.cap:
            return False
        if x.sizes.dropout != 0 or y.sizes.dropout != 0:
            return False
        for i in range(x.sizes.n_blocks):
            p, q = &x.blocks[i], &y.blocks[i]
            more = q.source - p.source
            if p.index != NULL or q.index != NULL or p.lengths != q.lengths or p.valid != q.valid or p.owners != q.owners or (more and q.valid != NULL):
                return False
            if p.causal != q.causal or p.window != q.window or p.prefix != q.prefix or p.kv_heads != q.kv_heads:
                return False
            uneven = q.lengths != NULL and q.causal
            if p.k.at != q.k.at or p.v.at != q.v.at or not (uneven or more in (0, 1)) or q.offset != p.offset + more:
                return False
            moved = 0 if uneven else more * p.bias_stride[3] * element
            if (<char *>q.bias if q.bias != NULL else NULL) != (<char *>p.bias - moved if p.bias != NULL else NULL):
                return False
            if more or uneven:
                grows[0] |= <uint64_t>1 << i
        return True

    def run(self, x, ptrdiff_t keys):
        """The step of x (B, 1, d), where each stream has so many keys of its own, the new ones included: (B, 1, d).

        B: at most as many as were noted: the streams that are the first of their arrays.
        """
        cdef mt_now now
        cdef int failed
        cdef Calls calls = self.second
        cdef cnp.ndarray input
        self.check_ready("run")
        input = calls.input
        if not (plain(x) and cnp.PyArray_NDIM(x) == 3 and cnp.PyArray_TYPE(x) == cnp.PyArray_TYPE(input)):
            raise InvalidValue("x: expected a contiguous array (B, 1, d) of the dtype that was noted")
        now.batch, now.keys = cnp.PyArray_DIM(x, 0), keys
        if now.batch > calls.batch or cnp.PyArray_NBYTES(x) * calls.batch != cnp.PyArray_NBYTES(input) * now.batch or keys < 1:
            raise InvalidValue(f"x: expected at most {calls.batch} streams of shape {self.result.shape[1:]}, got {x.shape}")
        memcpy(cnp.PyArray_DATA(input), cnp.PyArray_DATA(x), cnp.PyArray_NBYTES(x))
        with nogil:
            failed = mt_run_calls(calls.calls, self.grows, calls.n, now)
        raise_if(failed)
        return self.result[: now.batch].copy()

    cdef int check_ready(self, str method) except -1:
        if self.grows == NULL:
            raise InvalidValue(
                f"{method}: expected a program that is ready, for which two equal steps were noted, got one that is not; ask `ready` first"
            )
        return 0

    def run_greedily(self, tokens, ptrdiff_t keys, ptrdiff_t steps, ends, feed, choice, position, owners=None):
        """Steps in a row, each fed what the one before has chosen, the first one tokens (B,): ids (B, n) and the last step's scores (B,).

        n: `steps`, or fewer: none follows one that chooses an id of ends (m,), or has a score that is not finite. keys: as of `run`, of
        the first step. position (1,): that of its token, in the array that was noted, and in the end that of the next. owners (rows,
        capacity): each new key is its own row's.
        """
        cdef Ahead ahead = Ahead(self, "run_greedily", tokens, keys, steps, ends, feed, choice, position, owners)
        cdef ptrdiff_t row, batch = ahead.batch
        cdef bint ended = False
        cdef ptrdiff_t step = 0
        scores, ids = np.empty((batch, 1), ahead.x.dtype), np.empty((batch, steps), np.int64)
        cdef void *ps = ptr(scores)
        cdef int64_t *pi = <int64_t *>ptr(ids)
        while True:
            ahead.take(ps, ahead.next, NULL, 1)
            for row in range(batch):
                pi[row * steps + step] = ahead.next[row]
                ended = ended or not isfinite(real_at(ps, row, ahead.wide)) or ahead.is_end(ahead.next[row])
            step += 1
            if ended or step == steps:
                return ids[:, :step], scores[:, 0]

    def run_beams(
        self, tokens, scores, ptrdiff_t width, ptrdiff_t k, ptrdiff_t keys, ptrdiff_t steps, ends, feed, choice, position, owners=None
    ):
        """Steps of beam search in a row: log_probs, ids (B, k) of the last step, and before it parents, chosen (B, n), n < steps.

        Beams of one source, `width` of B, stand side by side; scores (B,) are theirs, in float64, and brought on. After each step but the
        last their best continuations take their places, best first, of equal ones the one of the earlier beam, then of the better token:
        row b goes on from row parents[b, i] with token chosen[b, i]. None follows a step where one of these is an end, where a row's best
        is not finite, or of which fewer than `width` are. All else: as of `run_greedily`.
        """
        cdef Ahead ahead = Ahead(self, "run_beams", tokens, keys, steps, ends, feed, choice, position, owners)
        cdef ptrdiff_t batch = ahead.batch
        cdef ptrdiff_t step, row, capacity = ahead.capacity
        if width < 1 or batch % width or k < width or (owners is None and width > 1):
            raise InvalidValue(f"width: expected whole groups of the {batch} rows, with owners, and at most k = {k}, got {width}")
        if not (plain(scores) and cnp.PyArray_TYPE(scores) == cnp.NPY_FLOAT64 and cnp.PyArray_NDIM(scores) == 1 and cnp.PyArray_DIM(scores, 0) == batch):
            raise InvalidValue(f"scores: expected contiguous float64 ({batch},)")
        found, ids, totals = np.empty((batch, k), ahead.x.dtype), np.empty((batch, k), np.int64), np.empty(batch, np.float64)
        log_probs, parents, chosen = np.empty((batch, k), np.float64), np.empty((batch, steps), np.int64), np.empty((batch, steps), np.int64)
        places, brought, moved = np.empty(batch, np.int64), np.empty(batch, np.float64), np.empty((batch, capacity), np.int64)
        cdef void *pf = ptr(found)
        cdef int64_t *pi = <int64_t *>ptr(ids)
        cdef double *pt = <double *>ptr(totals)
        cdef double *pl = <double *>ptr(log_probs)
        cdef double *ps = <double *>ptr(scores)
        cdef double *pb = <double *>ptr(brought)
        cdef int64_t *pp = <int64_t *>ptr(parents)
        cdef int64_t *pc = <int64_t *>ptr(chosen)
        cdef int64_t *at = <int64_t *>ptr(places)
        cdef int64_t *pm = <int64_t *>ptr(moved)
        cdef bint ended = False
        step = 0
        while True:
            ahead.take(pf, pi, pt, k)
            for row in range(batch * k):
                pl[row] = real_at(pf, row, ahead.wide) - pt[row // k]
            for row in range(batch):
                ended = ended or not isfinite(pl[row * k])
            for row in range(0, batch, width):
                ended = ended or not best_of_beams(pl + row * k, ps + row, width, k, at + row, pb + row)
            for row in range(batch if not ended else 0):
                ended = ended or ahead.is_end(pi[row // width * width * k + at[row]])
            if ended or step + 1 == steps:
                return log_probs, ids, parents[:, :step], chosen[:, :step]
            for row in range(batch):
                pp[row * steps + step] = row // width * width + at[row] // k
                pc[row * steps + step] = ahead.next[row] = pi[row // width * width * k + at[row]]
                ps[row] = pb[row]
                if capacity:
                    memcpy(pm + row * capacity, ahead.owners + pp[row * steps + step] * capacity, (ahead.now.keys - 1) * sizeof(int64_t))
            for row in range(batch if capacity else 0):
                memcpy(ahead.owners + row * capacity, pm + row * capacity, (ahead.now.keys - 1) * sizeof(int64_t))
            step += 1


cdef inline double real_at(const void *x, ptrdiff_t i, bint wide) noexcept:
    return (<const double *>x)[i] if wide else (<const float *>x)[i]


cdef bint best_of_beams(const double *log_probs, const double *scores, ptrdiff_t width, ptrdiff_t k, int64_t *at, double *best) noexcept:
    """The best `width` of scores (width,) + log_probs (width, k), whose rows descend: their places and sums; whether all are finite."""
    cdef ptrdiff_t rank, beam, place, i
    cdef double value
    for rank in range(width):
        at[rank], best[rank] = -1, -INFINITY
        for beam in range(width):
            place = beam * k
            for i in range(rank):
                place += at[i] // k == beam  # its better ones are taken
            if place == (beam + 1) * k:
                continue
            value = scores[beam] + log_probs[place]
            if value > best[rank]:
                at[rank], best[rank] = place, value
        if not isfinite(best[rank]):
            return False
    return True


cdef class Ahead:
    """Steps of a program that follow each other: what each is fed, and how its outputs are scored."""

    cdef Program program
    cdef cnp.ndarray x, hidden
    cdef PackedWeight w
    cdef bint wide, scaled, choice_scaled
    cdef double factor, choice_factor
    cdef ptrdiff_t batch, d, rows, capacity, n_ends
    cdef mt_now now
    cdef const void *table
    cdef const char *places
    cdef const void *bias
    cdef const int64_t *among
    cdef const int64_t *ends
    cdef int64_t *at         # the position of the next token
    cdef int64_t *owners
    cdef int64_t *next       # the tokens of the next step (B,)
    cdef object kept

    def __cinit__(
        self, Program program, str method, tokens, ptrdiff_t keys, ptrdiff_t steps, ends, feed, choice, position, owners
    ):
        program.check_ready(method)
        cdef Calls calls = program.second
        self.program, self.x = program, calls.input
        self.wide, self.d = is_double(self.x), last_axis(self.x)
        table, scale, places = feed
        weight, choice_scale, bias, among = choice
        if not (plain_integers(position) and cnp.PyArray_SIZE(position) == 1 and plain_integers(ends) and keys >= 1 and steps >= 1):
            raise InvalidValue("position, ends: expected contiguous integers, one position; keys, steps: at least 1")
        if not (plain_integers(tokens) and cnp.PyArray_NDIM(tokens) == 1 and 1 <= cnp.PyArray_DIM(tokens, 0) <= calls.batch):
            raise InvalidValue(f"tokens: expected integers (B,), with B from 1 to the {calls.batch} streams that were noted")
        if not (
            plain_like_rows(table, self.x, self.d) and all_within(tokens, 0, cnp.PyArray_DIM(table, 0))
            and (places is None or (plain_like_rows(places, self.x, self.d) and 0 <= position[0] <= cnp.PyArray_DIM(places, 0) - steps))
        ):
            raise InvalidValue("feed: expected contiguous tables (n, d) of the dtype that was noted, with a row for each token and position")
        self.w = own_weight(weight)
        if self.w.at.d_in != self.d or self.w.wide != self.wide or self.w.at.gated or self.w.at.d_out < 1:
            raise InvalidValue(f"choice: expected a weight (d, n) with d = {self.d} and without a gate, of the dtype that was noted")
        if not (
            self.w.at.d_out <= cnp.PyArray_DIM(table, 0) if among is None
            else plain_integers(among) and cnp.PyArray_SIZE(among) == self.w.at.d_out and all_within(among, 0, cnp.PyArray_DIM(table, 0))
        ):
            raise InvalidValue("choice: expected no more columns than feed's table has rows, or an id of one of these for each column")
        if not (bias is None or plain_vector(bias, self.x, self.w.at.d_out)):
            raise InvalidValue(f"choice: expected a bias ({self.w.at.d_out},) of the dtype that was noted")
        self.batch = cnp.PyArray_DIM(tokens, 0)
        if not (
            owners is None
            or (
                plain_integers(owners) and cnp.PyArray_NDIM(owners) == 2 and self.batch <= cnp.PyArray_DIM(owners, 0)
                and keys + steps - 1 <= cnp.PyArray_DIM(owners, 1)
            )
        ):
            raise InvalidValue("owners: expected contiguous integers (rows, capacity) with room for all streams and keys")
        self.hidden, tokens = np.empty((self.batch, self.d), self.x.dtype), tokens.copy()
        self.kept = tokens, table, places, bias, among, ends, position, owners
        self.next, self.ends, self.n_ends = <int64_t *>ptr(tokens), <const int64_t *>ptr(ends), cnp.PyArray_SIZE(ends)
        self.table, self.places, self.bias, self.among = ptr(table), <const char *>ptr_or_null(places), ptr_or_null(bias), <const int64_t *>ptr_or_null(among)
        self.at, self.owners = <int64_t *>ptr(position), <int64_t *>ptr_or_null(owners)
        self.rows, self.capacity = (0, 0) if owners is None else owners.shape
        self.scaled, self.choice_scaled = scale is not None, choice_scale is not None
        self.factor, self.choice_factor = scale if self.scaled else 1, choice_scale if self.choice_scaled else 1
        self.now.batch, self.now.keys = self.batch, keys

    cdef int take(self, void *scores, int64_t *ids, void *lse, ptrdiff_t k) except -1:
        """The step of the `next` tokens: its best k scores and their ids (B, k), and log sum exp (B,) of all, or NULL."""
        cdef Calls calls = self.program.second
        cdef ptrdiff_t row, n = self.batch * self.d
        cdef ptrdiff_t width = self.d * cnp.PyArray_ITEMSIZE(self.x)
        cdef char *x = <char *>ptr(self.x)
        cdef char *hidden = <char *>ptr(self.hidden)
        cdef const void *y = ptr(self.program.result)
        cdef int failed
        with nogil:
            for row in range(self.rows):
                self.owners[row * self.capacity + self.now.keys - 1] = row
            mt_embedding(self.wide, self.table, self.next, hidden, self.batch, self.d)
            if self.scaled:
                mt_scale(self.wide, hidden, self.factor, hidden, n)
            if self.places == NULL:
                memcpy(x, hidden, self.batch * width)
            for row in range(self.batch if self.places != NULL else 0):
                mt_add(self.wide, hidden + row * width, self.places + self.at[0] * width, x + row * width, self.d)
            failed = mt_run_calls(calls.calls, self.program.grows, calls.n, self.now)
            if not failed:
                if self.choice_scaled:
                    mt_scale(self.wide, y, self.choice_factor, hidden, n)
                    y = hidden
                failed = mt_linear_top_k(self.wide, y, &self.w.at, self.bias, scores, ids, lse, self.batch, k)
            for row in range(self.batch * k if self.among != NULL else 0):
                if ids[row] >= 0:
                    ids[row] = self.among[ids[row]]
        raise_if(failed)
        PyErr_CheckSignals()
        self.now.keys += 1
        self.at[0] += 1
        return 0

    cdef bint is_end(self, int64_t token) noexcept:
        cdef ptrdiff_t i
        for i in range(self.n_ends):
            if self.ends[i] == token:
                return True
        return False


def keep_rows(store, at, rows):
    """store (B, H, capacity, D), from row `at` on, becomes rows (B, H, n, D), in place. at: one for all, or (B,) one of each.

    A store of uint16 has them in bfloat16, one of int8 (B, H, capacity, D + 4) with a scale behind each row.
    """
    cdef int64_t first = 0
    cdef const int64_t *at_b = NULL
    cdef bint is_plain = (
        plain_heads(rows) and plain_kept(store, rows)
        and cnp.PyArray_ISWRITEABLE(<cnp.ndarray>store) and same_leading(store, rows, 2) and last_axis(store) == kept_axis(store, rows)
    )
    cdef ptrdiff_t most = cnp.PyArray_DIM(store, 2) - cnp.PyArray_DIM(rows, 2) if is_plain else 0
    if is_plain and plain_integers(at) and cnp.PyArray_NDIM(at) == 1:
        is_plain = cnp.PyArray_DIM(at, 0) == cnp.PyArray_DIM(rows, 0) and all_within(at, 0, most + 1)
    elif is_plain:
        is_plain = plain_integer(at, 0, most, &first)
    if not is_plain:
        store, at, rows = _checks.keep_rows(store, at, rows)
        first = 0 if isinstance(at, np.ndarray) else at
    if isinstance(at, np.ndarray):
        at_b = <const int64_t *>ptr(at)
    cdef bint wide = is_double(rows)
    cdef int kept = kept_as(store)
    cdef mt_rows to = rows_of(store)
    cdef mt_rows new = rows_of(rows)
    cdef ptrdiff_t batch = cnp.PyArray_DIM(rows, 0)
    cdef ptrdiff_t heads = cnp.PyArray_DIM(rows, 1)
    cdef ptrdiff_t n = cnp.PyArray_DIM(rows, 2)
    cdef ptrdiff_t d = cnp.PyArray_DIM(rows, 3)
    with nogil:
        mt_keep(wide, kept, &new, &to, first, at_b, batch, heads, n, d)
    cdef Calls into = recorder()
    if into is None:
        return
    cdef mt_call *call = into.new(MT_CALL_KEEP, wide, batch * n, d, None, [store, rows, at])
    if call != NULL:
        call.from_, call.to, call.heads, call.kept, call.at_b = new, to, heads, kept, at_b
