"""The host plan, which is plain C++: no GPU needed, only the built module."""

import pytest

_C = pytest.importorskip("flash_kda._C", reason="flash_kda was built without its kernels")

MAX = 2**31 - 1


@pytest.mark.parametrize("num_sequences, tokens, heads, packed", [
    (1, 8192, 96, False), (8, 1024, 12, False), (6, 8192, 96, True), (1, 0, 4, False), (3, 0, 4, True), (65535, 1, 128, False),
])
def test_one_cta_a_chain(num_sequences, tokens, heads, packed):
    plan = _C.plan(num_sequences, tokens, heads, packed)
    assert plan == {"chains": num_sequences * heads, "grid": num_sequences * heads}


@pytest.mark.parametrize("num_sequences, heads", [(0, 96), (4, 0), (0, 0)])
def test_nothing_to_do(num_sequences, heads):
    assert _C.plan(num_sequences, 16, heads, False)["grid"] == 0


@pytest.mark.parametrize("packed", [False, True])
def test_sizes_at_the_limit(packed):
    assert _C.plan(1, MAX, 1, packed)["grid"] == 1
    assert _C.plan(MAX, 1, 1, packed)["grid"] == MAX
    # Packed, the tokens are those of all sequences together
    assert _C.plan(3, MAX, 1, True)["grid"] == 3


@pytest.mark.parametrize("sizes, message", [
    ((1, MAX + 1, 1, False), "tokens"),
    ((1, MAX + 1, 1, True), "tokens"),
    ((2, MAX // 2 + 1, 1, False), "tokens"),
    ((MAX // 2 + 1, 1, 2, False), "heads"),
    ((2**62, 1, 2**62, True), "heads"),
    ((-1, 1, 1, False), "negative"),
    ((1, -1, 1, False), "negative"),
    ((1, 1, -1, True), "negative"),
])
def test_sizes_past_the_limit(sizes, message):
    with pytest.raises(ValueError, match=message):
        _C.plan(*sizes)
