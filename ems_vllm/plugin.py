# SPDX-License-Identifier: Apache-2.0
"""Entry point `vllm.general_plugins`: called once or more in every process of vLLM."""

import logging

# A child of vLLM's logger, so that its settings apply.
logger = logging.getLogger("vllm.ems")


def register() -> None:
    """Teach vLLM the flags of this package.

    Wraps three functions of EngineArgs, and the constructor of executors to look for settings that
    did not come through them. A server with compression off runs vLLM's own code from there on.
    What compression needs is installed by `engine.frontend.switch_on` and by the classes that it
    names, in the processes that need it.

    A vLLM that the package was not written for runs as if it were not there, until somebody asks
    for compression: that is refused with what to do. Nothing is raised, because vLLM would not
    start, whoever asked for what.
    """
    try:
        _register()
    except Exception as error:
        logger.warning("ems-vllm is not in use: %s", error, exc_info=True)


def _register() -> None:
    from ems_vllm.patches import catalogue, unsupported

    try:
        # None is applied unless all of them fit.
        for patch in catalogue.ALWAYS:
            patch.verify()
        for patch in catalogue.ALWAYS:
            patch.apply()
    except Exception as error:
        unsupported.refuse_compression(error)
