"""The benchmark's arithmetic, its reports and its scripts. No GPU, and nothing here is timed.

The figures in `synthetic` are made up for these tests; nothing of them is a measurement.
"""
import importlib
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_fwd  # noqa: E402
import kernels  # noqa: E402
import measure  # noqa: E402
import profile_row  # noqa: E402
import record  # noqa: E402
import report  # noqa: E402
import rows  # noqa: E402
import scaling  # noqa: E402


def entry(name, gate, ours, **peers):
    """A measured row that took `ours` times its floor at 3 TB/s, and peers that took so many times as long as ours."""
    row = rows.select(name)[0]
    us = ours * rows.floor_us(row.floor_bytes, 3.0)
    figures = {"flash_kda": {"us": us, "us_quartiles": [us, us], "host_us": 10.0}}
    for peer, times in peers.items():
        figures[peer] = {"us": times * us, "us_quartiles": [us, us], "host_us": 70.0} if times else {"error": "refused"}
    return {"row": row.name, "group": row.group, "gate": gate, "heads": row.heads, "lens": list(row.lens),
            "floor_bytes": row.floor_bytes, "kernels": figures}


@pytest.fixture
def synthetic():
    return {
        "date": "2000-01-01 00:00 UTC", "commit": "0123456789abcdef", "dirty": True, "torch": "2.4.0", "cuda": "12.9",
        "python": "3.9.0", "kernels": {"flash_kda": "0.0.0", "flashkda": "vllm 0.0.0"},
        "device": {"name": "Test GPU", "capability": "9.0", "sm_count": 1, "memory_bytes": 1, "driver": "1.2",
                   "sm_mhz": "1000", "sm_max_mhz": "2000", "memory_mhz": "1000", "power_limit_w": "1"},
        "bandwidth_tbps": {"convention": 3.0, "copy": 1.5},
        "accuracy": [{"gate": "slow", "kernel": "flash_kda", "out": 0.00123, "state": 0.00456},
                     {"gate": "slow", "kernel": "flashkda", "error": "refused"}],
        "rows": [entry("T8192-H96", "slow", 2.0, flashkda=1.5), entry("T8192-H64", "slow", 8.0, flashkda=6.0),
                 entry("T65536-H8", "random", 5.0, flashkda=None)],
    }


@pytest.fixture
def history():
    return {"device": "Test GPU", "row": "T8192-H96", "gate": "slow",
            "versions": [{"version": 1, "change": "first", "commit": "0123456789abcdef", "predicted_us": 500,
                          "measured_us": [679.5], "finding": "waits"},
                         {"version": 2, "change": "second", "commit": None, "predicted_us": None,
                          "measured_us": [509.6, 340], "finding": None},
                         {"version": 3, "change": "third", "commit": None, "predicted_us": 300,
                          "measured_us": [339.7, 340.1], "finding": None}],
            "tried": [{"change": "slower", "us": 510, "instead_of_us": 480, "finding": "spills"},
                      {"change": "the same", "us": None, "instead_of_us": None, "finding": None}],
            "profile": [{"quantity": "waiting", "value": 12.5, "unit": "%", "version": 2, "of": None},
                        {"quantity": "a step", "value": 0.5, "unit": "µs", "version": 3, "of": "T64-H1, slow gate"}]}


@pytest.fixture
def later():
    """A history of the versions after those of `history`, on another device, on which nothing was profiled or dropped."""
    return {"device": "Another GPU", "row": "T8192-H64", "gate": "random",
            "versions": [{"version": 2, "change": "second, here", "commit": None, "predicted_us": None,
                          "measured_us": [453], "finding": None}], "tried": [], "profile": []}


@pytest.fixture
def planned(synthetic):
    """What fit_plan.py writes: a fit a tenth over, and one exact; a plan that chose best, and one that did not."""
    costs = {"launch": 6.04, "steps": 0.3611, "summaries": 3.0, "compositions": 0.75, "corrections": 0.5}
    synthetic.update(costs=costs, points=[{"us": 100.0, "fitted_us": 110.0}, {"us": 50.0, "fitted_us": 50.0}],
                     left_out=[{"tokens": 512, "heads": 96, "segments": 1, "us": 45.3}], choices=[
        {"tokens": 32768, "heads": 4, "segments": 9, "us": 400.0, "best_segments": 9, "best_us": 400.0},
        {"tokens": 4096, "heads": 8, "segments": 5, "us": 78.0, "best_segments": 7, "best_us": 60.0}])
    return synthetic


@pytest.fixture
def scaled(synthetic):
    """What scaling.py writes: two numbers of heads, a length missing of one, and a peer that failed at a point."""
    def point(tokens, heads, us, **peers):
        figures = {"flash_kda": {"us": us}}
        figures.update({peer: {"us": them} if them else {"error": "refused"} for peer, them in peers.items()})
        return {"gate": "slow", "heads": heads, "tokens": tokens, "floor_bytes": 3000 * tokens, "kernels": figures}
    synthetic["kernels"]["cudnn"] = "0.0.0"
    synthetic["points"] = [point(512, 4, 10.0, flashkda=30.0, cudnn=20.0), point(1024, 4, 20.0, flashkda=50.0, cudnn=None),
                           point(512, 96, 40.0, flashkda=None, cudnn=None)]
    return synthetic


