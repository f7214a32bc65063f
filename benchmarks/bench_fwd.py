#!/usr/bin/env python3
"""Measures flash_kda.fwd on a Hopper GPU, beside the peers that are installed.

    python benchmarks/bench_fwd.py                          # every row, both gates
    python benchmarks/bench_fwd.py --rows standard,T2048-H12 --gates slow
    python benchmarks/bench_fwd.py --peers flashkda         # without FLA, which autotunes for minutes a shape

For each row: GPU microseconds (CUDA-graph replay, cold L2 cache), host microseconds to issue a call, both beside the
memory floor: the time its unavoidable bytes take at 3.0 TB/s, and at the copy bandwidth measured on this device.
Before them, the error of each implementation against the fp64 reference. Writes OUT.json, OUT.md and, where
matplotlib is installed, OUT.png; `python benchmarks/report.py` then brings the documents' tables up to date.
The commit is read from git, or from FLASH_KDA_COMMIT in a tree without it.
"""
import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

import kernels
import measure
import report
from rows import ACCURACY_ROW, GATES, GROUPS, Row, select

HERE = Path(__file__).resolve().parent


def _output(*command: str) -> Optional[str]:
    """What a command prints, or None where it is missing or fails."""
    try:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=str(HERE),
                              universal_newlines=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def source_state() -> Dict:
    """The commit measured, and whether tracked files differed from it (None where git cannot say)."""
    commit = _output("git", "rev-parse", "HEAD")
    if commit is None:
        return {"commit": os.environ.get("FLASH_KDA_COMMIT"), "dirty": None}
    return {"commit": commit, "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no"))}


def device_state() -> Dict:
    """The GPU, its driver, its clocks in MHz and its power limit in W; None for what nvidia-smi cannot say."""
    properties = torch.cuda.get_device_properties(0)
    state = {"name": properties.name, "capability": "%d.%d" % (properties.major, properties.minor),
             "sm_count": properties.multi_processor_count, "memory_bytes": properties.total_memory}
    fields = {"driver": "driver_version", "sm_mhz": "clocks.sm", "sm_max_mhz": "clocks.max.sm",
              "memory_mhz": "clocks.mem", "power_limit_w": "power.limit"}
    line = _output("nvidia-smi", "--id=0", "--format=csv,noheader,nounits", "--query-gpu=" + ",".join(fields.values()))
    values = [value.strip() for value in line.split(",")] if line else []
    state.update(dict(zip(fields, values)) if len(values) == len(fields) else dict.fromkeys(fields))
    return state


def load_kernels(peers: str) -> List:
    """Ours, then the named peers that can be loaded; a line says which cannot."""
    loaded = [kernels.KERNELS[kernels.OURS]()]
    for name in [name for name in peers.split(",") if name]:
        try:
            loaded.append(kernels.KERNELS[name]())
        except (ImportError, OSError, RuntimeError) as error:
            print("%s is left out: %s" % (name, _short(error)), flush=True)
    return loaded


def _short(error: Exception) -> str:
    return ("%s: %s" % (type(error).__name__, error)).split("\n")[0][:200]


def measure_accuracy(loaded: List, gates: List[str]) -> List[Dict]:
    entries = []
    for gate in gates:
        p = measure.problem(ACCURACY_ROW, gate)
        for kernel in loaded:
            entry = {"gate": gate, "kernel": kernel.name}
            try:
                entry.update(measure.accuracy(kernel, p))
                text = "out %.2e  state %.2e" % (entry["out"], entry["state"])
            except Exception as error:  # a peer that refuses a shape must not end the run
                if kernel.name == kernels.OURS:
                    raise
                text = entry["error"] = _short(error)
            entries.append(entry)
            print("accuracy  %-7s %-10s %s" % (gate, kernel.name, text), flush=True)
    return entries


def measure_row(loaded: List, row: Row, gate: str) -> Dict:
    p = measure.problem(row, gate)
    entry = {"row": row.name, "group": row.group, "gate": gate, "heads": row.heads, "lens": list(row.lens),
             "floor_bytes": row.floor_bytes, "kernels": {}}
    for kernel in loaded:
        try:
            us, quartiles = measure.device_us(lambda: kernel(p))
            figures = {"us": us, "us_quartiles": quartiles, "host_us": measure.host_us(lambda: kernel(p))}
        except Exception as error:
            if kernel.name == kernels.OURS:
                raise
            figures = {"error": _short(error)}
        entry["kernels"][kernel.name] = figures
    return entry


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(GROUPS),
                        help="groups and row names, comma-separated (default: %(default)s)")
    parser.add_argument("--gates", default=",".join(GATES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--peers", default=",".join(kernels.PEERS),
                        help="comma-separated; those that are not installed are left out (default: %(default)s)")
    parser.add_argument("--out", help="path of the results without suffix (default: results/DEVICE beside this script)")
    args = parser.parse_args(argv)
    try:
        rows = select(args.rows)
    except ValueError as error:
        parser.error(str(error))
    gates = args.gates.split(",")
    for given, known in ((gates, GATES), ([name for name in args.peers.split(",") if name], kernels.PEERS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error("unknown: %s; known: %s" % (", ".join(unknown), ", ".join(known)))
    if not torch.cuda.is_available():
        sys.exit("bench_fwd.py measures GPU time: PyTorch finds no CUDA device here.")

    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    stem = Path(args.out) if args.out else HERE / "results" / slug
    stem.parent.mkdir(parents=True, exist_ok=True)
    json_path = stem.with_name(stem.name + ".json")

    loaded = load_kernels(args.peers)
    result = {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}
    result.update(source_state())
    result.update({"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
                   "kernels": {kernel.name: kernel.version for kernel in loaded},
                   "bandwidth_tbps": {"convention": report.CONVENTION_TBPS, "copy": measure.copy_tbps()}})
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
            result["device"] = device_state()  # after a row, with the clocks still where the work put them
            # After every row, so that a run cut short leaves what it has measured.
            json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for path in [json_path] + report.write_companions(json_path):
        print("wrote %s" % path)


if __name__ == "__main__":
    main()
