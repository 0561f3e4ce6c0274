# SPDX-License-Identifier: Apache-2.0
"""Models that mix attention kinds: full-attention layers compress, the others stay as they are."""

from types import SimpleNamespace

import pytest
import torch
from engine import tiny_models
from engine.arrivals import Arrival, serve
from engine.harness import engine, tokens
from engine.tiny_models import MAX_MODEL_LEN

import ems_vllm
from ems_vllm.config import ConfigError, load_config
from ems_vllm.engine.worker.memory import KERNEL_SCRATCH_BYTES

pytestmark = pytest.mark.slow

LONG = tokens(500)
# One is the beginning of another: a hit that went too far would be compressed in place.
PROMPTS = [tokens(5, seed=5), LONG[:300], LONG]
MAX_TOKENS = 32
# TORCH_CPU: for some of these models vLLM would choose a backend that needs an accelerator.
OPTIONS = {"max_model_len": MAX_MODEL_LEN, "attention_backend": "TORCH_CPU"}
# Models, and the managers of their other layers.
MODELS = {
    "gemma2": "SlidingWindowManager",
    "gemma3": "SlidingWindowManager",
    "gemma4": "SlidingWindowManager",
    "gpt_oss": "SlidingWindowManager",
    "llama4": "ChunkedLocalAttentionManager",
    "lfm2": "MambaManager",
}


def settings(budget: int, recipe: str = "ems", **more: object) -> dict[str, object]:
    return {
        "recipe": recipe,
        "budget": budget,
        "recent_window": 32,
        "recompress_interval": 64,
        "min_blocks_saved": 1,
        **more,
    }


@pytest.fixture(scope="module", autouse=True)
def stand_ins():
    with tiny_models.stand_ins():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gives the folder of a model by its name; each is made once."""
    folders = {}

    def find(name):
        if name not in folders:
            build = getattr(tiny_models, name)
            folders[name] = tiny_models.save(build, tmp_path_factory.mktemp(name))
        return folders[name]

    return find


def hugging_face(folder, prompt, num_tokens):
    from transformers import AutoModelForCausalLM

    # The other implementations leave the soft cap and the sinks out.
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    answer = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return answer[0, len(prompt) :].tolist()


@pytest.mark.parametrize("model", MODELS)
def test_unlimited_budget_is_identical_to_plain_vllm(model, folder):
    with engine(None, folder(model), **OPTIONS) as probe:
        expected = probe.generate(PROMPTS, MAX_TOKENS)
    assert expected[1][:8] == hugging_face(folder(model), PROMPTS[1], 8)
    # A scorer that reads queries is refused where they are soft-capped.
    recipe = "knorm" if model == "gemma2" else "ems"
    with engine(settings(4096, recipe), folder(model), **OPTIONS) as probe:
        assert [probe.generate(PROMPTS, MAX_TOKENS) for _ in range(2)] == [expected] * 2
        assert probe.stats()["num_compactions"] == 0


@pytest.mark.parametrize("model", [model for model in MODELS if model != "gemma2"])
def test_only_full_attention_layers_are_compressed(model, folder):
    with engine(settings(64, "knorm"), folder(model), **OPTIONS) as probe:
        managers = {type(manager).__name__ for manager in probe.managers}
        assert managers == {"CompressedAttentionManager", MODELS[model]}
        answers = probe.generate(PROMPTS, MAX_TOKENS)
        stats = probe.stats()
        assert stats["num_layers"] == 2
        assert stats["num_compactions"] >= 2
        assert stats["num_entries_kept"] < stats["num_entries_in"]
        again = probe.generate_outputs(PROMPTS, MAX_TOKENS)
        # Of 500 tokens, the budget and the recent window are never hit, nor are partial blocks;
        # and a state is kept only where a chunk ended.
        assert again[-1].num_cached_tokens >= 256
        assert [list(output.outputs[0].token_ids) for output in again] == answers
        assert probe.generate(PROMPTS, MAX_TOKENS) == answers
        probe.assert_pool_is_empty()


def test_preempted_requests_of_a_model_with_states_give_the_same_answers(folder):
    prompts = [tokens(length, seed=length) for length in (420, 380, 300)]
    options = {**OPTIONS, "max_model_len": 640}
    with engine(settings(64, "knorm"), folder("lfm2"), **options) as probe:
        expected = probe.generate(prompts, 80)
        assert probe.num_preemptions == 0
    with engine(settings(64, "knorm"), folder("lfm2"), num_blocks=15, **options) as probe:
        assert probe.generate(prompts, 80) == expected
        assert probe.num_preemptions > 0
        probe.assert_pool_is_empty()


def test_prompts_that_end_just_behind_a_block_are_served(folder):
    """Where states are cached, vLLM ends chunks at blocks; whoever waits must not wait for ever."""
    compression = settings(64, "ems", query_ring_rows=1)
    with engine(compression, folder("lfm2"), **OPTIONS) as probe:
        assert probe.scheduler.need_mamba_block_aligned_split
        block_size = probe.scheduler.cache_config.block_size
        count = -(-400 // block_size)
        arrivals = [
            Arrival(0, tokens(count * block_size + beyond, seed=beyond), MAX_TOKENS)
            for beyond in (0, 1, 2)
        ]

        def limit(step):
            assert step < 1000, "no progress"

        outputs = serve(probe, arrivals, limit)
        assert {len(output.outputs[0].token_ids) for output in outputs} == {MAX_TOKENS}
        assert probe.stats()["num_compactions"] >= 3


def test_scores_and_cache_together_fit_the_memory(folder):
    memory, workspace = 112 << 20, 40
    options = {**OPTIONS, "kv_cache_memory_bytes": memory, "max_num_seqs": 4}
    with engine(settings(64, workspace_mib=workspace), folder("gemma3"), **options) as probe:
        tensors = probe.worker.compression.groups[0].tensors
        caches = {
            cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes()
            for cache in probe.worker.model_runner.kv_caches
        }
        taken = sum(caches.values()) + tensors.scores.nbytes + tensors.query_ring.queries.nbytes
        taken += (workspace << 20) + KERNEL_SCRATCH_BYTES
        assert 0.95 * memory < taken <= memory
        probe.generate(PROMPTS, MAX_TOKENS)
        assert probe.stats()["num_compactions"] >= 2
        probe.assert_pool_is_empty()


@pytest.fixture
def refused_start():
    """An engine that fails while it starts does not shut down its worker, which would do this."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from ems_vllm.engine.attention import restore_backends

    yield
    restore_backends()
    cleanup_dist_env_and_memory()


