# SPDX-License-Identifier: Apache-2.0
"""`python -m ems_vllm.eval.lab`: one processed prompt for many variants."""

import inspect
import json
from importlib import resources
from pathlib import Path

import pytest
import torch
import typer
import yaml
from engine.harness import LLAMA, tokens
from typer.testing import CliRunner

from ems_vllm.config import ConfigError, load_config
from ems_vllm.config.cache_shape import CacheShape
from ems_vllm.eval.lab import variants as sets
from ems_vllm.eval.lab.__main__ import main
from ems_vllm.eval.lab.cells import _COMPRESSION, _FORCING, _code, cells
from ems_vllm.eval.lab.forcing import Forced
from ems_vllm.eval.lab.result import LabResult
from ems_vllm.eval.lab.runner import Lab
from ems_vllm.eval.lab.sizes import ByteBudget, parse_sizes
from ems_vllm.eval.lab.variants import Variant, configured, described, read_variants
from ems_vllm.eval.records.budget import Budget, kv_budget
from ems_vllm.eval.records.method import TRANSFORMERS, Method
from ems_vllm.eval.records.prompt_files import PromptLine
from ems_vllm.eval.transformers_engine.attention import observed_by
from ems_vllm.eval.transformers_engine.attention_errors import AttentionErrors, QueryRecorder
from ems_vllm.eval.transformers_engine.engine import TransformersEngine
from ems_vllm.eval.transformers_engine.quantised import FORMATS
from ems_vllm.eval.transformers_engine.runner import Runner
from ems_vllm.eval.transformers_engine.server_config import request_options, server_config
from ems_vllm.layer_shares import LayerShares
from ems_vllm.plan import PlanSettings
from ems_vllm.policies.levels import in_levels
from ems_vllm.policies.policy import Policy

app = typer.Typer()
app.command()(main)


