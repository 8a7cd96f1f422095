"""Oracle: sorting and summing everything at once, in plain numpy and in exact fractions."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcrp.errors import OnnxcrpError
from onnxcrp.index.state import EMPTY, Lists, Moments, decode, encode, from_ranges, ranges
from onnxcrp.index.work import in_order


def test_keys_sort_by_score_then_sample_and_come_back():
    score = np.array([0.5, -0.5, 0.5, 0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38], np.float32)
    sample = np.array([7, 1, 3, 2**31 - 1, 0, 5, 6, 8, 9])
    key = encode(score, sample)
    order = np.argsort(key)
    assert order.tolist() == sorted(range(len(score)), key=lambda i: (-float(score[i]), sample[i]))
    back, number = decode(key)
    np.testing.assert_array_equal(back, score)
    np.testing.assert_array_equal(number, sample)
    assert (key < EMPTY).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_lists_hold_the_best_of_everything_whatever_the_parts(seed, n, k, several):
    rng = np.random.default_rng(seed)
    C, classes = 3, rng.integers(0, 4, n)
    sample = rng.integers(0, n, n) if several else rng.permutation(n)
    target = np.arange(n, dtype=np.int32) if several else classes.astype(np.int32)
    score = rng.integers(-2, 3, (n, C)).astype(np.float32) / 4  # many ties
    if several:  # rows of one sample under different targets, often with one score
        score = score[sample]
    position = rng.integers(0, 9, (n, C)).astype(np.int32)
    by_class = None if several else classes

    def lists_of(rows):
        lists = Lists(C, k, targets=True)
        for part in np.array_split(rows, rng.integers(1, 4)):
            if len(part):
                key = encode(score[part], sample[part][:, None])
                lists.add(key, position[part], target[part], None if by_class is None else by_class[part])
        return lists

    parts = [lists_of(rows) for rows in np.array_split(rng.permutation(n), 3) if len(rows)]
    merged = parts.pop(rng.integers(len(parts)))
    for part in parts:
        merged.merge(part)
    for cls in [0] if by_class is None else np.unique(classes):
        span = merged.span[int(cls)]
        rows = range(n) if by_class is None else np.flatnonzero(classes == cls)
        for c in range(C):
            best = sorted(rows, key=lambda i: (-score[i, c], sample[i], target[i]))[:k]
            full = merged.key[span][c] != EMPTY
            found_score, found_sample = decode(merged.key[span][c][full])
            assert found_sample.tolist() == [sample[i] for i in best]
            assert found_score.tolist() == [score[i, c] for i in best]
            assert merged.target[span][c][full].tolist() == [target[i] for i in best]
            assert merged.position[span][c][full].tolist() == [position[i, c] for i in best]


def test_lists_of_chosen_pairs_leave_the_others_out():
    chosen = {1: np.array([0, 2], np.int32)}
    lists = Lists(3, 2, targets=False, chosen=chosen)
    score = np.arange(12, dtype=np.float32).reshape(4, 3)
    key = encode(score, np.arange(4)[:, None])
    lists.add(key, np.zeros((4, 3), np.int32), np.zeros(4, np.int32), np.array([0, 1, 1, 1]))
    assert lists.span[0] == slice(0, 0)
    assert lists.channel[lists.span[1]].tolist() == [0, 2]
    assert decode(lists.key[lists.span[1]])[1].tolist() == [[3, 2], [3, 2]]


@pytest.mark.parametrize("normalize", [True, False])
def test_moments_are_those_of_exact_fractions_in_any_order(normalize):
    rng = np.random.default_rng(0)
    score = (rng.normal(0, 1, (200, 4)) * 10.0 ** rng.uniform(-6, 0 if normalize else 3, (200, 1))).astype(np.float32)
    classes = rng.integers(0, 3, 200)

    def of(parts):
        whole = Moments(4, normalize=normalize)
        for rows in parts:
            part = Moments(4, normalize=normalize)
            part.add(score[rows], classes[rows])
            whole.merge(part)
        return whole

    one, other = of([np.arange(200)]), of(np.array_split(rng.permutation(200), 7))
    for cls in range(3):
        rows = classes == cls
        np.testing.assert_array_equal(one.sums[one.slot[cls]], other.sums[other.slot[cls]])
        mean, variance = one.mean_and_variance(cls, int(rows.sum()))
        for c in range(4):
            exact = [Fraction(float(v)) for v in score[rows, c]]
            m = sum(exact) / len(exact)
            assert mean[c] == pytest.approx(float(m), rel=1e-9, abs=1e-11)
            assert variance[c] == pytest.approx(float(sum((v - m) ** 2 for v in exact) / len(exact)), rel=1e-6)


def test_moments_refuse_what_would_overflow():
    moments = Moments(1, normalize=False)
    with pytest.raises(OnnxcrpError, match="too large for exact statistics"):
        moments.add(np.full((1, 1), 1e12, np.float32), np.zeros(1, np.int64))


def test_blocks_as_ranges():
    assert ranges({5, 0, 1, 2}) == [[0, 3], [5, 6]]
    assert from_ranges([[0, 3], [5, 6]]) == {0, 1, 2, 5}


def test_calls_run_ahead_of_their_use_but_come_in_order():
    running, most = 0, 0
    lock = threading.Lock()

    def call(number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01 if number % 3 else 0.03)
        with lock:
            running -= 1
        if number == 17:
            raise OnnxcrpError("the seventeenth")
        return number * number

    asked = []

    def calls(n):
        for number in range(n):
            asked.append(number)
            yield number, partial(call, number) if number % 5 else None

    with ThreadPoolExecutor(3) as pool:
        found = []
        for key, result in in_order(pool, calls(15), 4):
            found.append((key, result))
            assert len(asked) <= key + 5
        assert found == [(n, n * n if n % 5 else None) for n in range(15)]
        assert most == 3
        with pytest.raises(OnnxcrpError, match="seventeenth"):
            list(in_order(pool, calls(20), 4))