@pytest.mark.usefixtures("refused_start")
def test_layers_that_vllm_would_put_into_one_group_are_refused(folder):
    options = {**OPTIONS, "disable_hybrid_kv_cache_manager": True}
    with (
        pytest.raises(ConfigError, match=r"block tables of their own.*--disable-hybrid"),
        engine(settings(64, "knorm"), folder("gemma3"), **options),
    ):
        pass


@pytest.mark.usefixtures("refused_start")
def test_a_share_of_a_layer_that_is_not_compressed_is_refused(folder):
    message = (
        r"kv_compression_config.allocator='pyramid' cannot be combined with .*: it deals to other "
        r"layers than are compressed \(a share to model\.layers\.0\.self_attn\.attn, which is not "
        r"compressed\); choose the allocator uniform, or a profile of this very model, or set "
        r"kv_compression to off\.$"
    )
    with (
        pytest.raises(ConfigError, match=message),
        engine(settings(64, "knorm", allocator="pyramid"), folder("gemma3"), **OPTIONS),
    ):
        pass


def test_full_attention_layers_share_a_budget_by_a_profile_of_them(folder):
    profile = {"ratios": [0.5], "fractions": {2: [0.8], 5: [0.2]}}
    allocator = {"name": "profile", "profile": profile, "uniform_share": 0}
    with engine(settings(64, allocator=allocator), folder("gemma3"), **OPTIONS) as probe:
        answers = probe.generate(PROMPTS, MAX_TOKENS)
        first, second = probe.llm.collective_rpc("kv_compression_stats")[0]
        assert first["num_compactions"] == second["num_compactions"] == 2
        # Of 64 entries on the mean: 6.4 and 1.6 of 4 blocks a layer.
        assert first["num_entries_kept"] == 2 * 96
        assert second["num_entries_kept"] == 2 * 32
        # Hits in the prefix cache of all kinds of layers.
        outputs = probe.generate_outputs(PROMPTS, MAX_TOKENS)
        assert outputs[-1].num_cached_tokens >= 256
        assert [list(output.outputs[0].token_ids) for output in outputs] == answers
        probe.assert_pool_is_empty()


