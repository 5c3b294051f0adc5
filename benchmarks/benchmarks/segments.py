"""Backpropagation through many segments: kept, and computed again. The gradients are the same to the bit; RAM and time are not."""

import subprocess
import sys
from pathlib import Path

import numpy as np

import mini_tfm as mt

from .common import interleaved, relative_error, seconds

SEGMENT, BATCH, VOCABULARY = 128, 8, 256
SEGMENTS = [2, 64]
MEMORIES = ["recurrent:tokens=8", "window:size=256"]
MODEL = {"vocab_size": VOCABULARY, "d_model": 128, "n_heads": 4, "n_encoder_layers": 2, "n_decoder_layers": 2, "d_ff": 512}

# In a process of its own: kilobytes after the weights and moments have been touched, and at most while a step is taken.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from benchmarks import segments
from benchmarks.segments import make_trainer, streams
segments.BATCH, segments.SEGMENT = map(int, sys.argv[5:])
trainer = make_trainer(sys.argv[2], sys.argv[4] == "True")
trainer.step(*(x[:1, :1, :1] for x in streams(1)))
status = lambda name: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before, batch = status("VmRSS"), streams(int(sys.argv[3]))
trainer.step(*batch)
trainer.step(*batch)
print(before, status("VmHWM"))
"""


def make_trainer(memory, recompute):
    return mt.Trainer(mt.Transformer(mt.Config(**MODEL), seed=0), mt.memory(memory), recompute=recompute, dropout=0.1)


def streams(segments):
    return [np.random.default_rng(seed).integers(3, VOCABULARY, (BATCH, segments, SEGMENT)) for seed in (0, 1)]


def peak(memory, segments, recompute):
    """Of two steps, in bytes: beyond weights, gradients and moments, and of the whole process."""
    arguments = [str(Path(__file__).parents[1]), memory, *map(str, (segments, recompute, BATCH, SEGMENT))]
    if not Path("/proc/self/status").exists():
        raise NotImplementedError("there is no /proc/self/status")
    done = subprocess.run([sys.executable, "-P", "-c", PROGRAM, *arguments], capture_output=True, text=True)
    if done.returncode:  # a fault, which is not to be left out
        raise RuntimeError(f"memory of {memory} over {segments} segments: the process failed: {done.stderr[-2000:]}")
    before, most = (1024 * int(number) for number in done.stdout.split())
    return most - before, most


class Recomputed:
    params = [MEMORIES, SEGMENTS]
    param_names = ["memory", "segments"]
    timeout = 600
    pairs = 7

    def setup(self, memory, segments):
        self.batch = streams(segments)

    def track_ratio_time(self, memory, segments):
        """Of a step that computes again to one that keeps, in interleaved pairs."""
        again, kept = (make_trainer(memory, recompute) for recompute in (True, False))
        times = [lambda trainer=trainer: seconds(lambda: trainer.step(*self.batch)) for trainer in (kept, again)]
        return interleaved(*times, self.pairs, warm=1).median

    track_ratio_time.unit = "time computed again / time kept"

    def track_ratio_memory(self, memory, segments):
        """Beyond weights, gradients and moments: of so many segments, computed again, to one."""
        return peak(memory, segments, True)[0] / peak(memory, 1, False)[0]

    track_ratio_memory.unit = "peak RAM of a step / that of one segment"

    def track_ratio_process(self, memory, segments):
        return peak(memory, segments, True)[1] / peak(memory, 1, False)[1]

    track_ratio_process.unit = "peak RAM of the process / that of one segment"

    def track_ratio_kept(self, memory, segments):
        return peak(memory, segments, False)[0] / peak(memory, 1, False)[0]

    track_ratio_kept.unit = "peak RAM of a step that keeps all / that of one segment"

    def track_error_loss(self, memory, segments):
        """Of the second step, which has the gradient of the first in it: 0, the same bits."""
        losses = []
        for recompute in (False, True):
            trainer = make_trainer(memory, recompute)
            losses.append([trainer.step(*self.batch) for _ in range(2)])
        return relative_error(losses[1], losses[0])

    track_error_loss.unit = "|error| / |loss|"
