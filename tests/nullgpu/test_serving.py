# SPDX-License-Identifier: Apache-2.0
"""vLLM's real GPU path, dense and compressed: what is captured, launched and waited for."""

import importlib.util

import pytest
from nullgpu.serving import CHUNK, COMPRESSION, REQUESTS, Run, count, serve

# Of the model.
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 8, 4, 64
BLOCK_SIZE = 16
OBS_WINDOW = 16
# The last queries of a prompt that score: as many as a hit in the prefix cache always leaves.
NUM_SCORING = COMPRESSION["budget"] + COMPRESSION["recent_window"]
# The shortest prompt that is compressed: one whole block beside what is kept and what is recent.
COMPRESSED_FROM = NUM_SCORING + BLOCK_SIZE
RUNNERS = (2, 1)
# What compression may add to a step in which every request decodes: recording the queries of each
# layer, the metadata, and bringing ring slots and first columns to the GPU.
MOST_EXTRA_PER_DECODE = NUM_LAYERS + 6
# And to one that compacts: 15 launches of ours, and the policy's arithmetic is torch's, a kernel
# for every operation, on as many layers at once as memory is meant for; 8 are to measure it. EMS
# took 134 to 143 in all when the bound was set, for one request as for two
# (tests/policies/test_launches.py).
MOST_EXTRA_PER_COMPACTION = 150
# Each of these works on all layers, heads and requests that are due, but of EMS's orders on one.
COMPACTION_KERNELS = {
    "ems::score_window_lse_kernel": 1,
    "ems::score_window_kernel": 1,
    "ems::vector_norms_kernel": 1,
    "ems::key_moments_kernel": 1,
    "ems::key_moments_sum_kernel": 1,
    "ems::key_scores_kernel": 1,
    "ems::rank_entries_kernel": 3,
    "ems::select_entries_kernel": 1,
    "ems::centre_norms_kernel": 1,
    "ems::assign_classes_kernel": 1,
    "ems::group_members_kernel": 1,
    "ems::merge_classes_kernel": 1,
    "ems::write_targets_kernel": 1,
}
SCORE, SCORE_LSE = "ems::score_queries_sm90_kernel", "ems::score_queries_lse_sm90_kernel"
RECORD, HEAD_PAGES = "ems::record_queries_kernel", "ems::head_pages_kernel"
FLASH = {"attention_backend": "FLASH_ATTN"}
DENSE = Run(None, FLASH)
EMS = Run(arguments=FLASH)
GRAPHS = {
    "NONE": {"enforce_eager": True},
    "PIECEWISE": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "FULL_DECODE_ONLY": {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}},
}
BY_GRAPHS = {mode: Run(arguments=FLASH | chosen) for mode, chosen in GRAPHS.items()}
# vLLM would leave a single token of the first for the second step, and take as much of the second.
SHORT_CHUNKS = Run(arguments=FLASH, requests=((CHUNK + 1, 8), (CHUNK - 1, 8), (CHUNK, 8)))
# In one chunk, so they are due in the same step.
TOGETHER = Run(arguments=FLASH, requests=((CHUNK // 2, 40), (CHUNK // 2, 40)))
# Scores and query ring of more than 10 MiB each, so that torch allocates them by themselves.
PREFIX_SCORE_TOKENS, RING_ROWS = 1 << 19, 256
LARGE = FLASH | {
    "max_num_seqs": RING_ROWS,
    "num_blocks": 200,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]},
}
SLEEPING_DENSE = Run(None, LARGE, sleeps=True)
SLEEPING = Run(
    COMPRESSION | {"prefix_score_tokens": PREFIX_SCORE_TOKENS, "query_ring_rows": RING_ROWS},
    LARGE,
    sleeps=True,
)
# Half of the layers keep much, half little: two KV-cache groups.
LEVELS = Run(COMPRESSION | {"allocator": {"name": "pyramid", "num_levels": 2}}, FLASH)
# What a compaction keeps is decided on the host.
COVERED = Run(COMPRESSION | {"coverage": 0.5, "min_budget": 16}, FLASH)
# Prompts are compacted as they come; requests protect tokens, and what compactions change in
# attention is measured. The shortest has none of these.
WITHIN_PROMPTS = Run(COMPRESSION | {"prefill_interval": 64}, FLASH)
PROTECTED = Run(
    COMPRESSION | {"guard_share": 1.0},
    FLASH,
    requests=REQUESTS[:2],
    extra_args={"kv_protect": ["100-130"]},
)
UNEQUAL_RUNS = (COVERED, WITHIN_PROMPTS, PROTECTED)
# The kv_heads of a layer share unequally what it keeps, in each layer others.
SHARES = (0.9, 0.1, 0.6, 0.4)
BY_HEAD = COMPRESSION | {
    "allocator": {
        "name": "profile",
        "profile": {
            "ratios": [0.5],
            "fractions": {str(layer): [0.5] for layer in range(NUM_LAYERS)},
            "head_fractions": {
                str(layer): [[share] for share in SHARES[layer:] + SHARES[:layer]]
                for layer in range(NUM_LAYERS)
            },
        },
        "uniform_share": 0,
        "num_levels": 1,
        "per_head": True,
    }
}
HEAD_RUNS = {
    (backend, mode): Run(
        BY_HEAD, {"attention_backend": backend, "compilation_config": {"cudagraph_mode": mode}}
    )
    for backend, mode in (
        ("TRITON_ATTN", "FULL_AND_PIECEWISE"),
        ("FLASH_ATTN", "FULL_AND_PIECEWISE"),
        ("FLASH_ATTN", "FULL_DECODE_ONLY"),
        ("FLASH_ATTN", "PIECEWISE"),
        ("FLASH_ATTN", "NONE"),
    )
}
# What kv_heads add to a decoding step: in each layer their pages, and FlashAttention's schedule,
# which otherwise is made once for all; places and first tokens of the rows are brought to the GPU.
MOST_EXTRA_BY_HEAD = 2 * NUM_LAYERS + 2
FLASH_RUNS = (DENSE, EMS, *BY_GRAPHS.values(), SHORT_CHUNKS, TOGETHER)
OTHER_BACKENDS = {
    name: Run(arguments={"attention_backend": name}) for name in ("TRITON_ATTN", "FLEX_ATTENTION")
}


def with_flash(runner, run):
    return serve(runner, *FLASH_RUNS)[FLASH_RUNS.index(run)]


def of_backend(runner, name):
    return serve(runner, *OTHER_BACKENDS.values())[list(OTHER_BACKENDS).index(name)]


def of_unequal(runner, run):
    return serve(runner, *UNEQUAL_RUNS)[UNEQUAL_RUNS.index(run)]


def by_head(runner, *name):
    return serve(runner, *HEAD_RUNS.values())[list(HEAD_RUNS).index(name)]


def assert_served(found, requests=REQUESTS):
    """To its end, compressed, with no call that CUDA would have refused."""
    assert found.answer_lens == [num_new for _, num_new in requests]
    assert found.num_used_blocks == 0
    events = sum((step.events for step in found.steps), found.start)
    assert [event for event in events if event.kind == "error"] == []
    if found.stats:
        assert found.stats["num_compactions"] > 0
        assert found.stats["num_entries_kept"] < found.stats["num_entries_in"]


def assert_captures_are_sound(found, ours=(RECORD,)):
    # Work on another stream than the one that is captured would be done once and not replayed.
    assert [event for event in found.start if event.how == "beside"] == []
    # Where its pages lie is not known when the graph is replayed.
    captured = [event for event in found.start if event.how == "captured"]
    assert [event for event in captured if "pageable" in event.name] == []
    assert {event.name for event in captured if event.is_ours} <= set(ours)


def num_scoring(step):
    """Prompt queries of a step that have to score."""
    return sum(
        len(range(max(start, prompt_len - NUM_SCORING), min(stop, prompt_len)))
        for start, stop, prompt_len in step.spans
        if prompt_len >= COMPRESSED_FROM
    )


def assert_scored(found, requests=REQUESTS, passes=(SCORE,)):
    """Every query that has to score does, in every layer, and no step launches more for it."""
    for step in found.steps:
        launched = {
            event.name: n for event, n in step.events.items() if "score_queries" in event.name
        }
        expected = passes if num_scoring(step) else ()
        assert launched == dict.fromkeys(expected, NUM_LAYERS), step.spans
    compressed = [length for length, _ in requests if length >= COMPRESSED_FROM]
    assert sum(map(num_scoring, found.steps)) == NUM_SCORING * len(compressed)
    assert sum(step.num_prompt for step in found.steps) == sum(length for length, _ in requests)


def full_decodes(found):
    steps = [s for s in found.steps if s.only_decodes and len(s.spans) == len(REQUESTS)]
    assert steps
    return steps


@pytest.mark.parametrize("runner", RUNNERS)
def test_dense_vllm_runs_as_the_baseline(runner):
    found = with_flash(runner, DENSE)
    assert_served(found)
    assert found.backend == "FlashAttentionBackend"
    events = sum((step.events for step in found.steps), found.start)
    assert count(events, is_ours=True) == 0


@pytest.mark.parametrize("runner", RUNNERS)
def test_flash_attention_is_served_compressed_in_graphs(runner):
    found = with_flash(runner, EMS)
    assert_served(found)
    assert_captures_are_sound(found)
    assert found.runner.startswith("vllm.v1.worker.gpu" + (".m" if runner == 2 else "_m"))
    assert found.backend == "CompressedFlashAttentionBackend"
    assert found.graphs == "FULL_AND_PIECEWISE"
    # FlashAttention hands over its log-sum-exp: the pass that would compute it is not needed.
    assert_scored(found)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("backend", OTHER_BACKENDS)
def test_other_backends_are_served_compressed(runner, backend):
    found = of_backend(runner, backend)
    assert_served(found)
    assert_captures_are_sound(found)
    assert found.backend.startswith("Compressed")
    assert backend.split("_")[0].lower() in found.backend.lower()
    # These keep no log-sum-exp.
    assert_scored(found, passes=(SCORE_LSE, SCORE))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs flashinfer")
def test_flashinfer_is_served_compressed(runner):
    (found,) = serve(runner, Run(arguments={"attention_backend": "FLASHINFER"}))
    assert_served(found)
    assert_captures_are_sound(found)
    assert found.backend == "CompressedFlashInferBackend"


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("mode", GRAPHS)
def test_graph_modes(runner, mode):
    found = with_flash(runner, BY_GRAPHS[mode])
    assert_served(found)
    assert_captures_are_sound(found)
    assert found.graphs == mode
    in_graph = "replayed" if mode == "FULL_DECODE_ONLY" else "eager"
    for step in full_decodes(found):
        assert step.count(name=RECORD, how=in_graph) == NUM_LAYERS
    assert (count(found.start, how="captured") > 0) == (mode != "NONE")


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_decoding_step_adds_one_launch_a_layer_and_no_waiting(runner):
    dense, ems = (with_flash(runner, run) for run in (DENSE, EMS))
    # The first ones still allocate; vLLM itself does more in a step that begins a block.
    dense_work = max(step.count(runs=True) for step in full_decodes(dense)[4:])
    dense_waits = max(step.count(kind="synchronize") for step in full_decodes(dense)[4:])
    for step in full_decodes(ems)[4:]:
        assert step.count(name=RECORD, how="replayed") == NUM_LAYERS
        assert step.count(name="ems::shift_block_tables_kernel") == 1
        assert step.count(is_ours=True) == NUM_LAYERS + 1
        assert step.count(runs=True) <= dense_work + MOST_EXTRA_PER_DECODE
        assert step.count(kind="synchronize") == dense_waits
        assert step.count(kind="allocate") == 0


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("run", [EMS, TOGETHER], ids=["alone", "two together"])
def test_a_compaction_launches_each_kernel_once_for_all_and_waits_for_nothing(runner, run):
    dense, ems = (with_flash(runner, each) for each in (DENSE, run))
    compacting = [step for step in ems.steps if step.num_compactions]
    assert compacting
    if run is TOGETHER:
        assert {step.num_compactions for step in compacting} == {2}
    most_waits = max(step.count(kind="synchronize") for step in dense.steps)
    plain = max(step.count(runs=True) for step in ems.steps if not step.num_compactions)
    for step in compacting:
        launched = {event.name: n for event, n in step.events.items() if event.is_ours}
        assert {name: launched.get(name) for name in COMPACTION_KERNELS} == COMPACTION_KERNELS
        assert step.count(runs=True) <= plain + MOST_EXTRA_PER_COMPACTION
        assert step.count(kind="synchronize") <= most_waits


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("run", FLASH_RUNS[1:], ids=["ems", *GRAPHS, "short chunks", "together"])
def test_our_kernels_run_on_the_stream_of_the_model(runner, run):
    for step in with_flash(runner, run).steps:
        model = {event.stream for event in step.events if event.name == "cublasGemmEx"}
        assert {event.stream for event in step.events if event.is_ours} <= model


@pytest.mark.parametrize("runner", RUNNERS)
def test_levels_of_layers_are_served_in_graphs_and_cost_a_launch_each(runner):
    (found,) = serve(runner, LEVELS)
    assert_served(found)
    assert_captures_are_sound(found)
    assert_scored(found)
    for step in full_decodes(found)[4:]:
        assert step.count(name=RECORD, how="replayed") == NUM_LAYERS
        assert step.count(name="ems::shift_block_tables_kernel") == 2
        assert step.count(is_ours=True) == NUM_LAYERS + 2
    compacting = [step for step in found.steps if step.num_compactions]
    assert compacting
    for step in compacting:
        launched = {event.name: n for event, n in step.events.items() if event.is_ours}
        twice = {name: 2 * count for name, count in COMPACTION_KERNELS.items()}
        assert {name: launched.get(name) for name in COMPACTION_KERNELS} == twice


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_coverage_waits_once_for_each_compaction_and_never_else(runner):
    ems, covered = with_flash(runner, EMS), of_unequal(runner, COVERED)
    assert_served(covered)
    assert_captures_are_sound(covered)
    assert_scored(covered)
    # Scores are whatever the memory holds; only that there is a decision is seen here.
    most_waits = max(step.count(kind="synchronize") for step in ems.steps)
    compacting = [step for step in covered.steps if step.num_compactions]
    assert compacting
    for step in covered.steps:
        assert step.count(kind="synchronize") <= most_waits + (step.num_compactions > 0)
    for step in compacting:
        launched = {event.name: n for event, n in step.events.items() if event.is_ours}
        assert {name: launched.get(name) for name in COMPACTION_KERNELS} == COMPACTION_KERNELS
    waits = {step.count(kind="synchronize") for step in full_decodes(ems)[4:]}
    for step in full_decodes(covered)[4:]:
        assert step.count(is_ours=True) == NUM_LAYERS + 1
        assert step.count(kind="synchronize") in waits


@pytest.mark.parametrize("runner", RUNNERS)
def test_prompts_are_compacted_as_they_come_without_waiting(runner):
    ems, found = with_flash(runner, EMS), of_unequal(runner, WITHIN_PROMPTS)
    assert_served(found)
    assert_captures_are_sound(found)
    most_waits = max(step.count(kind="synchronize") for step in ems.steps)
    within = [step for step in found.steps if step.num_compactions and step.num_prompt]
    assert len(within) > 5
    for step in found.steps:
        assert step.count(kind="synchronize") <= most_waits
        if step.num_compactions:
            launched = {event.name: n for event, n in step.events.items() if event.is_ours}
            assert {name: launched.get(name) for name in COMPACTION_KERNELS} == COMPACTION_KERNELS


@pytest.mark.parametrize("runner", RUNNERS)
def test_tokens_are_protected_and_errors_measured_without_waiting(runner):
    ems, found = with_flash(runner, EMS), of_unequal(runner, PROTECTED)
    assert_served(found, PROTECTED.requests)
    assert_captures_are_sound(found)
    most_waits = max(step.count(kind="synchronize") for step in ems.steps)
    assert any(step.num_compactions for step in found.steps)
    for step in found.steps:
        assert step.count(kind="synchronize") <= most_waits


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("backend", "mode"), HEAD_RUNS)
def test_unequal_kv_heads_are_served_in_graphs_of_decodes(runner, backend, mode):
    found = by_head(runner, backend, mode)
    assert_served(found)
    assert_captures_are_sound(found, {RECORD, HEAD_PAGES})
    assert_scored(found, passes=(SCORE,) if backend == "FLASH_ATTN" else (SCORE_LSE, SCORE))
    assert found.backend.startswith("Compressed")
    assert found.graphs == mode
    for step in found.steps:
        is_in_graph = mode.startswith("FULL") and step.num_prompt == 0
        how = "replayed" if is_in_graph else "eager"
        assert step.count(name=HEAD_PAGES, how=how) == NUM_LAYERS
        assert step.count(name=HEAD_PAGES) == NUM_LAYERS
        if backend == "TRITON_ATTN":
            # With few rows it cuts each into segments, as with few requests.
            assert step.count(name="reduce_segments", how=how) == NUM_LAYERS * is_in_graph


