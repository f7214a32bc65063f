"""flash-linear-attention hands `chunk_kda` to `flash_kda.fwd`: the published package, a process for each version.

A version is tested if it lies in `fla/<version>` under the environment's prefix (tests/test.sh puts it there;
FLASH_KDA_FLA_DIR names another folder than `fla`), and skipped if not. Functions called through `fla(...)` run in
that version's process, which imports this file. FLA's own kernels need a GPU: for CPU tensors a stand-in takes their
place that only says it was reached.
"""
from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence
from unittest import mock

import problems
import pytest
import torch

FLA_DIR = Path(os.environ.get("FLASH_KDA_FLA_DIR") or os.path.join(sys.prefix, "fla")).resolve()
VERSIONS = ("0.5.0", "0.5.1", "0.5.2", "0.6.0")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))

HIT = {
    "0.5.0": "[FLA Backend] kda.chunk_kda -> flashkda",
    "0.5.1": "[FLA Backend] kda.chunk_kda -> flashkda",
    "0.5.2": "[FLA Backend] kda.chunk_kda -> flash_kda",
    "0.6.0": "[FLA Backend] fla.ops.kda.chunk.chunk_kda -> flash_kda",
}


class Outcome(NamedTuple):
    """What one `chunk_kda` call did."""

    ran: Optional[str]          # "flash_kda", "fla" (its own kernels), or None
    log: List[str]              # FLA's dispatch lines about this call
    raised: Optional[str]       # "TypeError: ...", or None
    out_error: Optional[float]  # against FLA's naive recurrence; None where no real kernel ran
    state_error: Optional[float]


@pytest.fixture(scope="module", params=VERSIONS)
def version(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def fla(version: str):
    """Runs a function of this file in a process that imports this version of FLA."""
    folder = FLA_DIR / version
    if not (folder / "fla").is_dir():
        pytest.skip(f"flash-linear-attention {version} is not in {FLA_DIR}")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("flash-linear-attention imports Triton, which is not installed")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), use_version, (str(folder),)) as process:
        yield lambda function, *args, **kwargs: process.submit(function, *args, **kwargs).result(timeout=300)


# ------------------------------------------------------------------------------------------------ in FLA's process

def use_version(folder: str) -> None:
    """Before the first import: FLA from `folder`, without the settings of whoever runs the tests."""
    sys.path.insert(0, folder)
    for name in [name for name in os.environ if name.startswith("FLA_")]:
        del os.environ[name]


def make_call(lengths: Sequence[int], packed: bool, gate: str, seed: int) -> dict:
    """Keyword arguments of a `chunk_kda` call that FLA gives to flash_kda, on the CPU."""
    x = problems.make(lengths, heads=2, gate=gate, packed=packed, seed=seed)
    call = dict(x.arguments(), dt_bias=x.dt_bias.flatten(), output_final_state=True)  # FLA's layers keep [H * K]
    for flag in ("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "safe_gate"):
        call[flag] = True
    call["scale"] = None  # K^-0.5
    return dict(call, **v_first())


def v_first() -> Dict[str, bool]:
    """The argument that asks this version of FLA for [V, K] states."""
    import fla
    return {"transpose_state_layout" if fla.__version__ == "0.5.0" else "state_v_first": True}


def naive(call: dict, lengths: Sequence[int]):
    """Output and V-first final state of `call` by FLA's naive recurrence in fp32."""
    from fla.ops.kda.gate import naive_kda_lowerbound_gate
    from fla.ops.kda.naive import naive_recurrent_kda

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6)

    # As one row of tokens, sequence after sequence: what a pack already is.
    tokens = (unit(call["q"]), unit(call["k"]), call["v"].float(),
              naive_kda_lowerbound_gate(call["g"], call["A_log"], call["dt_bias"], call["lower_bound"]),
              call["beta"].float().sigmoid())
    sequences = zip(*(x.flatten(0, 1).split(list(lengths)) for x in tokens))
    outs, states = [], []
    for n, sequence in enumerate(sequences):
        h0 = None if call["initial_state"] is None else call["initial_state"][n:n + 1].transpose(-1, -2)
        out, state = naive_recurrent_kda(*(x[None] for x in sequence), scale=call.get("scale"), initial_state=h0,
                                         output_final_state=True)
        outs.append(out[0])
        states.append(state.transpose(-1, -2))
    return torch.cat(outs).view_as(call["v"]), torch.cat(states)


