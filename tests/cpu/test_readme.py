"""What the README and the configurations name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from based_mp.config import help_text

REPO = Path(__file__).parents[2]
README = (REPO / "README.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"\b(?:launch|configs|docs|benchmarks|based_mp|tests|csrc)/[\w./-]*\w", README)))
WRITTEN_BY_THE_USER = {"launch/hostfile"}


@pytest.mark.parametrize("path", [path for path in PATHS if path not in WRITTEN_BY_THE_USER])
def test_named_files_exist(path):
    assert (REPO / path).exists()


@pytest.mark.parametrize("module", sorted(set(re.findall(r"(?<!/)\bdata_prep\.(\w+)", README))))
def test_named_modules_exist(module):
    assert (REPO / "data_prep" / f"{module}.py").exists()


def test_named_make_targets_exist():
    makefile = (REPO / "Makefile").read_text()
    for target in re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


def test_named_configurations_and_keys_exist():
    for name in re.findall(r"`((?:based|attention|smoke)_[\w.]*(?:360m|1\.3b|cpu)\w*)`", README):
        assert (REPO / "configs" / f"{name}.yaml").exists(), name
    keys = help_text()
    sections = "model|parallel|training|optimizer|logging|validation|checkpoint"
    for key in re.findall(rf"(?<![/\w])((?:{sections})\.[a-z_]+)\b", README):
        assert f" {key} " in keys, key
