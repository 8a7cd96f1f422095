"""Oracles: zennit's composites (which layer type gets which rule), the TOML texts themselves, and by hand."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from onnxcrp import composite
from onnxcrp.errors import CompositeError
from tests.support import peers

PRESETS = {
    "alpha1_beta0",
    "alpha2_beta1",
    "beta_smooth",
    "deconvnet",
    "epsilon",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "epsilon_gamma_box",
    "epsilon_plus",
    "epsilon_plus_flat",
    "excitation_backprop",
    "flat",
    "gradient",
    "guided_backprop",
    "wsquare",
    "zero",
}


def node(op: str, family: str, *, depth: int = 3, source: str = "", names: tuple[str, ...] = ("layer",)) -> dict:
    return {"op": op, "source_op": source or op, "family": family, "names": names, "depth": depth}


CONV, FIRST_CONV = node("Conv", "convolution"), node("Conv", "convolution", depth=1)
DENSE, FIRST_DENSE = node("Linear", "dense", source="Gemm"), node("Linear", "dense", depth=1, source="Gemm")
RELU, SIGMOID = node("Relu", "activation"), node("Sigmoid", "activation")
POOL, ADD, BATCHNORM = node("AveragePool", "average"), node("Add", "sum"), node("BatchNormalization", "normalization")
MAXPOOL = node("MaxPool", "max")


def rules(name: str, *nodes: dict) -> list[str]:
    loaded = composite.load(name)
    return [found[0] if (found := loaded.rule_for(**each)) else "none" for each in nodes]


# --- presets ----------------------------------------------------------------------------------------------------------


def test_presets_are_complete_and_load():
    assert set(composite.presets()) >= PRESETS
    for name in composite.presets():
        loaded = composite.load(name)
        assert loaded.name == name
        assert loaded.description
        assert loaded.missing == (("low", "high") if name == "epsilon_gamma_box" else ())


@pytest.mark.parametrize(
    "name",
    [
        "epsilon_plus_flat",
        "epsilon_plus",
        "epsilon_gamma_box",
        "epsilon_alpha2_beta1",
        "epsilon_alpha2_beta1_flat",
        "excitation_backprop",
        "guided_backprop",
        "deconvnet",
        "beta_smooth",
    ],
)
def test_assignment_equals_zennit(name):
    """Except where a hook says nothing (the gradient, in zennit): there each kind of preset has its own line."""
    peers.need()
    import torch
    from zennit.composites import COMPOSITES
    from zennit.layer import Sum

    their_words = {
        "Epsilon": "epsilon",
        "ZPlus": "zplus",
        "AlphaBeta": "alpha_beta",
        "Gamma": "gamma",
        "ZBox": "zbox",
        "Flat": "flat",
        "Norm": "norm",
        "Pass": "pass",
        "ReLUGuidedBackprop": "guided_backprop",
        "ReLUDeconvNet": "deconvnet",
        "ReLUBetaSmooth": "beta_smooth",
        "NoneType": "gradient",
    }
    bounds = {"low": -1, "high": 1} if name == "epsilon_gamma_box" else {}
    theirs = COMPOSITES[name](**bounds)
    ours = composite.load(name, **bounds)
    relus = [torch.nn.ReLU(), torch.nn.Sigmoid(), torch.nn.BatchNorm2d(1), torch.nn.MaxPool2d(2)]
    modules = [torch.nn.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 1), torch.nn.Linear(1, 1), torch.nn.AvgPool2d(2), Sum()]
    nodes = [FIRST_CONV, CONV, DENSE, POOL, ADD, RELU, SIGMOID, BATCHNORM, MAXPOOL]
    context: dict = {}
    for module, each in zip([*modules, *relus], nodes, strict=True):
        hook = theirs.module_map(context, "", module)
        word = their_words[type(hook).__name__]
        found = ours.rule_for(**each)
        assert found is not None
        if hook is None and found[0] in ("winner", "pass"):
            # the gradient of max pooling is the winner; excitation backprop's z+ already gives nothing to a dead ReLU
            assert each is MAXPOOL or name == "excitation_backprop"
            continue
        assert found[0] == word, each
        for parameter in ("alpha", "beta", "gamma", "epsilon"):
            if parameter in found[1] and hasattr(hook, parameter):
                assert float(getattr(hook, parameter)) == found[1][parameter]


def test_first_dense_layer_is_flat_where_zennit_says_so():
    assert rules("epsilon_plus_flat", FIRST_DENSE, DENSE) == ["flat", "epsilon"]
    assert rules("epsilon_plus", FIRST_DENSE, FIRST_CONV) == ["epsilon", "zplus"]


@pytest.mark.parametrize(
    ("name", "linear"),
    [("epsilon", "epsilon"), ("zero", "zero"), ("wsquare", "wsquare"), ("alpha2_beta1", "alpha_beta")],
)
def test_uniform_presets_give_every_linear_layer_one_rule(name, linear):
    assert rules(name, FIRST_CONV, CONV, FIRST_DENSE, DENSE) == [linear] * 4
    assert rules(name, RELU, POOL, ADD, MAXPOOL, BATCHNORM) == ["pass", "norm", "norm", "winner", "pass"]


def test_flat_is_flat_everywhere_from_a_seed_of_ones():
    assert rules("flat", CONV, DENSE, POOL, MAXPOOL, ADD, RELU) == ["flat"] * 5 + ["pass"]
    assert composite.load("flat").seed == "one"


def test_gradients_have_no_other_rule_and_a_seed_of_ones():
    assert rules("gradient", CONV, DENSE, RELU, POOL, ADD, MAXPOOL, BATCHNORM) == ["gradient"] * 7
    for name in ("gradient", "guided_backprop", "deconvnet", "beta_smooth"):
        assert composite.load(name).seed == "one"


def test_rearrangements_need_no_rule_and_unknown_families_get_none():
    reshape = node("Reshape", "rearrangement")
    assert rules("epsilon", reshape) == ["none"]
    assert rules("gradient", reshape) == ["none"]
    assert rules("epsilon", node("Attention", "attention")) == ["none"]


# --- lines ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def written(text: str, name: str = "my.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return written


def test_the_first_line_that_fits_decides(write):
    path = write("""
        seed = "one"
        stabilizer = 1e-3
        [[layer]]
        name = ["features.2*", "head"]
        rule = "gamma"
        gamma = 0.5
        stabilizer = 1e-9
        bias = "drop"
        [[layer]]
        op = "MatMul"
        rule = "epsilon"
        [[layer]]
        op = "Conv"
        first = 2
        rule = "wsquare"
        [[layer]]
        rule = "zplus"
    """)
    loaded = composite.load(path)
    assert loaded.seed == "one"
    named = node("Conv", "convolution", names=("conv1", "features.24"))
    assert loaded.rule_for(**named) == ("gamma", {"gamma": 0.5, "stabilizer": 1e-9, "bias": "drop"})
    common = {"stabilizer": 1e-3, "bias": "keep"}
    assert loaded.rule_for(**DENSE) == ("epsilon", common)  # Gemm and MatMul are one thing: Linear
    assert loaded.rule_for(**node("Conv", "convolution", depth=2)) == ("wsquare", common)
    assert loaded.rule_for(**CONV) == ("zplus", common)
    assert loaded.rule_for(**RELU) is None  # a line without op fits what its rule can treat


def test_extends_puts_own_lines_first(write):
    write('extends = "base"\nstabilizer = 0.5\n[[layer]]\nop = "convolution"\nrule = "zplus"', "parent.toml")
    child = composite.load(write('extends = "parent.toml"\n[[layer]]\nop = "Add"\nrule = "equal"', "child.toml"))
    assert child.stabilizer == 0.5
    found = [child.rule_for(**each) for each in (ADD, CONV, RELU)]
    assert [rule for rule, _ in found if rule] == ["equal", "zplus", "pass"]


def test_parameters_in_place_apply_to_every_rule_that_has_them(tmp_path):
    called = composite.load("epsilon_gamma_box(low=-3, high=[1, 2.5], stabilizer=1e-4)", gamma=0.1)
    assert called == composite.load("epsilon_gamma_box", low=-3, high=[1, 2.5], stabilizer=1e-4, gamma=0.1)
    assert called.rule_for(**CONV) == ("gamma", {"gamma": 0.1, "stabilizer": 1e-4, "bias": "keep"})
    assert called.rule_for(**FIRST_CONV) == (
        "zbox",
        {"low": -3.0, "high": (1.0, 2.5), "stabilizer": 1e-4, "bias": "keep"},
    )
    assert called.missing == ()
    again = composite.load(called.name)  # the name says it all
    assert again == called
    twice = called.with_parameters(gamma=0.2)
    assert twice.name == "epsilon_gamma_box(low=-3, high=[1, 2.5], stabilizer=0.0001, gamma=0.2)"


def test_text_is_the_whole_composite(write):
    for name in composite.presets():
        loaded = composite.load(name)
        table = tomllib.loads(loaded.text)
        assert "extends" not in table
        assert len(table["layer"]) == len(loaded.lines)
        again = composite.load(write(loaded.text, f"{name}.toml"))
        assert again == loaded
    boxed = composite.load("epsilon_gamma_box(low=[-1, -2], high=3)")
    assert tomllib.loads(boxed.text)["layer"][0] == {
        "op": "convolution",
        "first": 1,
        "rule": "zbox",
        "low": [-1.0, -2.0],
        "high": 3.0,
    }


def test_missing_bounds_are_an_error_only_where_they_are_needed():
    loaded = composite.load("epsilon_gamma_box(low=0)")
    assert loaded.missing == ("high",)
    assert loaded.rule_for(**CONV) is not None
    with pytest.raises(CompositeError, match=r"zbox.*needs high.*in place"):
        loaded.rule_for(**FIRST_CONV)


def test_a_rule_that_cannot_treat_an_op_says_so(write):
    loaded = composite.load(write('[[layer]]\nop = "Relu"\nrule = "zplus"'))
    with pytest.raises(CompositeError, match=r"my.toml: \[\[layer\]\] 1 \(line 1\).*zplus.*cannot treat layer \(Relu"):
        loaded.rule_for(**RELU)


# --- mistakes ---------------------------------------------------------------------------------------------------------

TABLE = '[[layer]]\nrule = "zplus"\n'
MISTAKES = {
    "unknown rule": (
        f'{TABLE}\n[[layer]]\nop = "Conv"\nrule = "gama"',
        r"\[\[layer\]\] 2 \(line 4\).*gama.*did you mean \"gamma\"",
    ),
    "no rule": ('[[layer]]\nruel = "zplus"', r"\[\[layer\]\] 1 \(line 1\): has no rule.*"),
    "unknown key": ('sed = "one"\n' + TABLE, r"\(line 1\).*\"sed\".*did you mean \"seed\""),
    "unknown table": (TABLE + '[[lyer]]\nrule = "flat"', r"\(line 3\).*\"lyer\".*\"layer\""),
    "seed in a table": (TABLE + 'seed = "one"', r"\[\[layer\]\] 1.*\"seed\".*above the first \[\[layer\]\]"),
    "seed": ('seed = "two"\n' + TABLE, r"\(line 1\).*\"output\" or \"one\".*'two'"),
    "syntax": ('seed = "one"\n[[layer]]\nrule = = 1', r"not valid TOML.*line 3"),
    "single brackets": ('[layer]\nrule = "zplus"', "double brackets"),
    "empty": ("", "no .*layer"),
    "op": ('[[layer]]\nop = "Conf"\nrule = "zplus"', r"\"Conf\".*did you mean \"Conv\""),
    "family": ('[[layer]]\nop = "convolutions"\nrule = "zplus"', r"did you mean \"convolution\""),
    "op type": ('[[layer]]\nop = 3\nrule = "zplus"', "string or a list of strings"),
    "op empty": ('[[layer]]\nop = []\nrule = "zplus"', "op is empty"),
    "name type": ('[[layer]]\nname = 3\nrule = "zplus"', "features"),
    "family of rule": (
        '[[layer]]\nop = "average"\nrule = "gamma"',
        r"cannot treat \"average\"; it treats convolution and dense",
    ),
    "first": ('[[layer]]\nfirst = 0\nrule = "zplus"', "whole number >= 1"),
    "parameter": ('[[layer]]\nrule = "gamma"\ngama = 1', r"no parameter \"gama\"; did you mean \"gamma\""),
    "parameter of another": ('[[layer]]\nrule = "zplus"\ngamma = 1', r"no parameter \"gamma\""),
    "stabiliser": (TABLE + "stabiliser = 1e-3", r"did you mean \"stabilizer\""),
    "text for a number": ('[[layer]]\nrule = "gamma"\ngamma = "1"', "must be a number, got '1'"),
    "true for a number": ('[[layer]]\nrule = "gamma"\ngamma = true', "must be a number, got True"),
    "negative": ('[[layer]]\nrule = "gamma"\ngamma = -1', "must not be negative, got -1"),
    "epsilon 0": ('[[layer]]\nrule = "epsilon"\nepsilon = 0', r"above 0.*\"zero\""),
    "epsilon negative": ('[[layer]]\nrule = "epsilon"\nepsilon = -1e-3', "above 0, got -0.001"),
    "infinite": ('[[layer]]\nrule = "gamma"\ngamma = inf', "finite"),
    "alpha": ('[[layer]]\nrule = "alpha_beta"\nalpha = 3', r"alpha - beta must be 1, got 3 - 1 = 2.*set beta = 2"),
    "bounds": ('[[layer]]\nrule = "zbox"\nlow = 2\nhigh = 1', "low must not be above high"),
    "bounds nan": ('[[layer]]\nrule = "zbox"\nlow = nan', "low must be a number or a list"),
    "stabilizer": ("stabilizer = 0\n" + TABLE, r"\(line 1\): stabilizer must be above 0"),
    "stabilizer of nothing": ("stabilizer = 1e-50\n" + TABLE, r"\(line 1\): stabilizer is too small for float32"),
    "bias": ('bias = "none"\n' + TABLE, r"\"keep\" or \"drop\""),
    "extends": ('extends = "bse"\n' + TABLE, r"\(line 1\): extends: composite \"bse\" is unknown"),
    "extends type": ("extends = 3\n" + TABLE, "must be a name"),
    "extends itself": ('extends = "my.toml"\n' + TABLE, "extends itself"),
    "mistake in parent": (
        'extends = "parent.toml"\n' + TABLE,
        r"my.toml \(line 1\): extends: .*parent.toml.*line 1.*gama",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_with_their_place(mistake, write):
    text, message = MISTAKES[mistake]
    write('[[layer]]\nrule = "gama"', "parent.toml")
    with pytest.raises(CompositeError, match=message) as caught:
        composite.load(write(text))
    assert "\n" not in str(caught.value)
    assert "my.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("epsilon_pus", r'did you mean "epsilon_plus"'),
        ("epsilon(gamma=1)", r'no rule of this composite has a parameter "gamma" .hint: there are epsilon'),
        ("epsilon_gamma_box(lo=1)", r'did you mean "low"'),
        ("epsilon(epsilon=0)", "above 0"),
        ("alpha2_beta1(alpha=3)", "set beta = 2"),
        ("epsilon(0.1)", "by name"),
        ("epsilon(epsilon=x)", "got x"),
        ("epsilon(", "a parenthesis is not closed"),
        ("epsilon(epsilon=[1, 2)", "cannot be read"),
        ("epsilon_plus_flat(bias=drop)", "quote words: bias='drop'"),
        ("epsilon(epsilon=)", "cannot be read"),
        ("nowhere/my.toml", "does not exist"),
        ("../rules/epsilon", "does not exist"),
    ],
)
def test_mistakes_in_a_call(call, message):
    with pytest.raises(CompositeError, match=message):
        composite.load(call)


def test_given_twice():
    with pytest.raises(CompositeError, match="in place and as a keyword"):
        composite.load("epsilon(epsilon=1)", epsilon=2)


def test_own_lines_are_those_of_the_users_file(tmp_path):
    (tmp_path / "mine.toml").write_text("[[layer]]\nname = 'fc*'\nfirst = 2\nrule = 'zplus'\n")
    (tmp_path / "more.toml").write_text("extends = 'mine.toml'\n\n[[layer]]\nrule = 'gamma'\n")
    assert [line.shown for line in composite.load(tmp_path / "mine.toml").lines if line.own] == [
        "table 1 (line 1) name = fc*, first = 2"
    ]
    more = composite.load(f"{tmp_path / 'more.toml'}(gamma=1)")
    assert [line.shown for line in more.lines if line.own] == ["table 1 (line 3) rule = gamma"]
    assert not any(line.own for line in composite.load("epsilon_plus").lines)
