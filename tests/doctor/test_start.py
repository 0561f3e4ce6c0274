# SPDX-License-Identifier: Apache-2.0
"""`ems-vllm doctor MODEL`: what a server would refuse, what it would lose, and what would fit."""

import json
import os
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
from engine import known_models
from engine.harness import LLAMA
from typer.testing import CliRunner
from vllm import platforms
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability

import ems_vllm
from ems_vllm import cli
from ems_vllm.config import ConfigError, load_config
from ems_vllm.doctor.start import examine as examine_module
from ems_vllm.doctor.start import installed as installed_module
from ems_vllm.doctor.start.check import Status
from ems_vllm.doctor.start.examine import examine
from ems_vllm.doctor.start.features import CHECK_OF, features
from ems_vllm.engine.frontend.compatibility import HARMONY_ROLES, RULES
from ems_vllm.engine.worker.refusals import LAYER_REFUSALS
from ems_vllm.patches import registry, target


def checks_of(*arguments):
    return {check.name: check for check in examine([LLAMA, *arguments]).checks}


def settings(**values):
    return "--kv-compression-config", json.dumps(values)


def model_folder(tmp_path, name):
    """A well-known model's configuration as a folder, which has no weights and no tokenizer."""
    shutil.copy(known_models.CONFIGS / f"{name}.json", tmp_path / "config.json")
    return str(tmp_path)


@pytest.fixture(scope="module")
def plain():
    return examine([LLAMA])


def test_a_server_that_can_start(plain):
    assert plain.status == "ok", [check for check in plain.checks if check.status != "ok"]
    assert (plain.model, plain.recipe, plain.recipe_is_assumed) == (LLAMA, "ems", True)
    found = {check.name: check.finding for check in plain.checks}
    assert found["layers"] == "all 4 compressed"
    assert found["attention"].startswith("TORCH_CPU, wrapped by ems-vllm")
    assert "hits change no answer" in found["prefix cache"]
    assert {"build", "vllm", "platform", "model runner", "parallelism", "memory"} <= set(found)


def test_several_refusals_are_all_named():
    """With the sentences of a server, which names the first one only."""
    arguments = ("--scheduler-cls", "mine.Scheduler", "--kv-cache-dtype", "fp8_e5m2")
    report = examine([LLAMA, *arguments])
    assert report.status == "refused"
    refused = {c.name: c.finding for c in report.checks if c.status == "refused"}
    assert set(refused) == {"scheduling", "dtypes"}
    with pytest.raises(ConfigError) as refusal:
        EngineArgs(
            LLAMA,
            scheduler_cls="mine.Scheduler",
            kv_cache_dtype="fp8_e5m2",
            additional_config={"kv_compression": "ems"},
        ).create_engine_config()
    assert str(refusal.value) in refused.values()


def test_refusals_stand_in_the_places_of_checks(plain):
    """Those that have none are lines of their own."""
    assert set(CHECK_OF.values()) <= {check.name for check in plain.checks} | {"protect"}
    known = {refusal.key for refusal in (*RULES, *LAYER_REFUSALS, HARMONY_ROLES)}
    assert set(CHECK_OF) <= known


