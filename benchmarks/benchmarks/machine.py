"""What the machine can do at most: the other figures are read against these."""

from .common import Reading, Sgemm, seconds

TRIES = 7


class Limits:
    """The best of several tries."""

    def setup(self):
        self.sgemm, self.reading = Sgemm(), Reading()

    def track_sgemm_peak(self):
        return self.sgemm.flops / min(seconds(self.sgemm) for _ in range(TRIES)) / 1e9

    track_sgemm_peak.unit = "GFLOP/s"

    def track_read_bandwidth(self):
        return self.reading.n_bytes / min(seconds(self.reading) for _ in range(TRIES)) / 1e9

    track_read_bandwidth.unit = "GB/s"