@pytest.mark.usefixtures("refused_start")
def test_soft_capped_logits_are_refused_where_queries_are_scored(folder):
    with (
        pytest.raises(ConfigError, match="soft-capped attention logits"),
        engine(settings(64, "ems"), folder("gemma2"), **OPTIONS),
    ):
        pass


@pytest.mark.usefixtures("refused_start")
def test_a_model_whose_head_size_has_no_cuda_kernel_is_refused_on_a_gpu(folder, on_cuda):
    on_cuda(64, 128)
    message = (
        r"no layer that can be compressed \(.*, \d+ layers: head_size 32, for which there is no "
        r"CUDA kernel \(there are for 64, 128\)\); serve a model that has one"
    )
    with (
        pytest.raises(ConfigError, match=message),
        engine(settings(64, "knorm"), folder("gemma3"), **OPTIONS),
    ):
        pass


@pytest.fixture
def on_cuda(monkeypatch):
    """Call it with head sizes: layers are chosen as on a GPU with kernels for these.

    The pairs of dtypes are those of the CPU unless others are given.
    """
    from ems_vllm.engine.worker import layer_choice

    build = ems_vllm.build_info()

    def set_sizes(*sizes, cuda_dtypes=build["cpu_dtypes"]):
        platform = SimpleNamespace(is_cuda=lambda: True)
        info = {**build, "cuda_head_sizes": sizes, "cuda_dtypes": cuda_dtypes}
        monkeypatch.setattr(layer_choice, "current_platform", platform)
        monkeypatch.setattr(ems_vllm, "build_info", lambda: info)

    return set_sizes


class TestLayerChoice:
    """Kinds of layers that no model here has."""

    @staticmethod
    def spec(**fields):
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        defaults = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
        return FullAttentionSpec(**{**defaults, **fields})

    @staticmethod
    def layer(**fields):
        defaults = {"impl": SimpleNamespace(), "dtype": torch.float32, "kv_cache_dtype": "auto"}
        return SimpleNamespace(**{**defaults, **fields})

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"head_size_v": 16}, "differ in size"),
            ({"non_causal": True}, "not causal"),
            ({"sliding_window": 64}, "sliding window"),
            ({"attention_chunk_size": 64}, "chunked"),
        ],
    )
    def test_special_full_attention_is_kept(self, fields, reason):
        from ems_vllm.engine.worker.layer_choice import choose_layers

        choice = choose_layers({"plain": self.spec(), "special": self.spec(**fields)})
        assert choice.compressed == {"plain"}
        assert reason in choice.describe_kept()

    def test_on_a_gpu_layers_without_kernels_are_kept(self, on_cuda):
        from ems_vllm.engine.worker.layer_choice import choose_layers

        specs = {f"size {size}": self.spec(head_size=size) for size in (32, 64, 72, 128)}
        assert choose_layers(specs).compressed == specs.keys()
        on_cuda(64, 128)
        choice = choose_layers(specs)
        assert choice.compressed == {"size 64", "size 128"}
        assert choice.kept["size 72"].startswith("head_size 72, for which there is no CUDA kernel")

    @pytest.mark.parametrize(
        ("recipe", "query", "cache", "reason"),
        [
            ("ems", torch.float32, "fp8", "float32 queries with a float8_e4m3fn cache"),
            ("ems", torch.bfloat16, "fp8", None),
            ("ems", torch.bfloat16, "auto", "bfloat16 queries with a float16 cache"),
            ("knorm", torch.float32, "fp8", None),
            ("knorm", torch.bfloat16, "auto", None),
            ("knorm", torch.bfloat16, "fp8_e5m2", "a uint8 cache, which no kernel reads"),
        ],
    )
    def test_on_a_gpu_dtypes_without_kernels_are_kept(self, on_cuda, recipe, query, cache, reason):
        from ems_vllm.engine.worker.layer_choice import choose_layers

        pairs = [("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16")]
        pairs += [("bfloat16", "float8_e4m3fn"), ("float16", "float8_e4m3fn")]
        on_cuda(32, cuda_dtypes=pairs)
        scorer = load_config({"recipe": recipe, "budget": 64}).scorer
        layers = {"layer": self.layer(dtype=query, kv_cache_dtype=cache)}
        # As vLLM has it: float8 is stored as bytes.
        stored = torch.float16 if cache == "auto" else torch.uint8
        choice = choose_layers({"layer": self.spec(dtype=stored)}, layers, scorer)
        if reason is None:
            assert choice.compressed == {"layer"}
        else:
            assert choice.kept["layer"].startswith(reason)

    @pytest.mark.parametrize(
        ("recipe", "impl", "is_compressed"),
        [
            ("knorm", {"alibi_slopes": torch.ones(4)}, False),
            ("knorm", {"alibi_slopes": None, "logits_soft_cap": 0}, True),
            ("knorm", {"logits_soft_cap": 50.0}, True),
            ("ems", {"logits_soft_cap": 50.0}, False),
            ("snapkv", {"logits_soft_cap": 50.0}, False),
            ("h2o", {"logits_soft_cap": 50.0}, False),
            ("ems", {"logits_soft_cap": 0}, True),
        ],
    )
    def test_biased_and_soft_capped_logits(self, recipe, impl, is_compressed):
        from ems_vllm.engine.worker.layer_choice import choose_layers

        layers = {"layer": self.layer(impl=SimpleNamespace(**impl))}
        scorer = load_config({"recipe": recipe, "budget": 64}).scorer
        choice = choose_layers({"layer": self.spec()}, layers, scorer)
        assert choice.compressed == ({"layer"} if is_compressed else set())


