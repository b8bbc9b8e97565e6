"""What a diagnosis is made of: signs that programs print, the causes they tell of, and what was found in a log.

Causes are data (see `causes/`). Everything here is frozen and knows nothing of files or of the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple


class Line(NamedTuple):
    """A line of a log: its number as `grep -n` gives it, from 1, and its text without colours."""

    number: int
    text: str


class Weight(Enum):
    """How a sign stands against the others of the same run; the first decides before the second, and so on."""

    DECISIVE = 0
    """It ends a process."""
    WEAK = 1
    """It ends a process, but other causes end in it too: it is the answer only if nothing decisive is there."""
    HINT = 2
    """A program prints it and may go on."""


ANY_ERROR: Final = r"^(?!.*(?:no longer alive|[Aa]bort.event))[\w.\[\]: ]*Error: "
"""For signs that are known by where they are raised: the last line of any exception but the famous echo."""


@dataclass(frozen=True)
class Sign:
    """Something that programs print.

    Attributes:
        text: A literal that the line holds.
        regex: What else the line must match (searched); "" if the literal says it all.
        within: A pattern that one frame of the traceback must match, as `path:function`; "" for any line.
        sure: Whether the line names the cause itself. If not, the diagnosis says "likely".
        weight: How it stands against other signs.
    """

    text: str
    regex: str = ""
    within: str = ""
    sure: bool = True
    weight: Weight = Weight.DECISIVE


class Answer(Enum):
    """What kind of answer a cause is."""

    KNOWN = "known"
    HEALTHY = "healthy"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Cause:
    """One thing that goes wrong, or one reason not to know.

    Attributes:
        key: Its name in tests and scripts.
        group: R1 to R10 of the field notes, or "" for what is not among them.
        title: What went wrong, as a sentence without a full stop.
        what: What happened, in a few sentences.
        remedy: What to do, one step each, with commands and variables to copy.
        safeloader: What SafeLoader does about it.
        signs: What programs print when it happens; any of them is enough.
        sources: Public threads in which it happened.
        unless: Keys of causes that this one is a consequence of, or a vaguer name for.
        answer: Known, for all but those of `verdict.py`.
    """

    key: str
    group: str
    title: str
    what: str
    remedy: tuple[str, ...]
    safeloader: str = ""
    signs: tuple[Sign, ...] = ()
    sources: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    answer: Answer = Answer.KNOWN


@dataclass(frozen=True)
class Echo:
    """A line that follows from any failure: never a cause, however often and however late it is printed.

    Attributes:
        key: Its name.
        of: What it is an echo of, as the end of the sentence "this line …".
        signs: What is printed.
    """

    key: str
    of: str
    signs: tuple[Sign, ...]


class Place(Enum):
    """Where an exception was raised, as its traceback shows."""

    WORKER = "in a data loading worker"
    FEEDER = "in the thread of a worker that sends its batches"
    RECEIVER = "in the thread of the trainer that receives the batches"
    TRAINER = "in the training process"
    POOL = "in a process that preprocesses, predicts or exports"
    ELSEWHERE = ""


@dataclass(frozen=True)
class Raised:
    """An exception in the log.

    Attributes:
        line: Its last line, `Type: message`.
        kind: Its type, as printed.
        place: Where it was raised.
        code: The innermost frame in code that is not an installed package, `path, line N, in f`; "" if there is none.
        root: The first exception of its chain ("The above exception was …"); itself if it has no chain.
    """

    line: Line
    kind: str
    place: Place
    code: str = ""
    root: Raised | None = None


@dataclass(frozen=True)
class Finding:
    """A cause that the log has signs of.

    Attributes:
        cause: Which.
        evidence: The first lines that show it, a few.
        total: How many lines show it.
        sure: Whether one of them names the cause itself.
        weight: That of its strongest sign.
        first: The line of its first strongest sign, which decides between equal weights.
        last: The line of its last sign.
        place: Where the first of them was raised.
        code: The user's own code that it was raised in, or "".
    """

    cause: Cause
    evidence: tuple[Line, ...]
    total: int
    sure: bool
    weight: Weight
    first: int
    last: int
    place: Place = Place.ELSEWHERE
    code: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What is known about a log.

    Attributes:
        primary: The cause, or the reason not to know it, with its evidence.
        further: Other causes with signs in the same run, strongest first.
        symptom: The line "background workers are no longer alive", if it is there: an echo, never the cause.
        notes: What else a reader should know, one sentence each.
        lines: How many lines the log has.
    """

    primary: Finding
    further: tuple[Finding, ...]
    symptom: Line | None
    notes: tuple[str, ...]
    lines: int

    @property
    def known(self) -> bool:
        """Whether the question is answered: a cause was found, or nothing went wrong."""
        return self.primary.cause.answer is not Answer.UNKNOWN

    @property
    def confidence(self) -> str:
        """How certain it is, in words."""
        if self.primary.cause.answer is not Answer.KNOWN:
            return ""
        return SURE if self.primary.sure else LIKELY


SURE: Final = "sure: the log says so itself"
LIKELY: Final = "likely: it fits, but other causes can print the same"
