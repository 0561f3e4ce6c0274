# SPDX-License-Identifier: Apache-2.0
"""Quality beside memory and speed: tasks run against an OpenAI endpoint, and their report.

Four wings, and engines beside them; each knows the ones above it alone:

    questions/             tasks, and the prompts that they become in each protocol
    records/               settings, methods, answers and results, as they lie on disk; scores
    server/                starts a server, asks it, measures it: an evaluation
    report/                results as HTML, Markdown and a table on the terminal
    transformers_engine/   our recipes on transformers, without vLLM
    lab/                   ablations on that engine
    profiling/             what each layer and kv_head needs, by that engine
    command.py             what is typed
"""