def forget_logged() -> None:
    """FLA logs each decision once a process; make it log the next call's again."""
    try:
        from fla.backends import _function_registries as registries      # 0.6
    except ImportError:
        from fla.ops.backends import BackendRegistry                      # 0.5
        registries = BackendRegistry._registries
    for registry in registries.values():
        registry._logged.clear()


def run(
    lengths: Sequence[int] = (37, 37), packed: bool = False, gate: str = "mixed", device: str = "cpu", seed: int = 0,
    edit: Optional[str] = None, mode: str = "inference_mode", environment: Optional[Dict[str, str]] = None,
) -> Outcome:
    """Calls `chunk_kda` once (arguments changed by `EDITS[edit]`, inside torch's `mode()`) and says what happened."""
    import flash_kda
    from fla.ops.kda import chunk, chunk_kda

    call = make_call(lengths, packed, gate, seed)
    if edit is not None:
        call.update(EDITS[edit](call))
    call = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in call.items()}

    ran, log, raised, errors = [], [], None, (None, None)
    real_fwd, real_apply = flash_kda.fwd, chunk.ChunkKDAFunction.apply

    def fwd(*args, **kwargs):
        ran.append("flash_kda")
        for buffer in (args[6], kwargs["final_state"]):
            if buffer is not None:
                buffer.fill_(float("nan"))
        return real_fwd(*args, **kwargs)

    def apply(*args):
        ran.append("fla")
        return real_apply(*args) if device == "cuda" else (torch.empty_like(call["v"]), None)

    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: log.append(record.getMessage())
    logger = logging.getLogger("fla")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    forget_logged()
    try:
        with mock.patch.object(flash_kda, "fwd", fwd), mock.patch.object(chunk.ChunkKDAFunction, "apply", apply), \
                mock.patch.dict(os.environ, environment or {}), getattr(torch, mode)():
            out, state = chunk_kda(**call)
        if ran == ["flash_kda"] or device == "cuda":
            want_out, want_state = naive(call, lengths)
            errors = problems.error(out, want_out), None if state is None else problems.error(state, want_state)
    except (RuntimeError, TypeError, ValueError) as error:
        raised = f"{type(error).__name__}: {error}"
    finally:
        logger.removeHandler(handler)
    assert len(ran) <= 1
    return Outcome(ran[0] if ran else None, [line for line in log if "chunk_kda" in line], raised, *errors)


def cast(call: dict, *names: str, dtype: torch.dtype) -> dict:
    return {name: call[name].to(dtype) for name in names}


def more_value_heads(call: dict) -> dict:
    """Grouped value attention: twice as many heads of v, g and beta as of q and k."""
    return {**{name: call[name].repeat_interleave(2, dim=2) for name in ("v", "g", "beta")},
            "A_log": call["A_log"].repeat(2), "dt_bias": call["dt_bias"].repeat(2), "initial_state": None}


