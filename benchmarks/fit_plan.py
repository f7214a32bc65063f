#!/usr/bin/env python3
"""Fits the constants by which the plan chooses the number of segments (csrc/plan.cpp) to measurements on this GPU.

    python benchmarks/fit_plan.py        # a minute

Single sequences of several lengths, on several numbers of heads, are each cut into several numbers of segments. The
plan says what the busiest CTA then does (`Work`); a robust fit of the relative errors says what each part of it costs.
Points that take much longer than a first fit says are left out of the second one.
Writes results/plan/DEVICE.json: points, those left out, costs, and what the plan chose beside the best that was measured.
The costs are then typed into csrc/plan.cpp; a test holds the two together. Choices are those of the costs that the
installed flash_kda was built with: run it again after typing new ones.
"""
import argparse
import sys
from pathlib import Path
from typing import Dict, List, Optional, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

import flash_kda
import kernels
import measure
import record
import report
from flash_kda import _C
from rows import Row

LENGTHS = (512, 1024, 2048, 4096, 8192, 32768)
HEADS = (2, 4, 8, 16, 24, 64, 96)
SEGMENTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17)
CHUNK = 16
FIT_SCALE, FIT_ROUNDS = 0.05, 30
SLOW = 1.15  # times what a first fit says: of short serial calls with many heads the model knows too little
PARTS = tuple(part for part in report.PLAN_UNITS if part != "launch")


def time_us(p: measure.Problem, num_segments: Optional[int]) -> float:
    out, state = torch.empty_like(p.v), torch.empty_like(p.initial_state)
    return measure.device_us(lambda: flash_kda.fwd(
        p.q, p.k, p.v, p.g, p.beta, p.scale, out, p.A_log, p.dt_bias, p.lower_bound, initial_state=p.initial_state,
        final_state=state, num_segments=num_segments))[0]


def worth_measuring(tokens: int, heads: int, segments: int, sms: int) -> bool:
    """Whether a segment has four chunks at least, and a pair of CTAs one task at most in either phase.

    Where pairs have several, the order in which these fall to them blurs what each costs.
    """
    return segments == 1 or tokens >= segments * 4 * CHUNK and heads * (2 * segments - 1) <= sms // 2


def measure_shape(tokens: int, heads: int, sms: int) -> Tuple[List[Dict], Dict]:
    """A point a number of segments, with what the plan makes of it and its time; and the plan's own choice."""
    p = measure.problem(Row("plan", "T%d-H%d" % (tokens, heads), heads, (tokens,)), "slow")
    points = []
    for segments in SEGMENTS:
        if worth_measuring(tokens, heads, segments, sms):
            work = _C.plan(1, tokens, heads, False, segments, sms).work
            points.append({"tokens": tokens, "heads": heads, "segments": segments, "us": time_us(p, segments),
                           "work": {part: getattr(work, part) for part in PARTS}})
    best = min(points, key=lambda x: x["us"])
    chosen = _C.plan(1, tokens, heads, False, 0, sms)  # 0: free to choose, as None is to flash_kda.fwd
    return points, {"tokens": tokens, "heads": heads, "segments": chosen.segments, "us": time_us(p, None),
                    "best_segments": best["segments"], "best_us": best["us"]}


def fit(points: List[Dict]) -> Dict[str, float]:
    """Microseconds of a launch and of each part of the work, by a fit of the relative errors.

    Their squares count, but beyond FIT_SCALE no more than their sizes (P. J. Huber, Robust estimation of a location parameter, 1964, by
    iteratively reweighted least squares): a hiccup of the machine must not bend the costs. Adds to each point its "fitted_us". Raises ValueError where no point has a part: then nothing says what it costs.
    """
    for part in PARTS:
        if not any(x["work"][part] for x in points):
            raise ValueError("no measurement has any %s" % part)
    features = torch.tensor([[1.0] + [x["work"][part] for part in PARTS] for x in points], dtype=torch.float64)
    us = torch.tensor([x["us"] for x in points], dtype=torch.float64)
    relative, weights = features / us[:, None], torch.ones_like(us)
    for _ in range(FIT_ROUNDS):
        costs = torch.linalg.lstsq(relative * weights[:, None], weights[:, None]).solution[:, 0]
        weights = (FIT_SCALE / (relative @ costs - 1).abs().clamp(min=FIT_SCALE)).sqrt()
    for x, fitted in zip(points, (features @ costs).tolist()):
        x["fitted_us"] = fitted
    return dict(zip(("launch",) + PARTS, costs.tolist()))


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="path of the results without suffix (default: results/plan/DEVICE beside this "
                                      "script)")
    args = parser.parse_args(argv)
    measure.require_cuda(parser.prog)

    path = record.json_path("plan", args.out)
    result = record.run_state([kernels.FlashKda()])
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    result.update({"points": [], "choices": []})
    for heads in HEADS:
        for tokens in LENGTHS:
            points, choice = measure_shape(tokens, heads, sms)
            result["points"] += points
            result["choices"].append(choice)
            print("T%d-H%d: %s; the plan takes %d: %.1f us" % (
                tokens, heads, ", ".join("%d: %.1f" % (x["segments"], x["us"]) for x in points),
                choice["segments"], choice["us"]), flush=True)
            torch.cuda.empty_cache()
    fit(result["points"])
    slow = [x for x in result["points"] if x["us"] > SLOW * x["fitted_us"]]
    result["points"] = [x for x in result["points"] if x not in slow]
    result["left_out"] = [{key: x[key] for key in ("tokens", "heads", "segments", "us")} for x in slow]
    result["costs"] = fit(result["points"])
    record.save(result, path)
    print("costs: %s" % ", ".join("%s %.4g" % cost for cost in result["costs"].items()))
    print(report.plan_summary(result))
    print("wrote %s" % path)


if __name__ == "__main__":
    main()
