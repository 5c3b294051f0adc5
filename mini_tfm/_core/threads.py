"""How many threads to start with, and what a fork does to them."""

import os
from pathlib import Path


def _quota(read) -> float | None:
    """Processors' worth of time that the control group grants, None when it sets no limit. Version 2, then version 1."""
    try:
        limit, period = read("/sys/fs/cgroup/cpu.max").split()
    except (OSError, ValueError):
        try:
            limit, period = read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
        except OSError:
            return None
    try:
        quota = int(limit) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return quota if quota > 0 else None


def default_num_threads(environ=os.environ, read=lambda path: Path(path).read_text()) -> int:
    """OMP_NUM_THREADS if it is set to a number; else the processors this process may run on, within its cgroup's quota."""
    asked = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(read)
    return max(1, processors if quota is None else min(processors, round(quota)))
