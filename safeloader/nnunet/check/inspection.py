"""All cases of a configuration, each read to its last byte, by processes that may die of them.

    inspect ─► case ─► reader 1   answers, dies (a truncated file that is mapped: SIGBUS), or does not answer
            ─► case ─► reader 2   a reader that died is replaced; a case is blamed for the second death

`safeloader.nnunet.check.reader` is what runs in those processes.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from safeloader.faults.exits import ProcessExit
from safeloader.nnunet import apart
from safeloader.nnunet.check.cases import Expected

TIMEOUT_S: Final = 600.0
"""A case that is not read by then never will be: 10 GB at 17 MB/s."""
_DEATHS: Final = 2


@dataclass(frozen=True)
class Verdict:
    """What was found in one case: nothing, if `problems` is empty."""

    case: str
    problems: tuple[str, ...]


@dataclass
class _Reader:
    """One process, and the case that it has in hand."""

    expected: Expected
    case: str | None = None
    since: float = 0.0
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            apart.command("safeloader.nnunet.check.reader"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # One thread each, as a worker: there is one for each CPU.
            env=apart.environment(OMP_NUM_THREADS="1", BLOSC_NTHREADS="1"),
        )
        self._say(asdict(self.expected))

    def take(self, case: str) -> None:
        """Have it read a case."""
        self.case, self.since = case, time.monotonic()
        self._say(case)

    def answer(self) -> list[str] | None:
        """The problems that it has found; None if it has died. To be called when it has said something."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return None if not line.endswith(b"\n") else json.loads(line)

    def end(self) -> ProcessExit:
        """How it ended; it is killed if it lives."""
        self.process.kill()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what it was not told any more
                pipe.close()
        return ProcessExit.from_returncode(code)

    def _say(self, what: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(what).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # it has died: its end is read next


class _Inspection:
    """The readers at work; see `inspect`."""

    def __init__(self, expected: Expected, todo: Sequence[str], readers: int, timeout_s: float) -> None:
        self._expected = expected
        self._todo = deque(todo)
        self._deaths: Counter[str] = Counter()
        self._timeout_s = timeout_s
        self._readers = [_Reader(expected) for _ in range(min(readers, len(todo)))]

    def run(self) -> Iterator[Verdict]:
        for reader in self._readers:
            self._give(reader)
        while busy := [reader for reader in self._readers if reader.case is not None]:
            ready = self._wait(busy)
            for reader in busy:
                if reader in ready:
                    yield from self._heard(reader)
                elif time.monotonic() >= reader.since + self._timeout_s:
                    yield from self._lost(reader, f"it was not read within {self._timeout_s:g} s: storage that hangs")

    def _wait(self, busy: Sequence[_Reader]) -> list[_Reader]:
        """Those that have answered or died; none if the first one's time is up."""
        until = min(reader.since for reader in busy) + self._timeout_s
        with selectors.DefaultSelector() as selector:
            for reader in busy:
                assert reader.process.stdout is not None
                selector.register(reader.process.stdout, selectors.EVENT_READ, reader)
            return [key.data for key, _ in selector.select(max(0.0, until - time.monotonic()))]

    def _give(self, reader: _Reader) -> None:
        if self._todo:
            reader.take(self._todo.popleft())
        else:
            reader.case = None

    def _heard(self, reader: _Reader) -> Iterator[Verdict]:
        assert reader.case is not None
        found = reader.answer()
        if found is None:
            yield from self._lost(reader, None)
            return
        yield Verdict(reader.case, tuple(found))
        self._give(reader)

    def _lost(self, reader: _Reader, why: str | None) -> Iterator[Verdict]:
        """A reader has died, or is given up: another takes its place."""
        assert reader.case is not None
        case, how = reader.case, reader.end()
        self._readers.remove(reader)
        self._deaths[case] += 1
        if why is not None or self._deaths[case] == _DEATHS:
            yield Verdict(case, (why or f"the process that read it {how.what}, twice",))
        else:
            self._todo.appendleft(case)  # it may have been killed from outside
        if self._todo:
            self._readers.append(_Reader(self._expected))
            self._give(self._readers[-1])

    def close(self) -> None:
        for reader in self._readers:
            reader.end()


def inspect(
    expected: Expected,
    todo: Sequence[str],
    *,
    readers: int,
    tell: Callable[[Verdict], None],
    timeout_s: float = TIMEOUT_S,
) -> list[Verdict]:
    """Read all these cases, and say what is wrong with each.

    Args:
        expected: What they are held against.
        todo: The cases.
        readers: Processes at a time.
        tell: Is told of each verdict when it is known.
        timeout_s: How long one case may take.

    Returns:
        The verdicts, in the order of `todo`.
    """
    inspection = _Inspection(expected, todo, readers, timeout_s)
    verdicts: dict[str, Verdict] = {}
    try:
        for verdict in inspection.run():
            verdicts[verdict.case] = verdict
            tell(verdict)
    finally:
        inspection.close()
    return [verdicts[case] for case in todo]
