"""Several processes that train one model over MPI: what a second one costs, each with one thread and rows of its own."""

import json
import os
import shutil
import statistics
import subprocess
import sys

from .common import relative_error

STEP = """
import json, sys, time
import numpy as np
from mpi4py import MPI
import mini_tfm as mt

rows, length, steps, as_one = json.loads(sys.argv[1])
ranks = MPI.COMM_WORLD
size = as_one or ranks.size
config = mt.Config(vocab_size=1000, d_model=128, n_heads=4, n_encoder_layers=2, n_decoder_layers=2)
trainer = mt.Trainer(mt.Transformer(config, seed=0), learning_rate=1e-3, communicator=ranks)
source, target = np.random.default_rng(0).integers(3, 1000, (2, rows * size, length))
losses, times = [], []
for _ in range(steps + 1):
    ranks.Barrier()
    began = time.perf_counter()
    losses.append(trainer.step(source, target))
    times.append(time.perf_counter() - began)
if ranks.rank == 0:
    print(json.dumps([min(times[1:]), losses]))
"""
# Open MPI refuses root, which one is in a container, and binds both of two jobs to the same cores.
MPI_SETTINGS = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1"}


def train(ranks, rows, length, steps, as_one=0):
    """(seconds of the quickest step, losses) of `ranks` processes with so many rows each; `as_one`: with the rows of so many."""
    environment = {**os.environ, **MPI_SETTINGS, "OMP_NUM_THREADS": "1"}
    given = json.dumps([rows, length, steps, as_one])
    command = ["mpirun", "-n", str(ranks), sys.executable, "-c", STEP, given]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True, timeout=600).stdout)


class WeakScaling:
    """(rows of a rank, tokens) of a step of the model of 1.0 M weights: twice the rows on twice the processes."""

    params = ([(16, 128), (64, 128)],)
    param_names = ["size"]
    timeout = 600
    pairs, steps = 5, 5

    def setup(self, size):
        if shutil.which("mpirun") is None:
            raise NotImplementedError("there is no mpirun")
        try:
            import mpi4py  # noqa: F401  # the processes import it, not this one, which would become a rank of its own
        except ImportError:
            raise NotImplementedError("mpi4py is not installed") from None

    def track_efficiency(self, size):
        """Time of a step of one rank over that of two, in interleaved pairs: 1 where a second costs nothing."""
        pairs = [[train(ranks, *size, self.steps)[0] for ranks in (1, 2)] for _ in range(self.pairs)]
        return statistics.median(one / two for one, two in pairs)

    track_efficiency.unit = "share of a rank's speed alone"

    def track_error_loss(self, size):
        """Of the losses of two ranks from those of one with the same rows, which sums in another order."""
        return relative_error(train(2, *size, self.steps)[1], train(1, *size, self.steps, 2)[1])

    track_error_loss.unit = "|difference| / |loss|"
