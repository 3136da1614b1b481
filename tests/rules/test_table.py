"""The table of rules, and that each function in it is tested."""

import importlib.util
from pathlib import Path

import drawing
import pytest
import torch
import torch.nn.functional as F

from kalmannorm.gaussian import Gaussian
from kalmannorm.propagation import exact, function_name
from kalmannorm.rules import RULES, aliases, rule
from kalmannorm.steps import Step


def _built_in():
    """The functions that the library's own rules stand for; other tests may have taught it more."""
    return {f for f, each in RULES.items() if each.__module__.startswith("kalmannorm.rules.")}


def test_every_function_is_tested():
    """A rule without a test fails here. The tests beside this one say what they cover as they load."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path != Path(__file__):
            spec = importlib.util.spec_from_file_location(f"covered_by_{path.stem}", path)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
    missing = sorted(function_name(f) for f in _built_in() - drawing.COVERED)
    assert not missing
    unknown = sorted(function_name(f) for f in drawing.COVERED - set(RULES))
    assert not unknown


def test_every_rule_says_what_it_does():
    for function in _built_in():
        doc = RULES[function].__doc__
        assert doc, f"{function_name(function)} has a rule without a docstring"


@pytest.fixture
def _same_table_after():
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.usefixtures("_same_table_after")
def test_teaching_a_rule():
    @rule(F.glu, F.relu)
    def mine(x):
        return x

    assert RULES[F.glu] is mine
    assert RULES[F.relu] is mine, "a rule taught later replaces the one before"
    assert RULES[torch.Tensor.relu] is not mine


@pytest.mark.usefixtures("_same_table_after")
@pytest.mark.parametrize("belief_first", [False, True])
def test_a_rule_says_whether_its_first_argument_is_a_belief(belief_first):
    """By an argument; an annotation changes nothing."""

    @rule(torch.cumprod, belief_first=belief_first)
    def mine(x: Gaussian, y):
        return y

    known, belief = torch.zeros(4), Gaussian(torch.zeros(1), torch.ones(1), (4,))
    its = Step(None, (), {}, (4,), belief=belief)
    assert torch.equal(exact(Step(torch.cumprod, (its, its), {}, (4,))).var, belief.var)
    result = exact(Step(torch.cumprod, (known, its), {}, (4,)))
    if belief_first:
        assert result.reason == "torch.cumprod with an argument that is computed from the input"
    else:
        assert torch.equal(result.var, belief.var)


@pytest.mark.parametrize("wrong", ["relu", None, 3])
def test_only_functions_have_rules(wrong):
    with pytest.raises(TypeError, match="takes torch functions, got"):
        rule(F.relu, wrong)


def test_aliases_are_functions_and_methods():
    assert set(aliases("relu")) == {torch.relu, torch.Tensor.relu, F.relu}
    assert len(aliases("relu", "relu")) == 3
    assert aliases("no such function") == []


def test_more_arguments_than_a_rule_takes():
    belief = Gaussian(torch.zeros(1, 3), torch.ones(1, 3))
    assert "arguments that its rule does not take" in exact(Step(torch.neg, (belief, 1, 2, 3), {}, (2, 3))).reason
