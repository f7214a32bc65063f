#!/usr/bin/env python3
"""The two halves of ncu.sh: one call of a benchmark row for Nsight Compute to profile, and the table of what it found.

    python benchmarks/profile_row.py run ROW GATE          # under ncu --profile-from-start off
    python benchmarks/profile_row.py table ROW FILE.csv    # FILE.csv: ncu --csv --page raw --print-units base
"""
import csv
import re
import sys
from pathlib import Path
from typing import Dict, List

sys.path.insert(0, str(Path(__file__).resolve().parent))

from rows import Row, select

DURATION_NS = "gpu__time_duration.sum"
DRAM_BYTES = ("dram__bytes_read.sum", "dram__bytes_write.sum")
METRICS = {  # what the table shows of a kernel, beside its duration and bytes
    "DRAM, % of peak": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor pipe active, % of cycles": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "issue slots used, %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "special functions (exp2, rsqrt), %": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "registers a thread": "launch__registers_per_thread",
}
# "selected" counts the warp that issues, which is no stall.
STALL = re.compile(r"smsp__average_warps_issue_stalled_(?!selected)(\w+)_per_issue_active\.ratio")
STALLS_SHOWN = 6


def run(row: Row, gate: str) -> None:
    """Calls flash_kda.fwd twice on the row's inputs; only the second call is between profiler start and stop."""
    import torch

    import kernels
    import measure
    call, p = kernels.FlashKda(), measure.problem(row, gate)
    call(p)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call(p)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def parse(text: str) -> List[Dict[str, str]]:
    """The kernels in ncu's wide CSV: a header, a line of units, a line a kernel; messages around them are skipped."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    kernels = list(csv.DictReader(lines))[1:]
    if not kernels:
        raise ValueError("ncu recorded no kernel:\n" + text)
    return kernels


def number(kernel: Dict[str, str], metric: str) -> float:
    """A metric's value; nan where this ncu or GPU does not have it."""
    try:
        return float((kernel.get(metric) or "nan").replace(",", ""))
    except ValueError:
        return float("nan")


def table(row: Row, kernels: List[Dict[str, str]]) -> str:
    """DRAM bytes beside the floor's, then each kernel's utilisation and main stall reasons."""
    moved = sum(number(kernel, metric) for kernel in kernels for metric in DRAM_BYTES)
    lines = ["%s: %.1f MB through DRAM, the floor is %.1f MB: %.2f times"
             % (row.name, moved / 1e6, row.floor_bytes / 1e6, moved / row.floor_bytes)]
    for kernel in kernels:
        lines += ["", kernel["Kernel Name"].split("(")[0]]
        read, written = (number(kernel, metric) / 1e6 for metric in DRAM_BYTES)
        lines.append("  %-36s %.1f us" % ("duration", number(kernel, DURATION_NS) / 1e3))
        lines.append("  %-36s %.1f MB read, %.1f MB written" % ("DRAM", read, written))
        lines += ["  %-36s %.1f" % (label, number(kernel, metric)) for label, metric in METRICS.items()]
        stalls = sorted(((number(kernel, metric), match.group(1)) for metric, match in
                         ((metric, STALL.fullmatch(metric)) for metric in kernel) if match), reverse=True)
        lines.append("  warps stalled an issue, by reason    "
                     + ", ".join("%s %.2f" % (reason, value) for value, reason in stalls[:STALLS_SHOWN]))
    return "\n".join(lines)


def main(argv: List[str]) -> None:
    command, name, last = argv
    rows = select(name)
    if len(rows) != 1:
        raise ValueError("one row at a time: %s" % ", ".join(row.name for row in rows))
    if command == "run":
        run(rows[0], last)
    else:
        print(table(rows[0], parse(Path(last).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    if sys.argv[1:] == ["metrics"]:  # for ncu.sh, so that the names stand in one place
        print(",".join((DURATION_NS,) + DRAM_BYTES + tuple(METRICS.values())))
    else:
        main(sys.argv[1:])