@pytest.fixture
def project(tmp_path, synthetic, history):
    """A project with one result, no plot, and documents with a block of each kind."""
    results = tmp_path / "benchmarks" / "results"
    (results / "ladder").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (results / "test.json").write_text(json.dumps(synthetic), encoding="utf-8")
    (results / "ladder" / "history.json").write_text(json.dumps([history]), encoding="utf-8")
    (tmp_path / "README.md").write_text(
        "before\n<!-- results:begin summary -->\n<!-- results:end -->\nafter\n", encoding="utf-8")
    (tmp_path / "docs" / "performance.md").write_text(
        "<!-- results:begin rows --><!-- results:end -->\n<!-- results:begin accuracy --><!-- results:end -->\n"
        "<!-- results:begin ladder --><!-- results:end -->\n<!-- results:begin tried --><!-- results:end -->\n"
        "<!-- results:begin profile --><!-- results:end -->\n", encoding="utf-8")
    return tmp_path


# ---- rows and bytes

def test_floor_of_a_whole_model_row():
    row, = rows.select("T8192-H96")
    assert row.lens == (8192,) and row.heads == 96
    assert row.floor_bytes == 8192 * 96 * 5 * 128 * 2 + 2 * 96 * 128 * 128 * 4
    assert rows.floor_us(row.floor_bytes, 3.0) == pytest.approx(339.7, abs=0.1)


def test_floor_counts_a_state_a_sequence():
    one, = rows.select("T8192-H96")
    eight, = rows.select("T8192-H96-N8")
    assert eight.tokens == one.tokens
    assert eight.floor_bytes - one.floor_bytes == 7 * 2 * 96 * 128 * 128 * 4


def test_rows_have_unique_names_and_the_groups_sizes():
    names = [row.name for row in rows.ROWS]
    assert len(set(names)) == len(names)
    sizes = {group: len(rows.select(group)) for group in rows.GROUPS}
    assert sizes == {"standard": 6, "shards": 10, "long": 2, "many": 1}
    assert all(row.tokens == sum(row.lens) and int(row.name.split("-")[0][1:]) == row.tokens for row in rows.ROWS)


def test_select_mixes_groups_and_rows():
    assert [row.name for row in rows.select("many,T8192-H64-mixed")] == ["T8192-H64-mixed", "T16384-H32-N64"]
    for bad in ("", "T1-H1", "standard,T1-H1"):
        with pytest.raises(ValueError, match="T2048-H12"):
            rows.select(bad)


# ---- inputs

@pytest.mark.parametrize("gate, low, high", [("random", -5.0, -0.5), ("slow", -0.2, -0.001)])
def test_gates_decay_as_they_are_named(gate, low, high):
    p = measure.problem(rows.ACCURACY_ROW, gate, device="cpu")
    decay = p.lower_bound * torch.sigmoid(p.A_log.exp()[:, None] * (p.g.float()[0] + p.dt_bias))
    medians = decay.median(0).values
    assert low < medians.min() and medians.max() < high


def test_problem_has_the_public_interfaces_shapes():
    row = rows.Row("test", "test", 2, (5, 0, 3))
    p = measure.problem(row, "random", device="cpu")
    assert p.q.shape == p.k.shape == p.v.shape == p.g.shape == (1, 8, 2, 128)
    assert p.beta.shape == (1, 8, 2) and p.A_log.shape == (2,) and p.dt_bias.shape == (2, 128)
    assert p.initial_state.shape == (3, 2, 128, 128) and p.cu_seqlens.tolist() == [0, 5, 5, 8]
    assert {t.dtype for t in (p.q, p.k, p.v, p.g, p.beta)} == {torch.bfloat16}
    assert {t.dtype for t in (p.A_log, p.dt_bias, p.initial_state)} == {torch.float32}
    assert p.cu_seqlens.dtype == torch.int64
    again, other = (measure.problem(row, "random", device="cpu", seed=seed) for seed in (0, 1))
    assert torch.equal(p.q, again.q) and not torch.equal(p.q, other.q)
    with pytest.raises(ValueError, match="fast"):
        measure.problem(row, "fast", device="cpu")


@pytest.mark.parametrize("gate", rows.GATES)
def test_accuracy_of_this_library_on_cpu(gate):
    p = measure.problem(rows.Row("test", "test", 2, (70, 33, 5)), gate, device="cpu")
    errors = measure.accuracy(kernels.FlashKda(), p)
    assert 0 < errors["out"] < 2.5e-3 and 0 < errors["state"] < 2.5e-3
    off = measure.accuracy(lambda p: (torch.zeros_like(p.v), torch.zeros_like(p.initial_state)), p)
    assert off["out"] == off["state"] == 1.0


# ---- figures and tables

def test_figures(synthetic):
    f = report.figures(synthetic, synthetic["rows"][0], "flash_kda")
    assert f.over_floor == pytest.approx(2.0)
    assert f.over_copy_floor == pytest.approx(1.0)  # the copy runs at half the convention's bandwidth
    assert f.tbps == pytest.approx(1.5)
    assert report.figures(synthetic, synthetic["rows"][2], "flashkda") is None
    assert report.figures(synthetic, synthetic["rows"][0], "fla") is None


