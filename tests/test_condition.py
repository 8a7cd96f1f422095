"""Oracles: masks and weights written out by hand, numpy's own indexing, and hypothesis round trips of the grammar."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcrp import condition
from onnxcrp.condition import Selection, mask, parse_condition, parse_target, target
from onnxcrp.errors import QuestionError

IMAGE = ("N", 4, 3, 5)  # [N, C, H, W]
TOKENS = ("N", 6, 4)  # [B, T, C]


def image(concepts):
    return mask(concepts, layer="conv", shape=IMAGE, axis=1)


def tokens(concepts):
    return mask(concepts, layer="fc", shape=TOKENS, axis=2)


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("concepts", "weights"),
    [
        ([1, 3], [0, 1, 0, 1]),
        ((1,), [0, 1, 0, 0]),
        (2, [0, 0, 1, 0]),
        ({0, 2}, [1, 0, 1, 0]),
        (range(2), [1, 1, 0, 0]),
        ([], [0, 0, 0, 0]),
        ({}, [0, 0, 0, 0]),
        ([1, 1], [0, 1, 0, 0]),
        ({3: 0.5, 0: -1}, [-1, 0, 0, 0.5]),
        ({np.int64(3): np.float32(0.5)}, [0, 0, 0, 0.5]),
        (np.array([1, 3]), [0, 1, 0, 1]),
        (np.array([0.1, 0.2, 0.3, 0.4]), [0.1, 0.2, 0.3, 0.4]),
        (np.array([True, False, False, True]), [1, 0, 0, 1]),
        (Selection(((1, 2.0),)), [0, 2, 0, 0]),
        (Selection(()), [0, 0, 0, 0]),
    ],
)
def test_channels(concepts, weights):
    expected = np.asarray(weights, np.float32)
    found = image(concepts)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.reshape(1, 4, 1, 1))
    np.testing.assert_array_equal(tokens(concepts), expected.reshape(1, 1, 4))


def test_the_mask_of_a_channel_is_made_once_and_nobodys_own():
    assert image(2) is image(2)
    assert image(2) is not mask(2, layer="conv", shape=(None, 5, 3, 5), axis=1)
    with pytest.raises(ValueError, match="read-only"):
        image(2)[:] = 0


@pytest.mark.parametrize("shape", [(1, 4, 3, 5), (2, 4, 1, 1), (1, 1, 3, 5), (4, 3, 5), (4, 1, 1), (1, 3, 5)])
def test_arrays_of_the_layers_rank_are_taken_as_they_are(shape):
    array = np.random.default_rng(0).normal(size=shape)
    found = image(array)
    np.testing.assert_array_equal(found, array.astype(np.float32).reshape((1,) * (4 - len(shape)) + shape))


def test_places():
    by_hand = np.zeros((1, 1, 3, 5), np.float32)
    by_hand[0, 0, 2, 4] = by_hand[0, 0, 0, 1] = 1
    np.testing.assert_array_equal(image(Selection(None, (("pos", ((2, 4), (0, 1))),))), by_hand)
    both = image(Selection(((3, 0.5),), (("pos", ((2, 4), (0, 1))),)))
    np.testing.assert_array_equal(both, by_hand * np.array([0, 0, 0, 0.5]).reshape(1, 4, 1, 1))
    np.testing.assert_array_equal(tokens(Selection(None, (("token", ((5,),)),))).ravel(), [0, 0, 0, 0, 0, 1])
    heads = mask(Selection(None, (("head", ((1,),)),)), layer="qk", shape=("N", 2, 6, 4), axis=3, heads=True)
    np.testing.assert_array_equal(heads, np.array([0, 1]).reshape(1, 2, 1, 1))


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ([4], r"layer conv: channel 4 is out of range, it has 4 channels, 0\.\.3"),
        ([-1], "channel -1 is out of range"),
        ({9: 1}, "channel 9"),
        ([0.5, 1], "whole numbers"),
        ({0.5: 1}, "whole numbers"),
        ({True: 1}, "whole numbers"),
        ({1: "x"}, "weight of channel 1 must be a number"),
        ({1: np.nan}, "finite"),
        ({1: [1, 2]}, "must be a number"),
        (None, "must be channels"),
        ("3", "must be channels"),
        ([[1, 2], [3]], "different lengths"),
        (np.full((1, 4, 1, 1), np.nan), "finite"),
        (np.full((1, 4, 1, 1), np.inf), "finite"),
        (np.ones((1, 4, 2, 1)), r"shape \[1, 4, 2, 1\] does not fit \[N, 4, 3, 5\]"),
        (np.ones(5), r"does not fit"),
        (np.ones((3, 5)), r"does not fit"),
        (np.array(["a"]), "must be numbers"),
        (Selection(None, (("pos", ((3, 0),)),)), r"@pos=3:0 is out of range 0\.\.2:0\.\.4"),
        (Selection(None, (("pos", ((3,),)),)), "takes 2 numbers, got 3"),
        (Selection(None, (("token", ((3,),)),)), "no token axis"),
        (Selection(None, (("head", ((3,),)),)), "no attention heads"),
    ],
)
def test_wrong_concepts_name_the_layer(concepts, message):
    with pytest.raises(QuestionError, match=message) as caught:
        image(concepts)
    assert "layer conv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dynamic_sizes():
    shape = ("N", 4, "h", "w")
    assert mask([1], layer="c", shape=shape, axis=1).shape == (1, 4, 1, 1)
    assert mask(np.ones((1, 1, 7, 7)), layer="c", shape=shape, axis=1).shape == (1, 1, 7, 7)
    with pytest.raises(QuestionError, match="not known before"):
        mask(Selection(None, (("pos", ((0, 0),)),)), layer="c", shape=shape, axis=1)
    with pytest.raises(QuestionError, match="number of its channels"):
        mask([1], layer="c", shape=("N", None, 3), axis=1)


# --- targets ----------------------------------------------------------------------------------------------------------


def weights(question, shape=(5,), batch=3, **kwargs):
    (found,) = target(question, shape=shape, batch=batch, **kwargs)
    assert found.weights.dtype == np.float32
    return np.broadcast_to(found.weights, (batch, *shape)), found.labels


@pytest.mark.parametrize("index", [2, np.int64(2), (2,), np.array(2)])
def test_a_class(index):
    expected = np.zeros((3, 5))
    expected[:, 2] = 1
    found, labels = weights(index)
    np.testing.assert_array_equal(found, expected)
    assert labels in ((2,), ((2,),))


@pytest.mark.parametrize("index", [1, (1,), (1, 3), (0, 2, 1)])
def test_an_index_counts_as_in_numpy(index):
    shape = (2, 4, 3)
    expected = np.zeros((3, *shape))
    expected[(slice(None), *(index if isinstance(index, tuple) else (index,)))] = 1
    np.testing.assert_array_equal(weights(index, shape)[0], expected)


@pytest.mark.parametrize("entries", [[4, 0, 2], np.array([4, 0, 2]), [(4,), 0, {2: 1}], range(3)])
def test_one_target_per_sample(entries):
    expected = np.zeros((3, 5))
    for row, entry in enumerate(range(3) if isinstance(entries, range) else (4, 0, 2)):
        expected[row, entry] = 1
    found, labels = weights(entries)
    np.testing.assert_array_equal(found, expected)
    assert len(labels) == 3


def test_sums_contrasts_and_weights():
    np.testing.assert_array_equal(weights({1: 1, 4: -0.5})[0][0], [0, 1, 0, 0, -0.5])
    np.testing.assert_array_equal(weights({(1, 0): 2}, (2, 2))[0][0], [[0, 0], [2, 0]])
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    np.testing.assert_array_equal(weights(array)[0], array)
    np.testing.assert_array_equal(weights(array[0])[0], np.stack([array[0]] * 3))
    np.testing.assert_array_equal(weights(array[:1])[0], np.stack([array[0]] * 3))


def test_a_single_output_value():
    np.testing.assert_array_equal(weights(0, ())[0], [1, 1, 1])


def test_top_is_the_largest_of_each_sample():
    explained = np.random.default_rng(1).normal(size=(3, 2, 4)).astype(np.float32)
    found = target("top3", shape=(2, 4), batch=3, explained=explained)
    assert len(found) == 3
    ranks = np.sort(explained.reshape(3, -1), axis=1)[:, ::-1]
    for place, one in enumerate(found):
        np.testing.assert_array_equal((one.weights * explained).sum((1, 2)), ranks[:, place])
        assert [explained[row][label] for row, label in enumerate(one.labels)] == list(ranks[:, place])
    (top,) = target("top", shape=(2, 4), batch=3, explained=explained)
    np.testing.assert_array_equal(top.weights, found[0].weights)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (5, r"target class 5 is out of range, the explained output has 0\.\.4"),
        (-1, "target class -1 is out of range"),
        ((1, 1), "out of range"),
        (True, "class number"),
        (0.5, "class number"),
        ([1, 2], "2 targets for 3 samples"),
        ([0.1, 0.2, 0.3], "class number"),
        ([1, 2, 9], "out of range"),
        ({}, "explains nothing"),
        ({9: 1}, "out of range"),
        ({1: np.nan}, "finite"),
        (np.ones((2, 5)), r"shape \[2, 5\] do not fit"),
        (np.full(5, np.nan), "finite"),
        ("best", "unknown"),
        ("top0", "unknown"),
        (None, "no target"),
    ],
)
def test_wrong_targets(question, message):
    with pytest.raises(QuestionError, match=message) as caught:
        target(question, shape=(5,), batch=3, explained=np.zeros((3, 5)))
    assert "\n" not in str(caught.value)


def test_more_top_entries_than_there_are():
    with pytest.raises(QuestionError, match="5 entries only"):
        target("top6", shape=(5,), batch=1, explained=np.zeros((1, 5)))


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("features.28=102", {"features.28": Selection(((102, 1.0),))}),
        ("a=3,7", {"a": Selection(((3, 1.0), (7, 1.0)))}),
        ("a=3*0.5,7*-0.002", {"a": Selection(((3, 0.5), (7, -0.002)))}),
        ("a=", {"a": Selection(())}),
        ("a=+b=1", {"a": Selection(()), "b": Selection(((1, 1.0),))}),
        ("/a/b#2=1+c.d=2", {"/a/b#2": Selection(((1, 1.0),)), "c.d": Selection(((2, 1.0),))}),
        ("a=b=3", {"a=b": Selection(((3, 1.0),))}),
        ("a+b=3", {"a+b": Selection(((3, 1.0),))}),
        ("x@y=3", {"x@y": Selection(((3, 1.0),))}),
        ("a@pos=4:5,4:6", {"a": Selection(None, (("pos", ((4, 5), (4, 6))),))}),
        (
            "a@token=5+b@head=3",
            {"a": Selection(None, (("token", ((5,),)),)), "b": Selection(None, (("head", ((3,),)),))},
        ),
        ("a=3@pos=7", {"a": Selection(((3, 1.0),), (("pos", ((7,),)),))}),
        ("y=208+a=3", {"y": 208, "a": Selection(((3, 1.0),))}),
        ("a=3+y=207-281", {"a": Selection(((3, 1.0),)), "y": {207: 1.0, 281: -1.0}}),
        ("y=1234,1", {"y": (1234, 1)}),
        ("y=top+a=1", {"y": "top", "a": Selection(((1, 1.0),))}),
    ],
)
def test_conditions_are_read(text, expected):
    assert parse_condition(text) == expected
    assert condition.text(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "=3",
        "a=b",
        "a=3+",
        "a=3+b",
        "a=3,",
        "a=-3",
        "a@pos=",
        "a@pos=1:",
        "a=3*",
        "+",
        "y=",
        "y=b+a=3",
        "a=3+y=1*2",
        "y@pos=1:2",
    ],
)
def test_conditions_that_cannot_be_read(text):
    with pytest.raises(QuestionError, match="cannot"):
        parse_condition(text)


def test_a_layer_named_twice():
    with pytest.raises(QuestionError, match="appears twice"):
        parse_condition("a=1+a=2")


NAMES = st.from_regex(r"[A-Za-z/][A-Za-z0-9_./#:\-]{0,12}", fullmatch=True).filter(lambda name: name != "y")
CHANNELS = st.lists(st.integers(0, 999), min_size=0, max_size=4, unique=True)


@given(st.dictionaries(NAMES, CHANNELS, min_size=1, max_size=3))
def test_reading_and_writing_are_inverse(channels):
    asked = {layer: Selection(tuple((c, 1.0) for c in each)) for layer, each in channels.items()}
    assert parse_condition(condition.text(asked)) == asked
    assert condition.text(channels) == condition.text(asked)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("208", 208),
        ("1234,1", (1234, 1)),
        ("281+282", {281: 1, 282: 1}),
        ("207-281", {207: 1, 281: -1}),
        ("1,2+3,4*0.5", {(1, 2): 1, (3, 4): 0.5}),
        ("5*2", {5: 2}),
        ("top", "top"),
        ("top3", "top3"),
    ],
)
def test_targets_are_read(text, expected):
    assert parse_target(text) == expected
    assert condition.target_text(expected) == text


@pytest.mark.parametrize("text", ["", "-1", "cat", "1,", "1++2", "topp", "top0", "1.5"])
def test_targets_that_cannot_be_read(text):
    with pytest.raises(QuestionError, match=r"cannot be read|unknown"):
        parse_target(text)


def test_json():
    asked = {
        "y": np.int64(3),
        "a": [1, 2],
        "b": {3: 0.5},
        "c": np.zeros((1, 9, 9, 9)),
        "d": np.array([0.5, 1]),
        "e": parse_condition("e=3@pos=1:2")["e"],
    }
    assert condition.to_json(asked) == {
        "y": 3,
        "a": [1, 2],
        "b": {"3": 0.5},
        "c": {"mask": [1, 9, 9, 9]},
        "d": [0.5, 1.0],
        "e": "=3@pos=1:2",
    }
