# SPDX-License-Identifier: Apache-2.0
"""The settings of a server: which recipe compresses, to what size, and when.

Every default here is ours; the EMS paper's constants are not public in full.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ems_vllm.config import composition, profiles
from ems_vllm.config.errors import ConfigError, from_pydantic, shown, unknown_key
from ems_vllm.config.guard import TOLERANCE, GuardSettings
from ems_vllm.config.protect import Role
from ems_vllm.config.recipes import OFF
from ems_vllm.keys import KEY_PREFIX
from ems_vllm.plan import PlanSettings
from ems_vllm.policies.base import (
    ALLOCATORS,
    MERGERS,
    SCORERS,
    SELECTORS,
    Allocator,
    Component,
    Merger,
    Scorer,
    Selector,
)
from ems_vllm.policies.coverage import Coverage
from ems_vllm.registry import Registry

# The plan counts in 32 bits, after rounding up to whole blocks.
_LARGEST = 2**30
# Prompt queries that score unless a server says otherwise (ours).
_GLOBAL_QUERIES = 256
# Entries that are kept whatever the coverage, unless a server says otherwise (ours).
_MIN_BUDGET = 64
# One in so many of them where all do (docs/defaults.md).
_STRIDE_OF_ALL = 4


def _component(registry: Registry, key: str, value: Any) -> Any:
    """Build the policy component that `{"name": ..., option: ...}` describes."""
    if isinstance(value, Component):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError(
            f"{KEY_PREFIX}{key}={shown(value)} is not allowed: give a name, "
            f"one of {', '.join(registry.names())}, or a mapping with `name` and options."
        )
    try:
        cls = registry.get(value["name"])
    except KeyError as error:
        raise ConfigError(
            f"{KEY_PREFIX}{key}.name={shown(value['name'])} is not allowed: {error.args[0]}."
        ) from None
    options = {name: option for name, option in value.items() if name != "name"}
    for option in options:
        if option not in cls.model_fields:
            raise unknown_key(f"{KEY_PREFIX}{key}.", option, options[option], cls.model_fields)
    try:
        return cls(**options)
    except ValidationError as error:
        raise from_pydantic(error, f"{KEY_PREFIX}{key}.", cls.model_fields) from None


def _always_computed(settings: dict[str, Any]) -> int:
    """Tokens of a compressed prompt that no hit in the prefix cache covers.

    With a `ratio` they depend on the prompt: the plan of a request lowers global_queries then.
    """
    budget, recent_window = settings.get("budget"), settings.get("recent_window")
    return _LARGEST if budget is None or recent_window is None else budget + recent_window


class KVCompressionConfig(BaseModel):
    """Settings of KV-cache compression for one server.

    Attributes:
        recipe: Name of the recipe these settings started from, for logs.
        budget: Entries kept per kv_head, rounded up to whole blocks. The ceiling for requests,
            unless `max_budget` raises it.
        ratio: Instead of `budget`, and a ceiling like it: entries kept as a fraction of the prompt,
            in (0, 1).
        max_budget: Entries up to which a request may raise its size through `kv_budget` or
            `kv_ratio`; at least `budget`. None: not above the server's own size. A request that
            asks for nothing gets the server's size; where that is a `ratio` of a long prompt and
            more than `max_budget`, it stays the ceiling.
        coverage: Keep fewer entries than the budget: as many as hold this share of the score of
            what is compressed, in the mean of the kv_heads that share a block table, in (0, 1). The
            budget stays the most; blocks that are not needed go back to the pool. None keeps the
            budget.
        min_budget: With a coverage, entries that are kept in any case, up to the budget. By
            default 64, or the budget where that is less.
        allow_off: Whether a request may switch compression off for itself. Set it to false where
            the pool is sized for compressed requests.
        when: "always": every request that is long enough is compressed. "pressure": only what is
            admitted while the pool could not hold all that runs and waits uncompressed; others keep
            their whole cache, and are compressed if they are preempted. What a request gets then
            depends on the load, unless it asks for compression itself.
        pressure_usage: With "pressure", the share of the pool that what runs and waits may come to
            need, answers as long as they have been in the mean.
        recent_window: Last tokens that stay as they are, beside the budget.
        obs_window: Last queries that score the entries; at most `recent_window`.
        recompress_interval: Generated tokens beyond `recent_window` after which the request is
            compressed again, rounded up to whole blocks; 0 compresses the prompt only.
        prefill_interval: Tokens after which a prompt is compressed while it is still processed,
            rounded up to whole blocks and at least `obs_window`; 0: not before its end. A prompt
            then never holds much more than budget + recent_window + 2 * prefill_interval entries,
            whatever its length; later parts of a prompt attend to what was kept of earlier ones.
        min_blocks_saved: Compress a prompt only if this many columns of blocks are given back.
        global_queries: Last queries of the prompt (with a prefill_interval, before each of its
            compactions) whose attention a scorer accumulates, or "all"
            for every query that is computed. At most `budget + recent_window`, which a hit in the
            prefix cache always leaves to be computed; then neither hits nor chunks change which
            queries score. By default 256, or as many as are allowed.
        sample_stride: Of these queries, one position in so many is accumulated and counts for all
            (ours); at most `global_queries`. By default 4 of "all", and 1, each, of a number.
        prefix_score_tokens: Capacity, in tokens, of the private scores for prefixes that came
            from the prefix cache, at least max_model_len; None derives it from max_model_len and
            max_num_batched_tokens. A request that finds no room waits a step.
        query_ring_rows: Requests whose last queries are recorded at a time; None derives it from
            the number of blocks. A request that finds no row waits a step.
        workspace_mib: Upper bound of what a compaction allocates, in MiB; a single layer of a
            request of max_model_len may need more. The larger of the two, and what kernels need
            beside it (32 MiB), are kept free when the KV cache is sized.
        protect: What stays whole of every chat request that says nothing itself through
            `kv_protect`: any of "system", "last_user" and "tools". A role that is not in a
            conversation protects nothing.
        inspect_requests: How many of the latest compressed requests a server remembers what was
            kept of, for its status page; 0: of none. Each takes 4 bytes for an entry of every
            kv_head, beside the cache.
        inspect_text: Whether the text of their prompts is remembered, too, and shown to whoever may
            read the status page.
        guard_share: Share of the requests of which it is measured what their compactions change in
            the outputs of attention; 0 measures none.
        guard_limit: Relative error beyond which such a request counts as diverging; None judges
            none.
        guard_action: "report": what is measured is told on /metrics. "dense": also, as long as more
            than `guard_tolerance` of the measured requests diverge, new ones keep their whole
            cache, but for those that are measured or ask for compression themselves.
        guard_tolerance: With "dense", the share of the measured requests that may diverge, in
            (0, 1); it begins once more do with 95 % confidence, and ends when no more do among the
            latest.
        scorer: How important an entry is; the highest scores stay.
        allocator: How many entries each layer and each kv_head keeps.
        selector: Which entries stay, and which of the others may be merged.
        merger: What becomes of entries that do not stay.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    recipe: str = "custom"
    budget: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_budget: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    coverage: Annotated[float, Field(gt=0, lt=1)] | None = None
    min_budget: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    allow_off: bool = True
    when: Literal["always", "pressure"] = "always"
    pressure_usage: Annotated[float, Field(gt=0, le=1)] = 0.8
    recent_window: Annotated[int, Field(ge=1, le=_LARGEST)] = 64
    obs_window: Annotated[int, Field(ge=1, le=256)] = 16
    recompress_interval: Annotated[int, Field(ge=0, le=_LARGEST)] = 256
    prefill_interval: Annotated[int, Field(ge=0, le=_LARGEST)] = 0
    min_blocks_saved: Annotated[int, Field(ge=1, le=_LARGEST)] = 4
    global_queries: Annotated[int, Field(ge=1, le=_LARGEST)] | Literal["all"] = Field(
        default_factory=lambda data: min(_GLOBAL_QUERIES, _always_computed(data))
    )
    sample_stride: Annotated[int, Field(ge=1, le=64)] = Field(
        default_factory=lambda data: _STRIDE_OF_ALL if data.get("global_queries") == "all" else 1
    )
    prefix_score_tokens: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    query_ring_rows: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    workspace_mib: Annotated[int, Field(ge=1, le=_LARGEST)] = 64
    protect: tuple[Role, ...] = ()
    inspect_requests: Annotated[int, Field(ge=0, le=64)] = 0
    inspect_text: bool = False
    guard_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    guard_limit: Annotated[float, Field(gt=0)] | None = None
    guard_action: Literal["report", "dense"] = "report"
    guard_tolerance: Annotated[float, Field(gt=0, lt=1)] = TOLERANCE
    scorer: Scorer
    allocator: Allocator
    selector: Selector
    merger: Merger

    @field_validator("recipe")
    @classmethod
    def _not_off(cls, value: str) -> str:
        # A recipe of one's own could bear this name; wherever the settings go, it means none.
        if value == OFF:
            raise ConfigError(
                f"{KEY_PREFIX}recipe={value!r} is not allowed: it switches compression off; "
                "give the recipe or its file another name."
            )
        return value

    @field_validator("global_queries", mode="before")
    @classmethod
    def _count_or_all(cls, value: Any) -> Any:
        if value == "all" or (type(value) is int and 1 <= value <= _LARGEST):
            return value
        raise ConfigError(
            f"{KEY_PREFIX}global_queries={shown(value)} is not allowed: give a number of queries, "
            'at least 1, or "all".'
        )

    @field_validator("scorer", mode="before")
    @classmethod
    def _scorer(cls, value: Any) -> Any:
        return _component(SCORERS, "scorer", profiles.resolved(value, f"{KEY_PREFIX}scorer"))

    @field_validator("allocator", mode="before")
    @classmethod
    def _allocator(cls, value: Any) -> Any:
        return _component(
            ALLOCATORS, "allocator", profiles.resolved(value, f"{KEY_PREFIX}allocator")
        )

    @field_validator("selector", mode="before")
    @classmethod
    def _selector(cls, value: Any) -> Any:
        return _component(SELECTORS, "selector", value)

    @field_validator("merger", mode="before")
    @classmethod
    def _merger(cls, value: Any) -> Any:
        return _component(MERGERS, "merger", value)

    @model_validator(mode="after")
    def _consistent(self) -> "KVCompressionConfig":
        if (self.budget is None) == (self.ratio is None):
            raise ConfigError(
                f"{KEY_PREFIX}budget={self.budget!r} and {KEY_PREFIX}ratio={self.ratio!r} do not "
                "fit together: set exactly one of them and the other to null."
            )
        if self.max_budget is not None and self.max_budget < (self.budget or 0):
            raise ConfigError(
                f"{KEY_PREFIX}max_budget={self.max_budget} is not allowed: it must be at least "
                f"budget={self.budget}; raise it, lower budget, or set it to null."
            )
        if self.obs_window > self.recent_window:
            raise ConfigError(
                f"{KEY_PREFIX}obs_window={self.obs_window} is not allowed: it must be at most "
                f"recent_window={self.recent_window}; lower it or raise recent_window."
            )
        if 0 < self.prefill_interval < self.obs_window:
            raise ConfigError(
                f"{KEY_PREFIX}prefill_interval={self.prefill_interval} is not allowed: it must be "
                f"at least obs_window={self.obs_window}; raise it, or set it to 0 to compress "
                "prompts at their end only."
            )
        if self.inspect_text and not self.inspect_requests:
            raise ConfigError(
                f"{KEY_PREFIX}inspect_text=True has no effect with {KEY_PREFIX}inspect_requests=0: "
                "set that to how many requests are to be remembered, or leave inspect_text out."
            )
        self._check_coverage()
        self.guard.check(self.scorer, allow_off=self.allow_off)
        composition.check(
            self.scorer, self.allocator, self.selector, self.coverage, self.prefill_interval
        )
        computed = _always_computed(self.model_dump(include={"budget", "recent_window"}))
        if self.global_queries != "all" and self.global_queries > computed:
            raise ConfigError(
                f"{KEY_PREFIX}global_queries={self.global_queries} is not allowed: a hit in the "
                f"prefix cache leaves budget + recent_window = {computed} tokens to be computed; "
                'lower it, raise budget, or set it to "all".'
            )
        if self.global_queries != "all" and self.sample_stride > self.global_queries:
            raise ConfigError(
                f"{KEY_PREFIX}sample_stride={self.sample_stride} is not allowed: of the last "
                f"global_queries={self.global_queries} queries it may sample none; lower it, or "
                'set global_queries to "all".'
            )
        if self.budget is not None and self.selector.num_sink_tokens > self.budget:
            raise ConfigError(
                f"{KEY_PREFIX}selector.num_sink_tokens={self.selector.num_sink_tokens} is not "
                f"allowed: it must be at most budget={self.budget}; lower it or raise budget."
            )
        return self

    def _check_coverage(self) -> None:
        if self.coverage is None:
            if self.min_budget is not None:
                raise ConfigError(
                    f"{KEY_PREFIX}min_budget={self.min_budget} would change nothing: it is for a "
                    "coverage; set one, or leave min_budget out."
                )
            return
        if self.budget is not None and (self.min_budget or 0) > self.budget:
            raise ConfigError(
                f"{KEY_PREFIX}min_budget={self.min_budget} is not allowed: it must be at most "
                f"budget={self.budget}; lower it or raise budget."
            )

    @property
    def guard(self) -> GuardSettings:
        """What is measured of requests, and what follows from it."""
        return GuardSettings(
            self.guard_share, self.guard_limit, self.guard_action, self.guard_tolerance
        )

    @property
    def covered(self) -> Coverage | None:
        """What a compaction keeps of its budget; None for all of it."""
        if self.coverage is None:
            return None
        least = _MIN_BUDGET if self.min_budget is None else self.min_budget
        return Coverage(self.coverage, least)

    @property
    def plan_settings(self) -> PlanSettings:
        """What a request's CompressionPlan depends on, but the shares of the layers."""
        return PlanSettings(
            budget=self.budget,
            ratio=self.ratio,
            recent_window=self.recent_window,
            recompress_interval=self.recompress_interval,
            min_blocks_saved=self.min_blocks_saved,
            global_queries=None if self.global_queries == "all" else self.global_queries,
            allow_off=self.allow_off,
            max_budget=self.max_budget,
            prefill_interval=self.prefill_interval,
        )

    def plan_settings_of(self, num_layers: int) -> PlanSettings:
        """`plan_settings` with the shares of a model's layers.

        Args:
            num_layers: Of the model.

        Raises:
            ConfigError: the allocator does not deal to a model of so many layers.
        """
        try:
            shares = self.allocator.shares(num_layers)
        except ValueError as error:
            name = self.allocator.name()
            raise ConfigError(f"{KEY_PREFIX}allocator={name!r} is not allowed: {error}.") from None
        return replace(self.plan_settings, shares=shares)

    @property
    def is_neutral_to_hits(self) -> bool:
        """Whether hits in the prefix cache, or other chunks, leave the kept entries as they are."""
        return not self.scorer.uses_accumulated or self.global_queries != "all"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data from which `KVCompressionConfig(**data)` rebuilds this object."""
        data = self.model_dump(exclude={"scorer", "allocator", "selector", "merger"})
        data["protect"] = list(self.protect)
        for key in ("scorer", "allocator", "selector", "merger"):
            component: Component = getattr(self, key)
            data[key] = {"name": component.name(), **component.model_dump()}
        return data