def test_mean_figures_are_geometric_and_need_every_row(synthetic):
    standard = synthetic["rows"][:2]
    ours = report.mean_figures(synthetic, standard, "flash_kda")
    theirs = report.mean_figures(synthetic, standard, "flashkda")
    assert ours.over_floor == pytest.approx(4.0)
    assert theirs.us / ours.us == pytest.approx(3.0)
    assert report.mean_figures(synthetic, synthetic["rows"][1:], "flashkda") is None
    assert report.mean_figures(synthetic, [], "flash_kda") is None


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_tables_are_rectangular_and_say_what_is_missing(synthetic):
    for table in (report.summary_table, report.rows_table, report.accuracy_table):
        lines = cells(table(synthetic))
        assert len({len(line) for line in lines}) == 1
    summary = cells(report.summary_table(synthetic))
    assert summary[2][:3] == ["standard", "slow", "2"] and summary[2][5] == "4.00"
    assert summary[3][:3] == ["long", "random", "1"] and summary[3][-3:] == ["—"] * 3
    by_row = cells(report.rows_table(synthetic))
    assert [line[0] for line in by_row[2:]] == ["T8192-H96", "T8192-H64", "T65536-H8"]
    assert by_row[2][2:8] == ["339.7", "679.5", "2.00", "1.00", "1.50", "10.0"] and by_row[2][-1] == "1.50"
    assert cells(report.accuracy_table(synthetic))[2:] == [
        ["slow", "flash_kda", "1.23e-03", "4.56e-03"], ["slow", "FlashKDA (vLLM)", "—", "—"]]


def test_ladder_tables(history):
    assert cells(report.ladder_table(history))[2:] == [
        ["1", "first", "`0123456`", "waits", "500", "679.5", "2.00"],
        ["2", "second", "—", "", "—", "340–509.6", "1.00–1.50"],
        ["3", "third", "—", "", "300", "339.7–340.1", "1.00"]]
    assert cells(report.tried_table(history))[2:] == [["slower", "spills", "510", "480"], ["the same", "", "—", "—"]]
    assert cells(report.profile_table(history))[2:] == [
        ["waiting", "T8192-H96, slow gate", "12.5 %", "2"], ["a step", "T64-H1, slow gate", "0.5 µs", "3"]]


def test_plan_text(planned):
    assert cells(report.plan_table(planned))[2] == ["`launch`", "a call", "6.04"]
    assert [line[0] + line[2] for line in cells(report.plan_table(planned))[3:]] == [
        "`steps`0.361", "`summaries`3", "`compositions`0.75", "`corrections`0.5"]
    text = report.plan_text(planned)
    assert "2 points, and 1 left out; relative error of the fit: median 5.0 %, worst 10.0 %" in text
    assert "Of 2 shapes" in text and "T4096-H8: number of segments 5, 78.0 µs, which is 1.30 times" in text
    assert "number of segments 7, 60.0 µs." in text


def test_scaling_table(scaled):
    assert cells(report.scaling_table(scaled)) == [
        ["gate", "heads", "T = 512", "T = 1024"], ["---", "---:", "---:", "---:"],
        ["slow", "4", "10.0 (2.00)", "20.0 (2.50)"], ["slow", "96", "40.0 (—)", ""]]


def test_markdown_says_where_it_comes_from(synthetic):
    text = report.markdown(synthetic)
    for said in ("Test GPU", "2000-01-01", "0123456789ab with local changes", "driver 1.2", "PyTorch 2.4.0",
                 "1000 of 2000"):
        assert said in text
    assert "](test.png)" in report.markdown(synthetic, "test.png") and ".png" not in text
    synthetic.update(commit=None, dirty=None)
    synthetic["device"].update(driver=None, sm_mhz=None)
    text = report.markdown(synthetic)
    assert "unknown commit" in text and "None" not in text


def test_progress_line(synthetic):
    line = report.progress_line(synthetic, synthetic["rows"][0])
    assert "T8192-H96" in line and "flash_kda 679.5 us = 2.00x (1.50 TB/s, host 10.0 us)" in line
    assert "flashkda: refused" in report.progress_line(synthetic, synthetic["rows"][2])