EDITS: Dict[str, Callable[[dict], dict]] = {
    # Arguments flash_kda takes as well
    "int32 cu_seqlens": lambda call: cast(call, "cu_seqlens", dtype=torch.int32),
    "own scale": lambda call: {"scale": 0.25},
    "no states": lambda call: {"initial_state": None, "output_final_state": False},
    "strided initial state": lambda call: {"initial_state": call["initial_state"].mT.contiguous().mT},
    # Calls that FLA's verifier rejects
    "fp16": lambda call: cast(call, "q", "k", "v", "g", "beta", dtype=torch.float16),
    "K": lambda call: {**{name: call[name][..., :64] for name in ("q", "k", "g")}, "dt_bias": call["dt_bias"][:128],
                       "initial_state": None},
    "V": lambda call: {"v": call["v"][..., :64], "initial_state": None},
    "value heads": more_value_heads,
    "gate": lambda call: {"use_gate_in_kernel": False},
    "norm": lambda call: {"use_qk_l2norm_in_kernel": False},
    "sigmoid": lambda call: {"use_beta_sigmoid_in_kernel": False},
    "safe gate": lambda call: {"safe_gate": False},
    "K-first": lambda call: dict.fromkeys(v_first(), False),
    "old name": lambda call: {"state_v_first": False, "transpose_state_layout": True},
    "context parallel": lambda call: {
        **{name: call[name][:1] for name in ("q", "k", "v", "g", "beta")}, "initial_state": None,
        "output_final_state": False,
        "cp_context": SimpleNamespace(cu_seqlens=torch.tensor([0, 37]), cu_seqlens_cpu=None)},
    "intermediate states": lambda call: {"return_intermediate_states": True},
    "negative eigenvalues": lambda call: {"allow_neg_eigval": True},
    "no A_log": lambda call: {"A_log": None},
    "no dt_bias": lambda call: {"dt_bias": None},
    # Calls that it lets through and flash_kda.fwd refuses
    "bf16 A_log": lambda call: cast(call, "A_log", dtype=torch.bfloat16),
    "bf16 dt_bias": lambda call: cast(call, "dt_bias", dtype=torch.bfloat16),
    "bf16 initial state": lambda call: cast(call, "initial_state", dtype=torch.bfloat16),
    "fp32 beta": lambda call: cast(call, "beta", dtype=torch.float32),
    "strided q": lambda call: {"q": call["q"].transpose(1, 2).contiguous().transpose(1, 2)},
    "no lower_bound": lambda call: {"lower_bound": None},
    "low lower_bound": lambda call: {"lower_bound": -5.5},
}


# ------------------------------------------------------------------------------------------------------------ tests

def assert_hit(outcome: Outcome, version: str, device: str) -> None:
    assert outcome.raised is None
    assert outcome.ran == "flash_kda"
    assert outcome.log == [HIT[version]]
    out_bound, state_bound, _ = problems.BOUNDS[device]
    assert outcome.out_error <= out_bound
    assert outcome.state_error is None or outcome.state_error <= state_bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gate", ("random", "slow", "mixed", "none"))
def test_batch(fla, version, gate, device):
    outcome = fla(run, lengths=(67, 67, 67), gate=gate, device=device, seed=1)
    assert_hit(outcome, version, device)
    assert outcome.state_error is not None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("edit", (None, "int32 cu_seqlens"))
@pytest.mark.parametrize("lengths", ((5, 0, 33, 1, 16), (97,)))
def test_packed(fla, version, lengths, edit, device):
    outcome = fla(run, lengths=lengths, packed=True, edit=edit, device=device, seed=2)
    assert_hit(outcome, version, device)
    assert outcome.state_error is not None


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(fla, version, device):
    outcome = fla(run, lengths=(0, 0), packed=True, device=device, seed=3)
    assert (outcome.raised, outcome.ran, outcome.log) == (None, "flash_kda", [HIT[version]])
    assert outcome.state_error == 0


@pytest.mark.parametrize("edit", ("own scale", "no states", "strided initial state"))
def test_accepted(fla, version, edit):
    outcome = fla(run, edit=edit, seed=4)
    assert_hit(outcome, version, "cpu")
    assert (outcome.state_error is None) == (edit == "no states")


def test_no_grad(fla, version):
    assert_hit(fla(run, mode="no_grad", seed=5), version, "cpu")


REJECTIONS = {
    "fp16": "FlashKDA requires bfloat16, got torch.float16",
    "K": "FlashKDA requires K=128, got 64",
    "V": "FlashKDA requires V=128, got 64",
    "value heads": "FlashKDA does not support GVA (HV=4 != H=2)",
    "gate": "FlashKDA requires use_gate_in_kernel=True",
    "norm": "FlashKDA requires use_qk_l2norm_in_kernel=True",
    "sigmoid": "FlashKDA requires use_beta_sigmoid_in_kernel=True",
    "safe gate": "FlashKDA requires safe_gate=True",
    "K-first": "FlashKDA requires {state_v_first}=True",
    "context parallel": "FlashKDA does not support context parallel",
    "intermediate states": "FlashKDA does not support return_intermediate_states",
}


