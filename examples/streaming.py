"""A long sequence in pieces: the state, updated in place, carries over from call to call."""

import torch

import flash_kda

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
device = "cuda" if hopper else "cpu"
T, H, D, piece = 1000, 4, 128, 100

torch.manual_seed(0)
q, k, v, g = (torch.randn(1, T, H, D, dtype=torch.bfloat16, device=device) for _ in range(4))
beta = torch.randn(1, T, H, dtype=torch.bfloat16, device=device)
gate = dict(A_log=torch.zeros(H, device=device), dt_bias=torch.full((H, D), -6.0, device=device), lower_bound=-5.0)

whole, streamed = torch.empty_like(v), torch.empty_like(v)
state = torch.zeros(1, H, D, D, device=device)
with torch.inference_mode():
    flash_kda.fwd(q, k, v, g, beta, D ** -0.5, whole, **gate)
    for begin in range(0, T, piece):
        tokens = slice(begin, begin + piece)  # a slice of T is contiguous as long as B = 1
        flash_kda.fwd(
            q[:, tokens], k[:, tokens], v[:, tokens], g[:, tokens], beta[:, tokens], D ** -0.5, streamed[:, tokens],
            initial_state=state, final_state=state, **gate,
        )

difference = ((streamed.double() - whole.double()).norm() / whole.double().norm()).item()
print("streaming: {} tokens in pieces of {} on {}".format(T, piece, device))
print("relative difference from one call: {:.1e}".format(difference))