def test_plot(tmp_path, synthetic):
    pytest.importorskip("matplotlib")
    assert report.plot(synthetic, tmp_path / "test.png")
    assert (tmp_path / "test.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_scaling(tmp_path, scaled):
    pytest.importorskip("matplotlib")
    json_path = tmp_path / "test.json"
    assert report.write_plot(report.plot_scaling, scaled, json_path) == tmp_path / "test.png"
    one_more = (tmp_path / "test.png").read_bytes()
    assert one_more.startswith(b"\x89PNG")
    del scaled["points"][0]["kernels"]["cudnn"]["us"]  # a curve less, and nothing breaks
    assert report.plot_scaling(scaled, tmp_path / "test.png") and (tmp_path / "test.png").read_bytes() != one_more


def test_companions_without_matplotlib(tmp_path, synthetic, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "test.json"
    path.write_text(json.dumps(synthetic), encoding="utf-8")
    (tmp_path / "test.png").write_bytes(b"a plot of an earlier run")
    assert report.write_companions(path) == [tmp_path / "test.md"]
    assert not (tmp_path / "test.png").exists()
    assert "matplotlib" in capsys.readouterr().out


# ---- documents

def write_outdated(root):
    for path, text in report.outdated(root).items():
        path.write_text(text, encoding="utf-8")


def test_documents_are_brought_up_to_date_once(project):
    assert {path.name for path in report.outdated(project)} == {"README.md", "performance.md", "test.md"}
    write_outdated(project)
    assert report.outdated(project) == {}
    readme = (project / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("before\n") and readme.endswith("after\n")
    assert "Test GPU" in readme and "| standard | slow | 2 |" in readme and ".png" not in readme
    document = (project / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "| T8192-H64 | slow |" in document and "1.23e-03" in document
    assert "| 1 | first |" in document and "| slower |" in document and "| waiting | T8192-H96, slow gate | 12.5 % | 2 |" in document
    assert "**Test GPU**: T8192-H96, slow gate." in document


def test_a_typed_figure_and_a_new_result_are_noticed(project, synthetic):
    write_outdated(project)
    readme = project / "README.md"
    right = readme.read_text(encoding="utf-8")
    readme.write_text(right.replace("4.00", "3.00"), encoding="utf-8")
    assert report.outdated(project) == {readme: right}
    readme.write_text(right, encoding="utf-8")
    synthetic["rows"].pop()
    (project / "benchmarks" / "results" / "test.json").write_text(json.dumps(synthetic), encoding="utf-8")
    assert {path.name for path in report.outdated(project)} == {"README.md", "performance.md", "test.md"}


def test_a_plot_of_another_result_is_noticed(project, synthetic, scaled):
    pytest.importorskip("matplotlib")
    results = project / "benchmarks" / "results"
    (results / "scaling").mkdir()
    plots = {results / "test.json": (report.plot, synthetic), results / "scaling" / "test.json": (report.plot_scaling, scaled)}
    for path, (draw, result) in plots.items():
        path.write_text(json.dumps(result), encoding="utf-8")
        report.write_plot(draw, result, path)
    assert report.outdated_plots(project) == {}
    for path, (draw, result) in plots.items():
        path.write_text(json.dumps(dict(result, date="later")), encoding="utf-8")
    assert report.outdated_plots(project) == {path: draw for path, (draw, _) in plots.items()}


def block(name, project):
    text = "<!-- results:begin %s --><!-- results:end -->" % name
    return report.regenerate(text, project / "docs" / "performance.md", project / "benchmarks" / "results")


def test_a_history_a_device_in_their_order(project, history, later):
    path = project / "benchmarks" / "results" / "ladder" / "history.json"
    path.write_text(json.dumps([history, later]), encoding="utf-8")
    ladder = block("ladder", project)
    ours, theirs = "**Test GPU**: T8192-H96, slow gate.", "**Another GPU**: T8192-H64, random gate."
    assert ladder.index(ours) < ladder.index("| 1 | first |") < ladder.index(theirs) < ladder.index("| 2 | second, here |")
    assert "| 453 | 2.00 |" in ladder  # times the floor of its own row
    for name in ("tried", "profile"):  # a device without entries is left out
        assert ours in block(name, project) and "Another GPU" not in block(name, project)
    path.write_text(json.dumps([later]), encoding="utf-8")
    assert "-->\nnot measured yet\n<!--" in block("tried", project)


@pytest.mark.parametrize("kind, fixture, said", [("plan", "planned", "| `launch` | a call | 6.04 |"),
                                                 ("scaling", "scaled", "| slow | 4 | 10.0 (2.00) |")])
def test_blocks_of_plan_and_scaling(project, request, kind, fixture, said):
    assert "-->\nnot measured yet\n<!--" in block(kind, project)
    folder = project / "benchmarks" / "results" / kind
    folder.mkdir()
    result = request.getfixturevalue(fixture)
    for stem, device in (("a", "A GPU"), ("b", "B GPU")):
        result["device"]["name"] = device
        (folder / (stem + ".json")).write_text(json.dumps(result), encoding="utf-8")
    (folder / "b.png").write_bytes(b"")
    text = block(kind, project)
    assert text.index("**A GPU**: 2000-01-01") < text.index(said) < text.index("**B GPU**: 2000-01-01") < text.rindex(said)
    link = "![Time over the length of one sequence](../benchmarks/results/scaling/b.png)"
    assert text.count(".png") == text.count(link) == (1 if kind == "scaling" else 0)


def test_a_plot_is_linked_from_where_the_document_stands(project):
    (project / "benchmarks" / "results" / "test.png").write_bytes(b"")
    block = "<!-- results:begin summary --><!-- results:end -->"
    folder = project / "benchmarks" / "results"
    assert "](benchmarks/results/test.png)" in report.regenerate(block, project / "README.md", folder)
    assert "](../benchmarks/results/test.png)" in report.regenerate(block, project / "docs" / "performance.md", folder)


def test_without_results_the_blocks_say_so(project):
    folder = project / "none"
    for name in ("summary", "rows", "accuracy"):
        text = report.regenerate("<!-- results:begin %s --><!-- results:end -->" % name, project / "README.md", folder)
        assert "No results are recorded yet" in text
    for name in ("plan", "scaling", "ladder", "tried", "profile"):
        text = report.regenerate("<!-- results:begin %s --><!-- results:end -->" % name, project / "README.md", folder)
        assert "-->\nnot measured yet\n<!--" in text


@pytest.mark.parametrize("text", [
    "<!-- results:begin summary -->", "<!-- results:end -->",
    "<!-- results:begin rows --><!-- results:begin summary --><!-- results:end -->",
    "<!-- results:begin nothing --><!-- results:end -->", "<!-- results:begin ladder first --><!-- results:end -->",
])
def test_broken_markers_are_refused(project, text):
    with pytest.raises(ValueError, match="README.md"):
        report.regenerate(text, project / "README.md", project / "benchmarks" / "results")


def test_this_projects_documents_are_up_to_date():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "report.py"), "--check"], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 0, done.stdout + "run: python benchmarks/report.py"


# ---- clocks

class Timeline:
    """A GPU's part in a measurement replaced: the n-th run takes n microseconds, and is queued late where `late` says so."""

    def __init__(self, monkeypatch, late):
        timeline, empty = self, torch.empty
        self.runs = 0

        class Event:
            def __init__(self, enable_timing=False):
                pass

            def record(self):
                pass

            def query(self):
                return late(timeline.runs)

            def elapsed_time(self, stop):
                return 1e-3 * timeline.runs

        monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(1, dtype=dtype))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: None)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        for name, call in (("_sleep", lambda cycles: None), ("synchronize", lambda: None)):
            monkeypatch.setattr(torch.cuda, name, call)

    def run(self):
        self.runs += 1


