"""A KDA layer over the bytes of a file: in one piece, streamed through the states, and packed with cu_seqlens.

    python examples/run.py [FILE]

Shows that the three agree and how far the result is from the fp64 reference. Runs on a Hopper GPU if there is one, else on the CPU.
`bash examples/run.sh [FILE]` does the same and installs everything first.
"""
import argparse
import importlib.util
import re
import sys
import time
from pathlib import Path

import torch
from torch import nn

import flash_kda

HEAD_DIM = 128          # K = V
MAX_TOKENS = {"cuda": 256 * 1024, "cpu": 64 * 1024}  # of the file; the rest is not read
STREAM_TOKENS = 1000    # a call, when streaming
MAX_SEQUENCES = 512     # when packing; what is over goes into the last one
REFERENCE_TOKENS = 2048  # the reference runs token by token, so only over the first of them
TOLERANCE = 1e-2        # relative; outputs are bf16, and other cuts of a sequence round otherwise


class KDALayer(nn.Module):
    """Byte embedding, projections, Kimi Delta Attention, output projection; random weights in fp32, attention in bf16."""

    def __init__(self, width=512, heads=4):
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(256, width)
        self.q, self.k, self.v, self.g = (nn.Linear(width, heads * HEAD_DIM, bias=False) for _ in range(4))
        self.beta = nn.Linear(width, heads, bias=False)
        self.o = nn.Linear(heads * HEAD_DIM, width, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(0, 1))
        self.dt_bias = nn.Parameter(torch.empty(heads, HEAD_DIM).uniform_(-6, 0))  # channels that keep long and channels that forget
        self.scale = HEAD_DIM ** -0.5
        self.lower_bound = -5.0

    def project(self, tokens):
        """bf16 q, k, v, g [1, T, H, 128] and beta [1, T, H] of tokens [T]."""
        x = self.embedding(tokens)[None]
        q, k, v, g = (layer(x).bfloat16().unflatten(-1, (self.heads, HEAD_DIM)) for layer in (self.q, self.k, self.v, self.g))
        return q, k, v, g, self.beta(x).bfloat16()

    def forward(self, tokens, state=None, cu_seqlens=None):
        """[T, width] of tokens [T]. `state` fp32 [1, H, V, K], if given, is where the sequence starts and is updated in place."""
        q, k, v, g, beta = self.project(tokens)
        out = torch.empty_like(v)
        flash_kda.fwd(q, k, v, g, beta, self.scale, out, self.A_log, self.dt_bias, self.lower_bound,
                      initial_state=state, final_state=state, cu_seqlens=cu_seqlens)
        return self.o(out.flatten(2).float())[0]

    def new_state(self):
        return torch.zeros(1, self.heads, HEAD_DIM, HEAD_DIM, device=self.A_log.device)


def choose_device():
    """The device to run on and why."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return torch.device("cpu"), "CPU, {} threads (PyTorch sees no Hopper GPU)".format(torch.get_num_threads())
    if importlib.util.find_spec("flash_kda._C") is None:
        return torch.device("cpu"), "CPU, {} threads (flash_kda is installed without its CUDA kernels)".format(torch.get_num_threads())
    return torch.device("cuda"), "{}, CUDA kernels".format(torch.cuda.get_device_name())


def timed(device, function):
    """(what `function` returns, seconds it took on the device)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def relative_error(value, expected):
    """|value - expected| / |expected|, 0 for two empty tensors."""
    difference, size = (value.double() - expected.double()).norm(), expected.double().norm()
    return (difference / size).item() if size > 0 else difference.item()


def paragraph_ends(data):
    """Where the paragraphs of a text end, [0, ..., len(data)]: after each empty line."""
    ends = [match.end() for match in re.finditer(rb"\n[ \t\r]*\n+", data) if match.end() < len(data)]
    return [0] + ends[:MAX_SEQUENCES - 1] + [len(data)]


def check(what, error):
    print("    {:<58} {:.1e}{}".format(what, error, "" if error <= TOLERANCE else "   MORE THAN {:.0e}".format(TOLERANCE)), flush=True)
    return error <= TOLERANCE


@torch.inference_mode()
def run(path):
    device, device_name = choose_device()
    limit = MAX_TOKENS[device.type]
    with open(str(path), "rb") as file:
        data = file.read(limit + 1)
    cut = len(data) > limit
    data = data[:limit]

    torch.manual_seed(0)
    layer = KDALayer().to(device)
    tokens = torch.tensor(list(data), dtype=torch.long, device=device)
    total = len(tokens)
    print("flash_kda {} on {}".format(flash_kda.__version__, device_name))
    print("{}: {:,} bytes{}; KDA layer with random weights, {} heads, K = V = {}\n".format(
        path, total, " (its first; the rest is left out)" if cut else "", layer.heads, HEAD_DIM), flush=True)

    def rate(seconds):
        return "{:.3f} s, {:,.0f} tokens/s".format(seconds, total / seconds)

    layer(tokens[:STREAM_TOKENS])  # the first call pays for loading
    state = layer.new_state()
    whole, seconds = timed(device, lambda: layer(tokens, state))
    print("In one piece: {}".format(rate(seconds)), flush=True)

    stream_state = layer.new_state()
    pieces = tokens.split(STREAM_TOKENS)
    streamed, seconds = timed(device, lambda: torch.cat([layer(piece, stream_state) for piece in pieces]))
    print("Streamed through the state, calls of up to {} tokens: {}, {}".format(STREAM_TOKENS, len(pieces), rate(seconds)))
    agree = [check("output against the one piece's", relative_error(streamed, whole)),
             check("final state against the one piece's", relative_error(stream_state, state))]

    ends = paragraph_ends(data)
    cu_seqlens = torch.tensor(ends, dtype=torch.long, device=device)
    packed, seconds = timed(device, lambda: layer(tokens, cu_seqlens=cu_seqlens))
    print("Packed in one call, paragraphs as sequences: {}, {}".format(len(ends) - 1, rate(seconds)))
    alone = torch.cat([layer(tokens[start:end]) for start, end in zip(ends, ends[1:])])
    agree += [check("output against each paragraph by itself", relative_error(packed, alone)),
              check("first paragraph against the one piece's", relative_error(packed[:ends[1]], whole[:ends[1]]))]

    first = layer.project(tokens[:REFERENCE_TOKENS])
    out, state = torch.empty_like(first[2]), layer.new_state()
    constants = (layer.A_log, layer.dt_bias, layer.lower_bound)
    flash_kda.fwd(*first, layer.scale, out, *constants, final_state=state)
    expected_out, expected_state = flash_kda.reference(*first, layer.scale, *constants)
    print("Against the fp64 reference, {}".format(
        "the first {} tokens".format(REFERENCE_TOKENS) if total > REFERENCE_TOKENS else "all tokens"))
    agree += [check("output of flash_kda.fwd", relative_error(out, expected_out)),
              check("final state of flash_kda.fwd", relative_error(state, expected_state))]

    print("\n{}".format("All agree." if all(agree) else "They do NOT agree."))
    return all(agree)


def main():
    parser = argparse.ArgumentParser(description="Runs a KDA layer over the bytes of a file.")
    parser.add_argument("file", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent / "README.md",
                        help="the README by default")
    path = parser.parse_args().file
    try:
        return 0 if run(path) else 1
    except OSError as error:
        print("error: {}".format(error), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
