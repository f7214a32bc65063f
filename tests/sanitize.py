"""Small calls of every variant of the CUDA path, for compute-sanitizer: see sanitize.sh."""

import torch

import flash_kda

HEAD_DIM = 128
STATES = (  # dtype, in place
    (None, False), (torch.float32, False), (torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True),
)
CALLS = (  # tokens of each sequence, packed, heads, num_segments
    ((33, 33), False, 2, 1),
    ((5, 0, 205), True, 2, 1),  # the last goes round the ring of stages
    ((70, 70), False, 2, 3),
    ((5, 0, 205), True, 2, 6),
)
# As racecheck is slow, these once:
MANY_CHAINS = ((40, 0, 24, 16), True, 48, 1)  # more than SMs: some are cut, and their states handed over
PAIRS_LEFT_OVER = ((1700,), False, 24, None)  # on 132 SMs: they have a segment of each chain among them


def call(lens, packed, heads, num_segments, state_dtype, in_place):
    """One call on sequences of these lengths, which are all the same unless packed."""
    batch, tokens = (1, sum(lens)) if packed else (len(lens), lens[0])

    def normal(*shape):
        return torch.randn(*shape, device="cuda")

    q, k, v, g = (normal(batch, tokens, heads, HEAD_DIM).bfloat16() for _ in range(4))
    beta = normal(batch, tokens, heads).bfloat16()
    out = torch.full_like(v, float("nan"))
    initial_state = final_state = cu_seqlens = None
    if state_dtype is not None:
        initial_state = normal(len(lens), heads, HEAD_DIM, HEAD_DIM).to(state_dtype)
        final_state = initial_state if in_place else torch.full_like(initial_state, float("nan"))
    if packed:
        cu_seqlens = torch.tensor((0,) + lens, device="cuda").cumsum(0)
    flash_kda.fwd(q, k, v, g, beta, HEAD_DIM ** -0.5, out, normal(heads), normal(heads, HEAD_DIM), -5.0,
                  initial_state=initial_state, final_state=final_state, cu_seqlens=cu_seqlens, num_segments=num_segments)
    torch.cuda.synchronize()
    assert out.isfinite().all() and (final_state is None or final_state.isfinite().all())


if __name__ == "__main__":
    torch.manual_seed(0)
    for state_dtype, in_place in STATES:
        for arguments in CALLS:
            call(*arguments, state_dtype, in_place)
    call(*MANY_CHAINS, torch.float32, True)
    call(*PAIRS_LEFT_OVER, torch.float32, True)
    print("all variants ran")
