"""What the benchmark measures: its rows, and the bytes that no implementation of a row can avoid moving.

Plain Python, so that reports can be made from recorded results on a machine without PyTorch.
"""
import argparse
from typing import Callable, List, NamedTuple, Sequence, Tuple

HEAD_DIM = 128  # K and V
BF16_BYTES, FP32_BYTES = 2, 4
GATES = ("random", "slow")


class Row(NamedTuple):
    """One shape: `heads` heads over packed sequences of the given lengths (a single one is not packed)."""
    group: str
    name: str
    heads: int
    lens: Tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lens)

    @property
    def floor_bytes(self) -> int:
        """Bytes of q, k, v, g read and out written (bf16), and of one fp32 state a sequence read and one written.

        Left out: beta (2 bytes beside the 1280 of a token and head), A_log, dt_bias and cu_seqlens.
        """
        token_head = 5 * HEAD_DIM * BF16_BYTES
        state = HEAD_DIM * HEAD_DIM * FP32_BYTES
        return self.heads * (self.tokens * token_head + 2 * len(self.lens) * state)


def floor_us(floor_bytes: float, tbps: float) -> float:
    """Microseconds that `floor_bytes` take at `tbps` terabytes (1e12 bytes) a second."""
    return floor_bytes / (tbps * 1e6)


def _row(group: str, heads: int, lens: Tuple[int, ...]) -> Row:
    name = "T%d-H%d" % (sum(lens), heads)
    if len(lens) > 1:
        name += "-N%d" % len(lens) if len(set(lens)) == 1 else "-mixed"
    return Row(group, name, heads, tuple(lens))


def _all_rows() -> List[Row]:
    rows = []
    # Whole models: Kimi's 96 heads and the 64 of others, over one sequence, an uneven pack and an even one.
    for heads in (96, 64):
        for lens in ((8192,), (1300, 547, 2048, 963, 271, 3063), (1024,) * 8):
            rows.append(_row("standard", heads, lens))
    # What tensor parallelism leaves on one GPU: few heads.
    for length, heads, sequences in ((2048, 12, 1), (2048, 16, 1), (4096, 8, 1), (4096, 12, 1), (2048, 12, 4),
                                     (8192, 16, 1), (1024, 4, 1), (3072, 10, 1), (8192, 24, 1), (2048, 16, 8)):
        rows.append(_row("shards", heads, (length,) * sequences))
    # Long prompts on such a shard.
    for length, heads in ((65536, 8), (32768, 12)):
        rows.append(_row("long", heads, (length,)))
    # Many short sequences at once: the states weigh as much as the tokens.
    rows.append(_row("many", 32, (256,) * 64))
    return rows


ROWS = _all_rows()
GROUPS = tuple(dict.fromkeys(row.group for row in ROWS))

# Odd lengths, so that tails, a nearly full pack and a sequence shorter than a chunk are in the accuracy figures.
ACCURACY_ROW = Row("accuracy", "accuracy", 4, (700, 33, 1000, 5))


def select(names: str) -> List[Row]:
    """The rows named by a comma-separated list of groups and row names, in the table's order.

    Raises ValueError for a name that is neither.
    """
    wanted = [name for name in names.split(",") if name]
    known = set(GROUPS) | {row.name for row in ROWS}
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError("no such row or group: %s; groups: %s; rows: %s" % (
            ", ".join(unknown) or repr(names), ", ".join(GROUPS), ", ".join(row.name for row in ROWS)))
    return [row for row in ROWS if row.group in wanted or row.name in wanted]


def some_of(known: Sequence[str]) -> Callable[[str], List[str]]:
    """An argparse type: comma-separated names, none twice, each a known one."""
    def parse(text: str) -> List[str]:
        names = list(dict.fromkeys(name for name in text.split(",") if name))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError("unknown: %s; known: %s" % (", ".join(unknown), ", ".join(known)))
        return names
    return parse
