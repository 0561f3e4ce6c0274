# SPDX-License-Identifier: Apache-2.0
"""`ems-vllm doctor --url`: reading a server, and what cannot be read."""

import importlib.util
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from doctor.recorded import last_page, readings
from rich.console import Console
from typer.testing import CliRunner

from ems_vllm import cli
from ems_vllm.config import ConfigError, load_config
from ems_vllm.doctor.live import report
from ems_vllm.doctor.live.advice import Helps, advice
from ems_vllm.doctor.live.lengths import spread
from ems_vllm.doctor.live.page import Page
from ems_vllm.doctor.live.reading import Reading
from ems_vllm.doctor.live.regime import regime
from ems_vllm.doctor.live.report import live_report
from ems_vllm.doctor.live.table import print_report
from ems_vllm.doctor.live.traffic import traffic
from ems_vllm.engine.frontend import metric_catalogue

BUSY = "long_prompts"


class Pages(BaseHTTPRequestHandler):
    """Answers as a vLLM server behind a proxy that wants a key."""

    def do_GET(self):
        wants = self.server.key
        if wants is not None and self.headers.get("Authorization") != f"Bearer {wants}":
            status, text = 401, "no"
        elif self.path == "/metrics":
            status, text = 200, self.server.text
        else:
            status, text = 404, "nothing here"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def served():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()


@pytest.fixture
def page(served):
    served.text, served.key = last_page(BUSY), None
    return served


def run(*args, columns=80):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(cli.app, ["doctor", *args])


@pytest.mark.parametrize("path", ["", "/", "/v1", "/metrics"])
def test_a_server_is_read_wherever_its_url_leads(page, path):
    result = run("--url", page.url + path, "--seconds", "0.1", "--json")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert found["schema_version"] == 1
    assert found["traffic"]["num_readings"] == 2
    assert found["traffic"]["pool"]["num_blocks"] == 1023
    assert found["thresholds"]["full_pool"] == 0.9


def test_people_read_it_at_80_columns(page):
    printed = run("--url", page.url, "--seconds", "0.1").stdout
    assert max(map(len, printed.splitlines())) <= 80
    assert "requests waiting" in printed
    assert "requests that fit" in printed


def test_settings_can_be_given(page):
    args = ("--url", page.url, "--seconds", "0.1", "--json", "--kv-compression-config")
    sizes = [
        json.loads(run(*args, f'{{"budget": {budget}}}').stdout)["gain"]["compressed_blocks"]
        for budget in (256, 512)
    ]
    assert sizes[1] - sizes[0] == 256 / 16


