"""Small calls of every variant of the CUDA path, for compute-sanitizer: see sanitize.sh."""

import torch

import flash_kda

HEADS, HEAD_DIM = 2, 128
STATES = ((None, False), (torch.float32, False), (torch.bfloat16, False), (torch.float32, True))  # dtype, in place


def call(lens, packed, state_dtype, in_place):
    """One call on sequences of these lengths, which are all the same unless packed."""
    batch, tokens = (1, sum(lens)) if packed else (len(lens), lens[0])

    def normal(*shape):
        return torch.randn(*shape, device="cuda")

    q, k, v, g = (normal(batch, tokens, HEADS, HEAD_DIM).bfloat16() for _ in range(4))
    beta = normal(batch, tokens, HEADS).bfloat16()
    out = torch.full_like(v, float("nan"))
    initial_state = final_state = cu_seqlens = None
    if state_dtype is not None:
        initial_state = normal(len(lens), HEADS, HEAD_DIM, HEAD_DIM).to(state_dtype)
        final_state = initial_state if in_place else torch.full_like(initial_state, float("nan"))
    if packed:
        cu_seqlens = torch.tensor((0,) + lens, device="cuda").cumsum(0)
    flash_kda.fwd(q, k, v, g, beta, HEAD_DIM ** -0.5, out, normal(HEADS), normal(HEADS, HEAD_DIM), -5.0,
                  initial_state=initial_state, final_state=final_state, cu_seqlens=cu_seqlens)
    torch.cuda.synchronize()
    assert out.isfinite().all() and (final_state is None or final_state.isfinite().all())


if __name__ == "__main__":
    torch.manual_seed(0)
    for state_dtype, in_place in STATES:
        call((33, 33), False, state_dtype, in_place)
        call((5, 0, 205), True, state_dtype, in_place)  # the last goes round the ring of stages
    print("all variants ran")
