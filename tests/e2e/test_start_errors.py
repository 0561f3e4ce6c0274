# SPDX-License-Identifier: Apache-2.0
"""A mistake in the settings stops `vllm serve` with one sentence: key, value, remedy."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import fork_vllm


@pytest.mark.parametrize(
    ("args", "key_and_value", "remedy"),
    [
        pytest.param(
            ["--kv-compression", "bogus"],
            "kv_compression='bogus' is not a recipe",
            "use off, adakv,",
            id="unknown recipe",
        ),
        pytest.param(
            ["--kv-compression", "no-such.yaml"],
            "kv_compression='no-such.yaml' cannot be read",
            "give the path of a YAML file",
            id="missing recipe file",
        ),
        pytest.param(
            ["--kv-compression", "ems", "--kv-compression-config", '{"bugdet": 1}'],
            "kv_compression_config.bugdet=1 is not a setting",
            "use 'budget'",
            id="unknown key",
        ),
        pytest.param(
            ["--kv-compression", "ems", "--kv-compression-config", '{"budget": 0}'],
            "kv_compression_config.budget=0 is not allowed",
            "greater than or equal to 1",
            id="out of range",
        ),
        pytest.param(
            ["--kv-compression", "ems", "--kv-compression-config", '{"budget": 64'],
            "kv_compression_config='{\"budget\": 64' is not valid JSON",
            "quote the whole object and its keys",
            id="bad JSON",
        ),
        pytest.param(
            ["--kv-compression", "ems", "--kv-compression-config", "no-such.yaml"],
            "kv_compression_config='no-such.yaml' cannot be read",
            "give the path of a YAML file",
            id="missing settings file",
        ),
        pytest.param(
            ["--kv-compression-config", '{"budget": 64}'],
            "kv_compression_config={'budget': 64} has no effect",
            "choose a recipe",
            id="settings without a recipe",
        ),
        pytest.param(
            ["--kv-compression", "ems", "--scheduler-cls", "mine.Scheduler"],
            "scheduler_cls='mine.Scheduler' cannot be combined with kv_compression='ems'",
            "drop --scheduler-cls",
            id="scheduler of one's own",
        ),
        pytest.param(
            ["--kv-compression", "ems", "--kv-cache-dtype", "fp8_e5m2"],
            "kv_cache_dtype='fp8_e5m2' cannot be combined with kv_compression='ems'",
            "use --kv-cache-dtype auto or fp8",
            id="fp8 cache of another kind",
        ),
        pytest.param(
            ["--additional-config", '{"kv_compression": {"recipe": "bogus"}}'],
            "kv_compression='bogus' is not a recipe",
            "use off, adakv,",
            id="unknown recipe in vLLM's own flag",
        ),
    ],
)
def test_one_sentence_says_what_to_change(
    models: Path,
    tmp_path: Path,
    args: list[str],
    key_and_value: str,
    remedy: str,
) -> None:
    sentence = refusal(models, tmp_path / "log.txt", args)
    assert key_and_value in sentence
    assert remedy in sentence


json_text = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
).map(json.dumps)
# None of these can be right: a server that starts would not end.
bad_recipes = st.text(max_size=8).map("no-{}".format)
bad_settings = (
    st.text(max_size=8).map("{{{}".format)
    | json_text.map('{{"no such setting": {}}}'.format)
    | json_text.map('{{"budget": [{}]}}'.format)
)
bad_arguments = (
    bad_recipes.map(lambda recipe: ["--kv-compression", recipe])
    | bad_settings.map(lambda text: ["--kv-compression", "ems", f"--kv-compression-config={text}"])
    | json_text.map(lambda text: ["--additional-config", f'{{"kv_compression": [{text}]}}'])
)


@settings(max_examples=5)
@given(args=bad_arguments)
@example(args=["--kv-compression", "off.yaml\0"])
@example(args=["--kv-compression", "ems", "--kv-compression-config", '{"a":' * 10_000])
def test_any_mistake_ends_with_a_sentence(
    models: Path,
    tmp_path_factory: pytest.TempPathFactory,
    args: list[str],
) -> None:
    log = tmp_path_factory.mktemp("mistake") / "log.txt"
    sentence = refusal(models, log, args)
    assert "kv_compression" in sentence
    assert "Traceback" not in log.read_text()


def refusal(models: Path, log: Path, args: list[str]) -> str:
    """The last line of a `vllm serve` that does not start."""
    status = fork_vllm(["serve", str(models / "random-llama"), *args], log)
    lines = log.read_text().strip().split("\n")
    assert status != 0, "\n".join(lines)
    assert lines[-1].endswith("."), "\n".join(lines)
    return lines[-1]
