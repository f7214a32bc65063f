#!/usr/bin/env python3
"""Measures how the time of one sequence grows with its length, for several numbers of heads, beside the peers.

    python benchmarks/scaling.py                       # the random gate
    python benchmarks/scaling.py --gates random,slow --peers flashkda

GPU microseconds as bench_fwd.py takes them (CUDA-graph replay, cold L2 cache), at lengths in powers of two. Writes
OUT.json and, where matplotlib is installed, OUT.png; `python benchmarks/report.py` then brings docs/performance.md up
to date.
"""
import argparse
import sys
from pathlib import Path
from typing import Dict, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

import kernels
import measure
import record
import report
from rows import GATES, Row, some_of

HEADS = (4, 8, 16, 32, 64, 96)
LENGTHS = tuple(512 << n for n in range(8))
MOST_TOKEN_HEADS = 65536 * 16  # past these a point says nothing new, and takes long


def shapes() -> List[Row]:
    return [Row("scaling", "T%d-H%d" % (tokens, heads), heads, (tokens,))
            for heads in HEADS for tokens in LENGTHS if tokens * heads <= MOST_TOKEN_HEADS]


def measure_point(loaded: List, row: Row, gate: str) -> Dict:
    p = measure.problem(row, gate)
    return {"gate": gate, "heads": row.heads, "tokens": row.tokens, "floor_bytes": row.floor_bytes, "kernels": {
        kernel.name: kernels.attempt(kernel, lambda: {"us": measure.device_us(lambda: kernel(p))[0]})
        for kernel in loaded}}


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", type=some_of(GATES), default=GATES[0],
                        help="comma-separated, of %s (default: %%(default)s)" % ", ".join(GATES))
    kernels.add_peers(parser)
    parser.add_argument("--out", help="path of the results without suffix (default: results/scaling/DEVICE beside this "
                                      "script)")
    args = parser.parse_args(argv)
    if not args.gates:
        parser.error("no gate is named")
    measure.require_cuda(parser.prog)

    json_path = record.json_path("scaling", args.out)
    loaded = kernels.load(args.peers)
    result = record.run_state(loaded)
    result["points"] = []
    total = len(args.gates) * len(shapes())
    for gate in args.gates:
        for row in shapes():
            point = measure_point(loaded, row, gate)
            result["points"].append(point)
            print("[%d/%d] %-7s %-10s %s" % (len(result["points"]), total, gate, row.name, " | ".join(
                "%s %s" % (name, "%.1f us" % x["us"] if "us" in x else x["error"])
                for name, x in point["kernels"].items())), flush=True)
            torch.cuda.empty_cache()
            record.save(result, json_path)
    print("wrote %s" % json_path)
    png = report.write_plot(report.plot_scaling, result, json_path)
    if png:
        print("wrote %s" % png)


if __name__ == "__main__":
    main()
