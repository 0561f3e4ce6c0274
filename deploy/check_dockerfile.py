# SPDX-License-Identifier: Apache-2.0
"""Carry out Dockerfile.cpu without Docker: COPY and RUN in a temporary folder, then the server.

Usage: python deploy/check_dockerfile.py [--port PORT]

Steps that change the system (packages, users) are shown and left out; everything else is done as it
stands. Succeeds when the health check of the image passes and a completion comes back.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SYSTEM_COMMANDS = ("apt-get", "useradd")
START_SECONDS = 180
PRETRAINED = ("smollm2", "gemma3-270m")


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(keyword, rest) of each instruction, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(keyword, rest) for keyword, rest in (line.split(None, 1) for line in lines if line)]


class Image:
    """A folder that stands for the image's file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.workdir = folder
        self.prefix = ""
        self.env = dict(os.environ)
        self.commands: dict[str, list[str]] = {}

    def carry_out(self, keyword: str, rest: str) -> None:
        """One instruction; those that say nothing about files or commands are passed over."""
        if keyword == "WORKDIR":
            self.prefix = rest
            self.workdir.mkdir(parents=True, exist_ok=True)
        elif keyword in ("ARG", "ENV"):
            name, _, value = rest.partition("=")
            value = value.strip('"').replace(f"{self.prefix}/", f"{self.workdir}/", 1)
            self.env.setdefault(name, value) if keyword == "ARG" else self._extend(name, value)
        elif keyword == "COPY":
            self._copy(*(word for word in shlex.split(rest) if not word.startswith("--")))
        elif keyword == "RUN":
            self._run(rest)
        elif keyword in ("ENTRYPOINT", "CMD"):
            self.commands[keyword] = json.loads(rest)
        elif keyword == "HEALTHCHECK":
            self.commands[keyword] = json.loads(rest.split("CMD", 1)[1])

    def _extend(self, name: str, value: str) -> None:
        self.env[name] = value.replace(f"${name}", self.env.get(name, ""))

    def _copy(self, *paths: str) -> None:
        *sources, target = paths
        for source in map(ROOT.joinpath, sources):
            destination = self.workdir / target
            if source.is_dir():
                # As .dockerignore has it.
                ignore = shutil.ignore_patterns("*.so", "__pycache__", "random-*", *PRETRAINED)
                shutil.copytree(source, destination, symlinks=True, ignore=ignore)
            else:
                destination.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, destination)

    def _run(self, command: str) -> None:
        if command.startswith(SYSTEM_COMMANDS):
            print(f"left out: {command}")
            return
        print(f"RUN {command}", flush=True)
        start = time.monotonic()
        subprocess.run(command, shell=True, cwd=self.workdir, env=self.env, check=True)
        print(f"    {time.monotonic() - start:.0f} s", flush=True)


def serve(image: Image, port: int) -> str:
    """Start what the image starts, wait for its health check, return a completion."""
    command = [*image.commands["ENTRYPOINT"], *image.commands["CMD"], f"--port={port}"]
    health = [word.replace(":8000", f":{port}") for word in image.commands["HEALTHCHECK"]]
    where = {"cwd": image.workdir, "env": image.env, "stderr": subprocess.DEVNULL}
    executable = shutil.which(command[0], path=image.env["PATH"])
    server = subprocess.Popen(command, executable=executable, stdout=subprocess.DEVNULL, **where)
    try:
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(health, **where).returncode != 0:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{shlex.join(command)} does not become healthy")
            time.sleep(1)
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/completions",
            json.dumps(
                {"model": image.commands["CMD"][0], "prompt": "Watson", "max_tokens": 8}
            ).encode(),
            {"Content-Type": "application/json"},
        )
        return json.load(urllib.request.urlopen(request))["choices"][0]["text"]
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=8765)
    port = parser.parse_args().port
    with tempfile.TemporaryDirectory() as folder:
        image = Image(Path(folder))
        for keyword, rest in instructions(ROOT / "Dockerfile.cpu"):
            image.carry_out(keyword, rest)
        print(f"completion: {serve(image, port)!r}")


if __name__ == "__main__":
    sys.exit(main())
