"""What the README says is there, is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from safeloader import errors
from safeloader.config import OPTIONS
from safeloader.nnunet.history import PROMETHEUS
from safeloader.nnunet.validation import TIMEOUT_ENV

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_documented_with_its_variable(name: str) -> None:
    assert re.search(rf"^\| `{name}` \|.*\| `{OPTIONS[name].env(name)}` \|", README, re.MULTILINE)


def test_no_option_is_documented_that_does_not_exist() -> None:
    trainers = {PROMETHEUS, TIMEOUT_ENV}
    named = set(re.findall(r"`(SAFELOADER_[A-Z_]+)[`=]", README))
    assert named == {OPTIONS[name].env(name) for name in OPTIONS} | trainers


def test_every_test_that_it_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/.]+)`", README)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_error_that_it_names_exists() -> None:
    named = set(re.findall(r"`(\w+Error)`", README))
    assert named <= set(vars(errors))
