# SPDX-License-Identifier: Apache-2.0
"""The settings of a server: which recipe compresses, to what size, and when.

Every default here is ours; the EMS paper's constants are not public in full.
"""

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ems_vllm.config.errors import ConfigError, from_pydantic, shown, unknown_key
from ems_vllm.config.recipes import OFF
from ems_vllm.plan import PlanSettings
from ems_vllm.policies.base import (
    ALLOCATORS,
    MERGERS,
    SCORERS,
    SELECTORS,
    BudgetAllocator,
    Component,
    Merger,
    Scorer,
    Selector,
)
from ems_vllm.registry import Registry

KEY_PREFIX = "kv_compression_config."
# The plan counts in 32 bits, after rounding up to whole blocks.
_LARGEST = 2**30


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


class KVCompressionConfig(BaseModel):
    """Settings of KV-cache compression for one server.

    Attributes:
        recipe: Name of the recipe these settings started from, for logs.
        budget: Entries kept per kv_head, rounded up to whole blocks. The ceiling for requests.
        ratio: Instead of `budget`: entries kept as a fraction of the prompt, in (0, 1).
        recent_window: Last tokens that stay as they are, beside the budget.
        obs_window: Last queries that score the entries; at most `recent_window`.
        recompress_interval: Generated tokens beyond `recent_window` after which the request is
            compressed again, rounded up to whole blocks; 0 compresses the prompt only.
        min_blocks_saved: Compress a prompt only if this many columns of blocks are given back.
        prefix_score_tokens: Capacity, in tokens, of the private scores for prefixes that came
            from the prefix cache; None derives it from max_model_len and
            max_num_batched_tokens. A hit that finds no room is shortened, never wrong.
        workspace_mib: Upper bound of what a compaction allocates, in MiB; a single layer of a
            request of max_model_len may need more. The larger of the two, and what kernels need
            beside it (32 MiB), are kept free when the KV cache is sized.
        scorer, allocator, selector, merger: The four choices of a policy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    recipe: str = "custom"
    budget: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    recent_window: Annotated[int, Field(ge=1, le=_LARGEST)] = 64
    obs_window: Annotated[int, Field(ge=1, le=256)] = 16
    recompress_interval: Annotated[int, Field(ge=0, le=_LARGEST)] = 256
    min_blocks_saved: Annotated[int, Field(ge=1, le=_LARGEST)] = 4
    prefix_score_tokens: Annotated[int, Field(ge=0, le=_LARGEST)] | None = None
    workspace_mib: Annotated[int, Field(ge=1, le=_LARGEST)] = 64
    scorer: Scorer
    allocator: BudgetAllocator
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

    @field_validator("scorer", mode="before")
    @classmethod
    def _scorer(cls, value: Any) -> Any:
        return _component(SCORERS, "scorer", value)

    @field_validator("allocator", mode="before")
    @classmethod
    def _allocator(cls, value: Any) -> Any:
        return _component(ALLOCATORS, "allocator", value)

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
        if self.obs_window > self.recent_window:
            raise ConfigError(
                f"{KEY_PREFIX}obs_window={self.obs_window} is not allowed: it must be at most "
                f"recent_window={self.recent_window}; lower it or raise recent_window."
            )
        if self.budget is not None and self.selector.num_sink_tokens > self.budget:
            raise ConfigError(
                f"{KEY_PREFIX}selector.num_sink_tokens={self.selector.num_sink_tokens} is not "
                f"allowed: it must be at most budget={self.budget}; lower it or raise budget."
            )
        return self

    @property
    def plan_settings(self) -> PlanSettings:
        """What scheduler and worker need to compute a request's CompressionPlan."""
        return PlanSettings(
            budget=self.budget,
            ratio=self.ratio,
            recent_window=self.recent_window,
            recompress_interval=self.recompress_interval,
            min_blocks_saved=self.min_blocks_saved,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data from which `KVCompressionConfig(**data)` rebuilds this object."""
        data = self.model_dump(exclude={"scorer", "allocator", "selector", "merger"})
        for key in ("scorer", "allocator", "selector", "merger"):
            component: Component = getattr(self, key)
            data[key] = {"name": component.name(), **component.model_dump()}
        return data
