"""The trainings that run on this machine, as they are seen at one moment, and what has changed since an earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import psutil

from safeloader.report.window import WindowError, look, process_of, windows

_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True)
class Rates:
    """Of a pool, between two looks.

    Attributes:
        batches_per_s: Batches that were given to training, in a second.
        waited: The part of the time in which training waited for a batch, 0 to 1.
    """

    batches_per_s: float
    waited: float


@dataclass(frozen=True)
class Sight:
    """One training at one moment.

    Attributes:
        name: Its window's.
        pid: Its process.
        command: What was typed, as far as it can be read.
        uptime_s: Since the process has started, or None.
        state: What `pool.view` shows; empty if it could not be seen.
        trouble: Why it could not be seen, or "".
    """

    name: str
    pid: int
    command: str
    uptime_s: float | None
    state: Mapping[str, Any]
    trouble: str = ""

    @property
    def pools(self) -> list[Mapping[str, Any]]:
        """Its pools as `pool.view` shows them."""
        return list(self.state.get("pools", []))

    def rates(self, pool: Mapping[str, Any], earlier: Sight | None) -> Rates | None:
        """What has changed in a pool since an earlier look; None if there was none, or the pool is new."""
        if earlier is None or not earlier.pools:
            return None
        before = next((one for one in earlier.pools if one["name"] == pool["name"]), None)
        elapsed_s = self.state["at_s"] - earlier.state["at_s"]
        if before is None or elapsed_s <= 0 or before["batches"] > pool["batches"]:
            return None
        waited_s = pool["wait_s"] - before["wait_s"]
        return Rates((pool["batches"] - before["batches"]) / elapsed_s, min(1.0, waited_s / elapsed_s))

    def as_json(self, earlier: Sight | None) -> dict[str, Any]:
        """All of it, for scripts."""
        pools = []
        for pool in self.pools:
            rates = self.rates(pool, earlier)
            pools.append({**pool, **({} if rates is None else vars(rates))})
        return {
            "pid": self.pid,
            "command": self.command,
            "uptime_s": self.uptime_s,
            "trouble": self.trouble,
            "pools": pools,
        }


def look_at_all() -> list[Sight]:
    """All trainings of this user here; those of others, and those that have just ended, are left out.

    Raises:
        WindowError: They can't be listed.
    """
    seen = [_look_at(name) for name in windows()]
    return [sight for sight in seen if sight is not None]


def _look_at(name: str) -> Sight | None:
    pid = process_of(name)
    try:
        state, trouble = look(name, _TIMEOUT_S), ""
    except WindowError as error:
        state, trouble = {}, str(error)
    if trouble.startswith(("it is gone", "it is another user's")):
        return None
    command, uptime_s = _about(pid)
    return Sight(name, pid, command, uptime_s, state, trouble)


def _about(pid: int) -> tuple[str, float | None]:
    try:
        process = psutil.Process(pid)
        words = process.cmdline()
        uptime_s = (datetime.now() - datetime.fromtimestamp(process.create_time())).total_seconds()
    except psutil.Error:
        return "", None
    if words and Path(words[0]).name.startswith("python") and len(words) > 1:
        words = words[1:]
    return " ".join([Path(words[0]).name, *words[1:]]) if words else "", uptime_s
