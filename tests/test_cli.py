# SPDX-License-Identifier: Apache-2.0
"""The command `ems-vllm`."""

import json

import pytest
from typer.testing import CliRunner

from ems_vllm import cli
from ems_vllm.config import ConfigError, recipes

MODEL = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "dtype": "float32",
}


def run(*args: str):
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, args)


def row_of(output: str, prompt: str) -> list[str]:
    line = next(line for line in output.splitlines() if f" {prompt} " in line)
    return [cell.strip() for cell in line.strip("│┃ ").split("│")]


def test_plan_shows_columns_and_bytes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    result = run(
        "plan", "--prompt-len", "4000", "--prompt-len", "100", "--budget", "256",
        "--output-len", "1024", "--model", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    prompt, dense, after_prompt, _, at_most, saved, dense_mib, at_most_mib = row_of(
        result.output, "4,000"
    )
    assert (prompt, dense) == ("4,000", "314")
    # 16 blocks of budget, then the window of 64 tokens and the interval of 256, and one more.
    assert at_most == str(16 + (64 + 256) // 16 + 1)
    assert int(after_prompt) < int(at_most)
    assert saved == "88%"
    # 16 tokens x 4 layers x 4 heads x 64 x (K, V) x 4 bytes = 128 KiB a column.
    assert dense_mib == f"{314 / 8:.1f}"
    assert at_most_mib == f"{37 / 8:.1f}"


def test_plan_shows_what_levels_of_layers_keep(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    recipe = tmp_path / "pyramid.yaml"
    recipe.write_text(
        "budget: 256\nscorer: ems\nallocator: {name: pyramid, num_levels: 2}\nselector: top_k\n"
        "merger: ems\n"
    )
    result = run(
        "plan", "--prompt-len", "4000", "--prompt-len", "100", "--recipe", str(recipe),
        "--model", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    columns, levels = result.output.split("Entries kept per kv_head")
    # As many columns on the mean as with the same budget in every layer.
    assert row_of(columns, "4,000")[4] == str(16 + (64 + 256) // 16 + 1)
    # 26 and 6 blocks; a prompt below the budget is kept in all layers.
    assert row_of(levels, "0, 1") == ["0, 1", "416", "100"]
    assert row_of(levels, "2, 3") == ["2, 3", "96", "100"]


def test_plan_shows_what_kv_heads_keep(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    profile = {
        "ratios": [0.5],
        "fractions": {layer: [0.5] for layer in range(4)},
        "head_fractions": {layer: [[0.8], [0.2], [0.5], [0.5]] for layer in range(4)},
    }
    allocator = {
        "name": "profile", "profile": profile, "per_head": True, "num_levels": 1,
        "uniform_share": 0,
    }  # fmt: skip
    recipe = tmp_path / "heads.yaml"
    recipe.write_text(
        f"budget: 1600\nscorer: ems\nallocator: {json.dumps(allocator)}\nselector: top_k\n"
        "merger: ems\n"
    )
    result = run(
        "plan", "--prompt-len", "3264", "--prompt-len", "100", "--recipe", str(recipe),
        "--model", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    _, levels = result.output.split("Entries kept per kv_head")
    # 100 of 200 blocks, and of them what the profile says; a prompt below the budget is kept.
    assert row_of(levels, "0, 1, 2, 3")[1:] == ["1,600 (640 to 2,560)", "100 (100 to 100)"]


def test_plan_says_that_kv_heads_share_by_scores(tmp_path):
    recipe = tmp_path / "ada.yaml"
    recipe.write_text("budget: 256\nscorer: ems\nallocator: ada\nselector: top_k\nmerger: ems\n")
    ada, equal = (
        run("plan", "--prompt-len", "4000", "--budget", "256", "--recipe", name)
        for name in (str(recipe), "ems")
    )
    assert ada.exit_code == 0, ada.output
    assert row_of(ada.output, "4,000") == row_of(equal.output, "4,000")
    said = "kv_heads share what their layer keeps, by the scores of each compaction."
    assert said in ada.output
    assert said not in equal.output


def test_plan_of_levels_without_a_model_is_refused(tmp_path):
    recipe = tmp_path / "pyramid.yaml"
    recipe.write_text(
        "budget: 256\nscorer: ems\nallocator: pyramid\nselector: top_k\nmerger: ems\n"
    )
    refusal = run("plan", "--prompt-len", "4000", "--recipe", str(recipe)).exception
    assert isinstance(refusal, ConfigError)
    assert str(refusal) == (
        "allocator='pyramid' shares a budget among the layers of a model: give --model."
    )


def table_after(output: str, title: str) -> str:
    return output.split(title)[1]


def test_plan_shows_how_many_requests_a_pool_holds(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    result = run(
        "plan", "--prompt-len", "4000", "--prompt-len", "200000", "--budget", "256",
        "--model", str(tmp_path), "--pool-gib", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    # 128 KiB a column, and one block that no request gets.
    pool = table_after(result.output, "a pool of 1 GiB: 8,191 columns")
    # 314 columns dense; 37 once compressed; 251 with the prompt and the first two tokens.
    fit = [8191 // 314, 8191 // 37, 1 + (8191 - 251) // 37]
    assert row_of(pool, "4,000") == ["4,000", *map(str, fit)]
    # This prompt takes 12,501 columns before anything can be given back.
    assert row_of(pool, "200,000") == ["200,000", "0", str(8191 // 37), "0"]


def test_plan_of_a_pool_counts_what_a_prompt_holds_that_is_compressed_as_it_comes():
    result = run(
        "plan", "--prompt-len", "200000", "--budget", "256", "--prefill-interval", "512",
        "--num-layers", "4", "--num-kv-heads", "4", "--head-size", "64", "--dtype", "float32",
        "--pool-gib", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    at_most = int(row_of(result.output, "200,000")[4])
    pool = table_after(result.output, "a pool of 1 GiB: 8,191 columns")
    assert row_of(pool, "200,000")[3] == str(1 + (8191 - at_most) // 37)


def test_plan_takes_a_model_as_numbers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    common = ("plan", "--prompt-len", "4000", "--pool-gib", "1")
    numbers = ("--num-layers", "4", "--num-kv-heads", "4", "--head-size", "64")
    by_file = run(*common, "--model", str(tmp_path)).output
    assert run(*common, *numbers, "--dtype", "float32").output == by_file
    # A quarter of the bytes, so four times the columns.
    halved = run(*common, "--model", str(tmp_path), "--dtype", "fp8").output
    assert "a pool of 1 GiB: 32,767 columns" in halved


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "(sliding_attention)"),
        ({"sliding_window": 512}, "(sliding_attention)"),
    ],
)
def test_plan_of_a_pool_that_other_layers_share_is_refused(config, kinds, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL | config))
    args = ("plan", "--prompt-len", "4000", "--model", str(tmp_path))
    assert run(*args).exit_code == 0
    refusal = run(*args, "--pool-gib", "1").exception
    assert isinstance(refusal, ConfigError)
    assert kinds in str(refusal)


def test_methods_are_listed_with_what_they_need():
    listed = run("methods", "--json")
    found = {one["name"]: one for one in json.loads(listed.output)["methods"]}
    assert list(found) == recipes.names()
    assert found["knorm"]["needs"] == []
    assert found["pyramidkv"]["needs"] == ["last queries", "unequal layers"]
    assert found["adakv"]["needs"] == ["last queries", "unequal heads"]
    assert found["criticalkv"]["needs"] == ["last queries", "output projections"]
    assert found["ems"]["needs"] == ["attention of the prompt", "last queries"]
    for one in found.values():
        assert one["keeps"]
        assert all(paper["method"] and paper["authors"] for paper in one["papers"])
        # Ours alone is the control.
        assert one["papers"] or one["name"] == "random"
    assert {"url": "https://arxiv.org/abs/2404.14469"}.items() <= found["snapkv"]["papers"][
        0
    ].items()
    assert set(found["ems"]["measured"]) == {"smollm2", "gemma3-270m"}
    assert found["ems"]["compaction_time"] == 1
    not_served = json.loads(listed.output)["not_served"]
    assert all(one["why"] and one["instead"] for one in not_served)


def test_methods_are_listed_for_people():
    listed = run("methods").output
    one = run("methods", "chunkkv").output
    assert all(name in listed for name in recipes.names())
    assert "https://arxiv.org/abs/2502.00299" in one
    assert "SmolLM2" in one
    assert "Gemma" in one
    assert "on Gemma" in " ".join(run("methods", "--model", "gemma3-270m").output.split())
    assert "method='emz' is not a recipe" in str(run("methods", "emz").exception)
    assert "model='opt' was not measured" in str(run("methods", "--model", "opt").exception)


def test_recipes_are_shown():
    shown = json.loads(run("show", "ems").stdout)
    assert shown["scorer"]["name"] == "ems"
    assert shown["budget"] == 1024


def test_version_says_what_was_built():
    assert {"version", "compiler", "cuda_archs"} <= set(json.loads(run("version").output))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "--prompt-len", "9", "--recipe", "emz"], "kv_compression='emz'"),
        (["plan", "--prompt-len", "9", "--model", "/no/such"], "model='/no/such'"),
        (["plan", "--prompt-len", "9", "--pool-gib", "1"], "give --model"),
        (["plan", "--prompt-len", "9", "--num-layers", "4"], "give all three"),
        (["plan", "--prompt-len", "9", "--dtype", "fp8"], "give --model"),
        (
            [
                "plan",
                "--prompt-len",
                "9",
                "--num-layers",
                "4",
                "--num-kv-heads",
                "4",
                "--head-size",
                "64",
                "--dtype",
                "int4",
            ],
            "dtype='int4'",
        ),
        (
            [
                "plan",
                "--prompt-len",
                "9",
                "--num-layers",
                "4",
                "--num-kv-heads",
                "4",
                "--head-size",
                "64",
                "--pool-gib",
                "0",
            ],
            "pool_gib=0",
        ),
        (
            ["plan", "--prompt-len", "9", "--num-layers", "4", "--model", "models/ems-tiny"],
            "drop --num-layers",
        ),
        (["show", "off"], "compresses nothing"),
    ],
)
def test_mistake_is_answered_with_a_sentence(args, message, monkeypatch, capsys):
    assert isinstance(run(*args).exception, ConfigError)
    monkeypatch.setattr("sys.argv", ["ems-vllm", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("ems-vllm: error: ")
    assert message in " ".join(error.split())
