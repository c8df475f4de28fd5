"""Peak memory of this process."""

import re

# The registry's torch is linked with CUDA and touches some of it at import, GPU or not.
CUDA = re.compile(r"/nvidia/|/lib(torch_cuda|c10_cuda|torch_nvshmem)")


def peak_mib():
    """The largest resident size that this process had, MiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024


def cuda_mib():
    """What of this process's memory is CUDA's libraries: their files' pages, and what lies right behind them (their
    zeroed data, and what the allocator may have put there). MiB."""
    total, owner, end = 0, "", None
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if region := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+\s*(.*)", line):
                start, last, path = int(region[1], 16), int(region[2], 16), region[3]
                if path or start != end:
                    owner = path
                end = last
            elif line.startswith("Rss:") and CUDA.search(owner):
                total += int(line.split()[1])
    return total / 1024