def prompt_line(index=0, **fields):
    values = {"gold_token_ids": tokens(6, seed=90), "written_token_ids": tokens(5, seed=91)}
    return PromptLine(
        task="niah", length=256, depth=0.5, seed=0, index=index, protocol="later", prompt="",
        prompt_token_ids=tokens(200 + index, seed=index), max_tokens=6, stop=(), references=("7",),
        **{**values, **fields},
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    return TransformersEngine.load(LLAMA, "cpu", "float32")


def measure(engine, prompt, variants, *budgets, errors=True):
    sizes = parse_sizes(map(str, budgets))
    configs = configured(variants, sizes, [prompt], {}, engine.block_size)
    chosen = cells(variants, configs, sizes, errors)
    record = Lab(engine, True, errors).measure(prompt, Forced.of(prompt), chosen)
    return record.full, [record.cells[cell.digest] for cell in chosen]


def test_a_budget_for_the_whole_prompt_is_the_full_cache(engine):
    variant = Variant(name="ems")
    full, (all_of_it, part) = measure(engine, prompt_line(), [variant], 256, 64)
    assert all_of_it.loss == pytest.approx(full.loss, abs=1e-5)
    assert all_of_it.kl == pytest.approx(0, abs=1e-6)
    assert all_of_it.attention_error == pytest.approx(0, abs=1e-5)
    assert part.loss != pytest.approx(full.loss, abs=1e-3)
    assert part.kl > 1e-3
    assert part.attention_error > 0.01


def test_layers_that_share_a_budget_unequally_take_as_many_bytes(engine):
    pyramid = {"allocator": {"name": "pyramid", "num_levels": 2}}
    variants = [Variant(name="ems"), Variant(name="pyramid", settings=pyramid)]
    _, (even, uneven) = measure(engine, prompt_line(), variants, 96)
    assert uneven.kv_bytes == even.kv_bytes
    assert uneven.attention_error > 0.01
    assert uneven.attention_error != pytest.approx(even.attention_error, rel=1e-3)
    assert uneven.loss != pytest.approx(even.loss, abs=1e-4)
    # Where all of it fits, shares are no matter.
    full, (everything,) = measure(engine, prompt_line(), variants[1:], 256)
    assert everything.kv_bytes == full.kv_bytes
    assert everything.attention_error == pytest.approx(0, abs=1e-5)


def test_right_is_what_would_have_been_written(engine):
    """The answer that a variant writes by itself is right for it, and no other one is."""
    prompt = prompt_line(written_token_ids=())
    config = server_config("ems", 64, {}, engine.block_size)
    options = request_options(
        Method("ems", TRANSFORMERS, Budget(count=64)), prompt, config, engine.block_size
    )
    scored = engine.scored_queries(len(prompt.prompt_token_ids), config, options)
    prefilled = engine.prefill(prompt.prompt_token_ids, 16, [scored])
    request = engine.request(prefilled, config, options)
    written = [int(prefilled.logits.argmax())]
    while len(written) < 4:
        written.append(int(request.step(written[-1]).argmax()))
    for index in range(4):
        gold = [token + (place == index) for place, token in enumerate(written)]
        other = prompt_line(written_token_ids=(), gold_token_ids=gold)
        assert not measure(engine, other, [Variant(name="ems")], 64)[1][0].right
    own = prompt_line(written_token_ids=(), gold_token_ids=written)
    assert measure(engine, own, [Variant(name="ems")], 64)[1][0].right


@pytest.mark.parametrize("recipe", ["ems", "snapkv"])
def test_one_pass_is_teacher_forcing_of_the_command(engine, recipe):
    # Long enough to be compressed again on the way.
    prompt = prompt_line(
        gold_token_ids=(), written_token_ids=(), continuation_token_ids=tokens(48, seed=92),
        continuation_bytes=48,
    )  # fmt: skip
    overrides = {"recompress_interval": 16}
    variant = Variant(name="x", recipe=recipe, settings=overrides)
    _, (found,) = measure(engine, prompt, [variant], 64)
    method = Method(recipe, TRANSFORMERS, Budget(count=64))
    ((_, line),) = Runner(engine, LLAMA, [method], [prompt], overrides).answers(prompt, [method])
    # The first token is predicted before anything is compressed.
    assert found.loss == pytest.approx(-sum(line.logprobs[1:]) / 47, abs=1e-4)


def test_errors_are_those_of_the_projection_s_output(engine):
    prompt, fed = prompt_line(), tokens(5, seed=93)
    prefilled = engine.prefill(prompt.prompt_token_ids, 16)
    config = load_config({"recipe": "streaming_llm", "budget": 32, "recent_window": 16})
    options = request_options(Method("full", TRANSFORMERS), prompt, config, engine.block_size)
    outputs, hooks = [], []
    for layer in engine.model.get_decoder().layers:
        hook = lambda module, args, output: outputs.append(output[0])  # noqa: E731
        hooks.append(layer.self_attn.o_proj.register_forward_hook(hook))
    recorder = QueryRecorder(engine.compressed_layers)
    full = engine.request(prefilled, config, options)
    with observed_by(recorder):
        full.extend(fed)
    for hook in hooks:
        hook.remove()
    errors = AttentionErrors(engine, recorder.queries(), full)
    for own, expected in zip(errors.outputs, outputs, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    keys, values = engine.request(prefilled, config, options).entries()
    assert errors.by_layer(keys, values, 5).mean().item() == pytest.approx(0, abs=1e-5)
    # Twice the prompt is the same shares of it, and fewer of the new tokens.
    twice_keys, twice_values = (
        [of_layer.repeat(1, 2, 1) for of_layer in entries] for entries in (keys, values)
    )
    assert errors.by_layer(twice_keys, twice_values, 5).mean().item() < 0.1
    # Layers need not hold equally many entries.
    assert (
        errors.by_layer([*twice_keys[:1], *keys[1:]], [*twice_values[:1], *values[1:]], 5)
        .mean()
        .item()
        < 0.1
    )
    assert errors.by_layer(
        keys, [10 * of_layer for of_layer in values], 5
    ).mean().item() == pytest.approx(9, rel=0.1)


def test_what_is_measured_again(monkeypatch):
    def digest(budget="64", errors=True, recipe="ems", dtype="auto", **settings):
        variant = Variant(name="x", recipe=recipe, settings=settings, kv_cache_dtype=dtype)
        sizes = parse_sizes([budget])
        # The largest budget of a server is one of its settings, so it is the same here.
        configs = configured([variant], [Budget.parse(256)], [prompt_line()], {}, 16)
        return cells([variant], configs, sizes, errors)[0].digest

    known = digest()
    assert digest(scorer={"local_first": 26}) == known
    assert digest(scorer={"local_first": 13}) != known
    assert digest("128") != known
    assert digest("4x") != known
    assert digest(errors=False) != known
    assert digest(dtype="fp8") != known
    full = digest(recipe="full", dtype="fp8")
    assert full not in (known, digest(dtype="fp8"), digest(recipe="full", dtype="auto"))
    assert digest("128", recipe="full", dtype="fp8") == full
    # A change of a policy is none of what is not compressed.
    code = "ems_vllm.eval.lab.cells._code"
    monkeypatch.setattr(code, lambda *paths, before=_code: "changed" if paths else before())
    assert digest() != known
    assert digest(recipe="full", dtype="fp8") == full
    monkeypatch.setattr(code, lambda *paths: "changed")
    assert digest(recipe="full", dtype="fp8") != full


def test_measurements_depend_on_all_that_computes_them():
    package = Path(str(resources.files("ems_vllm")))
    patterns = (*_FORCING, *_COMPRESSION)
    assert all(any(package.glob(pattern)) for pattern in patterns)
    covered = {file for pattern in patterns for file in package.glob(pattern)}
    for computes in (
        Lab,
        TransformersEngine,
        kv_budget,
        Policy,
        PlanSettings,
        LayerShares,
        in_levels,
    ):
        assert Path(inspect.getfile(computes)) in covered


def test_a_share_of_the_bytes_is_so_many_entries():
    shape = CacheShape(num_layers=30, num_kv_heads=3, head_size=64, itemsize=2)
    quarter = ByteBudget(4)
    assert quarter.total(2000, shape, FORMATS["auto"]) == 500
    assert quarter.total(2000, shape, FORMATS["fp8"]) == 1000
    # 72 bytes instead of 256.
    assert quarter.total(2000, shape, FORMATS["int4_per_token_head"]) == 1777
    assert ByteBudget(2).total(2000, shape, FORMATS["int4_per_token_head"]) == 2000


def test_variants_at_equal_bytes(files):
    """A float8 cache of a float32 model takes a quarter; half of its entries take an eighth."""
    variants = [
        {"name": "stored", "recipe": "full", "kv_cache_dtype": "fp8"},
        {"name": "fewer"},
        {"name": "both", "kv_cache_dtype": "fp8"},
    ]
    done = run(files, variants, "--budgets", "4x", "8x", "--block-size", "4", "--limit", "1")
    assert done.exit_code == 0, done.exception
    assert "budget full" in done.stdout
    result = LabResult.model_validate_json((files / "out" / "result.json").read_text())
    assert result.budgets == ["full", "4x", "8x"]
    assert result.settings["stored"] == {"recipe": "full", "kv_cache_dtype": "fp8"}
    found = {(one.variant, one.budget): one for one in result.summaries}
    assert found.keys() == {
        ("stored", "full"), ("fewer", "4x"), ("both", "4x"), ("fewer", "8x"), ("both", "8x"),
    }  # fmt: skip
    assert found["stored", "full"].bytes_ratio == 4
    for (_, budget), one in found.items():
        if budget != "full":
            wanted = float(budget.removesuffix("x"))
            assert wanted <= one.bytes_ratio < 1.2 * wanted
    # Nothing is left out where all of it fits.
    same = found["stored", "full"].model_copy(update={"variant": "both", "budget": "4x"})
    assert found["both", "4x"] == same
    assert same.kl > 1e-6
    for one in found.values():
        if one.budget == "8x" or one.variant == "fewer":
            assert one.kl > 10 * same.kl


def test_only_tokens_that_a_compressed_cache_predicts_count():
    later = Forced.of(prompt_line(written_token_ids=(1, 2), gold_token_ids=(3, 4)))
    assert (later.fed, later.counted) == ((1, 2, 3), (3, 4))
    last = Forced.of(prompt_line(written_token_ids=(), gold_token_ids=(3, 4)))
    assert (last.fed, last.counted) == ((3,), (4,))
    assert Forced.of(prompt_line(written_token_ids=(), gold_token_ids=(3,))) is None
    lead = {"lead_token_ids": (1, 2), "written_token_ids": ()}
    first = Forced.of(prompt_line(gold_token_ids=(3, 4), **lead))
    assert (first.fed, first.counted) == ((1, 2, 3), (3, 4))
    text = Forced.of(prompt_line(continuation_token_ids=(3, 4), **lead))
    assert (text.fed, text.counted) == ((3,), (4,))
    assert Forced.of(prompt_line(gold_token_ids=())) is None


@pytest.fixture
def files(tmp_path):
    lines = [prompt_line(index) for index in range(2)] + [prompt_line(2, gold_token_ids=())]
    text = "".join(f"{line.model_dump_json()}\n" for line in lines)
    (tmp_path / "prompts.jsonl").write_text(text)
    return tmp_path


def run(files, variants, *more):
    path = files / "variants.yaml"
    path.write_text(variants if isinstance(variants, str) else yaml.safe_dump(variants))
    arguments = [
        "--model", LLAMA, "--prompts", str(files / "prompts.jsonl"), "--variants", str(path),
        "--out", str(files / "out" / "result.json"), "--device", "cpu", *more,
    ]  # fmt: skip
    return CliRunner().invoke(app, arguments)


def test_a_run_goes_on_where_it_stopped(files, monkeypatch):
    asked = []
    inner = Lab.measure

    def measure(self, prompt, forced, chosen):
        asked.append((prompt.index, [cell.variant for cell in chosen]))
        return inner(self, prompt, forced, chosen)

    monkeypatch.setattr(Lab, "measure", measure)
    two = [{"name": "ems"}, {"name": "no merger", "settings": {"merger": "none"}}]
    sizes = ("--budgets", "64", "128")
    assert run(files, two, *sizes, "--limit", "1").exit_code == 0
    assert asked == [(0, ["ems", "no merger"] * 2)]
    # Killed while it wrote the next line.
    journal = files / "out" / "result.journal.jsonl"
    with journal.open("a") as file:
        file.write('{"prompt": "ab')
    done = run(files, two, *sizes)
    assert asked[1:] == [(1, ["ems", "no merger"] * 2)]
    again = run(files, two, *sizes)
    assert len(asked) == 2
    assert again.stdout.split("Loss above")[1] == done.stdout.split("Loss above")[1]
    assert "1 prompts have no right answer to force" in done.stdout
    # A variant is known by its settings: one that is new is all that is measured.
    renamed = [{**two[1], "name": "evict"}, {"name": "random", "recipe": "random"}]
    assert run(files, renamed, *sizes).exit_code == 0
    assert asked[2:] == [(0, ["random"] * 2), (1, ["random"] * 2)]
    result = LabResult.model_validate_json((files / "out" / "result.json").read_text())
    assert [(one.budget, one.variant, one.n) for one in result.summaries] == [
        (budget, name, 2) for budget in ("64", "128") for name in ("evict", "random")
    ]
    for one in result.summaries:
        assert one.low <= one.loss_above_full <= one.high
    assert (result.left_out, result.full[0].n) == (1, 2)
    assert result.environment["versions"].keys() == {"ems-vllm", "transformers", "torch"}
    assert result.settings["evict"]["merger"] == {"name": "none"}
    assert result.settings["evict"]["kv_cache_dtype"] == "auto"
    # Another way to compute is another file.
    error = run(files, two, *sizes, "--no-compiled").exception
    assert isinstance(error, ConfigError)
    assert "operators='compiled', and this run has 'reference'" in str(error)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("name: ems", "holds a dict: write a list."),
        ("[", "is not valid YAML"),
        ("[]", "holds none: write at least one."),
        ([{"recipe": "ems"}], "variants[0].name"),
        ([{"name": "a"}, {"name": "a"}], "variants[1].name='a' is there twice"),
        ([{"name": "a", "recipee": "ems"}], "variants[0].recipee='ems' is not a setting: use"),
        ([{"name": "a", "recipe": "emms"}], "variant 'a': kv_compression='emms' is not a recipe"),
        ([{"name": "a", "settings": {"scorer": {"local": 1}}}], "variant 'a': kv_compression_co"),
        ([{"name": "a", "settings": {"budget": 9}}], "sizes come from --budgets"),
        ([{"name": "a", "kv_cache_dtype": "int3"}], "variants[0].kv_cache_dtype='int3' is not kn"),
        ([{"name": "a", "recipe": "full", "settings": {"budget": 9}}], "would change nothing"),
    ],
)
def test_a_wrong_file_of_variants_is_one_sentence(files, variants, message):
    error = run(files, variants, "--budgets", "64").exception
    assert isinstance(error, ConfigError)
    assert message in str(error)
    assert "\n" not in str(error)
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budgets", "0"), "budgets='0' is not a budget"),
        (("--budgets", "64", "full"), "the full cache is always measured"),
        (("--budgets", "0.5x"), "budgets='0.5x' is no ratio of bytes: give one of at least 1"),
        (
            ("--budgets", "64", "--variants", "score"),
            "use bytes, mergers, prefill_interval, scorers, or the path",
        ),
    ],
)
def test_mistakes_on_the_command_line_are_named(files, options, message):
    error = run(files, [{"name": "a"}], *options).exception
    assert isinstance(error, ConfigError)
    assert message in str(error)


def test_prompts_without_right_answers_are_refused(files):
    text = prompt_line(gold_token_ids=()).model_dump_json()
    (files / "prompts.jsonl").write_text(text)
    error = run(files, [{"name": "a"}], "--budgets", "64").exception
    assert isinstance(error, ConfigError)
    assert "has no right answers of two tokens or more" in str(error)


def test_a_result_names_the_profile_that_ships():
    allocator = {"name": "profile", "profile": "smollm2", "per_head": True}
    variant = Variant(name="by head", settings={"allocator": allocator})
    configs = configured([variant], [Budget(count=64)], [prompt_line()], {}, 16)
    assert described(variant, configs[variant.name])["allocator"].items() >= allocator.items()


@pytest.mark.parametrize("name", sets.names())
def test_shipped_variants_are_settings_that_exist(name):
    variants = read_variants(name)
    configs = configured(variants, [Budget(count=64)], [prompt_line()], {}, 16)
    assert len(configs) == len(variants) > 2
    # What is meant to be different is.
    different = {
        json.dumps(described(variant, configs[variant.name]), sort_keys=True)
        for variant in variants
    }
    assert len(different) > len(variants) - 3
