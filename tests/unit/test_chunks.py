"""What is known of a disk, chunk by chunk."""

from hypothesis import given
from hypothesis import strategies as st

from blockferry.plan.tracking import CHUNK
from blockferry.qemu.chunks import DIFFERENT, GROUP_BYTES, PASSED_OVER, SAMPLE_BYTES_MIN, UNREAD, WRITTEN, ZERO, Chunks

GIB = 1 << 30


@given(st.integers(1, 40 * CHUNK), st.data())
def test_every_byte_is_counted_once(size: int, data: st.DataObject) -> None:
    known = Chunks(size)
    for state in data.draw(st.lists(st.sampled_from([UNREAD, DIFFERENT, WRITTEN]))):
        start = data.draw(st.integers(0, size - 1))
        known.mark(start, data.draw(st.integers(1, size - start)), state)
    runs = {state: list(known.runs(state, 4 * CHUNK)) for state in range(5)}
    assert {state: sum(length for _start, length in found) for state, found in runs.items()} == {
        state: known.bytes_in(state) for state in runs
    }
    assert all(start % CHUNK == 0 and 0 < length <= 4 * CHUNK for found in runs.values() for start, length in found)
    pieces = sorted(piece for found in runs.values() for piece in found)
    assert [start for start, _length in pieces] == [0, *(start + length for start, length in pieces[:-1])]
    assert sum(pieces[-1]) == size


def test_all_of_what_is_touched_is_marked() -> None:
    known = Chunks(10 * CHUNK + 512)
    known.mark(CHUNK - 1, 2, DIFFERENT)
    known.mark(10 * CHUNK, 1, DIFFERENT)
    assert list(known.runs(DIFFERENT)) == [(0, 2 * CHUNK), (10 * CHUNK, 512)]
    assert known.span(DIFFERENT) == (0, 10 * CHUNK + 512)
    known.change(CHUNK, 9 * CHUNK + 1, DIFFERENT, WRITTEN)
    assert list(known.runs(DIFFERENT)) == [(0, CHUNK)]
    assert list(known.runs(WRITTEN)) == [(CHUNK, CHUNK), (10 * CHUNK, 512)]
    assert known.span(UNREAD) is None


def test_a_sample_is_a_hundredth() -> None:
    known = Chunks(10 * GIB)
    known.mark(0, 10 * GIB, UNREAD)
    known.mark(4 * GIB, GIB, ZERO)
    known.sample("1")
    assert known.bytes_in(ZERO) == GIB
    data = known.bytes_in(UNREAD) + known.bytes_in(PASSED_OVER)
    assert data == 9 * GIB
    assert 0 <= 9 * GIB // 100 - known.bytes_in(UNREAD) <= 80 * CHUNK, "the same chunk may be chosen twice"
    chosen = {start + at for start, length in known.runs(UNREAD) for at in range(0, length, CHUNK)}
    groups = {at for at in range(0, 10 * GIB, GROUP_BYTES) if not 4 * GIB <= at < 5 * GIB}
    assert groups | {10 * GIB - CHUNK} <= chosen
    assert len({at // GIB for at in chosen - groups}) == 9, "from everywhere"


def test_a_seed_chooses_the_same() -> None:
    def chosen(seed: str) -> list[tuple[int, int]]:
        known = Chunks(GIB)
        known.mark(0, GIB, UNREAD)
        known.sample(seed)
        return list(known.runs(UNREAD))

    assert chosen("1") == chosen("1") != chosen("2")


def test_a_sample_of_little_is_all() -> None:
    known = Chunks(10 * GIB)
    known.mark(GIB, SAMPLE_BYTES_MIN, UNREAD)
    known.sample("1")
    assert list(known.runs(UNREAD)) == [(GIB, SAMPLE_BYTES_MIN)]


def test_the_beginnings_of_groups_are_no_more_than_half_of_a_sample() -> None:
    known = Chunks(1024 * GIB)
    for start in range(0, 1024 * GIB, GROUP_BYTES):
        known.mark(start, CHUNK, UNREAD)
    known.mark(GIB, SAMPLE_BYTES_MIN, UNREAD)
    known.sample("1")
    assert known.bytes_in(UNREAD) <= SAMPLE_BYTES_MIN