class TestGrouping:
    """How vLLM groups layers whose specs are compressed."""

    @staticmethod
    def compressed(**fields):
        from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
        from ems_vllm.engine.observation import ObservationSettings

        plan_settings = load_config(settings(64)).plan_settings
        plain = TestLayerChoice.spec(**fields)
        observation = ObservationSettings(obs_window=0, score_tokens=None, ring_rows=None)
        return CompressedAttentionSpec.compress(plain, plan_settings, observation)

    @staticmethod
    def config(specs, disable_hybrid=False):
        """The KV-cache configuration that vLLM makes of specs by layer name."""
        from engine.harness import LLAMA
        from engine.vllm_imports import get_kv_cache_configs
        from vllm.engine.arg_utils import EngineArgs

        vllm_config = EngineArgs(
            LLAMA, block_size=16, disable_hybrid_kv_cache_manager=disable_hybrid
        ).create_engine_config()
        vllm_config.cache_config.kv_cache_layout = "LBNHC"
        return get_kv_cache_configs(vllm_config, [dict(specs)], [256 << 20])[0]

    def test_layers_of_different_sizes_get_groups_of_their_own(self):
        specs = {"small": self.compressed(), "large": self.compressed(head_size=64)}
        groups = self.config(specs).kv_cache_groups
        assert {
            (type(group.kv_cache_spec).__name__, group.kv_cache_spec.block_size, *group.layer_names)
            for group in groups
        } == {
            ("CompressedAttentionSpec", 32, "small"),
            ("CompressedAttentionSpec", 16, "large"),
        }

    @pytest.mark.parametrize("compressed_first", [True, False])
    @pytest.mark.parametrize("other_kind", ["sliding", "plain"])
    def test_a_compressed_layer_beside_a_plain_one_is_noticed(self, compressed_first, other_kind):
        from vllm.v1.kv_cache_interface import SlidingWindowSpec, replace_as

        from ems_vllm.engine.worker.layer_choice import mixed_layer

        other = TestLayerChoice.spec()
        if other_kind == "sliding":
            other = replace_as(
                other,
                SlidingWindowSpec,
                drop=("attention_chunk_size", "non_causal"),
                sliding_window=64,
            )
        specs = {"full": self.compressed(), "other": other}
        if not compressed_first:
            specs = dict(reversed(specs.items()))
        config = self.config(specs, disable_hybrid=True)
        assert mixed_layer(config, specs) in specs

    def test_a_compressed_layer_beside_a_sliding_window_is_right_by_default(self):
        from vllm.v1.kv_cache_interface import SlidingWindowSpec, replace_as

        from ems_vllm.engine.worker.layer_choice import mixed_layer

        sliding = replace_as(
            TestLayerChoice.spec(),
            SlidingWindowSpec,
            drop=("attention_chunk_size", "non_causal"),
            sliding_window=64,
        )
        specs = {"full": self.compressed(), "sliding": sliding}
        config = self.config(specs)
        assert len(config.kv_cache_groups) == 2
        assert mixed_layer(config, specs) is None