def rejected(version: str, reason: str) -> List[str]:
    name = "transpose_state_layout" if version == "0.5.0" else "state_v_first"
    return [f"{HIT[version]} rejected: {reason.format(state_v_first=name)}"]


@pytest.mark.parametrize("edit", REJECTIONS)
def test_rejected(fla, version, edit):
    outcome = fla(run, edit=edit)
    assert (outcome.ran, outcome.log, outcome.raised) == ("fla", rejected(version, REJECTIONS[edit]), None)


def test_old_state_layout_name(fla, version):
    """The name in 0.5.0 alone: later versions deprecate it, and their verifier does not see it."""
    outcome = fla(run, edit="old name")
    if version == "0.5.0":
        assert_hit(outcome, version, "cpu")
    else:
        assert (outcome.ran, outcome.log, outcome.raised) == \
            ("fla", rejected(version, "FlashKDA requires state_v_first=True"), None)


@pytest.mark.parametrize("edit, reason", (("negative eigenvalues", "FlashKDA requires allow_neg_eigval=False"),
                                          ("no A_log", "FlashKDA requires A_log and dt_bias tensors"),
                                          ("no dt_bias", "FlashKDA requires A_log and dt_bias tensors")))
def test_rejected_since_0_6(fla, version, edit, reason):
    """0.5 has no such checks; what it lets through without A_log or dt_bias, flash_kda refuses."""
    outcome = fla(run, edit=edit)
    if version == "0.6.0":
        assert (outcome.ran, outcome.log, outcome.raised) == ("fla", rejected(version, reason), None)
    elif edit == "negative eigenvalues":
        assert_hit(outcome, version, "cpu")  # ignored, as docs/fla.md warns: computed with sigmoid(beta)
    else:
        assert outcome.ran == "flash_kda" and outcome.raised.startswith("TypeError") and edit[3:] in outcome.raised


@pytest.mark.parametrize("device", DEVICES)
def test_rejected_with_grad(fla, version, device):
    outcome = fla(run, mode="enable_grad", device=device)
    assert (outcome.ran, outcome.raised) == ("fla", None)
    assert outcome.log == rejected(version, "FlashKDA only supports inference mode")


@pytest.mark.parametrize("device", DEVICES)
def test_disabled(fla, version, device):
    """FLA_FLASH_KDA=0 leaves the call to FLA's kernels, without a word, and 1 brings flash_kda back."""
    outcome = fla(run, environment={"FLA_FLASH_KDA": "0"}, device=device, gate="slow")
    assert (outcome.ran, outcome.log, outcome.raised) == ("fla", [], None)
    if device == "cuda" and version != "0.5.0":  # 0.5.0's own kernels take no use_beta_sigmoid_in_kernel
        assert outcome.out_error <= 1e-2 and outcome.state_error <= 1e-2
    assert_hit(fla(run, environment={"FLA_FLASH_KDA": "1"}, device=device, gate="slow"), version, device)


def test_example(fla, version):
    """examples/with_fla.py, as a user starts it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FLA_DIR / version), *sys.path])}
    environment.pop("FLA_FLASH_KDA", None)
    example = Path(__file__).parents[1] / "examples" / "with_fla.py"
    lines = subprocess.run([sys.executable, str(example)], env=environment, stdout=subprocess.PIPE, text=True,
                           timeout=300, check=True).stdout.splitlines()
    assert HIT[version] in lines and "FLA ran flash_kda" in lines


@pytest.mark.parametrize("edit, error, argument", (
    ("bf16 A_log", "TypeError", "A_log"), ("bf16 dt_bias", "TypeError", "dt_bias"),
    ("bf16 initial state", "TypeError", "initial_state"), ("fp32 beta", "TypeError", "beta"),
    ("strided q", "ValueError", "q: expected a contiguous tensor"), ("no lower_bound", "TypeError", "lower_bound"),
    ("low lower_bound", "ValueError", "lower_bound"),
))
def test_refused_by_flash_kda(fla, version, edit, error, argument):
    """What FLA's verifier does not look at raises from flash_kda.fwd; FLA does not fall back."""
    outcome = fla(run, edit=edit)
    assert outcome.ran == "flash_kda"
    assert outcome.raised.startswith(error) and argument in outcome.raised
