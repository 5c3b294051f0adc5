"""How many threads to start with."""

import os
import warnings
from pathlib import Path, PurePosixPath

from mini_tfm.reference._checks import MOST_THREADS

# Where control groups are mounted: version 2 (alone, beside version 1), then version 1's processor controller.
_MOUNTS = {"": ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"), "cpu": ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct")}


def _folders(read):
    """Folders that may hold a quota: this process's control groups and all above them, whose limits hold too.

    In a container the process may be told a path of the host's, of which nothing is to be seen but the mount itself.
    """
    try:
        lines = read("/proc/self/cgroup").splitlines()
    except OSError:
        lines = []
    paths = {"": "/", "cpu": "/"}
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        for controller in controllers.split(","):
            if controller in paths and path.startswith("/"):
                paths[controller] = path
    for controller, mounts in _MOUNTS.items():
        path = PurePosixPath(paths[controller])
        for mount in mounts:
            yield from (f"{mount}{'' if str(folder) == '/' else folder}" for folder in (path, *path.parents))


def _ratio(quota, period) -> float | None:
    try:
        processors = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return processors if processors > 0 else None  # -1: none


def _quota(read) -> float | None:
    """Processors' worth of time that the control groups grant, the least of them; None when none sets a limit."""
    found = []
    for folder in _folders(read):
        try:
            found.append(_ratio(*read(f"{folder}/cpu.max").split()))
        except (OSError, ValueError, TypeError):
            try:
                found.append(_ratio(read(f"{folder}/cpu.cfs_quota_us"), read(f"{folder}/cpu.cfs_period_us")))
            except OSError:
                continue
    return min((quota for quota in found if quota is not None), default=None)


def default_num_threads(environ=os.environ, read=lambda path: Path(path).read_text()) -> int:
    """OMP_NUM_THREADS if it is a number of threads that can be set; else the processors this process may run on, within its cgroups'
    quotas."""
    asked = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and len(asked) < 20 and 0 < int(asked) <= MOST_THREADS:
        return int(asked)
    n = _processors(read)
    if asked:
        told = asked if len(asked) < 40 else f"{asked[:20]}... ({len(asked)} characters)"
        warnings.warn(f"OMP_NUM_THREADS: expected a number from 1 to {MOST_THREADS}, got {told!r}; mini_tfm uses {n} threads", stacklevel=2)
    return n


def _processors(read) -> int:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(read)
    return max(1, processors if quota is None else min(processors, round(quota)))
