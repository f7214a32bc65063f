"""The implementations that can be measured, each behind one call: Problem -> (out, final_state).

Beside ours: flash-linear-attention's Triton `chunk_kda`, and the FlashKDA build that vLLM's wheels carry. A peer
that is not installed raises ImportError when it is made.
"""
import importlib.util
import inspect
import os
from pathlib import Path
from typing import Tuple

import torch

from measure import Problem

Result = Tuple[torch.Tensor, torch.Tensor]


def _version(distribution: str) -> str:
    from importlib import metadata
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


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
    """FlashKDA as vLLM ships it: a library of PyTorch operators, which needs nothing else of vLLM.

    It is taken from the installed vLLM, else from the folder PEERS_DIR (default: .peers in the working directory).
    """
    name = "flashkda"

    def __init__(self):
        library, self.version = self._find()
        torch.ops.load_library(str(library))
        self.ops = torch.ops._flashkda_C

    @staticmethod
    def _find() -> Tuple[Path, str]:
        spec = importlib.util.find_spec("vllm")  # does not import vLLM, which takes long
        if spec is not None:
            for folder in spec.submodule_search_locations or ():
                for library in Path(folder).glob("_flashkda_C*.so"):
                    return library, "vllm " + _version("vllm")
        for library in Path(os.environ.get("PEERS_DIR", ".peers")).glob("_flashkda_C*.so"):
            return library, "vllm, unpacked"
        raise ImportError("no _flashkda_C library in an installed vLLM or in PEERS_DIR")

    def __call__(self, p: Problem) -> Result:
        _, tokens, heads, _ = p.q.shape
        sequences = p.initial_state.shape[0]
        out, final_state = torch.empty_like(p.v), torch.empty_like(p.initial_state)
        workspace = torch.empty(self.ops.get_workspace_size(tokens, heads, sequences), dtype=torch.uint8,
                                device=p.q.device)
        self.ops.fwd(p.q, p.k, p.v, p.g, p.beta, p.scale, out, workspace, p.A_log, p.dt_bias, p.lower_bound,
                     p.initial_state, final_state, p.cu_seqlens, None, None)
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
KERNELS = {kernel.name: kernel for kernel in (FlashKda, VllmFlashKda, FlaChunkKda)}
PEERS = tuple(name for name in KERNELS if name != OURS)
