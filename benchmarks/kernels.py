"""The implementations that can be measured, each behind one call: Problem -> (out, final_state).

Beside ours: the FlashKDA build that vLLM's wheels carry, cuDNN's fused Hopper kernel, and flash-linear-attention's
Triton `chunk_kda`. A peer that is not installed raises ImportError when it is made.
"""
import argparse
import ctypes
import hashlib
import importlib.util
import inspect
import os
import runpy
import subprocess
import tempfile
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import torch

from measure import Problem
from rows import some_of

Result = Tuple[torch.Tensor, torch.Tensor]


def _version(distribution: str) -> str:
    from importlib import metadata
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def _shipped(package: str, distribution: str, pattern: str) -> Tuple[Path, str]:
    """A file that a package ships, and which one it is, by the package's version or else by its own hash.

    The package itself is not imported, which may take long.

    `pattern` is relative to the package. A file of that name is taken from the installed package, else from the
    folder PEERS_DIR (default: .peers in the working directory). Raises ImportError where neither has it.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in Path(folder).glob(pattern):
            return path, "%s %s" % (distribution, _version(distribution))
    name = pattern.split("/")[-1]
    for path in Path(os.environ.get("PEERS_DIR", ".peers")).glob(name):
        return path, "%s (SHA-256 %s)" % (distribution, hashlib.sha256(path.read_bytes()).hexdigest()[:12])
    raise ImportError("no %s: install %s, or put that file of it into PEERS_DIR" % (name, distribution))


class FlashKda:
    """This library."""
    name = "flash_kda"

    def __init__(self):
        import flash_kda
        self.fwd, self.version = flash_kda.fwd, flash_kda.__version__

    def __call__(self, p: Problem) -> Result:
        out, final_state = torch.empty_like(p.v), torch.empty_like(p.initial_state)
        self.fwd(p.q, p.k, p.v, p.g, p.beta, p.scale, out, p.A_log, p.dt_bias, p.lower_bound,
                 initial_state=p.initial_state, final_state=final_state, cu_seqlens=p.cu_seqlens)
        return out, final_state


class VllmFlashKda:
    """FlashKDA as vLLM ships it: a library of PyTorch operators, which needs nothing else of vLLM."""
    name = "flashkda"

    def __init__(self):
        library, self.version = _shipped("vllm", "vllm", "_flashkda_C*.so")
        torch.ops.load_library(str(library))
        self.ops = torch.ops._flashkda_C

    def __call__(self, p: Problem) -> Result:
        _, tokens, heads, _ = p.q.shape
        sequences = p.initial_state.shape[0]
        out, final_state = torch.empty_like(p.v), torch.empty_like(p.initial_state)
        workspace = torch.empty(self.ops.get_workspace_size(tokens, heads, sequences), dtype=torch.uint8,
                                device=p.q.device)
        self.ops.fwd(p.q, p.k, p.v, p.g, p.beta, p.scale, out, workspace, p.A_log, p.dt_bias, p.lower_bound,
                     p.initial_state, final_state, p.cu_seqlens, None, None)
        return out, final_state


class CudnnKda:
    """The fused Hopper kernel in cuDNN's frontend, compiled from the source it ships and launched without its Python layer.

    The kernel reads g and beta in fp32 and cu_seqlens in int32. They are converted once a problem, off the clock: that
    is in the kernel's favour, beside implementations that read them as they are. Raises ImportError where the source,
    nvcc or cuda-bindings is missing, RuntimeError where it does not compile or load.
    """
    name = "cudnn"
    SOURCE = "linear_attention/hopper/cuda_kernels/kda_fused_sm90.cu"
    THREADS, SMEM_BYTES = 128, 94464  # a CTA
    CTAS, CHUNK = 264, 16  # a sequence is split into pieces of whole chunks, to about two CTAs an SM
    # q k v g beta cu_seqlens h0 out h1 | sequences, heads, pieces | A_log, dt_bias | lower_bound, scale | value heads
    TYPES = (ctypes.c_void_p,) * 9 + (ctypes.c_int,) * 3 + (ctypes.c_void_p,) * 2 + (ctypes.c_float,) * 2 + (ctypes.c_int,)

    def __init__(self):
        source, self.version = _shipped("cudnn", "nvidia-cudnn-frontend", self.SOURCE)
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise ImportError("no cuda.bindings: install cuda-bindings") from error
        self.driver, self.problem, self.converted = driver, None, None
        cubin = self._compile(source)
        torch.zeros(1, device="cuda")  # PyTorch's context, which the module is loaded into
        module = self._checked(driver.cuModuleLoadData(cubin))
        self.function = self._checked(driver.cuModuleGetFunction(module, b"kda_fused"))
        self._checked(driver.cuFuncSetAttribute(
            self.function, driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self.SMEM_BYTES))

    @staticmethod
    def _compile(source: Path) -> bytes:
        # By its path: with the project's root on sys.path, flash_kda would be the folder there and not the installed package.
        toolchain = runpy.run_path(str(Path(__file__).resolve().parent.parent / "toolchain.py"))
        try:
            nvcc = toolchain["find_cuda"]().nvcc
        except toolchain["ToolchainError"] as error:
            raise ImportError("no nvcc: install the CUDA toolkit") from error
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kda.cubin")
            done = subprocess.run(
                [str(nvcc), "-cubin", "-arch=sm_90a", "-std=c++17", "-O3", "--use_fast_math", "-DNDEBUG",
                 "-DKDA_FUSED_FLAGS=7", "-o", str(cubin), str(source)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
            if done.returncode:
                raise RuntimeError("nvcc: " + done.stdout.strip())
            return cubin.read_bytes()

    @staticmethod
    def _checked(answer: Tuple):
        """What a driver call returns after its status. Raises RuntimeError where that is an error."""
        status, values = answer[0], answer[1:]
        if int(status) != 0:
            raise RuntimeError("CUDA driver: %s" % status)
        return values[0] if values else None

    def _inputs(self, p: Problem) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """g and beta in fp32, cu_seqlens in int32."""
        if p is not self.problem:
            cu_seqlens = torch.tensor([0, p.q.shape[1]]) if p.cu_seqlens is None else p.cu_seqlens
            self.converted = p.g.float(), p.beta.float(), cu_seqlens.to(p.q.device, torch.int32)
            self.problem = p
        return self.converted

    def __call__(self, p: Problem) -> Result:
        _, tokens, heads, _ = p.q.shape
        sequences = p.initial_state.shape[0]
        out, final_state = torch.empty_like(p.v), torch.empty_like(p.initial_state)
        chunks = -(-tokens // (sequences * self.CHUNK))
        pieces = max(1, min(self.CTAS // (sequences * heads), chunks))
        g, beta, cu_seqlens = self._inputs(p)
        tensors = (p.q, p.k, p.v, g, beta, cu_seqlens, p.initial_state, out, final_state)
        values = tuple(t.data_ptr() for t in tensors) + (
            sequences, heads, pieces, p.A_log.data_ptr(), p.dt_bias.data_ptr(), p.lower_bound, p.scale, heads)
        self._checked(self.driver.cuLaunchKernel(
            self.function, heads, sequences * pieces, 1, self.THREADS, 1, 1, self.SMEM_BYTES,
            torch.cuda.current_stream().cuda_stream, (values, self.TYPES), 0))
        return out, final_state


class FlaChunkKda:
    """flash-linear-attention's own Triton kernels. The first call of a shape autotunes, which takes minutes."""
    name = "fla"

    def __init__(self):
        os.environ["FLA_FLASH_KDA"] = "0"  # else FLA would hand the call to the flash_kda it finds
        from fla.ops.kda import chunk_kda
        self.chunk_kda, self.version = chunk_kda, _version("fla-core")
        # The V-first state layout was called transpose_state_layout in FLA 0.5.0.
        names = inspect.signature(chunk_kda).parameters
        self.v_first = "state_v_first" if "state_v_first" in names else "transpose_state_layout"

    def __call__(self, p: Problem) -> Result:
        with torch.inference_mode():
            return self.chunk_kda(
                q=p.q, k=p.k, v=p.v, g=p.g, beta=p.beta, scale=p.scale, initial_state=p.initial_state,
                output_final_state=True, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True,
                use_beta_sigmoid_in_kernel=True, safe_gate=True, lower_bound=p.lower_bound, A_log=p.A_log,
                dt_bias=p.dt_bias.flatten(), cu_seqlens=p.cu_seqlens, **{self.v_first: True})


