"""Packing: nothing lost, nothing twice, nothing across a boundary."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.train.data import packing

DOCUMENTS = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=40), max_size=12)


def windows_of(documents, seq_len, sizes=None):
    sizes = sizes or [[1] * len(document) for document in documents]
    pairs = [(np.array(d, dtype=np.uint8), np.array(s)) for d, s in zip(documents, sizes, strict=True)]
    rows = list(packing.pack(pairs, seq_len))
    assert all(row[name].shape == (seq_len,) for row in rows for name in ("inputs", "targets", "segment_ids"))
    return rows


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.integers(1, 33), st.integers(1, 9))
def test_windows_joined_by_segment_give_back_the_documents(documents, seq_len, piece):
    total = sum(map(len, documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_PIECE", piece)
        rows = windows_of(documents, seq_len)
    assert len(rows) == -(-total // seq_len)
    inputs = [token for row in rows for token in row["inputs"].tolist()][:total]
    assert inputs == [token for document in documents for token in document]

    # Document boundaries: where segment_ids rise inside a window, and, between windows, where no target is.
    rebuilt, current = [], []
    position = 0
    for row in rows:
        assert row["segment_ids"][0] == 0
        assert set(np.diff(row["segment_ids"]).tolist()) <= {0, 1}
        for i in range(min(seq_len, total - position)):
            current.append(int(row["inputs"][i]))
            ends = i + 1 < seq_len and row["segment_ids"][i + 1] != row["segment_ids"][i]
            if i + 1 == seq_len:
                ends = row["targets"][i] == -100
            if ends or position + i + 1 == total:
                rebuilt.append(current)
                current = []
        position += seq_len
    assert rebuilt == documents


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.integers(1, 33), st.integers(1, 9))
def test_each_token_but_a_documents_first_is_predicted_once_by_its_predecessor(documents, seq_len, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_PIECE", piece)
        rows = windows_of(documents, seq_len)
    predicted = [
        (int(token), int(target))
        for row in rows
        for token, target in zip(row["inputs"], row["targets"], strict=True)
        if target != -100
    ]
    assert predicted == [pair for document in documents for pair in itertools.pairwise(document)]
    assert sum(int(row["target_bytes"]) for row in rows) == len(predicted)


@settings(max_examples=50, deadline=None)
@given(DOCUMENTS, st.integers(2, 20), st.integers(2, 20))
def test_what_is_predicted_does_not_depend_on_the_window_length(documents, short, long):
    def predicted(seq_len):
        return [int(t) for row in windows_of(documents, seq_len) for t in row["targets"] if t != -100]

    assert predicted(short) == predicted(long)


def test_target_bytes_count_the_bytes_of_the_targets():
    rows = windows_of([[5, 6, 7], [8, 9]], seq_len=4, sizes=[[1, 10, 100], [1_000, 10_000]])
    assert [int(row["target_bytes"]) for row in rows] == [10 + 100 + 10_000, 0]
    assert rows[0]["targets"].tolist() == [6, 7, -100, 9]
    assert rows[0]["segment_ids"].tolist() == [0, 0, 0, 1]
    assert rows[1]["inputs"].tolist() == [9, 0, 0, 0]
    assert rows[1]["targets"].tolist() == [-100] * 4
    assert rows[1]["segment_ids"].tolist() == [0, 1, 1, 1]
