# SPDX-License-Identifier: Apache-2.0
"""Entry point `vllm.general_plugins`: called once or more in every process of vLLM."""


def register() -> None:
    """Teach vLLM the flags of this package.

    Wraps three functions of EngineArgs and nothing else: a server with compression off runs
    vLLM's own code from there on. What compression needs is installed by `engine.activation` and
    by the modules that it names, in the processes that need it.
    """
    from ems_vllm.patches import engine_args

    for patch in engine_args.PATCHES:
        patch.apply()