@pytest.mark.parametrize("runner", RUNNERS)
def test_unequal_kv_heads_add_launches_to_a_decoding_step_and_no_waiting(runner):
    ems = with_flash(runner, EMS)
    most_waits = max(step.count(kind="synchronize") for step in ems.steps)
    uniform = full_decodes(ems)[4:]
    most_work = max(step.count(runs=True) for step in uniform)
    (waits,) = {step.count(kind="synchronize") for step in uniform}
    found = by_head(runner, "FLASH_ATTN", "FULL_AND_PIECEWISE")
    for step in full_decodes(found)[4:]:
        assert step.count(is_ours=True) == 2 * NUM_LAYERS + 1
        assert step.count(runs=True) <= most_work + MOST_EXTRA_BY_HEAD
        assert step.count(kind="synchronize") == waits
        assert step.count(kind="allocate") == 0
    for step in found.steps:
        assert step.count(kind="synchronize") <= most_waits
        model = {event.stream for event in step.events if event.name == "cublasGemmEx"}
        assert {event.stream for event in step.events if event.is_ours} <= model


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_prompt_is_scored_whole_however_it_is_cut(runner):
    """A batch of chunks as short as decoding steps would replay their graph, which scores none."""
    found = with_flash(runner, SHORT_CHUNKS)
    assert_served(found, SHORT_CHUNKS.requests)
    assert found.steps[0].spans == [[0, CHUNK - 1, CHUNK + 1]]
    chunks = [(stop - start) for step in found.steps for start, stop, n in step.spans if start < n]
    assert len(chunks) > len(SHORT_CHUNKS.requests)
    assert min(chunks) > 1
    assert_scored(found, SHORT_CHUNKS.requests)


def test_an_engine_that_slept_serves_compressed():
    # vLLM lets one engine of a process sleep.
    (dense,), (found,) = serve(2, SLEEPING_DENSE), serve(2, SLEEPING)
    for each in (dense, found):
        assert_served(each)
        freed, taken = each.freed_bytes
        assert freed > 0
        assert taken == freed
    assert sum(step.num_compactions for step in found.steps) > 0
    # Cache and weights are given back as by vLLM alone, and what compression keeps beside them.
    pages = LARGE["num_blocks"] + PREFIX_SCORE_TOKENS // BLOCK_SIZE
    scores = NUM_LAYERS * pages * NUM_KV_HEADS * BLOCK_SIZE * 4
    ring = NUM_LAYERS * RING_ROWS * OBS_WINDOW * NUM_HEADS * HEAD_SIZE * 2
    assert found.freed_bytes[0] >= dense.freed_bytes[0] + scores + ring