OURS = FlashKda.name
KERNELS = {kernel.name: kernel for kernel in (FlashKda, VllmFlashKda, CudnnKda, FlaChunkKda)}
PEERS = tuple(name for name in KERNELS if name != OURS)
QUICK_PEERS = (VllmFlashKda.name, CudnnKda.name)  # those that do not autotune


def _short(error: Exception) -> str:
    return ("%s: %s" % (type(error).__name__, error)).split("\n")[0][:200]


def add_peers(parser: argparse.ArgumentParser) -> None:
    """The argument of `load`."""
    parser.add_argument("--peers", type=some_of(PEERS), default=",".join(QUICK_PEERS),
                        help="comma-separated, of %s; those that are not installed are left out (default: %%(default)s)"
                             % ", ".join(PEERS))


def load(peers: List[str]) -> List:
    """Ours, then the named peers that can be loaded; a line says which cannot."""
    loaded = [KERNELS[OURS]()]
    for name in peers:
        try:
            loaded.append(KERNELS[name]())
        except (ImportError, OSError, RuntimeError) as error:
            print("%s is left out: %s" % (name, _short(error)), flush=True)
    return loaded


def attempt(kernel, figures: Callable[[], Dict]) -> Dict:
    """The figures of a kernel, or {"error": why not}: a peer that refuses a shape must not end the run. Ours may not."""
    try:
        return figures()
    except Exception as error:
        if kernel.name == OURS:
            raise
        return {"error": _short(error)}
