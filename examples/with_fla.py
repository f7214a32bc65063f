"""flash_kda through flash-linear-attention: a plain `chunk_kda` call, which FLA hands to `flash_kda.fwd` by itself.

    pip install flash-linear-attention
    python examples/with_fla.py

FLA logs its choice once a process, at level INFO. (Do not name a script fla.py: it would be imported in FLA's place.)
"""
import inspect
import logging

import torch
from fla.ops.kda import chunk_kda

import flash_kda


class DispatchLines(logging.Handler):
    """Prints FLA's dispatch lines and remembers whether one of them is about a hit."""

    hit = False

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        print(line)
        self.hit |= line.endswith(("chunk_kda -> flash_kda", "chunk_kda -> flashkda"))


dispatch_lines = DispatchLines(logging.INFO)
logging.getLogger("fla").setLevel(logging.INFO)
logging.getLogger("fla").addHandler(dispatch_lines)

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
device = torch.device("cuda" if hopper else "cpu")
torch.manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=device)


B, T, H, D = 2, 300, 4, 128
q, k, v, g = (normal(B, T, H, D) for _ in range(4))
beta = normal(B, T, H)
A_log, dt_bias = torch.rand(H, device=device), torch.rand(H * D, device=device)

# States as [V, K], which FLA 0.5.0 calls transpose_state_layout and later versions state_v_first.
v_first = "state_v_first" if "state_v_first" in inspect.signature(chunk_kda).parameters else "transpose_state_layout"
options = dict(A_log=A_log, dt_bias=dt_bias, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True,
               use_beta_sigmoid_in_kernel=True, safe_gate=True, lower_bound=-5.0, output_final_state=True,
               **{v_first: True})

with torch.inference_mode():
    out, state = chunk_kda(q, k, v, g, beta, **options)

    # The same in two calls that hand the state on.
    start, rest = zip(*([part.contiguous() for part in x.split((100, T - 100), dim=1)] for x in (q, k, v, g, beta)))
    out_start, halfway = chunk_kda(*start, **options)
    out_rest, state_in_two = chunk_kda(*rest, initial_state=halfway, **options)

    # And without FLA.
    direct = torch.empty_like(v)
    flash_kda.fwd(q, k, v, g, beta, D ** -0.5, direct, A_log, dt_bias.view(H, D), -5.0)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


print(f"device {device}, out {tuple(out.shape)} {out.dtype}, state {tuple(state.shape)} {state.dtype}")
print("FLA ran", "flash_kda" if dispatch_lines.hit else "its own kernels")
print(f"relative difference to flash_kda.fwd {difference(out, direct):.1e}")
print(f"relative difference of two calls to one {difference(torch.cat((out_start, out_rest), 1), out):.1e} (out), "
      f"{difference(state_in_two, state):.1e} (state)")
