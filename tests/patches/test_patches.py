# SPDX-License-Identifier: Apache-2.0
"""Patches of vLLM: known targets, known sources, applied once, refused when in doubt."""

import functools
import importlib
import inspect
import operator
import pkgutil

import pytest

from ems_vllm.patches import catalogue, registry
from ems_vllm.patches import target as targets
from ems_vllm.patches.catalogue import PATCHES
from ems_vllm.patches.record import Patch, PatchError, Process
from ems_vllm.patches.target import fits, resolve
from ems_vllm.vllm_versions import SUPPORTED


def test_catalogue_is_complete():
    """Every patch lies with its process, and none is left out."""
    found = []
    for process in Process:
        folder = importlib.import_module(f"ems_vllm.patches.{process}")
        for module in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."):
            patches = importlib.import_module(module.name).PATCHES
            assert {patch.process for patch in patches} == {process}, module.name
            found += patches
    assert sorted(p.target for p in found) == sorted(p.target for p in PATCHES)


@pytest.mark.parametrize("process", Process)
def test_a_process_gets_its_own_patches(process, monkeypatch):
    """Those of `ALWAYS` are in place by then, and the others' stay out."""
    applied = []
    monkeypatch.setattr(Patch, "apply", lambda patch: applied.append(patch))
    registry.apply(process)
    assert applied == [
        patch for patch in PATCHES if patch.process is process and patch not in catalogue.ALWAYS
    ]
    assert catalogue.ALWAYS


class Target:
    """Stands in for a class of vLLM."""

    def method(self, value):
        return value + 1

    @classmethod
    def build(cls, value):
        return cls.__name__, value

    @staticmethod
    def static(value):
        return value * 2


def make(name: str, **changes: object) -> Patch:
    def wrap(original):
        def wrapped(*args):
            return ("wrapped", original(*args))

        return wrapped

    fields = {
        "target": f"{__name__}:Target.{name}",
        "wrap": wrap,
        "vllm": ">=0.32",
        "source_sha256": {},
        "process": Process.WORKER,
        "reason": "a test",
        "upstream": "none filed",
        "remove_when": "never",
    }
    return Patch(**{**fields, **changes})


@pytest.fixture(autouse=True)
def _fresh_target(monkeypatch):
    for name in ("method", "build", "static"):
        monkeypatch.setattr(Target, name, Target.__dict__[name])


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_installed_vllm_is_the_tested_one(patch):
    from vllm import __version__

    version = __version__.split("+")[0]
    assert patch.source_sha256[version] == patch.current_sha256()
    assert patch.reason
    assert patch.upstream
    assert patch.remove_when


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_applying_twice_wraps_once(patch):
    patch.apply()
    owner, name = resolve(patch.target)
    first = owner.__dict__[name]
    patch.apply()
    assert owner.__dict__[name] is first
    assert patch.is_applied()


def test_methods_of_every_kind_are_wrapped():
    for name in ("method", "build", "static"):
        make(name).apply()
    assert Target().method(1) == ("wrapped", 2)
    assert Target.build(1) == ("wrapped", ("Target", 1))
    assert Target.static(2) == ("wrapped", 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vllm": "<0.1"}, "not supported"),
        ({"target": f"{__name__}:Target.gone"}, "has no"),
        ({"target": "no_such_module:Target.method"}, "has no"),
    ],
)
def test_unknown_vllm_is_refused_and_left_alone(changes, message):
    patch = make("method", **changes)
    with pytest.raises(PatchError, match=message):
        patch.apply()
    assert Target().method(1) == 2


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7"])
def test_source_that_was_not_tested_is_refused(version, monkeypatch):
    monkeypatch.setattr("vllm.__version__", version)
    patch = make("method", source_sha256={version: "0" * 64})
    with pytest.raises(PatchError, match="not the code that was tested"):
        patch.apply()
    assert Target().method(1) == 2


@pytest.mark.parametrize("version", ["0.32.7", "0.33.2"])
def test_release_that_left_a_function_as_it_was_is_taken(version, monkeypatch):
    monkeypatch.setattr("vllm.__version__", version)
    for patch in PATCHES:
        patch.verify()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_wrapper_of_another_extension_is_noticed(patch, monkeypatch):
    """Also one that hides behind functools.wraps, before or after this package."""
    owner, name = resolve(patch.target)
    raw = inspect.getattr_static(owner, name)
    kind = type(raw) if isinstance(raw, staticmethod | classmethod) else (lambda fn: fn)
    original = getattr(raw, "__func__", raw)

    @functools.wraps(original)
    def other(*args, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, kind(other))
    with pytest.raises(PatchError, match=rf"wrapped by {__name__}: uninstall that extension"):
        patch.verify()


@pytest.mark.parametrize(
    "replacement",
    [
        pytest.param(functools.partial(Target.method), id="partial"),
        pytest.param(classmethod(functools.partial(Target.method)), id="partial as classmethod"),
        pytest.param(operator.itemgetter(0), id="object"),
        pytest.param(len, id="builtin"),
    ],
)
def test_what_is_no_function_is_refused_and_left_alone(replacement, monkeypatch):
    monkeypatch.setattr(Target, "method", replacement)
    before = Target.__dict__["method"]
    with pytest.raises(PatchError, match="another extension has replaced it"):
        make("method", source_sha256={"0.32.0": "0" * 64}).apply()
    assert Target.__dict__["method"] is before


def test_vllm_without_sources_is_refused(monkeypatch):
    def missing(function):
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", missing)
    # Read once, a source is known.
    targets.source_sha256.cache_clear()
    with pytest.raises(PatchError, match="source is missing: install vLLM"):
        make("method", source_sha256={"0.32.0": "0" * 64}).apply()


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.32.0", True),
        ("0.32.0+cu130", True),
        ("0.32.0.post1", True),
        ("0.32.1rc1", True),
        ("0.32.0rc2", False),
        ("0.33.0.dev7", True),
        ("0.33.0rc1", True),
        ("0.33.0", True),
        ("0.33.4+cu130", True),
        ("0.34.0.dev7", False),
        ("0.34.0rc1", False),
        ("0.34.0", False),
        ("dev", False),
    ],
)
def test_versions_are_told_apart(version, expected, monkeypatch):
    monkeypatch.setattr("vllm.__version__", version)
    assert fits(SUPPORTED) is expected
    assert fits("")