def test_runs_that_the_host_queued_late_do_not_count(monkeypatch):
    timeline = Timeline(monkeypatch, late=lambda run: run % 3 == 0)
    times = measure._cold_times_us(timeline.run)
    in_time = [run for run in range(1, 100) if run % 3]
    assert times == pytest.approx(in_time[measure.UNTIMED:measure.UNTIMED + measure.REPEATS])


def test_a_host_that_is_always_late_is_an_error(monkeypatch):
    timeline = Timeline(monkeypatch, late=lambda run: True)
    with pytest.raises(RuntimeError, match="does not queue"):
        measure._cold_times_us(timeline.run)


# ---- command lines

@pytest.mark.parametrize("arguments, said", [
    (["--rows", "T1-H1"], "no such row or group: T1-H1"),
    (["--gates", "fast"], "unknown: fast"),
    (["--gates", ""], "no gate is named"),
    (["--peers", "flashkda,triton"], "unknown: triton"),
])
def test_scripts_refuse_unknown_names(arguments, said, capsys):
    for main in [bench_fwd.main] + ([] if "--rows" in arguments else [scaling.main]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert said in capsys.readouterr().err


@pytest.fixture
def fit_plan():
    pytest.importorskip("flash_kda._C", reason="flash_kda was built without its kernels")
    return importlib.import_module("fit_plan")


@pytest.mark.parametrize("script", [bench_fwd, scaling, "fit_plan"])
def test_scripts_say_that_they_need_a_gpu(script, monkeypatch, request):
    script = request.getfixturevalue(script) if isinstance(script, str) else script
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        script.main([])


@pytest.fixture
def gpu(monkeypatch):
    """A GPU's part in the scripts replaced: problems without contents, and a call that returns None is one that fails."""
    def device_us(call):
        if call() is None:
            raise RuntimeError("refused\nat length")
        return 500.0, [490.0, 510.0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Test GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(record, "device_state", lambda: {"name": "Test GPU", "driver": None, "sm_mhz": None})
    monkeypatch.setattr(measure, "problem", lambda row, gate: type("P", (), {"v": 1, "initial_state": 2}))
    monkeypatch.setattr(measure, "copy_tbps", lambda: 2.5)
    monkeypatch.setattr(measure, "device_us", device_us)
    monkeypatch.setattr(measure, "host_us", lambda call: 9.0)


def implementations(monkeypatch):
    """Ours; FlashKDA, which is not installed; and cuDNN, which refuses every shape."""
    def not_installed():
        raise ImportError("not installed")

    def implementation(name, call):
        return type(name, (), {"name": name, "version": "0.0.0", "__call__": call})

    monkeypatch.setattr(kernels, "KERNELS", {
        "flash_kda": implementation("flash_kda", lambda self, p: (p.v, p.initial_state)), "flashkda": not_installed,
        "cudnn": implementation("cudnn", lambda self, p: None)})


def test_bench_writes_the_rows_that_ran(tmp_path, monkeypatch, gpu, capsys):
    """A row, a gate, a peer that is not there and one that fails."""
    implementations(monkeypatch)
    monkeypatch.setattr(measure, "accuracy", lambda call, p: dict(zip(("out", "state"), (0.25 * x for x in call(p)))))

    bench_fwd.main(["--rows", "many", "--gates", "slow", "--out", str(tmp_path / "new" / "run")])
    printed = capsys.readouterr().out
    assert "flashkda is left out: ImportError: not installed" in printed
    assert "[1/1] slow" in printed and "cudnn: RuntimeError: refused" in printed
    result = json.loads((tmp_path / "new" / "run.json").read_text(encoding="utf-8"))
    measured, = result["rows"]
    assert (measured["row"], measured["gate"], measured["lens"]) == ("T16384-H32-N64", "slow", [256] * 64)
    assert measured["kernels"]["flash_kda"] == {"us": 500.0, "us_quartiles": [490.0, 510.0], "host_us": 9.0}
    assert measured["kernels"]["cudnn"] == {"error": "RuntimeError: refused"}
    assert result["accuracy"][0] == {"gate": "slow", "kernel": "flash_kda", "out": 0.25, "state": 0.5}
    assert "error" in result["accuracy"][1] and result["bandwidth_tbps"] == {"convention": 3.0, "copy": 2.5}
    assert "T16384-H32-N64" in (tmp_path / "new" / "run.md").read_text(encoding="utf-8")


def test_ours_may_not_fail(monkeypatch, gpu):
    monkeypatch.setattr(kernels, "KERNELS", {"flash_kda": lambda: type("Ours", (), {
        "name": "flash_kda", "version": "0.0.0", "__call__": lambda self, p: None})()})
    with pytest.raises(RuntimeError, match="refused"):
        scaling.measure_point(kernels.load([]), scaling.shapes()[0], "slow")


def test_scaling_writes_a_point_a_shape(tmp_path, monkeypatch, gpu, capsys):
    implementations(monkeypatch)
    monkeypatch.setattr(scaling, "HEADS", (64, 96))
    scaling.main(["--gates", "slow,random", "--out", str(tmp_path / "new" / "run")])
    printed = capsys.readouterr().out
    assert "flashkda is left out: ImportError: not installed" in printed
    assert "[1/22] slow    T512-H64   flash_kda 500.0 us | cudnn RuntimeError: refused" in printed
    result = json.loads((tmp_path / "new" / "run.json").read_text(encoding="utf-8"))
    lengths = [512, 1024, 2048, 4096, 8192, 16384]  # the longest on 64 heads; 96 leave it out
    assert [(x["gate"], x["heads"], x["tokens"]) for x in result["points"]] == [
        (gate, heads, tokens) for gate in ("slow", "random") for heads in (64, 96)
        for tokens in lengths[:6 if heads == 64 else 5]]
    assert result["points"][0]["kernels"] == {"flash_kda": {"us": 500.0}, "cudnn": {"error": "RuntimeError: refused"}}
    assert result["points"][0]["floor_bytes"] == 64 * (512 * 1280 + 2 * 128 * 128 * 4)
    assert "cuDNN 0.0.0" in report.provenance(result) and "500.0 (—)" in report.scaling_text(result)


def test_results_are_named_after_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(record, "HERE", tmp_path)
    assert record.json_path("", None) == tmp_path / "results" / "nvidia-h100-80gb-hbm3.json"
    assert record.json_path("plan", None) == tmp_path / "results" / "plan" / "nvidia-h100-80gb-hbm3.json"
    assert record.json_path("plan", str(tmp_path / "v1.2")) == tmp_path / "v1.2.json"
    assert (tmp_path / "results" / "plan").is_dir()


def test_source_state_without_git(monkeypatch):
    monkeypatch.setattr(record, "_output", lambda *command: None)
    monkeypatch.setenv("FLASH_KDA_COMMIT", "abc")
    assert record.source_state() == {"commit": "abc", "dirty": None}


# ---- the plan's costs

COSTS = {"launch": 5.0, "steps": 0.25, "summaries": 3.0, "compositions": 0.75, "corrections": 0.5}


def test_fit_finds_the_costs_of_which_times_are_made(fit_plan, tmp_path, monkeypatch, gpu, capsys):
    """The whole command on times that follow from the plan, but for one shape where another cut is twice as fast, and one point that took twice its time."""
    from flash_kda import _C

    def time_us(p, segments):
        if p == (8192, 8) and segments is None:
            return 1e3
        work = _C.plan(1, *p, False, segments or 0, 132).work
        us = COSTS["launch"] + sum(COSTS[part] * getattr(work, part) for part in fit_plan.PARTS)
        return 2 * us if (p, segments) == ((2048, 4), 5) else us

    monkeypatch.setattr(measure, "problem", lambda row, gate: (row.tokens, row.heads))
    monkeypatch.setattr(fit_plan, "time_us", time_us)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: type("D", (), {"multi_processor_count": 132}))
    fit_plan.main(["--out", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert result["costs"] == pytest.approx(COSTS)
    assert list(result["costs"]) == list(report.PLAN_UNITS)
    assert all(x["fitted_us"] == pytest.approx(x["us"]) for x in result["points"])
    assert {x["segments"] for x in result["points"]} == set(fit_plan.SEGMENTS)
    assert [(x["tokens"], x["heads"], x["segments"]) for x in result["left_out"]] == [(2048, 4, 5)]
    assert len(result["choices"]) == len(fit_plan.LENGTHS) * len(fit_plan.HEADS)
    chosen, = (x["segments"] for x in result["choices"] if (x["tokens"], x["heads"]) == (8192, 8))
    assert chosen == _C.plan(1, 8192, 8, False, 0, 132).segments > 1
    printed = capsys.readouterr().out
    assert "worst choice is at T8192-H8" in printed and "worst 0.0 %" in printed


def test_fit_refuses_to_guess_a_cost(fit_plan):
    work = dict.fromkeys(fit_plan.PARTS, 1.0)
    with pytest.raises(ValueError, match="no measurement has any summaries"):
        fit_plan.fit([{"us": 10.0, "work": dict(work, summaries=0.0)}])


@pytest.mark.parametrize("tokens, heads, segments, worth", [
    (512, 4, 8, True), (511, 4, 8, False), (8192, 22, 2, True), (8192, 23, 2, False), (512, 96, 1, True)])
def test_cuts_worth_measuring(fit_plan, tokens, heads, segments, worth):
    assert fit_plan.worth_measuring(tokens, heads, segments, 132) is worth


def typed_costs(source):
    """The constants in Work::microseconds() of plan.cpp, by the part of the work; what has no part is the launch's."""
    terms = re.search(r"double Work::microseconds\(\) const \{\s*return ([^;]*);\s*\}", source).group(1).split("+")
    split = [[word.strip() for word in term.split("*")] for term in terms]
    return {(term + ["launch"])[1]: float(term[0]) for term in split}


def off(typed, fitted):
    """The parts of which the typed cost is neither the fitted one to two digits nor within 5 % of it."""
    return [part for part in sorted(set(typed) | set(fitted)) if part not in typed or part not in fitted or not (
        typed[part] == float("%.2g" % fitted[part]) or abs(typed[part] - fitted[part]) <= 0.05 * abs(fitted[part]))]


def test_typed_costs_are_held_to_the_fitted():
    source = "double Work::microseconds() const {\n    return 6.0 + 0.5 * steps +\n        3 * summaries;\n}\n"
    typed = typed_costs(source)
    assert typed == {"launch": 6.0, "steps": 0.5, "summaries": 3.0}
    assert off(typed, {"launch": 5.8, "steps": 0.5049, "summaries": 2.96}) == []
    assert off(typed, {"launch": 6.4, "steps": 0.53, "summaries": 3.1}) == ["launch", "steps"]
    assert off(typed, {"launch": 6.0, "compositions": 0.5, "summaries": 3.0}) == ["compositions", "steps"]


def test_the_plans_costs_are_those_fitted():
    typed = typed_costs((ROOT / "csrc" / "plan.cpp").read_text(encoding="utf-8"))
    results = report.load_results(BENCHMARKS / "results" / "plan")
    if not results:
        pytest.skip("the plan's costs have not been fitted yet: results/plan/ is empty")
    assert {stem: off(typed, result["costs"]) for stem, result in results.items()} == dict.fromkeys(results, [])


# ---- cuDNN's kernel, without a GPU to run it

class Driver:
    """The driver calls that the adapter makes; each launch is kept."""
    class CUfunction_attribute:
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self):
        self.launches, self.status = [], 0

    def cuModuleLoadData(self, image):
        assert image == b"cubin"
        return 0, "module"

    def cuModuleGetFunction(self, module, name):
        return 0, (module, name)

    def cuFuncSetAttribute(self, function, attribute, value):
        return (0,)

    def cuLaunchKernel(self, *arguments):
        self.launches.append(arguments)
        return (self.status,)


@pytest.fixture
def cudnn(tmp_path, monkeypatch):
    """The adapter on a driver that only records, and that driver."""
    driver = Driver()
    bindings = type(sys)("cuda.bindings")
    bindings.driver = driver
    for name, module in (("cuda", type(sys)("cuda")), ("cuda.bindings", bindings)):
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "kda_fused_sm90.cu").write_text("")
    monkeypatch.setenv("PEERS_DIR", str(tmp_path))
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(kernels.CudnnKda, "_compile", staticmethod(lambda source: b"cubin"))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **rest: zeros(*size, **rest))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("S", (), {"cuda_stream": 7}))
    return kernels.CudnnKda(), driver


