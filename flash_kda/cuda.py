"""The CUDA path: hands the tensors' addresses to the compiled module."""

import functools

import torch

try:
    from flash_kda import _C
except ImportError as error:  # built without CUDA, or the module does not load: the CPU path works all the same
    _C, _C_MISSING = None, str(error)


@functools.lru_cache(maxsize=None)  # once a device: it stands on the path of every call
def check_device(index: int) -> int:
    """The number of SMs of CUDA device `index`. Raises RuntimeError unless the kernels are built and run on it."""
    if _C is None:
        raise RuntimeError(
            "flash_kda is installed without its CUDA kernels ({}). To run on CUDA tensors, rebuild it on a "
            "machine with a CUDA toolkit and a CUDA build of PyTorch, without FLASH_KDA_SKIP_CUDA_BUILD: "
            "pip install -v --no-build-isolation .".format(_C_MISSING)
        )
    found = torch.cuda.get_device_capability(index)
    archs = [arch for arch in _C.CUDA_ARCHS.split(";") if arch]
    # wgmma is in code for sm_90a alone, which runs on 9.0 alone: compiled for others, the kernels trap.
    if found != (9, 0) or "90a" not in archs:
        raise RuntimeError(
            "flash_kda's CUDA kernels need a GPU of compute capability 9.0 (Hopper) and code for sm_90a, and are "
            "built for sm_{}; cuda:{} ({}) has compute capability {}.{}".format(
                ", sm_".join(archs), index, torch.cuda.get_device_name(index), found[0], found[1]
            )
        )
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.lru_cache(maxsize=128)  # all layers of a model ask for the same one
def _plan(num_sequences, tokens, heads, packed, num_segments, sms):
    return _C.plan(num_sequences, tokens, heads, packed, num_segments or 0, sms)


def fwd(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens,
    num_segments, num_sequences, tokens, heads,
) -> None:
    """`flash_kda.fwd` for checked CUDA tensors. `tokens` is T: of a row, or the packed total."""
    device = q.device
    sms = check_device(device.index)
    if num_sequences == 0 or heads == 0 or (tokens == 0 and final_state is None):
        return  # nothing to write
    state = initial_state if initial_state is not None else final_state
    plan = _plan(num_sequences, tokens, heads, cu_seqlens is not None, num_segments, sms)
    # It may be freed, and used by others on this stream, once the call is issued.
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device) if plan.workspace_bytes else None
    _C.fwd(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        g.data_ptr(),
        beta.data_ptr(),
        out.data_ptr(),
        A_log.data_ptr(),
        dt_bias.data_ptr(),
        0 if initial_state is None else initial_state.data_ptr(),
        0 if final_state is None else final_state.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
        num_sequences,
        tokens,
        heads,
        state is not None and state.dtype is torch.float32,
        float(scale),
        float(lower_bound),
        plan,
        device.index,
        torch.cuda.current_stream(device.index).cuda_stream,  # a torch.device takes a microsecond longer
    )
    # Autograd cannot see the kernel's writes: a graph that saved one of these for backward must notice.
    # An inference tensor has no version, and older PyTorch refuses to raise it.
    for x in (out, final_state):
        if x is not None and not x.is_inference():
            torch.autograd.graph.increment_version(x)
