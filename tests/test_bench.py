"""The benchmark's arithmetic, its reports and its scripts. No GPU, and nothing here is timed.

The figures in `synthetic` are made up for these tests; nothing of them is a measurement.
"""
import json
import os
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
import report  # noqa: E402
import rows  # noqa: E402


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
            "versions": [{"change": "first", "commit": "0123456789abcdef", "predicted_us": 500, "measured_us": [679.5],
                          "finding": "waits"},
                         {"change": "second", "commit": None, "predicted_us": None, "measured_us": [340, 509.6],
                          "finding": None}],
            "tried": [{"change": "slower", "us": 510, "instead_of_us": 480, "finding": "spills"},
                      {"change": "the same", "us": None, "instead_of_us": None, "finding": None}],
            "profile": [{"quantity": "waiting", "value": 12.5, "unit": "%", "version": 2}]}


@pytest.fixture
def project(tmp_path, synthetic, history):
    """A project with one result, no plot, and documents with a block of each kind."""
    results = tmp_path / "benchmarks" / "results"
    (results / "ladder").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (results / "test.json").write_text(json.dumps(synthetic), encoding="utf-8")
    (results / "ladder" / "history.json").write_text(json.dumps(history), encoding="utf-8")
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
        ["2", "second", "—", "", "—", "340–509.6", "1.00–1.50"]]
    assert cells(report.tried_table(history))[2:] == [["slower", "spills", "510", "480"], ["the same", "", "—", "—"]]
    assert cells(report.profile_table(history))[2:] == [["waiting", "12.5 %", "2"]]


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
    assert "| 1 | first |" in document and "| slower |" in document and "| waiting | 12.5 % | 2 |" in document
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
    for name in ("ladder", "tried", "profile"):
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


# ---- command lines

@pytest.mark.parametrize("arguments, said", [
    (["--rows", "T1-H1"], "no such row or group: T1-H1"),
    (["--gates", "fast"], "unknown: fast"),
    (["--peers", "triton"], "unknown: triton"),
])
def test_bench_refuses_unknown_names(arguments, said, capsys):
    with pytest.raises(SystemExit):
        bench_fwd.main(arguments)
    assert said in capsys.readouterr().err


def test_bench_says_that_it_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench_fwd.main([])


def test_bench_writes_the_rows_that_ran(tmp_path, monkeypatch, capsys):
    """The whole command with the GPU's part replaced: a row, a gate, a peer that is not there and one that fails."""
    class Peer:
        name, version = "fla", "0.0.0"

    def no_peer():
        raise ImportError("not installed")

    def device_us(call):
        if call() is None:
            raise RuntimeError("refused\nat length")
        return 500.0, [490.0, 510.0]

    ours = type("Ours", (), {"version": "0.0.0", "name": "flash_kda",
                             "__call__": lambda self, p: (p.v, p.initial_state)})
    monkeypatch.setattr(kernels, "KERNELS", {
        "flash_kda": ours, "flashkda": no_peer, "fla": type("Fla", (Peer,), {"__call__": lambda self, p: None})})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Test GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench_fwd, "device_state", lambda: {"name": "Test GPU", "driver": None, "sm_mhz": None})
    monkeypatch.setattr(measure, "problem", lambda row, gate: type("P", (), {"v": 1, "initial_state": 2}))
    monkeypatch.setattr(measure, "accuracy", lambda call, p: dict(zip(("out", "state"), (0.25 * x for x in call(p)))))
    monkeypatch.setattr(measure, "copy_tbps", lambda: 2.5)
    monkeypatch.setattr(measure, "device_us", device_us)
    monkeypatch.setattr(measure, "host_us", lambda call: 9.0)

    bench_fwd.main(["--rows", "many", "--gates", "slow", "--out", str(tmp_path / "new" / "run")])
    printed = capsys.readouterr().out
    assert "flashkda is left out: ImportError: not installed" in printed
    assert "[1/1] slow" in printed and "fla: RuntimeError: refused" in printed
    result = json.loads((tmp_path / "new" / "run.json").read_text(encoding="utf-8"))
    measured, = result["rows"]
    assert (measured["row"], measured["gate"], measured["lens"]) == ("T16384-H32-N64", "slow", [256] * 64)
    assert measured["kernels"]["flash_kda"] == {"us": 500.0, "us_quartiles": [490.0, 510.0], "host_us": 9.0}
    assert measured["kernels"]["fla"] == {"error": "RuntimeError: refused"}
    assert result["accuracy"][0] == {"gate": "slow", "kernel": "flash_kda", "out": 0.25, "state": 0.5}
    assert "error" in result["accuracy"][1] and result["bandwidth_tbps"] == {"convention": 3.0, "copy": 2.5}
    assert "T16384-H32-N64" in (tmp_path / "new" / "run.md").read_text(encoding="utf-8")


def test_source_state_without_git(monkeypatch):
    monkeypatch.setattr(bench_fwd, "_output", lambda *command: None)
    monkeypatch.setenv("FLASH_KDA_COMMIT", "abc")
    assert bench_fwd.source_state() == {"commit": "abc", "dirty": None}


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