@pytest.mark.parametrize("lens, heads, pieces, bounds", [
    ((1024,), 4, 64, [0, 1024]),  # as many pieces as chunks
    ((8192,), 4, 66, [0, 8192]),  # as fill the GPU twice
    ((40, 24), 4, 2, [0, 40, 64]),  # as many as a mean sequence has chunks
    ((5, 0, 3), 2, 1, [0, 5, 5, 8]),
    ((16,), 300, 1, [0, 16]),
])
def test_cudnn_is_launched_on_what_it_reads(cudnn, lens, heads, pieces, bounds):
    kernel, driver = cudnn
    p = measure.problem(rows.Row("test", "test", heads, lens), "slow", device="cpu")
    out, state = kernel(p)
    kernel(p)
    assert kernel.version == "nvidia-cudnn-frontend (SHA-256 e3b0c44298fc)"  # an empty file
    assert out.shape == p.v.shape and out.dtype == torch.bfloat16
    assert state.shape == p.initial_state.shape and state.dtype == torch.float32
    (function, x, y, z, *block, smem, stream, (values, types), extra), again = driver.launches
    assert function == ("module", b"kda_fused") and (x, y, z) == (heads, len(lens) * pieces, 1)
    assert block == [128, 1, 1] and smem == 94464 and stream == 7 and extra == 0 and len(values) == len(types) == 17
    g, beta, cu_seqlens = kernel.converted
    assert g.dtype == beta.dtype == torch.float32 and torch.equal(g, p.g.float()) and torch.equal(beta, p.beta.float())
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == bounds
    assert values[:7] == tuple(t.data_ptr() for t in (p.q, p.k, p.v, g, beta, cu_seqlens, p.initial_state))
    assert values[9:12] == (len(lens), heads, pieces) and values[12:14] == (p.A_log.data_ptr(), p.dt_bias.data_ptr())
    assert values[14:] == (-5.0, p.scale, heads)
    assert again[-2][0][3:6] == values[3:6]  # converted once
    other = measure.problem(rows.Row("test", "test", heads, lens), "slow", device="cpu", seed=1)
    kernel(other)
    assert torch.equal(kernel.converted[0], other.g.float())


