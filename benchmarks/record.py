"""What a result says of how it came about: the commit, the device, the versions; and where it is written."""
import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Dict, List, Optional

import torch

import measure
import report

HERE = Path(__file__).resolve().parent


def _output(*command: str) -> Optional[str]:
    """What a command prints, or None where it is missing or fails."""
    try:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=str(HERE),
                              universal_newlines=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def source_state() -> Dict:
    """The commit measured, and whether tracked files differed from it (None where git cannot say).

    FLASH_KDA_COMMIT names it for a tree that was copied: what git says there, if anything, is of another one.
    """
    commit = os.environ.get("FLASH_KDA_COMMIT") or _output("git", "rev-parse", "HEAD")
    if commit is None or "FLASH_KDA_COMMIT" in os.environ:
        return {"commit": commit, "dirty": None}
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


def run_state(loaded: List) -> Dict:
    """What every result begins with: when, of which implementations and with what it is measured; bandwidths in TB/s.

    The device's state is left to the caller: its clocks say something only once the work has put them where they are.
    """
    state = {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}
    state.update(source_state())
    state.update({"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
                  "kernels": {kernel.name: kernel.version for kernel in loaded},
                  "bandwidth_tbps": {"convention": report.CONVENTION_TBPS, "copy": measure.copy_tbps()}})
    return state


def json_path(kind: str, out: Optional[str]) -> Path:
    """The file for this device's results: OUT.json, or results/KIND/DEVICE.json beside this file. Makes its folder."""
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    stem = Path(out) if out else HERE / "results" / kind / slug
    stem.parent.mkdir(parents=True, exist_ok=True)
    return stem.with_name(stem.name + ".json")


def save(result: Dict, path: Path) -> None:
    """Writes what is measured so far, with the device's clocks where the work just done has put them.

    Called after every point, it leaves of a run cut short what that has measured.
    """
    result["device"] = device_state()
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