def test_a_key_is_taken_from_the_environment(page, monkeypatch):
    page.key = "secret"
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert run("--url", page.url, "--seconds", "0.1").exit_code == 0
    monkeypatch.setenv("VLLM_API_KEY", "another")
    refusal = run("--url", page.url, "--seconds", "0.1").exception
    assert isinstance(refusal, ConfigError)
    assert "answers HTTP 401: give its key in VLLM_API_KEY" in str(refusal)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", "has no metrics of vLLM"),
        ("# TYPE go_gc gauge\ngo_gc 1\n", "has no metrics of vLLM"),
        ("<html><body>Welcome</body></html>", "name a vLLM server"),
    ],
)
def test_what_is_not_vllm_is_answered_with_a_sentence(page, text, remedy):
    page.text = text
    refusal = run("--url", page.url, "--seconds", "0.1").exception
    assert isinstance(refusal, ConfigError)
    assert remedy in str(refusal)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--url", "http://127.0.0.1:9"], "does not answer"),
        (["--url", "localhost:8000"], "begin with http"),
        (["--url", "http://127.0.0.1:9/no/such"], "does not answer"),
        (["--url", "http://x", "--seconds", "0"], "seconds=0"),
        (["--url", "http://x", "--kv-compression", "off"], "name a recipe"),
        (["--url", "http://x", "--kv-compression", "emz"], "kv_compression='emz'"),
        (["--url", "http://x", "--tensor-parallel-size", "2"], "with --url only"),
        ([], "needs a model"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence(args, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ems-vllm", "doctor", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def page_of(*engines):
    """A page of a data-parallel server: (pool in use, running, waiting) of each engine."""
    lines = []
    for engine, (usage, running, waiting) in enumerate(engines):
        labels = f'{{engine="{engine}",model_name="m"}}'
        lines += [
            f"vllm:kv_cache_usage_perc{labels} {usage}",
            f"vllm:num_requests_running{labels} {running}",
            f"vllm:num_requests_waiting{labels} {waiting}",
            f"vllm:generation_tokens_total{labels} 100",
            # Of all engines together, as vLLM says it.
            f'vllm:cache_config_info{{engine="{engine}",num_gpu_blocks="{500 * len(engines)}",'
            'block_size="16"} 1.0',
        ]
    return Page.parse("\n".join(lines) + "\n")


def seen_of(*pages):
    return traffic([Reading(float(at), page) for at, page in enumerate(pages)])


def test_engines_are_added_up_and_the_fullest_pool_counts():
    page = page_of((0.2, 3, 0), (0.95, 5, 4))
    seen = seen_of(page, page)
    assert (seen.num_engines, seen.running, seen.waiting, seen.usage) == (2, 8, 4, 0.95)
    assert seen.pool.num_blocks == 499
    assert regime(seen) == "kv_bound"


def test_a_full_pool_of_an_engine_nobody_waits_for_is_none_of_the_queue():
    page = page_of((0.2, 3, 4), (0.95, 5, 0))
    seen = seen_of(page, page)
    assert seen.usage_in_queue == 0.2
    assert regime(seen) == "compute_bound"


def test_a_pool_counts_while_there_is_a_queue():
    seen = seen_of(page_of((0.95, 5, 4)), page_of((0.1, 1, 0)), page_of((0.97, 5, 4)))
    assert seen.usage_in_queue == pytest.approx(0.96)


def test_who_waits_for_something_else_is_in_no_queue_for_blocks():
    page = page_of((0.95, 5, 4))
    reasons = [
        ({"engine": "0", "reason": "deferred"}, 4.0),
        ({"engine": "0", "reason": "capacity"}, 0.0),
    ]
    page = Page({**page.samples, "vllm:num_requests_waiting_by_reason": reasons})
    seen = seen_of(page, page)
    assert seen.waiting == 0
    assert regime(seen) == "room"


def preempting(number):
    """Of a server with two hundred requests that run, and room for more."""
    page = page_of((0.5, 200, 0))
    count = "vllm:num_preemptions_total"
    last = Page({**page.samples, count: [({"engine": "0"}, float(number))]})
    return regime(seen_of(page, last))


def test_preemptions_tell_that_the_pool_was_full_whatever_is_seen_of_it():
    found = [preempting(number) for number in (0, 1, 2, 40)]
    assert found == ["room", "room", "kv_bound", "preempting"]


def test_nothing_is_said_of_lengths_that_are_not_known():
    page = page_of((0.95, 5, 4))
    seen = seen_of(page, page)
    told = advice(regime(seen), seen, None, None)
    assert told.helps is Helps.UNKNOWN
    assert "No request has ended yet" in " ".join(told.sentences)


def test_a_server_that_was_started_again_is_noticed():
    first, *_, last = readings(BUSY)
    with pytest.raises(ConfigError, match="started again"):
        traffic([Reading(0.0, last.page), Reading(1.0, first.page)])


def test_a_server_that_sleeps_is_not_called_idle():
    text = last_page("idle").replace('sleep_state="awake"} 1.0', 'sleep_state="awake"} 0.0')
    page = Page.parse(text)
    found = live_report(
        "http://x", [Reading(0.0, page), Reading(1.0, page)], load_config({"recipe": "ems"})
    )
    assert found.regime == "asleep"


def test_a_model_with_windows_is_not_reckoned_as_if_it_had_none():
    """Its longest requests hold more blocks than their length has columns."""
    text = last_page(BUSY).replace('max_concurrency="4.0"', 'max_concurrency="2.5"')
    text = text.replace('size_tokens="16384"', 'size_tokens="10240"')
    first = readings(BUSY)[0]
    found = live_report(
        "http://x", [first, Reading(9.0, Page.parse(text))], load_config({"recipe": "ems"})
    )
    assert not found.traffic["pool"]["is_uniform"]
    assert "Layers of this model differ in kind" in " ".join(found.sentences)


def test_what_a_server_says_of_its_memory_and_time_is_shown():
    """Metrics that the servers of the recorded pages did not have yet."""
    first, _, last = readings("ems_room")
    labels = {"engine": "0", "model_name": "m"}
    more = {
        "blocks_held": [(labels, 100.0)],
        "blocks_saved": [(labels, 300.0)],
        "kv_bytes_saved": [(labels, float(3 << 30))],
        "compaction_time_seconds_sum": [(labels, 0.5)],
        "compaction_time_seconds_count": [(labels, 100.0)],
        "preemptions_avoided_total": [(labels, 7.0)],
        "requests_refused_total": [({"reason": "kv_budget"}, 2.0)],
    }
    known = {metric.name for metric in metric_catalogue.ALL}
    stems = {re.sub(r"_(total|sum|count)$", "", name) for name in more}
    assert {f"ems_vllm:{stem}" for stem in stems} <= known
    page = Page({**last.page.samples, **{f"ems_vllm:{name}": more[name] for name in more}})
    both = [Reading(first.at, page), Reading(last.at, page)]
    found = live_report("http://x", both, load_config({"recipe": "ems"}))
    out = Console(width=80, record=True, file=io.StringIO())
    print_report(out, found)
    printed = out.export_text()
    for shown in ("3.00 GiB", "5.0 ms", "preemptions avoided", "requests refused: kv_budget"):
        assert shown in printed
    assert found.compressing["preemptions_avoided"] == 7
    assert found.compressing["live_share"] == 100 / 400


def test_vllm_has_every_metric_that_is_read():
    """By the text of its loggers: nothing would fail if a name were gone, but the advice."""
    live = Path(report.__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in live.glob("*.py"))
    named = set(re.findall(r"vllm:\w+", text)) - set(re.findall(r"ems_(vllm:\w+)", text))
    (vllm,) = importlib.util.find_spec("vllm").submodule_search_locations
    known = Path(vllm, "v1", "metrics", "loggers.py").read_text(encoding="utf-8")
    assert len(named) > 15
    for name in named:
        stem = re.sub(r"_(total|sum|count|bucket)$", "", name)
        assert f'"{name}"' in known or f'"{stem}"' in known, name


def test_lengths_stay_in_their_buckets_and_keep_their_mean():
    lengths = spread({100: 0, 200: 90, 500: 90, 1000: 90, 2000: 90, float("inf"): 100}, 700)
    (short, many), (long, few) = lengths
    assert (many, few) == (90, 10)
    assert 100 < short <= 200
    assert long > 2000
    even = spread({1000: 0, 2000: 10}, 1400)
    assert even == [(1400, 10)]
