"""Sequences of different lengths packed along T: each gives what it gives by itself."""

import torch

import flash_kda

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
device = "cuda" if hopper else "cpu"
lens, H, D = [300, 0, 17, 129], 4, 128
T, N = sum(lens), len(lens)

torch.manual_seed(0)
q, k, v, g = (torch.randn(1, T, H, D, dtype=torch.bfloat16, device=device) for _ in range(4))
beta = torch.randn(1, T, H, dtype=torch.bfloat16, device=device)
gate = dict(A_log=torch.zeros(H, device=device), dt_bias=torch.full((H, D), -4.0, device=device), lower_bound=-5.0)
states = torch.randn(N, H, D, D, device=device) * 0.1
cu_seqlens = torch.tensor([0] + lens, device=device).cumsum(0)  # [0, 300, 300, 317, 446]

out, final_states = torch.empty_like(v), torch.empty_like(states)
with torch.inference_mode():
    flash_kda.fwd(
        q, k, v, g, beta, D ** -0.5, out,
        initial_state=states, final_state=final_states, cu_seqlens=cu_seqlens, **gate,
    )

    difference = 0.0
    for n, (begin, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])):
        alone = [x[:, begin:end] for x in (q, k, v, g, beta)]
        out_alone, state_alone = torch.empty_like(alone[2]), states[n : n + 1].clone()
        flash_kda.fwd(*alone, D ** -0.5, out_alone, initial_state=state_alone, final_state=state_alone, **gate)
        for packed, by_itself in ((out[:, begin:end], out_alone), (final_states[n : n + 1], state_alone)):
            if packed.numel():
                difference = max(difference, (packed.float() - by_itself.float()).abs().max().item())

print("packed: {} sequences of {} tokens in one call on {}".format(N, lens, device))
print("largest difference from each sequence run alone: {:.1e}".format(difference))
