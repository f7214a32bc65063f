#!/usr/bin/env python3
"""Turns recorded results (results/) into Markdown, plots, and the tables in README.md and docs/performance.md.

    python benchmarks/report.py           # rewrite whatever is out of date
    python benchmarks/report.py --check   # change nothing; exit 1 and say what is out of date

Documents hold no typed figures. Each stands between a pair of marker comments and is generated from the results:

    <!-- results:begin summary -->    geometric means of every group of rows, for every file in results/
    <!-- results:begin rows -->       every row
    <!-- results:begin accuracy -->   errors against the fp64 reference
    <!-- results:begin plan -->       what each part of the work costs by the plan's model, and how well that fits
    <!-- results:begin scaling -->    time over the length of one sequence
    <!-- results:begin ladder -->     the versions of the kernel: time predicted, time measured
    <!-- results:begin tried -->      what was tried and dropped
    <!-- results:begin profile -->    what the profiler said
    <!-- results:end -->

results/ holds the current measurements, a file a device: of bench_fwd.py, in plan/ of fit_plan.py, in scaling/ of scaling.py.
The last three blocks come from results/ladder/history.json, which is kept by hand: a history a device, in the order of the
work, and in it an entry a version, written when it was measured.
"""
import argparse
import hashlib
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path
from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from rows import floor_us, select

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/performance.md")
OURS = "flash_kda"
CONVENTION_TBPS = 3.0  # floors are stated at this bandwidth, so that they compare across devices and reports
NOT_MEASURED = "not measured yet"
NO_RESULTS = ("No results are recorded yet. `python benchmarks/bench_fwd.py` on a Hopper GPU records them, "
              "`python benchmarks/report.py` puts them here.")
LABELS = {OURS: "flash_kda", "flashkda": "FlashKDA (vLLM)", "cudnn": "cuDNN", "fla": "FLA chunk_kda"}
PLAN_UNITS = {  # of the plan's costs: a launch, then the parts of Work in csrc/plan.h
    "launch": "a call",
    "steps": "a chunk, by a pair of CTAs",
    "summaries": "a call that has summaries: leaving one, waiting for others",
    "compositions": "a state composed with a segment's summary while no other is being found, all pairs at once",
    "corrections": "32 tokens' outputs corrected, by a pair, all pairs at once",
}

Result = Dict  # what a script here writes; all times in microseconds, all sizes in bytes
History = Dict  # an entry of results/ladder/history.json: one row on one device, version after version


class Figures(NamedTuple):
    """One implementation on one row, or the geometric means over several."""
    us: float
    host_us: float
    floor_us: float       # at CONVENTION_TBPS
    copy_floor_us: float  # at the copy bandwidth measured in the same run
    tbps: float           # unavoidable bytes over the time taken

    @property
    def over_floor(self) -> float:
        return self.us / self.floor_us

    @property
    def over_copy_floor(self) -> float:
        return self.us / self.copy_floor_us


def figures(result: Result, entry: Dict, kernel: str) -> Optional[Figures]:
    """A kernel's figures on a row entry of the result, or None where it has none."""
    measured = entry["kernels"].get(kernel, {})
    if "us" not in measured:
        return None
    size, bandwidth = entry["floor_bytes"], result["bandwidth_tbps"]
    return Figures(measured["us"], measured["host_us"], floor_us(size, bandwidth["convention"]),
                   floor_us(size, bandwidth["copy"]), size / (measured["us"] * 1e6))


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def mean_figures(result: Result, entries: List[Dict], kernel: str) -> Optional[Figures]:
    """Geometric means over the entries, or None unless the kernel has figures on all of them."""
    each = [figures(result, entry, kernel) for entry in entries]
    if not each or None in each:
        return None
    return Figures(*(geometric_mean(values) for values in zip(*each)))


def _groups(result: Result) -> List[Tuple[str, str, List[Dict]]]:
    """(gate, group, entries) in the order in which they were measured."""
    groups: Dict[Tuple[str, str], List[Dict]] = {}
    for entry in result["rows"]:
        groups.setdefault((entry["gate"], entry["group"]), []).append(entry)
    return [(gate, group, entries) for (gate, group), entries in groups.items()]


def _peers(result: Result) -> List[str]:
    return [kernel for kernel in result["kernels"] if kernel != OURS]