def test_cudnn_reports_the_drivers_errors(cudnn):
    kernel, driver = cudnn
    driver.status = 700
    with pytest.raises(RuntimeError, match="700"):
        kernel(measure.problem(rows.Row("test", "test", 1, (16,)), "slow", device="cpu"))


def test_cudnn_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PEERS_DIR", str(tmp_path))
    with pytest.raises(ImportError, match="kda_fused_sm90.cu: install nvidia-cudnn-frontend"):
        kernels.CudnnKda()
    (tmp_path / "kda_fused_sm90.cu").write_text("")
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ImportError, match="install cuda-bindings"):
        kernels.CudnnKda()


def nvcc(folder, body):
    """A folder for CUDA_HOME with an nvcc of this shell script, which passes for CUDA 13.0."""
    program = folder / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n" + body, encoding="utf-8")
    program.chmod(0o755)
    return folder


def test_cudnn_is_compiled_for_hopper(tmp_path, monkeypatch):
    source = tmp_path / "kernel.cu"
    monkeypatch.setattr(kernels.runpy, "run_path", lambda path: {
        "find_cuda": lambda: type("Cuda", (), {"nvcc": home / "bin" / "nvcc"}), "ToolchainError": KeyError})
    home = nvcc(tmp_path / "works", 'echo "$@" > %s/arguments\nfor last; do [ "$previous" = -o ] && printf cubin > "$last"; '
                                    'previous=$last; done\n' % tmp_path)
    assert kernels.CudnnKda._compile(source) == b"cubin"
    arguments = (tmp_path / "arguments").read_text(encoding="utf-8").split()
    assert "-arch=sm_90a" in arguments and "-DKDA_FUSED_FLAGS=7" in arguments and arguments[-1] == str(source)
    home = nvcc(tmp_path / "fails", "echo cannot; exit 1\n")
    with pytest.raises(RuntimeError, match="nvcc: cannot"):
        kernels.CudnnKda._compile(source)


