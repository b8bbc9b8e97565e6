"""Options: explicit before environment before default, and one clear line for everything that can't work."""

from __future__ import annotations

import pytest

from safeloader.config import OPTIONS, StartMethod, resolve
from safeloader.errors import ConfigError


def test_defaults_are_within_their_bounds() -> None:
    options = resolve({}, {})
    assert options.restart_window_s == 600.0
    assert options.start_method is StartMethod.AUTO
    assert all(option.help for option in OPTIONS.values())


def test_explicit_wins_over_environment_wins_over_default() -> None:
    assert resolve({}, {"SAFELOADER_SEED": "5"}).seed == 5
    assert resolve({"seed": 6}, {"SAFELOADER_SEED": "5"}).seed == 6
    assert resolve({"seed": 0}, {"SAFELOADER_SEED": "5"}).seed == 0


@pytest.mark.parametrize(
    ("given", "environ", "message"),
    [
        ({"sed": 1}, {}, r"unknown option 'sed': did you mean 'seed'\?"),
        ({"zzz": 1}, {}, r"unknown option 'zzz': there are: audit, backoff_first_s, "),
        ({"seed": -1}, {}, r"seed=-1: must be at least 0 \(root seed"),
        ({"seed": "x"}, {}, r"seed='x': expected int"),
        ({"seed": 1.5}, {}, r"seed=1\.5: expected int"),
        ({"seed": True}, {}, r"seed=True: expected int"),
        ({}, {"SAFELOADER_SEED": "lots"}, r"SAFELOADER_SEED=lots: expected int"),
        ({}, {"SAFELOADER_BACKOFF_MAX_S": "1e9"}, r"SAFELOADER_BACKOFF_MAX_S=1e9: must be at most 600 s"),
        ({"start_method": "spawn"}, {}, r"start_method='spawn': expected auto or clean or forked"),
        ({}, {"SAFELOADER_AUDIT": "yes"}, r"SAFELOADER_AUDIT=yes: expected 1 or true or 0 or false \(write a line"),
        ({"audit": 2, "folder": "f"}, {}, r"audit=2: expected 1 or true or 0 or false"),
        ({"audit": True}, {}, r"^audit is on, and there is no folder .* option `folder` \(SAFELOADER_FOLDER\)"),
        ({"folder": ""}, {"SAFELOADER_AUDIT": "1"}, r"^audit is on, and there is no folder"),
        ({"backoff_first_s": float("nan")}, {}, r"backoff_first_s=nan: must be at least 0 s"),
    ],
)
def test_what_cannot_work_is_refused(given: dict[str, object], environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(given, environ)


@pytest.mark.parametrize("value", ["1", "true", "TRUE", " True ", True, 1, "0", "false", "False", False, 0], ids=repr)
def test_the_ways_to_say_yes_and_no(value: object) -> None:
    expected = str(value).strip().lower() in ("1", "true")
    assert resolve({"audit": value, "folder": "f"}, {}).audit is expected
    if isinstance(value, str):
        assert resolve({}, {"SAFELOADER_AUDIT": value, "SAFELOADER_FOLDER": "f"}).audit is expected
    assert resolve({"audit": False}, {"SAFELOADER_AUDIT": "1"}).audit is False