def _table(header: List[str], lines: List[List[str]], text_columns: int) -> str:
    """A Markdown table whose first `text_columns` columns are text and the others numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| %s |" % " | ".join(cells) for cells in [header, rule] + lines)


def _figure_headers(peers: List[str]) -> List[str]:
    header = ["floor µs", "flash_kda µs", "× floor", "× copy floor", "TB/s", "host µs"]
    for peer in peers:
        header += [LABELS[peer] + " µs", "host µs", "× flash_kda"]
    return header


def _figure_cells(ours: Optional[Figures], theirs: List[Optional[Figures]]) -> List[str]:
    if ours is None:
        return [NOT_MEASURED] + ["—"] * (5 + 3 * len(theirs))
    cells = ["%.1f" % ours.floor_us, "%.1f" % ours.us, "%.2f" % ours.over_floor, "%.2f" % ours.over_copy_floor,
             "%.2f" % ours.tbps, "%.1f" % ours.host_us]
    for peer in theirs:
        cells += ["%.1f" % peer.us, "%.1f" % peer.host_us, "%.2f" % (peer.us / ours.us)] if peer else ["—"] * 3
    return cells


def summary_table(result: Result) -> str:
    """Geometric means, a line a gate and group."""
    peers = _peers(result)
    lines = []
    for gate, group, entries in _groups(result):
        cells = _figure_cells(mean_figures(result, entries, OURS),
                              [mean_figures(result, entries, peer) for peer in peers])
        lines.append([group, gate, str(len(entries))] + cells)
    return _table(["rows", "gate", "count"] + _figure_headers(peers), lines, text_columns=2)


def rows_table(result: Result) -> str:
    """Every row, a line a gate and row."""
    peers = _peers(result)
    lines = []
    for gate, _, entries in _groups(result):
        for entry in entries:
            cells = _figure_cells(figures(result, entry, OURS), [figures(result, entry, peer) for peer in peers])
            lines.append([entry["row"], gate] + cells)
    return _table(["row", "gate"] + _figure_headers(peers), lines, text_columns=2)


def accuracy_table(result: Result) -> str:
    """Errors against the fp64 reference, a line a gate and implementation."""
    lines = []
    for entry in result["accuracy"]:
        cells = ["%.2e" % entry["out"], "%.2e" % entry["state"]] if "out" in entry else ["—", "—"]
        lines.append([entry["gate"], LABELS[entry["kernel"]]] + cells)
    return _table(["gate", "implementation", "out", "final state"], lines, text_columns=2)


def provenance(result: Result) -> str:
    """One line: where, when and of what a result was measured."""
    device, bandwidth = result["device"], result["bandwidth_tbps"]
    commit = "commit %s" % result["commit"][:12] if result["commit"] else "unknown commit"
    if result["dirty"]:
        commit += " with local changes"
    versions = ["%s %s" % (LABELS[name], version) for name, version in result["kernels"].items()]
    parts = [result["date"], commit, ", ".join(versions), "PyTorch %s" % result["torch"], "CUDA %s" % result["cuda"]]
    if device.get("driver"):
        parts.append("driver %s" % device["driver"])
    if device.get("sm_mhz"):
        parts.append("SM clock %s of %s MHz" % (device["sm_mhz"], device["sm_max_mhz"]))
    parts.append("copy bandwidth %.2f TB/s" % bandwidth["copy"])
    return "; ".join(parts) + "."


def markdown(result: Result, plot_name: Optional[str] = None) -> str:
    """The whole result as one Markdown document."""
    parts = ["# %s" % result["device"]["name"], provenance(result),
             "Times are GPU microseconds; the floor is the row's unavoidable bytes at %.1f TB/s, the copy floor at the "
             "copy bandwidth measured in the same run." % result["bandwidth_tbps"]["convention"],
             "## Geometric means", summary_table(result), "## Rows", rows_table(result),
             "## Relative error against the fp64 reference", accuracy_table(result)]
    if plot_name:
        parts.insert(3, "![Time over the memory floor, a bar a row](%s)" % plot_name)
    return "\n\n".join(parts) + "\n"


def progress_line(result: Result, entry: Dict) -> str:
    """A row as it is printed while the benchmark runs."""
    parts = []
    for kernel in result["kernels"]:
        f = figures(result, entry, kernel)
        if f is None:
            parts.append("%s: %s" % (kernel, entry["kernels"].get(kernel, {}).get("error", NOT_MEASURED)))
        else:
            parts.append("%s %.1f us = %.2fx (%.2f TB/s, host %.1f us)"
                         % (kernel, f.us, f.over_floor, f.tbps, f.host_us))
    floor = floor_us(entry["floor_bytes"], result["bandwidth_tbps"]["convention"])
    return "%-7s %-9s %-16s floor %.1f us | %s" % (
        entry["gate"], entry["group"], entry["row"], floor, " | ".join(parts))


def _mark(result: Result) -> str:
    """What a plot is marked with, to tell whether it is of this result."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _save_plot(figure, result: Result, path: Path) -> None:
    figure.savefig(str(path), dpi=120, metadata={"Source": _mark(result)})  # stands in the file as it is