def test_cudnn_needs_a_toolkit(monkeypatch, tmp_path):
    find = {}
    monkeypatch.setattr(kernels.runpy, "run_path", lambda path: find)

    def find_cuda():
        raise KeyError("none")
    find.update(find_cuda=find_cuda, ToolchainError=KeyError)
    with pytest.raises(ImportError, match="install the CUDA toolkit"):
        kernels.CudnnKda._compile(tmp_path / "kernel.cu")


# ---- profiling

NCU_CSV = '''==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","dram__bytes_write.sum",\
"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio","launch__registers_per_thread"
"","","nsecond","byte","byte","%","inst","inst","register/thread"
"0","kda_fwd(Params)","512,000","900,000,000","200,000,000","41.5","1.5","2.25","168"
"1","second<1>(Params)","1,000","19,051,264","0","0","0","0","32"
==PROF== Disconnected
'''


def test_profile_sums_the_kernels_bytes():
    row, = rows.select("T8192-H96")
    text = profile_row.table(row, profile_row.parse(NCU_CSV))
    assert "1119.1 MB through DRAM, the floor is 1019.2 MB: 1.10 times" in text
    assert "kda_fwd\n" in text and "512.0 us" in text and "gmma 2.25, barrier 1.50" in text
    assert "issue slots used, %                  nan" in text  # a metric that was not recorded
    with pytest.raises(ValueError, match="no kernel"):
        profile_row.parse("==PROF== nothing\n")


def test_ncu_script(tmp_path):
    """The script around an `ncu` that records its arguments and writes the CSV above."""
    (tmp_path / "ncu.csv").write_text(NCU_CSV, encoding="utf-8")
    ncu = tmp_path / "ncu"
    ncu.write_text('#!/usr/bin/env bash\nprintf "%%s\\n" "$@" > "%s/arguments"\n'
                   'while [[ $1 != --log-file ]]; do shift; done\ncp "%s/ncu.csv" "$2"\n' % (tmp_path, tmp_path),
                   encoding="utf-8")
    ncu.chmod(ncu.stat().st_mode | stat.S_IXUSR)
    env = dict(os.environ, PATH="%s:%s" % (tmp_path, os.environ["PATH"]), PYTHON=sys.executable)
    done = subprocess.run(["bash", str(BENCHMARKS / "ncu.sh"), "T8192-H96", "slow"], env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    assert "1.10 times" in done.stdout
    arguments = (tmp_path / "arguments").read_text(encoding="utf-8").splitlines()
    assert arguments[:2] == ["--clock-control", "none"]
    assert arguments[-4:] == [str(BENCHMARKS / "profile_row.py"), "run", "T8192-H96", "slow"]
    assert "dram__bytes_read.sum" in arguments[arguments.index("--metrics") + 1].split(",")
    done = subprocess.run(["bash", str(BENCHMARKS / "ncu.sh")], env=env, stderr=subprocess.PIPE,
                          universal_newlines=True)
    assert done.returncode == 2 and "usage" in done.stderr
