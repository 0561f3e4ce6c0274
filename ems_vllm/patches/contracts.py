# SPDX-License-Identifier: Apache-2.0
"""Functions of vLLM that compression relies on without wrapping them.

Nothing would fail if one of them changed its order or its meaning: requests would read each other's
memory. So compression is refused until somebody has read the new code.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ems_vllm.patches import target as targets
from ems_vllm.patches.target import PatchError
from ems_vllm.vllm_versions import by_version


@dataclass(frozen=True)
class Contract:
    """One function, as it was when it was read.

    Attributes:
        target: "module:Class.function" or "module:function".
        why: What compression relies on.
        source_sha256: Hash of its source per vLLM version that was read.
    """

    target: str
    why: str
    source_sha256: Mapping[str, str]

    def verify(self) -> None:
        """Compare with the installed vLLM; the function's module is not imported.

        Raises:
            PatchError: the source is none of those that were read, or another extension has wrapped
                or replaced the function.
        """
        if self.current_sha256() not in self.source_sha256.values():
            raise PatchError(
                f"{self.target} of vllm=={targets.installed_version()} is not the code that was "
                f"tested ({self.why}): install a vLLM version that ems-vllm supports, or a newer "
                "ems-vllm."
            )
        if self.target.partition(":")[0] in sys.modules:
            function = targets.function_of(*targets.resolve(self.target))
            targets.check_code(self.target, function, self.source_sha256)

    def current_sha256(self) -> str:
        """Hash of the function's source in the installed vLLM.

        Raises:
            PatchError: there is none.
        """
        return hashlib.sha256(_source(self.target).encode()).hexdigest()


@functools.cache
def _source(target: str) -> str:
    """The source of a function as inspect.getsource gives it, read from the file.

    The runners take seconds to import, and one of them is for GPUs only.
    """
    module, _, path = target.partition(":")
    *classes, name = path.split(".")
    try:
        spec = importlib.util.find_spec(module)
        text = Path(str(spec and spec.origin)).read_text(encoding="utf-8")
    except (ImportError, OSError) as error:
        raise PatchError(
            f"{target} of vllm=={targets.installed_version()} cannot be read ({error}): install a "
            "vLLM version that ems-vllm supports, with its .py files."
        ) from None
    lines = text.splitlines(keepends=True)
    start = 0
    indent = ""
    for heading in [*(rf"class {cls}\b" for cls in classes), rf"(async )?def {name}\b"]:
        pattern = re.compile(indent + heading)
        # A class ends where something else begins at its own depth.
        end = re.compile(rf"{indent[4:]}\S") if indent else None
        for number in range(start, len(lines)):
            if pattern.match(lines[number]):
                start = number + 1
                break
            if end is not None and number > start and re.match(r"(class|def|@)", lines[number]):
                raise _missing(target)
        else:
            raise _missing(target)
        indent += "    "
    first = start - 1
    depth = indent[4:]
    while re.match(rf"{depth}@", lines[first - 1]):
        first -= 1
    return "".join(inspect.getblock(lines[first:]))


def _missing(target: str) -> PatchError:
    return PatchError(
        f"vllm=={targets.installed_version()} has no {target}: install a vLLM version that "
        "ems-vllm supports, or a newer ems-vllm."
    )


def _contract(target: str, why: str, sha256: str, of_0_33: str | None = None) -> Contract:
    return Contract(f"vllm.v1.{target}", why, by_version(sha256, of_0_33))


CONTRACTS = (
    _contract(
        "core.kv_cache_manager:KVCacheManager.allocate_slots",
        "it frees skipped blocks, asks how many are needed, and allocates, in this order",
        "8c60d937fd9eb0c854f7fc0123d45db8719c49c5f774e37b3ba507888ce5c687",
    ),
    _contract(
        "core.kv_cache_coordinator:KVCacheCoordinator.remove_skipped_blocks",
        "it passes on how many tokens have been processed",
        "03a961e76820d666d8565c6e825c3280385e2a966fc54c59d7fe3589a7454c26",
    ),
    _contract(
        "core.single_type_kv_cache_manager:SingleTypeKVCacheManager.remove_skipped_blocks",
        "it frees columns of processed tokens only",
        "7bf0e2a87ec3ccd0a622ad20104b6dcd4db0f769e76f9df3f4d869d451c5db17",
    ),
    _contract(
        "core.single_type_kv_cache_manager:SingleTypeKVCacheManager._remove_blocks_in_range",
        "freed columns become null blocks, and their places stay",
        "2a6485c3cf389d4a217b5ba0f71f6a5b60708a602ba3e7dc83f3b2228fc14948",
    ),
    _contract(
        "core.single_type_kv_cache_manager:SingleTypeKVCacheManager.get_num_blocks_to_allocate",
        "it counts columns by position, freed ones included",
        "f50d7c5b545195c318cc0bae8b3c809e116f6c2bee3491f015ddfce173bd0769",
    ),
    _contract(
        "core.single_type_kv_cache_manager:SingleTypeKVCacheManager.allocate_new_blocks",
        "new columns follow the ones that are there, freed ones included",
        "b8edfbf2e1667228335af522e18c66a511ce353056277f01ca01decac5d3f0ee",
    ),
    _contract(
        "core.sched.scheduler:Scheduler.schedule",
        "the length of a chunk is asked for after every other bound, and each request that runs is "
        "scheduled once",
        "da4f2cf2fc39c39e76fdefa09b755d72d6b51d39fdc26830f0859ea688ded2ca",
        "fa34c8a13c0a8936443c651218a8178988d53962ee5a2e465e8932337e8cda34",
    ),
    _contract(
        "core.sched.scheduler:Scheduler._preempt_request",
        "a preempted request gives all its blocks back and is admitted again",
        "4113f5de8a84ec2532821578e8e3fb6ca4609b14d3d77b4a57d2b641ca427902",
        "8d67cc4e856887246f278172c59af32917f32ad39e0d0c8b625360f1632714c2",
    ),
    _contract(
        "core.kv_cache_manager:KVCacheManager.get_computed_blocks",
        "it looks hits up through the groups' managers",
        "77f434d88d573bfe05905a20df26ff51a86156214cf297ff9bbe5d5f05f32d07",
        "ae0e67c0720ab7605ce0888dc8f7ad73e926b27ca697b6a2f528849c02777dd3",
    ),
    _contract(
        "core.sched.scheduler:Scheduler._get_local_prefix_cache_hit",
        "every admission asks for its hit here",
        "3495ddb7de463024f5b312c7e122ff554727fcb1dc4e094de43bfd10297c59e3",
        "8e6f6ae6a7ab8f04d4d2c5a49510b90dcead51c2b716ac77b15342db3f1f830a",
    ),
    _contract(
        "core.sched.scheduler:Scheduler._reserve_prefill_lookahead",
        "it only ever shortens a chunk",
        "c214e49d7610a63a4b06caa23f725b1f986f449364aa1fca1b44e5b152922f8d",
    ),
    _contract(
        "core.sched.scheduler:Scheduler._free_request_blocks",
        "a request gives its blocks back here, preempted or finished",
        "f967ef09115484c61bc3d5f6996424c36805a4186efbbd071822edd774015c39",
    ),
    _contract(
        "core.sched.scheduler:Scheduler._update_after_schedule",
        "the tokens of a step count as computed once it is scheduled",
        "2b527eb8070d3cce3510708df6df669d22ed2a6681261d84d0cb43c641036d07",
    ),
    _contract(
        "core.sched.async_scheduler:AsyncScheduler._update_after_schedule",
        "the tokens of a step count as computed once it is scheduled",
        "138d47daea23cdfd3ac33f3ead448b276e1636be02f3fbbc18ca59248abe7dba",
    ),
    _contract(
        "engine.core:EngineCore.step",
        "every scheduler output reaches the workers, in order",
        "a02d17986fb72adba2681ab05cf8cc1b22770cb354f050a11fc9cc197f813a51",
    ),
    _contract(
        "engine.core:EngineCore.step_with_batch_queue",
        "every scheduler output reaches the workers, in order",
        "a905a2e1c4452aff4f9145d89dc298d887fe57244f053f1ad2fd51e7964f7b7c",
    ),
    _contract(
        "worker.gpu_worker:Worker.execute_model",
        "it runs the model once per scheduler output",
        "782126ba48e7e116ab2aed81c9620fbd2dc9041556601f6a63ea060fd0db0fc5",
    ),
    _contract(
        "worker.gpu_model_runner:GPUModelRunner.execute_model",
        "it follows the scheduler, orders the batch, and then builds metadata, in this order",
        "e058bf791a298e988db79e75c180c5474cd4884623d87c8fe600a89b6289d1aa",
    ),
    _contract(
        "worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
        "metadata comes from the groups' builders and from nowhere else",
        "6015ffa2b3ec7cd3d6128492301635103cd9328ccab16cff126d987af1f4212c",
        "5283b37cccd1790710e5e70650daccc7eb476a11a4452ecfdae608d3c92dfb80",
    ),
    _contract(
        "worker.gpu_input_batch:InputBatch.req_ids",
        "requests are in the order of the batch's rows",
        "d9c383d3ce4b5e6488a3491f96eba9526865be8df7f4a98b3e83f62bd01ffebd",
    ),
    _contract(
        "worker.gpu.model_runner:GPUModelRunner.execute_model",
        "it follows the scheduler, orders the batch, and then builds metadata, in this order",
        "e1535583ba759cb3faf57f7dde6685136cf54a913756b63afb8e34c3bd87babf",
        "7a1168866a759c6a46dd4686b0416c72b9d9753a5308cc97e478a67cdcba690b",
    ),
    _contract(
        "worker.gpu.model_runner:GPUModelRunner.prepare_attn",
        "block tables and metadata are of the batch's rows",
        "da2162a643e4e6c2f256159e84310ec145f1ebf20241291d1d3a10f2c7f4a0d5",
        "a73828dcb06c0ce5f4dba9625ba0bc5cffc32368e927ebbcbae4b56fe6574619",
    ),
    _contract(
        "worker.gpu.attn_utils:build_attn_metadata",
        "metadata comes from the groups' builders and from nowhere else, with req_idx in the order "
        "of the batch's rows",
        "b7faabe5c799633ecf6f4ee767c989c6e1dd836d7453f01a3e02c239ea62da12",
    ),
    _contract(
        "worker.gpu.states:RequestState.add_request",
        "index_to_req_id names the request of an index for as long as it runs",
        "7feb34eb03ec8bcc81c901140f7e393774b7fdc5553a74aeb6640721ac19040d",
        "fe8f6720cd707cb9e7d4393ec74942759b6858c022697062a637dc257e0fda16",
    ),
    _contract(
        "worker.gpu.states:RequestState.remove_request",
        "index_to_req_id names the request of an index for as long as it runs",
        "00edb398dfe9cb2416aa0594836025c1d208690da99857840cae88fedfba904b",
    ),
)
