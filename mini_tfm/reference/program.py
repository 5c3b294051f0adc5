"""A decoding step that is run again without Python: what the compiled kernels can, and the twins leave to Python."""

from collections.abc import Callable

import numpy as np

from mini_tfm.errors import InvalidValue
from mini_tfm.reference import _checks
from mini_tfm.reference.kept import to_kept
from mini_tfm.reference.types import Choice, Feed, Integers, Real

__all__ = ["Program", "keep_rows"]


class Program:
    """A step of one token for each stream, noted twice and run again from then on.

    What is noted is every call of a norm, a packed product, `activation`, `add`, `recurrence`, `rotary`, `keep_rows` and `attention`, with
    the arrays they were given.
    Two steps in a row, of as many streams, must have called the same, each time with the arrays that calls before had given, or with
    those of the step before; otherwise something was computed that no kernel knows of, and the step is never `ready`. Arrays that stay the
    same but for what is in them (positions, masks, keys, lengths) are read anew. One program belongs to one caller. The twins
    never are ready: their steps are Python.
    """

    ready = False
    hopeless = True
    batch = 0

    def note(self, step: Callable[[Real], Real], x: Real) -> Real:
        """step(x), noted. x (B, 1, d), contiguous; the step gives an array (B, 1, d) that a kernel has written."""
        return step(x)

    def run(self, x: Real, keys: int) -> Real:
        """The step of x (B, 1, d), where each stream has so many keys of its own, the new ones included: (B, 1, d).

        B: at most as many as were noted: the streams that are the first of their arrays.
        """
        raise _not_ready("run")

    def run_greedily(
        self,
        tokens: Integers,
        keys: int,
        steps: int,
        ends: Integers,
        feed: Feed,
        choice: Choice,
        position: Integers,
        owners: Integers | None = None,
    ) -> tuple[Integers, Real]:
        """Steps in a row, each fed what the one before has chosen, the first one tokens (B,): ids (B, n) and the last step's scores (B,).

        n: `steps`, or fewer: none follows one that chooses an id of ends (m,), or has a score that is not finite. keys: as of `run`, of
        the first step. position (1,): that of its token, in the array that was noted, and in the end that of the next. owners (rows,
        capacity): each new key is its own row's.
        """
        raise _not_ready("run_greedily")

    def run_beams(
        self,
        tokens: Integers,
        scores: Real,
        width: int,
        k: int,
        keys: int,
        steps: int,
        ends: Integers,
        feed: Feed,
        choice: Choice,
        position: Integers,
        owners: Integers | None = None,
    ) -> tuple[Real, Integers, Integers, Integers]:
        """Steps of beam search in a row: log_probs, ids (B, k) of the last step, and before it parents, chosen (B, n), n < steps.

        Beams of one source, `width` of B, stand side by side; scores (B,) are theirs, in float64, and brought on. After each step but the
        last their best continuations take their places, best first, of equal ones the one of the earlier beam, then of the better token:
        row b goes on from row parents[b, i] with token chosen[b, i]. None follows a step where one of these is an end, where a row's best
        is not finite, or of which fewer than `width` are. All else: as of `run_greedily`.
        """
        raise _not_ready("run_beams")


def _not_ready(method: str) -> InvalidValue:
    return InvalidValue(
        f"{method}: expected a program that is ready, for which two equal steps were noted, got one that is not; ask `ready` first"
    )


def keep_rows(store: Real, at: int | Integers, rows: Real) -> None:
    """store (B, H, capacity, D), from row `at` on, becomes rows (B, H, n, D), in place. at: one for all, or (B,) one of each.

    A store of uint16 has them in bfloat16, one of int8 (B, H, capacity, D + 4) with a scale behind each row.
    """
    store, at, rows = _checks.keep_rows(store, at, rows)
    rows = to_kept(rows, store.dtype)
    for stream, first, new in zip(store, np.broadcast_to(at, len(store)), rows, strict=True):
        stream[:, first : first + rows.shape[2]] = new
