# SPDX-License-Identifier: Apache-2.0
"""Entry point `vllm.general_plugins`: called once or more in every process of vLLM."""


def register() -> None:
    """Teach vLLM the flags of this package.

    Wraps three functions of EngineArgs and nothing else: a server with compression off runs
    vLLM's own code from there on. What compression needs is installed by `engine.activation` and
    by the modules that it names, in the processes that need it.

    A vLLM that the package was not written for runs as if it were not there, until somebody asks
    for compression: that is refused with what to do.
    """
    from ems_vllm.patches import catalogue, engine_args, unsupported
    from ems_vllm.patches.record import PatchError

    try:
        catalogue.verify(engine_args.PATCHES)
    except PatchError as error:
        unsupported.refuse_compression(error)
        return
    for patch in engine_args.PATCHES:
        patch.apply()
