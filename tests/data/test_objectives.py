import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from maxlm.data.objectives import causal_batch

BOS, EOS = 0, 1


def slow_row(window: list[int], bos: int | None, eos: int | None, length: int):
    """The batch's definition (docs/architecture.md), token by token."""
    rows = []
    segment, position = 1, 0
    for t in range(len(window) - 1):
        if t >= length:
            rows.append((0, 0, 0, 0, 0.0))
            continue
        begins = window[t] == bos if bos is not None else t > 0 and window[t - 1] == eos
        if t > 0 and begins:
            segment, position = segment + 1, 0
        next_begins = window[t + 1] == bos if bos is not None else window[t] == eos
        has_target = t + 1 < length
        target = window[t + 1] if has_target else 0
        rows.append((window[t], target, segment, position, float(has_target and not next_begins)))
        position += 1
    return list(zip(*rows, strict=True))


@given(
    windows=st.lists(st.lists(st.integers(0, 6), min_size=9, max_size=9), min_size=1, max_size=4),
    marks=st.sampled_from([(BOS, EOS), (BOS, None), (None, EOS)]),
    data=st.data(),
)
def test_batch_is_as_defined(windows, marks, data):
    lengths = data.draw(st.none() | st.lists(st.integers(0, 9), min_size=len(windows), max_size=len(windows)))
    batch = causal_batch(np.array(windows, np.uint16), *marks, None if lengths is None else np.array(lengths))
    for row, window in enumerate(windows):
        expected = slow_row(window, *marks, 9 if lengths is None else lengths[row])
        names = ("inputs", "targets", "segments", "positions", "weights")
        for name, values in zip(names, expected, strict=True):
            assert batch[name][row].tolist() == list(values), name


def test_batch_has_the_contracts_dtypes():
    batch = causal_batch(np.zeros((2, 5), np.uint32), BOS, EOS)
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "inputs": ("int32", (2, 4)),
        "targets": ("int32", (2, 4)),
        "segments": ("int32", (2, 4)),
        "positions": ("int32", (2, 4)),
        "weights": ("float32", (2, 4)),
    }
