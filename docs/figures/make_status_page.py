# SPDX-License-Identifier: Apache-2.0
"""Takes docs/figures/status-page.png: the status page of a server that was asked about a chapter.

Usage: python docs/figures/make_status_page.py [--model models/smollm2]

Needs the model, playwright and Chromium.
"""

import argparse
import json
import os
import shutil
import tempfile
import urllib.request
from pathlib import Path
from threading import Thread

from PIL import Image
from playwright.sync_api import sync_playwright

from ems_vllm.eval.server.process import Server
from ems_vllm.keys import STATUS_PLUGIN

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"budget": 256, "inspect_requests": 8, "inspect_text": True}
QUESTIONS = ("What date is on the stick?", "Who owns the stick?")
# Where in the picture the pointer is: parts of its width and height.
POINTER = (0.555, 0.5)


def ask(server: Server, question: str, max_tokens: int = 300) -> None:
    chapter = (ROOT / "models/text/hound_of_the_baskervilles_1_2.txt").read_text()[:12000]
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": f"{chapter}\n\n{question}"}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request).read()


def take(url: str, path: Path) -> None:
    with sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1100, "height": 1200}, bypass_csp=True)
        page.goto(f"{url}/kv_compression")
        # The one that still writes was compressed twice.
        page.wait_for_function(
            "document.querySelector('tr.chosen')?.innerText.match(/\\s2\\s+running/)",
            timeout=120000,
        )
        # The picture follows its row.
        page.wait_for_timeout(1000)
        box = page.locator("#canvas").bounding_box()
        x, y = POINTER
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.screenshot(path=path)
        browser.close()
    # As many colours as it has, nearly, at a third of the size.
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="models/smollm2")
    model = parser.parse_args().model
    os.environ["VLLM_PLUGINS"] = f"ems_cpu,ems_vllm,{STATUS_PLUGIN}"
    flags = ("--kv-compression", "ems", "--kv-compression-config", json.dumps(SETTINGS))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with Server(model, (*flags, "--max-model-len", "8192"), log) as server:
            ask(server, QUESTIONS[0])
            running = Thread(target=ask, args=(server, QUESTIONS[1], 450))
            running.start()
            take(server.url, ROOT / "docs/figures/status-page.png")
            running.join()


if __name__ == "__main__":
    main()
