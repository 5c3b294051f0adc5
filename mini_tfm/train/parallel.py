"""Data parallelism over MPI: several processes, on one machine or many, take one step together.

Every process (rank) gets the same batch, computes on rows of its own, and sums its gradients with those of all others in
one reduction of the flat arena; each then takes the same optimizer step. A Trainer uses the five methods of `Alone`; `Ranks`
implements them over mpi4py.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..errors import InvalidType, InvalidValue, TrainingError

# Environment variables set by the launchers of Open MPI, MPICH, Intel MPI and those that speak PMIx.
_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MV2_COMM_WORLD_SIZE")
EXIT_CODE = 2
OTHERS_WAIT = 1.0  # seconds before another rank prints its error: rank 0 often has the same and prints it first


class StoppedTogether(KeyboardInterrupt):
    """All ranks agreed to stop after the same step."""


class Alone:
    """One process: nothing to sum, nobody to wait for."""

    rank, size = 0, 1

    def sum(self, array: np.ndarray) -> None:
        """Replaces a contiguous array by its sum over all ranks."""

    def share(self, array: np.ndarray) -> None:
        """Replaces a contiguous array by rank 0's."""

    def wait(self) -> None:
        """Waits until all ranks are here."""

    def together(self) -> contextlib.AbstractContextManager[None]:
        """An error that one rank raises inside ends all: the others would wait for it forever."""
        return contextlib.nullcontext()

    def any(self, answer: bool) -> bool:
        """Whether any rank says yes; the same answer on all."""
        yes = np.array([float(answer)])
        self.sum(yes)
        return bool(yes[0])


class Ranks(Alone):
    """The processes of an mpi4py communicator (default: all that `mpirun` started).

    describe: the text about an error that ends all ranks, for standard error; default: a traceback.
    """

    def __init__(self, comm: Any = None, describe: Callable[[BaseException], str] | None = None):
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise InvalidValue(f"training on several ranks needs mpi4py ({error}): pip install 'mini-tfm[mpi]'") from error
        comm = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(comm, MPI.Intracomm):
            raise InvalidType(f"communicator: expected an mpi4py intracommunicator such as MPI.COMM_WORLD, got {type(comm).__name__}")
        self._comm, self._in_place, self._describe = comm, MPI.IN_PLACE, describe
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def sum(self, array: np.ndarray) -> None:
        self._comm.Allreduce(self._in_place, array)

    def share(self, array: np.ndarray) -> None:
        self._comm.Bcast(array, root=0)

    def wait(self) -> None:
        self._comm.Barrier()

    @contextlib.contextmanager
    def _ending_all(self) -> Iterator[None]:
        try:
            yield
        except (TrainingError, StoppedTogether):  # raised by all ranks at once, after what they have summed
            raise
        except BaseException as error:
            if self.size == 1:
                raise
            if self.rank:
                time.sleep(OTHERS_WAIT)
            message = self._describe(error) if self._describe else "".join(traceback.format_exception(error)).rstrip()
            stream = sys.__stderr__ or sys.stderr
            stream.write(f"rank {self.rank} of {self.size}: {message}\n")
            stream.flush()
            self._comm.Abort(EXIT_CODE)
            raise  # an MPI whose Abort returns

    def together(self) -> contextlib.AbstractContextManager[None]:
        return self._ending_all()


def launched(environ: Any = os.environ) -> bool:
    """Whether `mpirun` or the like started this process."""
    return any(name in environ for name in _LAUNCHED)


def communicator_of(given: Any) -> Alone:
    """The argument of a Trainer as ranks: None is this process alone."""
    if given is None:
        return Alone()
    return given if isinstance(given, Alone) else Ranks(given)


def shares(n_rows: int, n_parts: int) -> list[slice]:
    """Rows cut into `n_parts` consecutive parts of nearly equal size; with fewer rows than parts some are empty."""
    ends = [part * n_rows // n_parts for part in range(n_parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]