def plot(result: Result, path: Path) -> bool:
    """Draws time over the floor, a bar a row and implementation, a panel a gate. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError:
        return False
    gates = list(dict.fromkeys(entry["gate"] for entry in result["rows"]))
    names = list(result["kernels"])
    most = max(sum(entry["gate"] == gate for entry in result["rows"]) for gate in gates)
    figure = Figure(figsize=(6 * len(gates), 1.5 + 0.2 * most * (len(names) + 0.5)), layout="constrained")
    panels = figure.subplots(1, len(gates), squeeze=False)[0]
    thickness = 0.8 / len(names)
    for panel, gate in zip(panels, gates):
        entries = [entry for entry in result["rows"] if entry["gate"] == gate]
        for i, name in enumerate(names):
            bars = [(y + i * thickness, f.over_floor) for y, f in
                    ((y, figures(result, entry, name)) for y, entry in enumerate(entries)) if f]
            panel.barh([y for y, _ in bars], [x for _, x in bars], height=thickness, align="edge", label=LABELS[name])
        panel.axvline(1, color="black", linewidth=1)
        panel.set_yticks([y + 0.4 for y in range(len(entries))], labels=[entry["row"] for entry in entries], fontsize=8)
        panel.margins(y=0.01)
        panel.invert_yaxis()
        panel.set_xscale("log")
        panel.set_xlim(left=min(0.5, panel.get_xlim()[0]))
        panel.set_xticks([x for x in (0.5, 1, 2, 5, 10, 20, 50, 100) if x <= panel.get_xlim()[1]])
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "%g" % x))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("time over the floor at %.1f TB/s" % result["bandwidth_tbps"]["convention"])
        panel.set_title("%s gate" % gate)
    panels[-1].legend(fontsize=8)
    figure.suptitle(result["device"]["name"])
    _save_plot(figure, result, path)
    return True


def plot_scaling(result: Result, path: Path) -> bool:
    """Draws time over length, a panel a number of heads, a curve an implementation and gate. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError:
        return False
    gates = list(dict.fromkeys(point["gate"] for point in result["points"]))
    heads = list(dict.fromkeys(point["heads"] for point in result["points"]))
    columns = min(3, len(heads))
    lines = -(-len(heads) // columns)
    figure = Figure(figsize=(4 * columns, 0.5 + 3.2 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    for panel, number in zip(panels, heads):
        points = [point for point in result["points"] if point["heads"] == number]
        for i, name in enumerate(result["kernels"]):
            for gate, marker, style in zip(gates, "os", ("-", ":")):
                curve = [(point["tokens"], point["kernels"][name]["us"]) for point in points
                         if point["gate"] == gate and "us" in point["kernels"][name]]
                if curve:
                    panel.plot(*zip(*curve), marker + style, color="C%d" % i, markersize=3, linewidth=1.2,
                               label="%s, %s gate" % (LABELS[name], gate))
        floor = {point["tokens"]: floor_us(point["floor_bytes"], CONVENTION_TBPS) for point in points}
        panel.plot(list(floor), list(floor.values()), "--", color="black", linewidth=1,
                   label="floor at %.1f TB/s" % CONVENTION_TBPS)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "%d" % x))
        panel.set_yscale("log")
        panel.set_title("%d heads" % number, fontsize=10)
        panel.tick_params(labelsize=7)
        panel.grid(True, linewidth=0.3)
        panel.set(xlabel="tokens", ylabel="µs")
        panel.label_outer()
    for panel in panels[len(heads):]:
        panel.set_axis_off()
    curves = {}  # of all panels, by label: a peer may be missing from any of them
    for panel in panels:
        for curve, label in zip(*panel.get_legend_handles_labels()):
            curves.setdefault(label, curve)
    figure.legend(curves.values(), curves.keys(), loc="outside lower center", ncols=min(4, len(curves)), fontsize=8)
    figure.suptitle(result["device"]["name"])
    _save_plot(figure, result, path)
    return True


def write_plot(draw: Callable[[Result, Path], bool], result: Result, json_path: Path) -> Optional[Path]:
    """Draws a result's plot beside it; returns its path, or None without matplotlib."""
    png = json_path.with_suffix(".png")
    if draw(result, png):
        return png
    print("no plot: matplotlib is not installed")
    if png.exists():
        png.unlink()  # a plot of an earlier run would pass for this one's
    return None


def write_companions(json_path: Path) -> List[Path]:
    """Writes the plot and the Markdown beside a result; returns what was written."""
    result = json.loads(json_path.read_text(encoding="utf-8"))
    png, md = write_plot(plot, result, json_path), json_path.with_suffix(".md")
    md.write_text(markdown(result, png.name if png else None), encoding="utf-8")
    return [path for path in (png, md) if path]


def load_results(folder: Path) -> Dict[str, Result]:
    """The results in a folder, by file name without suffix."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def plan_table(result: Result) -> str:
    """What a launch and each part of the work costs, in microseconds, a line each."""
    return _table(["part", "one of them is", "µs"],
                  [["`%s`" % part, PLAN_UNITS[part], "%.3g" % us] for part, us in result["costs"].items()],
                  text_columns=2)


def plan_summary(result: Result) -> str:
    """How well the costs explain the times measured, and where the plan's choice lost most."""
    errors = [abs(point["fitted_us"] / point["us"] - 1) for point in result["points"]]
    worst = max(result["choices"], key=lambda x: x["us"] / x["best_us"])
    return ("%d points, and %d left out; relative error of the fit: median %.1f %%, worst %.1f %%. Of %d shapes the plan's worst choice is at "
            "T%d-H%d: number of segments %d, %.1f µs, which is %.2f times the quickest measured, number of segments %d, %.1f µs." % (
                len(errors), len(result["left_out"]), 100 * statistics.median(errors), 100 * max(errors), len(result["choices"]),
                worst["tokens"], worst["heads"], worst["segments"], worst["us"], worst["us"] / worst["best_us"],
                worst["best_segments"], worst["best_us"]))


def plan_text(result: Result) -> str:
    return plan_table(result) + "\n\n" + plan_summary(result)


def _scaling_cell(point: Optional[Dict]) -> str:
    """Our microseconds and, in brackets, the quickest peer's time over ours."""
    if point is None:
        return ""
    us = point["kernels"][OURS]["us"]
    peers = [x["us"] for name, x in point["kernels"].items() if name != OURS and "us" in x]
    return "%.1f (%s)" % (us, "%.2f" % (min(peers) / us) if peers else "—")


def scaling_table(result: Result) -> str:
    """A line a gate and number of heads, a column a length."""
    points = {(x["gate"], x["heads"], x["tokens"]): x for x in result["points"]}
    lengths = sorted({tokens for _, _, tokens in points})
    return _table(["gate", "heads"] + ["T = %d" % tokens for tokens in lengths],
                  [[gate, str(heads)] + [_scaling_cell(points.get((gate, heads, tokens))) for tokens in lengths]
                   for gate, heads in dict.fromkeys((gate, heads) for gate, heads, _ in points)], text_columns=1)


def scaling_text(result: Result) -> str:
    return "flash_kda's µs; in brackets, times as long the quickest peer takes.\n\n" + scaling_table(result)


def _range(form: str, values: List[float]) -> str:
    """From the least to the greatest, or what both are written as."""
    return "–".join(dict.fromkeys(form % x for x in (min(values), max(values))))


def ladder_table(history: History) -> str:
    """A line a version of the kernel."""
    row, = select(history["row"])
    floor = floor_us(row.floor_bytes, CONVENTION_TBPS)
    lines = []
    for version in history["versions"]:
        commit, predicted, measured = version["commit"], version["predicted_us"], version["measured_us"]
        lines.append([str(version["version"]), version["change"], "`%s`" % commit[:7] if commit else "—", version["finding"] or "",
                      "%g" % predicted if predicted else "—", _range("%g", measured), _range("%.2f", [us / floor for us in measured])])
    return _table(["", "what changed", "commit", "what it taught", "predicted µs", "measured µs", "× floor"], lines,
                  text_columns=4)


def tried_table(history: History) -> str:
    """What did not pay, each beside the version that it was tried on."""
    lines = [[entry["change"], entry["finding"] or "", "%g" % entry["us"] if entry["us"] else "—",
              "%g" % entry["instead_of_us"] if entry["us"] else "—"] for entry in history["tried"]]
    return _table(["tried and dropped", "finding", "µs with", "µs without"], lines, text_columns=2)


def profile_table(history: History) -> str:
    """Figures of Nsight Compute's, or what else says where the time goes."""
    row = "%s, %s gate" % (history["row"], history["gate"])
    lines = [[entry["quantity"], entry["of"] or row, ("%g %s" % (entry["value"], entry["unit"])).strip(), str(entry["version"])]
             for entry in history["profile"]]
    return _table(["quantity", "of", "value", "version"], lines, text_columns=2)


class Kind(NamedTuple):
    """A kind of block that shows a result of every device."""
    folder: str                     # of results/, where these results lie
    text: Callable[[Result], str]
    image: Optional[str]            # what the plot beside the result shows, where the block has it,
    draw: Optional[Callable[[Result, Path], bool]]  # and what draws that
    absent: str                     # what stands there without results


KINDS = {
    "summary": Kind("", summary_table, "Time over the memory floor, a bar a row", plot, NO_RESULTS),
    "rows": Kind("", rows_table, None, None, NO_RESULTS),
    "accuracy": Kind("", accuracy_table, None, None, NO_RESULTS),
    "plan": Kind("plan", plan_text, None, None, NOT_MEASURED),
    "scaling": Kind("scaling", scaling_text, "Time over the length of one sequence", plot_scaling, NOT_MEASURED),
}
HISTORIES = {"ladder": ("versions", ladder_table), "tried": ("tried", tried_table), "profile": ("profile", profile_table)}


def _result_sections(kind: Kind, document: Path, folder: Path) -> str:
    sections = []
    for stem, result in load_results(folder / kind.folder).items():
        sections += ["**%s**: %s" % (result["device"]["name"], provenance(result)), kind.text(result)]
        png = folder / kind.folder / (stem + ".png")
        if kind.image and png.exists():
            link = os.path.relpath(str(png), str(document.parent)).replace(os.sep, "/")
            sections.append("![%s](%s)" % (kind.image, link))
    return "\n\n".join(sections) or kind.absent


def _history_sections(entries: str, table: Callable[[History], str], folder: Path) -> str:
    path = folder / "ladder" / "history.json"
    histories = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return "\n\n".join("**%s**: %s, %s gate.\n\n%s" % (history["device"], history["row"], history["gate"], table(history))
                       for history in histories if history[entries]) or NOT_MEASURED


def _block(name: str, document: Path, folder: Path) -> str:
    if name in KINDS:
        text = _result_sections(KINDS[name], document, folder)
    elif name in HISTORIES:
        text = _history_sections(*HISTORIES[name], folder)
    else:
        raise ValueError("%s: no such block of results: %r" % (document, name))
    return "\n" + text + "\n"


_BLOCK = re.compile(r"(<!-- results:begin ([^>]*?) -->)(.*?)(<!-- results:end -->)", re.DOTALL)


def regenerate(text: str, document: Path, folder: Path) -> str:
    """The document's text with every block of results generated anew. Raises ValueError for broken markers."""
    pairs = len(_BLOCK.findall(text))
    if any("results:begin" in match.group(3) for match in _BLOCK.finditer(text)) or \
            not pairs == text.count("<!-- results:begin") == text.count("<!-- results:end"):
        raise ValueError("%s: markers of results do not pair up" % document)
    return _BLOCK.sub(lambda match: match.group(1) + _block(match.group(2), document, folder) + match.group(4), text)


def outdated(root: Path = ROOT) -> Dict[Path, str]:
    """Files that differ from what the results say, and what they should hold."""
    folder = root / "benchmarks" / "results"
    wanted = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        png = path.with_suffix(".png")
        wanted[path.with_suffix(".md")] = markdown(result, png.name if png.exists() else None)
    for name in DOCUMENTS:
        document = root / name
        wanted[document] = regenerate(document.read_text(encoding="utf-8"), document, folder)
    return {path: text for path, text in wanted.items()
            if not path.exists() or path.read_text(encoding="utf-8") != text}


def outdated_plots(root: Path = ROOT) -> Dict[Path, Callable[[Result, Path], bool]]:
    """Results whose plot is of another result, and what draws them."""
    folder = root / "benchmarks" / "results"
    stale = {}
    for kind in (kind for kind in KINDS.values() if kind.draw):
        for stem, result in load_results(folder / kind.folder).items():
            json_path = folder / kind.folder / (stem + ".json")
            png = json_path.with_suffix(".png")
            if png.exists() and _mark(result).encode() not in png.read_bytes():
                stale[json_path] = kind.draw
    return stale


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a file is out of date")
    args = parser.parse_args(argv)
    stale = []
    for path, draw in outdated_plots().items():
        if args.check or write_plot(draw, json.loads(path.read_text(encoding="utf-8")), path):
            stale.append(path.with_suffix(".png"))
    for path, text in outdated().items():  # the texts link plots, which are gone now where they could not be drawn
        if not args.check:
            path.write_text(text, encoding="utf-8")
        stale.append(path)
    for path in stale:
        print("%s: %s" % ("out of date" if args.check else "wrote", path.relative_to(ROOT)))
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
