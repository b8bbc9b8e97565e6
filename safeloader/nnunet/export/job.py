"""One call that nnU-Net's validation has asked for: where it stands, and which processes it has cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from safeloader.nnunet.export.call import Brief, Call
from safeloader.nnunet.export.outputs import Output
from safeloader.nnunet.export.records import Death, Failed
from safeloader.ring import codec
from safeloader.ring.memfile import MemoryFile

TRIES: Final = 2
"""Processes that a job may cost: one with others beside it, one alone, and one more if one of them was its fault."""


class State(Enum):
    """Where a job stands."""

    WAITING = "waiting"
    GIVEN = "given"
    SETTLED = "settled"


@dataclass
class Job:
    """One call: where it stands, and what it has cost.

    Attributes:
        call: what is to be done; None once it lies in `file`.
        brief: what a person and the ledger are told about it.
        file: holds the pickled call once it was given to a process. nbytes: how much.
        deaths: of processes that had it in hand.
        value: what the function returned, once it is settled and has not failed.
        failed: why it can't be done.
    """

    number: int
    call: Call | None
    brief: Brief
    output: Output | None
    state: State = State.WAITING
    file: MemoryFile | None = None
    nbytes: int = 0
    deaths: list[Death] = field(default_factory=list)
    value: Any = None
    failed: Failed | None = None

    def spool(self) -> MemoryFile:
        """The call in a memory file, in which it stays until the job is settled; nothing else refers to it then."""
        if self.file is None:
            assert self.call is not None
            call = self.call if self.output is None else self.call.writing_to(self.output.path)
            file = MemoryFile.create("safeloader-export")
            try:
                self.nbytes = codec.encode((call.function, call.arguments), file, self.number, by_value=True)
            except BaseException:
                file.close()
                raise
            self.file, self.call = file, None
        if self.output is not None:
            self.output.begin()
        return self.file

    def tried(self) -> str:
        """What the processes died of, for a person."""
        return "; then ".join(f"its process {death.what}" for death in self.deaths) or "no process could be started"

    @property
    def own_fault(self) -> list[Death]:
        """Those that speak against the job itself: it would crash or hang in the trainer, too."""
        return [death for death in self.deaths if death.crashed or death.hung_s is not None]

    @property
    def may_cost_another(self) -> bool:
        """Whether it is tried in one more process."""
        return len(self.own_fault) < TRIES and len(self.deaths) < TRIES + len(self.own_fault)

    @property
    def settled(self) -> bool:
        """Whether it is done, or has failed."""
        return self.state is State.SETTLED

    def settle(self) -> None:
        """It is done, or has failed: let go of everything large."""
        self.state = State.SETTLED
        self.call = None
        if self.file is not None:
            self.file.close()
            self.file = None
        if self.output is not None:
            self.output.discard()
