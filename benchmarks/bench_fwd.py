#!/usr/bin/env python3
"""Measures flash_kda.fwd on a Hopper GPU, beside the peers that are installed.

    python benchmarks/bench_fwd.py                          # every row, both gates
    python benchmarks/bench_fwd.py --rows standard,T2048-H12 --gates slow
    python benchmarks/bench_fwd.py --peers flashkda,cudnn,fla    # with FLA, which autotunes for minutes a shape

For each row: GPU microseconds (CUDA-graph replay, cold L2 cache), host microseconds to issue a call, both beside the
memory floor: the time its unavoidable bytes take at 3.0 TB/s, and at the copy bandwidth measured on this device.
Before them, the error of each implementation against the fp64 reference. Writes OUT.json, OUT.md and, where
matplotlib is installed, OUT.png; `python benchmarks/report.py` then brings the documents' tables up to date.
The commit is FLASH_KDA_COMMIT, for a tree that was copied, or else read from git.
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
from rows import ACCURACY_ROW, GATES, GROUPS, Row, select, some_of


def measure_accuracy(loaded: List, gates: List[str]) -> List[Dict]:
    entries = []
    for gate in gates:
        p = measure.problem(ACCURACY_ROW, gate)
        for kernel in loaded:
            entry = {"gate": gate, "kernel": kernel.name}
            entry.update(kernels.attempt(kernel, lambda: measure.accuracy(kernel, p)))
            entries.append(entry)
            text = entry["error"] if "error" in entry else "out %.2e  state %.2e" % (entry["out"], entry["state"])
            print("accuracy  %-7s %-10s %s" % (gate, kernel.name, text), flush=True)
    return entries


def measure_row(loaded: List, row: Row, gate: str) -> Dict:
    p = measure.problem(row, gate)

    def figures(kernel) -> Dict:
        us, quartiles = measure.device_us(lambda: kernel(p))
        return {"us": us, "us_quartiles": quartiles, "host_us": measure.host_us(lambda: kernel(p))}

    return {"row": row.name, "group": row.group, "gate": gate, "heads": row.heads, "lens": list(row.lens),
            "floor_bytes": row.floor_bytes,
            "kernels": {kernel.name: kernels.attempt(kernel, lambda: figures(kernel)) for kernel in loaded}}


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(GROUPS),
                        help="groups and row names, comma-separated (default: %(default)s)")
    parser.add_argument("--gates", type=some_of(GATES), default=",".join(GATES),
                        help="comma-separated (default: %(default)s)")
    kernels.add_peers(parser)
    parser.add_argument("--out", help="path of the results without suffix (default: results/DEVICE beside this script)")
    args = parser.parse_args(argv)
    try:
        rows = select(args.rows)
    except ValueError as error:
        parser.error(str(error))
    gates = args.gates
    if not gates:
        parser.error("no gate is named")
    measure.require_cuda(parser.prog)

    json_path = record.json_path("", args.out)
    loaded = kernels.load(args.peers)
    result = record.run_state(loaded)
    print("%s, copy bandwidth %.2f TB/s" % (torch.cuda.get_device_name(0), result["bandwidth_tbps"]["copy"]),
          flush=True)

    result["accuracy"] = measure_accuracy(loaded, gates)
    result["rows"] = []
    total = len(rows) * len(gates)
    for gate in gates:
        for row in rows:
            entry = measure_row(loaded, row, gate)
            result["rows"].append(entry)
            print("[%d/%d] %s" % (len(result["rows"]), total, report.progress_line(result, entry)), flush=True)
            torch.cuda.empty_cache()
            record.save(result, json_path)
    for path in [json_path] + report.write_companions(json_path):
        print("wrote %s" % path)


if __name__ == "__main__":
    main()