@pytest.mark.parametrize(
    ("arguments", "name", "finding"),
    [
        (settings(global_queries="all"), "prefix cache", "may depend on what was asked before"),
        (settings(prefill_interval=512), "prompts", "often lost"),
        (settings(when="pressure"), "load", "depends on what else runs"),
        (
            settings(guard_share=0.1, guard_limit=0.2, guard_action="dense"),
            "guard",
            "depends on those before it",
        ),
        (("--max-model-len", "512"), "budget", "no request of at most 512 tokens"),
        (("--disable-log-stats",), "metrics", "only the log and the answers' usage"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else None,
)
def test_what_is_lost_is_said(arguments, name, finding):
    report = examine([LLAMA, "--kv-compression", "ems", *arguments])
    assert report.status == "degraded"
    (check,) = (check for check in report.checks if check.status != "ok")
    assert check.name == name
    assert finding in check.finding
    assert check.remedy


def test_what_is_wrong_with_the_settings_is_the_servers_sentence():
    (check,) = (c for c in examine([LLAMA, *settings(budget=64)]).checks if c.status == "refused")
    assert "kv_compression_config={'budget': 64} has no effect" in check.finding
    report = examine([LLAMA, "--kv-compression", "ems", *settings(budget=0)])
    assert "kv_compression_config.budget=0 is not allowed" in report.checks[-1].finding
    assert report.status == "refused"


def test_what_vllm_refuses_is_refused():
    report = examine([LLAMA, "--max-model-len", "99999999"])
    assert report.status == "refused"
    assert report.checks[-1].finding.startswith("ValidationError: User-specified max_model_len")


def test_layers_that_stay_are_named(tmp_path):
    report = examine([model_folder(tmp_path, "gemma-3-1b"), "--skip-tokenizer-init"])
    assert report.status == "degraded"
    layers = next(check for check in report.checks if check.name == "layers")
    assert layers.finding.startswith("4 of 26 compressed; left alone: 22 layers: SlidingWindow")
    # Windows hold as much either way, so a request shrinks by less than its full layers do.
    assert 1 < report.capacity.compressed / report.capacity.dense < 3


def test_a_window_that_can_be_lifted_is_pointed_out(tmp_path):
    folder = model_folder(tmp_path, "phi-3-mini-128k")
    arguments = (folder, "--skip-tokenizer-init", "--kv-cache-memory-bytes", str(1 << 38))
    report = examine(arguments)
    layers = next(check for check in report.checks if check.name == "layers")
    assert layers.status == "refused"
    assert "it has no layer that can be compressed" in layers.finding
    assert """--hf-overrides '{"sliding_window": null}'""" in layers.remedy
    lifted = examine([*arguments, "--hf-overrides", '{"sliding_window": null}'])
    assert lifted.status == "ok"


def test_a_model_that_is_refused_before_it_is_built(tmp_path):
    report = examine([model_folder(tmp_path, "deepseek-v3"), "--skip-tokenizer-init"])
    found = {check.name: check for check in report.checks}
    assert found["model"].status == "refused"
    assert "latent attention (MLA)" in found["model"].finding
    assert found["layers"].status == "unknown"


def test_ranks_and_stages_hold_a_part_of_the_cache_each(plain):
    blocks = plain.capacity.num_blocks
    for arguments in (("--tensor-parallel-size", "2"), ("--pipeline-parallel-size", "2")):
        assert examine([LLAMA, *arguments]).capacity.num_blocks == pytest.approx(
            2 * blocks, rel=0.01
        )
    alike = examine([LLAMA, "--data-parallel-size", "2"]).capacity
    assert alike.num_blocks == blocks


def test_a_pool_that_is_too_small_is_refused_as_vllm_does():
    memory = checks_of("--kv-cache-memory-bytes", str(110 << 20))["memory"]
    assert memory.status == "refused"
    assert "To serve at least one request with the model's max seq len (8192)" in memory.finding


def test_a_profile_of_another_model_is_refused():
    check = checks_of("--kv-compression", "compresskv")["budget"]
    assert check.status == "refused"
    assert "the model has 4 layers" in check.finding


@pytest.mark.parametrize("name", ["Qwen/NoSuch", "./no-such-folder"])
def test_a_model_that_is_not_here_is_answered_with_a_sentence(name):
    with pytest.raises(ConfigError, match="cannot be read: there is no such folder") as refusal:
        examine([name])
    assert "\n" not in str(refusal.value)


def test_compression_that_is_off_leaves_nothing_to_look_at():
    with pytest.raises(ConfigError, match="name a recipe"):
        examine([LLAMA, "--kv-compression", "off"])


def test_another_vllm_is_refused_before_anything_else(monkeypatch):
    monkeypatch.setattr(target, "installed_version", lambda: "0.99.0")
    report = examine([LLAMA])
    assert report.status == "refused"
    (check,) = (check for check in report.checks if check.status == "refused")
    assert "vllm==0.99.0 is not supported" in check.finding
    assert report.model is None


def test_functions_of_vllm_that_have_changed_are_all_named(monkeypatch):
    changed = ["one has changed.", "another has changed."]
    monkeypatch.setattr(registry, "problems", lambda: map(target.PatchError, changed))
    checks = examine([LLAMA]).checks
    assert [check.finding for check in checks if check.status == "refused"] == changed


def test_a_release_that_was_not_tested_is_said_to_be_one(monkeypatch):
    monkeypatch.setattr(target, "installed_version", lambda: "0.32.1")
    check = checks_of()["vllm"]
    assert check.status == "degraded"
    assert "this version was not tested" in check.finding


def test_an_extension_that_was_not_built_is_refused(monkeypatch):
    def missing():
        raise ImportError("no _C")

    monkeypatch.setattr(ems_vllm, "build_info", missing)
    (check,) = installed_module.installed()
    assert (check.name, check.status) == ("build", Status.REFUSED)


@pytest.mark.parametrize(
    ("error", "name", "status"),
    [
        (ValueError("no backend for it"), "attention", "refused"),
        (AttributeError("no such thing"), "layers", "unknown"),
    ],
)
def test_a_model_that_cannot_be_built_here(error, name, status, monkeypatch):
    monkeypatch.setattr(examine_module, "build", mock.Mock(side_effect=error))
    report = examine([LLAMA])
    assert report.status == status
    assert (report.checks[-1].name, report.checks[-1].status) == (name, status)
    assert str(error) in report.checks[-1].finding


class TestGPU:
    """What is said of a GPU, of which there is none here."""

    @pytest.fixture
    def on_cuda(self, monkeypatch):
        vllm_config = EngineArgs(LLAMA).create_engine_config()
        monkeypatch.setattr(vllm_config.device_config, "device_type", "cuda")
        return vllm_config

    @staticmethod
    def graphs(vllm_config, recipe):
        found = features(vllm_config, load_config({"recipe": recipe}), has_metrics=True)
        return next(check for check in found if check.name == "CUDA graphs")

    def test_decoding_without_graphs_loses_something(self, on_cuda):
        compilation = on_cuda.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        assert self.graphs(on_cuda, "ems").status == "ok"
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        assert self.graphs(on_cuda, "ems").status == "degraded"

    def test_drafts_of_heads_that_share_unequally_lose_full_graphs(self, on_cuda):
        on_cuda.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        on_cuda.speculative_config = SimpleNamespace(method="ngram", num_speculative_tokens=3)
        assert self.graphs(on_cuda, "ems").status == "ok"
        assert self.graphs(on_cuda, "adakv").status == "degraded"

    @pytest.mark.parametrize(
        ("archs", "status"),
        [
            (["8.0", "9.0a"], "ok"),
            (["9.0+PTX"], "ok"),
            (["8.0+PTX"], "degraded"),
            # For which there is a rule.
            (["12.0"], "ok"),
        ],
    )
    def test_kernels_that_a_driver_has_to_compile(self, archs, status, monkeypatch):
        gpu = SimpleNamespace(
            is_cuda=lambda: True, get_device_capability=lambda: DeviceCapability(9, 0)
        )
        monkeypatch.setattr(platforms, "current_platform", gpu)
        assert installed_module._build("1.0", archs, ["avx2"]).status == status


class TestCommand:
    """What is printed, and exit codes."""

    @staticmethod
    def run(*arguments):
        return CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, ["doctor", LLAMA, *arguments])

    def test_people_read_it_at_80_columns(self):
        result = self.run("--enforce-eager")
        assert result.exit_code == 0
        lines = result.stdout.splitlines()
        assert max(map(len, lines)) <= 80
        assert "--kv-compression was not given; 'ems' is assumed." in lines
        assert "ok: it can start, and nothing is lost" in lines

    def test_servers_that_are_started_later_log_as_ever(self, monkeypatch):
        monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
        self.run()
        assert "VLLM_LOGGING_LEVEL" not in os.environ

    def test_programs_read_json(self):
        result = self.run("--json", "--kv-cache-dtype", "fp8_e5m2")
        assert result.exit_code == 1
        report = json.loads(result.stdout)
        assert report["schema_version"] == 1
        assert report["status"] == "refused"
        assert {check["status"] for check in report["checks"]} == {"ok", "unknown", "refused"}

    def test_arguments_that_vllm_does_not_know(self):
        result = self.run("--no-such-flag")
        assert result.exit_code == 2
        assert "unrecognized arguments: --no-such-flag" in result.stderr
