"""`_crc`: the CRC-32 of parts of a buffer."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from lab_state._crc import part, running


@given(
    data=st.binary(max_size=2_000),
    cuts=st.lists(st.integers(0, 2_000), min_size=3, max_size=9),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_part_has_the_sum_that_zlib_gives_it(data: bytes, cuts: list[int], seed: int) -> None:
    """Any part, begun with any sum, has the CRC-32 of its bytes, though they are read once."""
    first, *ends = sorted(min(cut, len(data)) for cut in cuts)
    sums = running(data, first, ends)
    for begin in ends:
        for end in ends:
            if begin <= end:
                assert part(sums[begin], sums[end], end - begin, seed) == zlib.crc32(data[begin:end], seed)


def test_a_part_of_many_bytes() -> None:
    """A part may be as long as it likes."""
    data = bytes(range(256)) * 40_000
    sums = running(data, 0, [5, len(data)])
    assert part(sums[5], sums[len(data)], len(data) - 5, 7) == zlib.crc32(data[5:], 7)
