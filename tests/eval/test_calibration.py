# SPDX-License-Identifier: Apache-2.0
"""`ems-vllm calibrate`: what the layers of a model need of a text."""

import pytest
import torch
import yaml
from engine.harness import LLAMA
from typer.testing import CliRunner

from ems_vllm.cli import app
from ems_vllm.config import ConfigError, load_config
from ems_vllm.eval.calibration.fractions import head_fractions, layer_fractions
from ems_vllm.eval.calibration.repetition import peak_attention, reconstruction_peaks
from ems_vllm.eval.calibration.samples import passages
from ems_vllm.eval.transformers_engine.attention import observed_by
from ems_vllm.eval.transformers_engine.engine import TransformersEngine

pytestmark = pytest.mark.slow


def softmax_peaks(queries, keys, num_entries, scale):
    """The definition, a query at a time."""
    num_kv_heads, num_keys, _ = keys.shape
    group = queries.shape[1] // num_kv_heads
    peaks = torch.zeros(num_kv_heads, num_entries)
    for index, query in enumerate(queries):
        visible = num_keys - len(queries) + index + 1
        for head, vector in enumerate(query):
            logits = scale * keys[head // group, :visible] @ vector
            weights = torch.zeros(num_keys)
            weights[:visible] = logits.softmax(0)
            of_head = peaks[head // group]
            torch.maximum(of_head, weights[:num_entries], out=of_head)
    return peaks


def test_peaks_are_the_most_that_a_later_query_pays(monkeypatch):
    torch.manual_seed(0)
    queries, keys = torch.randn(7, 4, 8), torch.randn(2, 20, 8)
    expected = softmax_peaks(queries, keys, 13, 0.5)
    assert peak_attention(queries, keys, 13, 0.5) == pytest.approx(expected)
    # A few rows at a time.
    monkeypatch.setattr("ems_vllm.eval.transformers_engine.weights._MAX_LOGITS", 2 * 4 * 20)
    assert peak_attention(queries, keys, 13, 0.5) == pytest.approx(expected)


def test_a_repetition_is_what_follows_the_text(monkeypatch):
    engine = TransformersEngine.load(LLAMA, "cpu", "float32")
    text, instruction = list(range(40, 90)), [7, 8, 9]
    peaks = reconstruction_peaks(engine, text, instruction)
    # Processed at once, and in chunks.
    monkeypatch.setattr("ems_vllm.eval.calibration.repetition._CHUNK", 11)
    assert reconstruction_peaks(engine, text, instruction) == pytest.approx(peaks, abs=1e-5)
    # The same by transformers alone: queries behind the text, keys of everything.
    seen = {}
    with observed_by(lambda layer, queries, keys: seen.update({layer: (queries, keys)})):
        engine.model(torch.tensor([[*text, *instruction, *text]]))
    for layer, found in enumerate(peaks):
        queries, keys = (tensor.detach() for tensor in seen[layer])
        expected = softmax_peaks(queries[len(text) :], keys, len(text), engine.scale)
        assert found == pytest.approx(expected, abs=1e-5)


def test_heads_of_all_layers_compete_for_one_budget():
    # Of the second layer everything matters more than of the first, and of a second head more than
    # of a first one; sinks matter to no budget.
    peaks = torch.linspace(0.0, 0.9, 4 * 40).view(2, 2, 40)
    peaks[0, 0, :8] = 1.0
    of_heads = head_fractions([peaks], [0.25, 0.5, 0.75], num_sinks=8)
    assert of_heads == [[[0, 0, 0], [0, 0, 1]], [[0, 1, 1], [1, 1, 1]]]
    assert layer_fractions(of_heads) == [[0, 0, 0.5], [0.5, 1, 1]]
    # The mean over texts.
    both = head_fractions([peaks, peaks.flip(0)], [0.5], num_sinks=8)
    assert both == [[[0.5], [0.5]], [[0.5], [0.5]]]


def test_passages_lie_apart_and_are_whole():
    found = passages([list(range(50)), list(range(50, 100))], 3, 20)
    assert [passage[0] for passage in found] == [0, 40, 80]
    assert all(len(passage) == 20 for passage in found)
    with pytest.raises(ConfigError, match="length=200 is not allowed: the texts hold 100 tokens"):
        passages([list(range(100))], 3, 200)


def test_what_is_written_is_an_allocator_of_this_model(tmp_path):
    out = tmp_path / "profile.yaml"
    args = ["calibrate", LLAMA, "--out", str(out), "--length", "200", "--samples", "2"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    written = yaml.safe_load(out.read_text())
    assert written["model"] == "random-llama"
    for at, ratio in enumerate(written["ratios"]):
        of_layers = [fractions[at] for fractions in written["fractions"].values()]
        assert sum(of_layers) / len(of_layers) == pytest.approx(ratio, abs=0.002)
    config = load_config({"recipe": "ems", "allocator": {"name": "profile", "profile": str(out)}})
    shares = config.plan_settings_of(len(written["fractions"])).shares
    assert sorted(layer for level in shares.levels for layer in level) == list(written["fractions"])
    by_head = {"name": "profile", "profile": str(out), "per_head": True}
    of_layers = load_config({"recipe": "ems", "allocator": by_head}).allocator.head_shares()
    assert list(of_layers) == list(written["fractions"])
    assert {of_layer.num_heads for of_layer in of_layers.values()} == {4}


@pytest.mark.parametrize("ratios", ["0.5,0.2", "0", "1", "half", ""])
def test_ratios_must_ascend_between_0_and_1(tmp_path, ratios):
    args = ["calibrate", LLAMA, "--out", str(tmp_path / "p.yaml"), "--ratios", ratios]
    error = CliRunner().invoke(app, args).exception
    assert isinstance(error, ConfigError)
    assert "in ascending order" in str(error)
