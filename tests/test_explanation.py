"""Oracles: rankings and names worked out by hand, the arrays of `Explainer` for what is stacked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import external_data_helper, helper, numpy_helper

from onnxcrp.analysis import explanation as study
from onnxcrp.data import Sample
from onnxcrp.errors import InputError, OnnxcrpError, QuestionError
from onnxcrp.preprocessing import Preprocessing
from onnxcrp.result import ExplanationWarning

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def test_rank_by_hand():
    R = np.array([[1.0, 1.0], [-5.0, 1.0], [0.0, 1.0], [2.0, 1.0]])  # R_c = 2, -4, 1, 3
    assert study.rank(R, 0, 2) == [(3, 3.0, 0.3), (0, 2.0, 0.2)]
    assert study.rank(R, 0, 9, by="abs") == [(1, -4.0, -0.4), (3, 3.0, 0.3), (0, 2.0, 0.2), (2, 1.0, 0.1)]
    assert study.rank(np.diag([0.0, 2.0, 0.0, -2.0]), 0, 4) == [(1, 2.0, 0.5), (3, -2.0, -0.5)]  # none for show
    assert study.rank(R.T, 1, 1) == [(3, 3.0, 0.3)]  # concepts on the last axis, as in [T, C]
    assert study.rank(np.zeros((3, 2)), 0, 2) == []


@pytest.mark.parametrize(
    ("label", "text"),
    [(1, "b"), (7, "7"), ((1, 2), "1,2"), ({0: 1.0, 1: 1.0}, "a + b"), ({1: 1.0, 0: -1.0}, "b - a"),
     ({0: 0.5, 1: -2.0}, "0.5 a - 2 b"), ({0: -1.0}, "- a")],
)  # fmt: skip
def test_names_of_targets(label, text):
    assert study.ClassNames(("background", "a, the first", "b"), 1)(label) == text


def test_which_labels_and_which_offset(tmp_path):
    (tmp_path / "all.txt").write_text("background\na\nb")
    (tmp_path / "own.txt").write_text("x\ny")
    beside = Preprocessing(labels=("background", "a", "b"), label_offset=1)
    assert study.ClassNames.of(beside, None, 2)(1) == "b"
    assert study.ClassNames.of(beside, tmp_path / "all.txt", 2)(1) == "b"  # a file with the background line
    assert study.ClassNames.of(beside, tmp_path / "own.txt", 2)(1) == "y"  # and one without
    with pytest.raises(InputError, match="holds 2 class names, the explained output 5 classes"):
        study.ClassNames.of(beside, tmp_path / "own.txt", 5)


def test_targets_by_class_name():
    names = study.ClassNames(("background", "tench, Tinca", "top hat", "crane", "Crane"), 1)
    assert [names.target(text) for text in ("1", "TENCH", "tench, tinca", "top hat", "top2", "0+1")] == [
        1, 0, 0, 1, "top2", {0: 1.0, 1: 1.0}]  # fmt: skip
    for text, message in (("crane", "several classes.*2, 3"), ("tensh", "did you mean 'tench"), ("background", "read")):
        with pytest.raises(QuestionError, match=message):
            names.target(text)
    with pytest.raises(QuestionError, match="only numbers work"):
        study.ClassNames().target("tench")


def test_more_class_names_than_classes_are_told(tmp_path):
    (tmp_path / "long.txt").write_text("a\nb\nc")
    with pytest.warns(ExplanationWarning, match="holds 3 class names, the explained output 2 classes: the last 1"):
        study.ClassNames.of(Preprocessing(), tmp_path / "long.txt", 2)


def test_titles_may_break_beside_numbers_only():
    assert study._spaced("layer2.0.conv2=3,17+a@pos=4:5") == "layer2.0.conv2 = 3, 17 + a@pos = 4:5"
    assert study._spaced("disc + ball") == "disc + ball"


def test_files_of_subgraphs_and_weights_are_known(tmp_path):
    weights = numpy_helper.from_array(np.ones((64, 64), np.float32), "W")
    inner = helper.make_graph([helper.make_node("Identity", ["V"], ["v"])], "inner", [], [],
                              [numpy_helper.from_array(np.ones(600, np.float32), "V")])  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)], "net", [], [], [weights]
    )
    for tensor, location in ((graph.initializer[0], "w.data"), (graph.node[0].attribute[0].g.initializer[0], "v.data")):
        external_data_helper.set_external_data(tensor, location)
        tensor.ClearField("raw_data")
        (tmp_path / location).write_bytes(b"0")
    (tmp_path / "net.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    for name in ("net.onnx", "w.data", "v.data"):
        with pytest.raises(OnnxcrpError, match=f"would overwrite what is read: .*{name}"):
            study.keep_inputs(tmp_path / name, tmp_path / "net.onnx")
    study.keep_inputs(tmp_path / "other.onnx", tmp_path / "net.onnx")


def test_top_concepts_of_layers_whose_names_end_in_numbers():
    explainer, _ = study.open_model(FIXTURES / "ecg" / "net.onnx")
    assert study.parse_top_concepts(explainer, "6:3") == ("6", 3)
    assert study.parse_top_concepts(explainer, "6") == ("6", 5)
    resolve = explainer.facts.names.resolve
    explainer.facts.names.resolve = lambda name: resolve("6" if name == "layer:0" else name)  # type: ignore[method-assign]
    assert study.parse_top_concepts(explainer, "layer:0") == ("6", 5)
    assert study.parse_top_concepts(explainer, "layer:0:2") == ("6", 2)
    for text, message in (("nothing", "no layer 'nothing'"), ("6:0", "'0' is no number"), ("6:x", "'x' is no number")):
        with pytest.raises(QuestionError, match=message):
            study.parse_top_concepts(explainer, text)


def beats(count: int) -> list[Sample]:
    x = np.random.default_rng(0).random((count, 1, 150)).astype(np.float32)
    return [Sample(f"beat{row}", x[row : row + 1], None, f"beats[{row}]", input="input") for row in range(count)]


def test_stacked_results_are_those_of_a_batch():
    explainer, preprocessing = study.open_model(FIXTURES / "ecg" / "net.onnx", "epsilon")
    questions = study.Questions(targets=[2, 0], conditions=[{"6": [3]}], seed="one", record=["3"])
    found = list(study.explain(explainer, beats(3), questions, layout=preprocessing.layout))
    stacked = study.stack(found)
    x = np.concatenate([sample.x for sample in beats(3)])
    asked = [{"y": 2}, {"y": 2, "6": [3]}, {"y": 0}, {"y": 0, "6": [3]}]
    expected = explainer.explain(x, conditions=asked, seed="one", record=["3"])
    for name in ("input", "3"):
        np.testing.assert_allclose(stacked.relevance[name], expected.relevance[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(stacked.targets, expected.targets)
    np.testing.assert_allclose(stacked.explained, expected.explained, rtol=1e-5)
    for row, one in enumerate(found):
        assert [answer.label for answer in one.answers] == ["2", "6=3", "0", "6=3"]
        for place, answer in enumerate(one.answers):
            R = expected.relevance["input"][row, place]
            np.testing.assert_allclose(answer.heatmap, R, rtol=1e-4, atol=1e-6)
            assert answer.relevance == pytest.approx(float(R.sum()), rel=1e-3, abs=1e-5)


def test_inputs_that_cannot_be_drawn_say_so():
    explainer, preprocessing = study.open_model(FIXTURES / "ecg" / "net.onnx")
    [found] = study.explain(explainer, beats(1), study.Questions(targets=[2], seed="one"), layout="NCL")
    assert found.drawable
    found.answers[0].heatmap = None
    with pytest.raises(InputError, match=r"cannot be drawn \(hint: write arrays: -o out.npz\)"):
        study.figure([found], layout=preprocessing.layout)
