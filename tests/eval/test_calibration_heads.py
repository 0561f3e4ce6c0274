# SPDX-License-Identifier: Apache-2.0
"""`ems-vllm calibrate` by heads: what it counts, and how a budget follows from it."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch
import yaml
from engine.harness import LLAMA
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ems_vllm.cli import app
from ems_vllm.config import ConfigError, load_config
from ems_vllm.eval.calibration import induction, retrieval
from ems_vllm.eval.calibration.fractions import by_mass, in_proportion, layer_fractions
from ems_vllm.eval.calibration.parts import Parts
from ems_vllm.eval.calibration.retrieval import Fact
from ems_vllm.eval.calibration.samples import facts, periods


def attention(queries, keys, scale):
    """[num_heads, num_queries, num_keys]: the definition, of the last queries."""
    num_kv_heads, num_keys, _ = keys.shape
    group = queries.shape[1] // num_kv_heads
    found = torch.zeros(queries.shape[1], len(queries), num_keys)
    for row, query in enumerate(queries):
        visible = num_keys - len(queries) + row + 1
        for head, vector in enumerate(query):
            found[head, row, :visible] = (scale * keys[head // group, :visible] @ vector).softmax(0)
    return found


def test_induction_is_attention_to_what_came_after_the_same_token():
    torch.manual_seed(1)
    num_special, period = 1, 5
    num_tokens = num_special + induction.NUM_PERIODS * period
    queries, keys = torch.randn(num_tokens, 4, 8), torch.randn(2, num_tokens, 8)
    echo, found = induction.scores(queries, keys, 0.5, num_special).flatten(1)
    weights = attention(queries, keys, 0.5)
    rows = range(num_special + period, num_tokens)
    for head in range(4):
        same = [
            sum(weights[head, row, at] for at in range(row - period, num_special - 1, -period))
            for row in rows
        ]
        after = [
            sum(weights[head, row, at + 1] for at in range(row - period, num_special - 1, -period))
            for row in rows
        ]
        assert echo[head] == pytest.approx(float(sum(same)) / len(rows), abs=1e-5)
        assert found[head] == pytest.approx(float(sum(after)) / len(rows), abs=1e-5)


def test_retrieval_counts_answers_that_a_head_looks_up():
    # The answer 7 8 7 stands at 3; each query looks at one token only.
    fact = Fact(prompt=[0] * 3 + [7, 8, 7] + [0] * 4, answer=[7, 8, 7], start=3)
    keys = 50.0 * torch.eye(12)[None]
    # One head looks at the right tokens, another token of the same name counts too; one looks
    # elsewhere in the fact, and beside it.
    looks = torch.tensor([[5, 4, 3], [4, 3, 2]])
    queries = torch.eye(12)[looks].transpose(0, 1)
    copied, attended, peaked = retrieval.scores(queries, keys, 1.0, fact).flatten(1)
    assert copied.tolist() == pytest.approx([1.0, 0.0])
    assert attended.tolist() == pytest.approx([3.0, 2.0], abs=1e-3)
    assert peaked.tolist() == pytest.approx([3.0, 2.0], abs=1e-3)


def test_reasoning_counts_an_answer_only_among_what_a_head_attends_to_most():
    fact = Fact(prompt=[0] * 3 + [7, 8] + [0] * 4, answer=[7, 8], start=3)
    torch.manual_seed(2)
    queries, keys = torch.randn(2, 4, 8), torch.randn(2, 10, 8)
    _, attended, peaked = retrieval.scores(queries, keys, 0.5, fact).flatten(1)
    weights = attention(queries, keys, 0.5)
    for head in range(4):
        expected = 0.0
        for row in weights[head]:
            most = sorted(range(10), key=lambda at, row=row: -row[at])[:2]
            expected += sum(float(row[at]) for at in most if at in (3, 4))
        assert peaked[head] == pytest.approx(expected, abs=1e-5)
    assert (peaked < attended).all()


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=24),
    st.floats(0.01, 0.99),
    st.floats(0.01, 0.99),
)
def test_a_budget_is_dealt_in_proportion_and_never_falls(weights, one, other):
    importance = torch.tensor(weights)[None]
    low, high = sorted((one, other))
    (dealt,) = in_proportion(importance, [low, high])
    for at, ratio in enumerate((low, high)):
        assert sum(of_head[at] for of_head in dealt) / len(dealt) == pytest.approx(ratio, abs=1e-3)
    assert all(0 <= a <= b + 1e-4 <= 1.001 for a, b in dealt)
    order = sorted(range(len(weights)), key=lambda head: weights[head])
    for less, more in itertools.pairwise(order):
        assert dealt[less][0] <= dealt[more][0] + 1e-4


def test_what_is_full_leaves_the_rest_to_others():
    (dealt,) = in_proportion(torch.tensor([[8.0, 1.0, 1.0, 0.0]]), [0.4, 0.8])
    # 1.6 of 4 heads: one is full, two share 0.6; 3.2 leave 0.2 for the one without importance.
    assert [of_head[0] for of_head in dealt] == pytest.approx([1.0, 0.3, 0.3, 0.0], abs=1e-3)
    assert [of_head[1] for of_head in dealt] == pytest.approx([1.0, 1.0, 1.0, 0.2], abs=1e-3)


def test_nothing_has_more_than_a_multiple_of_the_mean():
    (dealt,) = in_proportion(torch.tensor([[8.0, 1.0, 1.0, 0.0]]), [0.2], most=2.0)
    # 0.8 of 4 heads: 0.4 is the most, and two share the rest.
    assert [of_head[0] for of_head in dealt] == pytest.approx([0.4, 0.2, 0.2, 0.0], abs=1e-3)


def test_layers_keep_the_same_share_of_their_attention():
    flat, peaked = torch.ones(100), torch.zeros(100)
    peaked[:10] = 1.0
    found = by_mass(torch.stack([flat, peaked]), [0.275])
    # Half of the attention: 50 tokens here, 5 there, which is 27.5 % on the mean.
    assert found[:, 0].tolist() == pytest.approx([0.5, 0.05], abs=0.01)


def test_facts_lie_at_all_depths_and_are_found_again():
    class Letters:
        def encode_special(self):
            return [0]

        def encode_plain(self, text):
            return [ord(letter) for letter in text]

    words = [[1] * 3000]
    found = facts(words, Letters(), 5, 400)
    for fact in found:
        assert fact.prompt[fact.start : fact.start + len(fact.answer)] == fact.answer
        assert len(fact.prompt) + len(fact.answer) == 400
    assert [fact.start for fact in found] == sorted(fact.start for fact in found)
    assert len({tuple(fact.answer) for fact in found}) == 5
    for fact in facts(words, Letters(), 5, 400, is_reasoned=True):
        text = "".join(map(chr, fact.prompt))
        answer = "".join(map(chr, fact.answer)).strip()
        named = re.search(rf"the ([a-z-]+) is {answer}\b", text)
        (holder,) = re.findall(r"what the ([a-z-]+) has is$", text)
        assert f"The {holder} has the {named[1]}." in text
        assert fact.prompt[fact.start : fact.start + len(fact.answer)] == fact.answer
    (sample,) = periods(range(50, 60), [0], 1, 41)
    assert sample[1:11] * 4 == sample[1:]


def test_samples_are_not_measured_twice(tmp_path):
    parts = Parts(tmp_path / "profile.yaml", {"by": "induction"})
    first = parts.measured(0, lambda: torch.ones(2))
    assert torch.equal(parts.measured(0, lambda: torch.zeros(2)), first)
    assert parts.measured(1, lambda: None) is None
    assert parts.measured(1, lambda: torch.zeros(2)) is None
    # Of other settings, anew.
    other = Parts(tmp_path / "profile.yaml", {"by": "retrieval"})
    assert torch.equal(other.measured(0, lambda: torch.zeros(2)), torch.zeros(2))
    parts.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("by", ["induction", "attention", "error"])
def test_a_profile_is_written_with_a_picture(by, tmp_path):
    out = tmp_path / "profile.yaml"
    args = ["calibrate", LLAMA, "--by", by, "--out", str(out), "--length", "200", "--samples", "2"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"profile.yaml", "profile.svg"}
    written = yaml.safe_load(out.read_text())
    assert (written["model"], written["by"]) == ("random-llama", by)
    for at, ratio in enumerate(written["ratios"]):
        of_layers = [fractions[at] for fractions in written["fractions"].values()]
        assert sum(of_layers) / len(of_layers) == pytest.approx(ratio, abs=0.005)
    assert ("head_fractions" in written) == (by == "induction")
    allocator = {"name": "profile", "profile": str(out), "per_head": by == "induction"}
    assert load_config({"recipe": "h2o", "allocator": allocator}).allocator.reads_profile
    json.dumps(load_config({"recipe": "h2o", "allocator": allocator}).to_dict())


@pytest.mark.slow
@pytest.mark.parametrize("by", ["semantic", "reasoning"])
def test_a_model_that_answers_nothing_is_told_so(by, tmp_path):
    args = ["calibrate", LLAMA, "--by", by, "--out", str(tmp_path / "p.yaml")]
    error = CliRunner().invoke(app, [*args, "--length", "200", "--samples", "2"]).exception
    assert isinstance(error, ConfigError)
    assert "answers none of 2 questions of 200 tokens" in str(error)


def test_heads_are_of_layers():
    of_heads = in_proportion(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), [0.25])
    assert layer_fractions(of_heads) == [[0.125], [0.375]]


def converted(tmp_path, data):
    """The profile that a published file becomes, for a model of 2 layers, 4 and 2 heads."""
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "scores.json").write_text(json.dumps(data))
    out = tmp_path / "profile.yaml"
    args = ["calibrate", str(tmp_path), "--published", str(tmp_path / "scores.json")]
    result = CliRunner().invoke(app, [*args, "--out", str(out), "--ratios", "0.25"])
    if result.exception is not None:
        raise result.exception
    scorer = {"name": "profile", "profile": str(out)}
    assert load_config({"recipe": "h2o", "allocator": scorer}).allocator.reads_profile
    return yaml.safe_load(out.read_text())


def test_published_scores_of_heads(tmp_path):
    data = {f"{layer}-{head}": [0.0, layer * head] for layer in (0, 1) for head in range(4)}
    found = converted(tmp_path, data)
    # Of a kv_head the mean of its two query heads: 0 0, 0.25 1.25.
    assert found["head_fractions"][0] == [[0.0], [0.0]]
    assert found["head_fractions"][1] == [
        [pytest.approx(1 / 6, abs=1e-3)],
        [pytest.approx(5 / 6, abs=1e-3)],
    ]
    assert found["query_heads"][1] == [3, 2, 1, 0]


def test_published_orders_of_query_heads(tmp_path):
    found = converted(tmp_path, {"0": [2, 3, 1, 0], "1": [0, 1, 2, 3]})
    assert found["query_heads"] == {0: [2, 3, 1, 0], 1: [0, 1, 2, 3]}
    assert found["fractions"] == {0: [0.25], 1: [0.25]}
    scorer = {"profile": str(tmp_path / "profile.yaml")}
    assert load_config({"recipe": "compresskv", "scorer": scorer}).scorer.missing([0, 1], 4) is None


def test_published_retrieval_heads_and_layers(tmp_path):
    found = converted(tmp_path, {"1": [1]})
    assert found["head_fractions"] == {0: [[0.0], [0.0]], 1: [[0.0], [1.0]]}
    found = converted(tmp_path, {"avg_score": [0.75, 0.25], "other": []})
    assert found["fractions"] == {0: [0.375], 1: [0.125]}


@pytest.mark.parametrize(
    "data", [{"0-0": [1]}, {"avg_score": [1.0]}, {"5": [0]}, {"0": ["x"]}, {"x-y": [1]}, [1, 2]]
)
def test_what_is_published_of_another_model_is_refused(tmp_path, data):
    with pytest.raises(ConfigError, match="is not about a model of 2 layers, 4 query heads"):
        converted(tmp_path, data)
