"""The plain call: a batch of equal sequences, checked against the fp64 reference."""

import torch

import flash_kda

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
device = "cuda" if hopper else "cpu"
B, T, H, D = 2, 500, 4, 128

torch.manual_seed(0)
q, k, v, g = (torch.randn(B, T, H, D, dtype=torch.bfloat16, device=device) for _ in range(4))
beta = torch.randn(B, T, H, dtype=torch.bfloat16, device=device)
gate = dict(A_log=torch.zeros(H, device=device), dt_bias=torch.full((H, D), -4.0, device=device), lower_bound=-5.0)
scale = D ** -0.5

out = torch.empty_like(v)
final_state = torch.empty(B, H, D, D, device=device)  # fp32 [N, H, V, K]
with torch.inference_mode():
    flash_kda.fwd(q, k, v, g, beta, scale, out, final_state=final_state, **gate)

true_out, true_state = flash_kda.reference(q, k, v, g, beta, scale, **gate)
out_error = ((out.double() - true_out).norm() / true_out.norm()).item()
state_error = ((final_state.double() - true_state).norm() / true_state.norm()).item()
print("direct: out {} and state {} on {}".format(list(out.shape), list(final_state.shape), device))
print("relative error to fp64: out {:.1e}, state {:.1e}".format(out_error, state_error))
