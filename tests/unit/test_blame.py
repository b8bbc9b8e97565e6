"""Whose fault it is: the book alone, and whole pools whose storage, cases and code misbehave."""

from __future__ import annotations

import itertools
import random

import pytest

from safeloader.config import OnBadCase
from safeloader.pool import events
from safeloader.pool.blame import READ_TRIES, Blame, Fate, Policy, Verdict
from safeloader.pool.events import Cause, Failure, Why
from tests.unit.simulation import HANG, Draw, Simulation, bad, bug, unreadable

CASE = "brain_007"
KEY_ERROR = Failure("KeyError at user.py:7 in transform", CASE)
UNREADABLE = Failure("OSError at dataset.py:71 in load_case", CASE, reading=True)
TRUNCATED = Failure("RuntimeError at dataset.py:71 in load_case", CASE, reading=True, broken=True)
AGAIN = Verdict(Fate.AGAIN)
RAISE = Verdict(Fate.RAISE)


def book(on_bad_case: OnBadCase = OnBadCase.QUARANTINE, *, cases: int = 100, worked: bool = True) -> Blame:
    """A book in which ticket 0 went well, at time 0."""
    blame = Blame(Policy(on_bad_case))
    blame.draws_from(cases)
    if worked:
        blame.succeeded(0, ("brain_000",), 0.0, begun=0.0)
    return blame


def others_work(blame: Blame, now: float, ticket: int = 900) -> None:
    assert blame.succeeded(ticket, ("brain_000",), now, begun=now) is None


def on(case: str | None, failure: Failure = UNREADABLE) -> Failure:
    return Failure(failure.place, case, failure.reading, failure.broken, failure.final)


# ---- before any success ----


def test_a_bug_is_raised_at_the_second_case() -> None:
    blame = book(worked=False)
    assert blame.failed(0, on("brain_001", KEY_ERROR), 0.0) == AGAIN
    assert blame.failed(1, on("brain_002", KEY_ERROR), 0.1) == RAISE


def test_a_bug_is_raised_at_the_second_ticket_if_nobody_knows_the_case() -> None:
    blame = book(worked=False)
    assert blame.failed(0, on(None, KEY_ERROR), 0.0) == AGAIN
    assert blame.failed(1, on(None, KEY_ERROR), 0.1) == RAISE


def test_one_bad_case_at_the_start_is_no_bug() -> None:
    blame = book(worked=False)
    assert blame.failed(0, KEY_ERROR, 0.0) == AGAIN
    assert blame.failed(0, KEY_ERROR, 0.1) == Verdict(Fate.DRAW_ANEW, case=CASE)
    others_work(blame, 0.2, ticket=0)
    assert blame.failed(3, KEY_ERROR, 0.3) == AGAIN
    assert blame.failed(3, KEY_ERROR, 0.4) == Verdict(Fate.DRAW_ANEW, quarantined=CASE)


def test_different_bugs_on_every_draw_are_raised_as_well() -> None:
    blame = book(worked=False)
    verdicts = [
        blame.failed(0, Failure(f"ValueError at user.py:{n // 2}", f"brain_{n // 2}"), n / 10) for n in range(20)
    ]
    fates = [verdict.fate for verdict in verdicts]
    assert fates[:11] == [Fate.AGAIN, Fate.DRAW_ANEW] * 5 + [Fate.AGAIN]
    assert fates[11] is Fate.RAISE


def test_what_can_be_read_nowhere_is_raised_within_four_tries() -> None:
    blame = book(worked=False)
    now, tries = 0.0, 0
    while True:
        tries += 1
        blame.failed(1, on("brain_002"), now)
        verdict = blame.failed(0, on("brain_001"), now)
        if verdict.fate is Fate.RAISE:
            break
        now += verdict.in_s
    assert (tries, now) == (READ_TRIES, 3.5)


def test_one_unreadable_case_at_the_start_waits_for_the_others() -> None:
    """Others may take long to make their first batch: only if they fail as well is it everything."""
    blame = book(worked=False)
    now, fates = 0.0, []
    for _ in range(2 * READ_TRIES):
        verdict = blame.failed(0, TRUNCATED, now)
        fates.append(verdict.fate)
        now += verdict.in_s
    assert fates == [Fate.AGAIN] * 7 + [Fate.DRAW_ANEW]
    assert now == pytest.approx(11.0)


def test_a_finite_loader_that_ends_is_told_at_once() -> None:
    for worked in (False, True):
        assert book(worked=worked).failed(1, Failure("StopIteration", final=True), 1.0) == RAISE


# ---- exceptions that are not about reading ----


def test_an_exception_that_does_not_come_again_is_nothing() -> None:
    blame = book()
    for ticket in range(1, 50):
        assert blame.failed(ticket, KEY_ERROR, ticket) == AGAIN
        blame.succeeded(ticket, (CASE,), ticket + 0.5, begun=ticket)
    assert not blame.quarantined


def test_an_exception_that_comes_again_in_another_draw_of_the_case() -> None:
    blame = book()
    assert blame.failed(1, KEY_ERROR, 1.0) == AGAIN
    assert blame.failed(1, KEY_ERROR, 1.1) == Verdict(Fate.DRAW_ANEW, case=CASE)
    assert blame.attempt(1) == 1
    others_work(blame, 1.5, ticket=1)
    assert blame.attempt(1) == 0, "forgotten with its success"
    assert blame.failed(9, KEY_ERROR, 2.0) == AGAIN
    assert blame.failed(9, KEY_ERROR, 2.1) == Verdict(Fate.DRAW_ANEW, quarantined=CASE)
    assert list(blame.quarantined) == [CASE]


def test_a_case_that_was_fine_before_has_twice_as_many_strikes() -> None:
    blame = book()
    blame.succeeded(1, (CASE,), 1.0, begun=0.5)
    for ticket, fate in ((2, None), (3, None), (4, None), (5, CASE)):
        assert blame.failed(ticket, KEY_ERROR, ticket) == AGAIN
        assert blame.failed(ticket, KEY_ERROR, ticket + 0.1).quarantined == fate
        others_work(blame, ticket + 0.5, ticket)


def test_an_exception_without_a_case_that_comes_again_is_raised() -> None:
    blame = book()
    assert blame.failed(1, on(None, KEY_ERROR), 1.0) == AGAIN
    assert blame.failed(1, on(None, KEY_ERROR), 1.1) == RAISE


def test_a_ticket_whose_draws_all_fail_is_raised() -> None:
    blame = book(cases=1000)
    for draw, second in itertools.product(range(5), range(2)):
        assert blame.failed(1, on(f"brain_1{draw}", KEY_ERROR), draw).fate is (Fate.DRAW_ANEW if second else Fate.AGAIN)
    assert blame.failed(1, on("brain_15", KEY_ERROR), 6.0) == AGAIN
    assert blame.failed(1, on("brain_15", KEY_ERROR), 6.1) == RAISE


# ---- failures to read ----


def test_one_unreadable_case_among_others_has_eleven_seconds() -> None:
    blame = book()
    now, waits = 1.0, []
    for _ in range(2 * READ_TRIES - 1):
        verdict = blame.failed(1, UNREADABLE, now)
        assert verdict.fate is Fate.AGAIN
        waits.append(verdict.in_s)
        now += verdict.in_s
        others_work(blame, now)
    assert waits == [0.5, 1.0, 2.0, 4.0, 0.5, 1.0, 2.0]
    assert blame.failed(1, UNREADABLE, now) == Verdict(Fate.DRAW_ANEW, quarantined=CASE)


def test_a_success_takes_the_strikes_back() -> None:
    blame = book()
    for ticket in range(1, 100):
        for _ in range(2 * READ_TRIES - 1):
            assert blame.failed(ticket, UNREADABLE, ticket).fate is Fate.AGAIN
            others_work(blame, ticket)
        blame.succeeded(ticket, (CASE,), ticket, begun=ticket)
    assert not blame.quarantined


def test_a_success_of_the_same_draw_counts_even_if_it_names_no_cases() -> None:
    blame = book()
    for _ in range(2 * READ_TRIES - 1):
        blame.failed(1, UNREADABLE, 1.0)
        others_work(blame, 1.0)
    blame.succeeded(1, (), 2.0, begun=1.5)
    assert blame.failed(2, UNREADABLE, 3.0) == Verdict(Fate.AGAIN, 0.5)


def test_what_was_begun_before_the_storage_failed_proves_nothing() -> None:
    blame = book()
    for tries in range(2 * READ_TRIES):
        verdict = blame.failed(1, UNREADABLE, 10.0 + 5 * tries)
        blame.succeeded(900 + tries, ("brain_000",), 10.5 + 5 * tries, begun=5.0)
    assert verdict == Verdict(Fate.DRAW_ANEW, case=CASE), "another draw is tried, and nothing quarantined"
    assert not blame.quarantined


def test_an_unreadable_ticket_without_a_case_is_raised_in_the_end() -> None:
    blame = book()
    for tries in range(2 * READ_TRIES - 1):
        assert blame.failed(1, on(None), 5.0 * tries).fate is Fate.AGAIN
        others_work(blame, 5.0 * tries)
    assert blame.failed(1, on(None), 40.0) == RAISE


def test_storage_that_fails_for_the_only_ticket_in_work_is_an_outage_in_the_end() -> None:
    """The ring is full, so nothing else is tried: it is drawn anew, and after that waits."""
    blame = book(cases=2)
    now, draws = 10.0, 0
    while True:
        verdict = blame.failed(1, UNREADABLE, now)
        assert verdict.fate is not Fate.RAISE
        if verdict.outage:
            break
        draws += verdict.fate is Fate.DRAW_ANEW
        now += verdict.in_s
    assert (draws, verdict.outage, verdict.fate) == (5, (CASE,), Fate.AGAIN)
    assert now < 120.0
    assert blame.succeeded(1, (CASE,), now + 1, begun=now) == pytest.approx(now + 1 - 10.0)


# ---- deaths ----


@pytest.mark.parametrize("cause", [Cause.ITSELF, Cause.READING, Cause.HUNG, Cause.MEMORY])
def test_the_second_death_quarantines_the_case_if_others_work(cause: Cause) -> None:
    blame = book()
    first = blame.died(1, CASE, 1.0, cause)
    assert first == Verdict(Fate.AGAIN, 0.5 if cause in (Cause.READING, Cause.HUNG) else 0.0)
    others_work(blame, 2.0)
    assert blame.died(1, CASE, 4.0, cause) == Verdict(Fate.DRAW_ANEW, quarantined=CASE)


def test_two_workers_that_read_the_same_half_written_file_at_once_are_one_strike() -> None:
    blame = book()
    assert blame.died(1, CASE, 1.0, Cause.READING) == Verdict(Fate.AGAIN, 0.5)
    others_work(blame, 1.01)
    assert blame.died(2, CASE, 1.02, Cause.READING) == Verdict(Fate.AGAIN, 1.0)
    assert blame.died(1, CASE, 1.52, Cause.READING) == Verdict(Fate.AGAIN, 2.0)
    blame.succeeded(2, [CASE], 2.1, begun=2.0)
    assert blame.died(7, CASE, 9.0, Cause.READING) == Verdict(Fate.AGAIN, 0.5), "it was fine meanwhile"


def test_the_second_death_does_not_if_nothing_else_worked() -> None:
    blame = book()
    assert blame.died(1, CASE, 1.0, Cause.ITSELF) == AGAIN
    assert blame.died(1, CASE, 1.1, Cause.ITSELF) == Verdict(Fate.DRAW_ANEW, case=CASE)
    others_work(blame, 2.0, ticket=1)
    assert blame.died(5, CASE, 3.0, Cause.ITSELF) == Verdict(Fate.DRAW_ANEW, quarantined=CASE)


def test_a_ticket_without_a_case_is_drawn_anew_after_two_deaths() -> None:
    blame = book()
    for draw in range(3):
        assert blame.died(1, None, 1.0 + draw, Cause.ITSELF) == AGAIN
        others_work(blame, 1.3 + draw)
        assert blame.died(1, None, 1.5 + draw, Cause.ITSELF) == Verdict(Fate.DRAW_ANEW)
        assert blame.attempt(1) == draw + 1
    assert not blame.quarantined


def test_a_quarantined_case_that_a_loader_draws_all_the_same() -> None:
    blame = Blame(Policy(), quarantined=[CASE])
    others_work(blame, 0.0)
    assert blame.died(1, CASE, 1.0, Cause.ITSELF) == Verdict(Fate.DRAW_ANEW)
    for _ in range(4):
        assert blame.failed(1, UNREADABLE, 1.0) == Verdict(Fate.DRAW_ANEW)
    assert blame.failed(1, UNREADABLE, 1.0) == RAISE


# ---- the limit ----


@pytest.mark.parametrize(("cases", "limit"), [(1, 0), (2, 1), (19, 1), (40, 2), (1000, 50)])
def test_at_most_a_twentieth_and_at_least_one(cases: int, limit: int) -> None:
    assert book(cases=cases).limit == limit


def test_where_the_number_of_cases_is_unknown_one_always_may() -> None:
    blame = Blame(Policy())
    assert blame.limit == 1
    blame.succeeded(0, [f"brain_{n}" for n in range(100)], 0.0, begun=0.0)
    assert blame.limit == 5


def test_beyond_the_limit_it_ends() -> None:
    blame = book(cases=20)
    for case, verdict in (("a", Fate.DRAW_ANEW), ("b", Fate.END)):
        blame.died(1, case, 1.0, Cause.ITSELF)
        others_work(blame, 1.0)
        last = blame.died(1, case, 1.0, Cause.ITSELF)
        assert last.fate is verdict
    assert (last.why, last.case) == (Why.QUARANTINE, "b")
    assert list(blame.quarantined) == ["a"]


# ---- other wishes ----


def test_raise() -> None:
    blame = book(OnBadCase.RAISE)
    assert blame.failed(1, KEY_ERROR, 1.0) == AGAIN
    assert blame.failed(1, KEY_ERROR, 1.0) == RAISE
    assert blame.died(2, "brain_2", 2.0, Cause.ITSELF) == AGAIN
    assert blame.died(2, "brain_2", 2.0, Cause.ITSELF) == Verdict(Fate.END, why=Why.BAD_CASE, case="brain_2")
    fates = [blame.failed(3, on("brain_3"), 3.0 + 5.0 * tries).fate for tries in range(8)]
    assert fates == [Fate.AGAIN] * 7 + [Fate.RAISE]


def test_retry_changes_nothing_in_the_stream() -> None:
    blame = book(OnBadCase.RETRY)
    for tries in range(50):
        now = 40.0 * tries
        assert blame.died(1, CASE, now, Cause.ITSELF).fate is Fate.AGAIN
        assert blame.failed(2, on("brain_2"), now).fate is Fate.AGAIN
        others_work(blame, now)
    assert blame.failed(2, on("brain_2"), 2000.0).in_s == 30.0
    fates = [blame.failed(3, on("brain_3", KEY_ERROR), 3.0).fate for _ in range(10)]
    assert fates == [Fate.AGAIN] * 9 + [Fate.RAISE], "but a bug does not go away"
    assert blame.attempt(1) == blame.attempt(2) == blame.attempt(3) == 0


# ---- outages ----


def outage() -> Blame:
    blame = book()
    assert blame.failed(1, on("brain_1"), 10.0) == Verdict(Fate.AGAIN, 0.5)
    assert blame.failed(2, on("brain_2"), 10.1) == Verdict(Fate.AGAIN, 0.5)
    assert blame.failed(3, on("brain_3"), 10.2) == Verdict(Fate.AGAIN, 1.0, outage=("brain_1", "brain_2", "brain_3"))
    assert blame.outage_since == 10.0
    return blame


def test_three_unreadable_cases_are_an_outage_and_one_of_them_ends_it() -> None:
    blame = outage()
    for now in range(11, 600):
        assert blame.failed(1, on("brain_1"), now).fate is Fate.AGAIN
    others_work(blame, 600.0)  # what it needs may be in the cache
    assert blame.outage_since == 10.0
    assert blame.succeeded(2, ("brain_2",), 605.0, begun=604.0) == 595.0
    assert blame.failed(1, on("brain_1"), 611.0) == Verdict(Fate.AGAIN, 0.5), "all is forgiven"


def test_an_outage_of_a_few_cases_among_good_ones_ends_after_ten_minutes_and_they_are_bad() -> None:
    blame = outage()
    assert blame.succeeded(900, ("brain_0",), 620.3, begun=619.0) == pytest.approx(610.3)
    now = 620.0
    while not (verdict := blame.failed(1, on("brain_1"), now)).quarantined:
        assert verdict.fate is Fate.AGAIN and now < 640.0
        now += verdict.in_s
        others_work(blame, now)
    assert verdict.quarantined == "brain_1"


def test_the_waits_in_an_outage_grow_to_half_a_minute() -> None:
    blame = outage()
    waits = [blame.failed(1, on("brain_1"), now).in_s for now in (11.0, 30.0, 50.0, 200.0)]
    assert waits == [1.0, 5.0, 10.0, 30.0]


def test_an_outage_does_not_last_for_ever() -> None:
    blame = outage()
    assert blame.failed(1, on("brain_1"), 610.0).fate is Fate.AGAIN
    assert blame.failed(1, on("brain_1"), 3610.0).fate is Fate.DRAW_ANEW, "something else is tried by then"
    assert blame.failed(1, on("brain_1"), 3610.1) == Verdict(Fate.END, why=Why.OUTAGE)


def test_a_sleep_is_no_part_of_an_outage() -> None:
    blame = outage()
    blame.slept(36_000.0)
    assert blame.failed(1, on("brain_1"), 36_020.0).in_s == pytest.approx(2.5)


def test_nothing_is_held_against_anybody_in_an_outage() -> None:
    blame = outage()
    for _ in range(5):
        assert blame.failed(4, KEY_ERROR, 20.0).fate is Fate.AGAIN
        assert blame.failed(5, on(None, KEY_ERROR), 20.0).fate is Fate.AGAIN
        assert blame.died(6, "brain_6", 20.0, Cause.ITSELF).fate is Fate.AGAIN
        others_work(blame, 20.0)
    assert not blame.quarantined and blame.attempt(4) == blame.attempt(6) == 0


def test_cases_that_fail_minutes_apart_are_no_outage() -> None:
    blame = book()
    for ticket in range(1, 20):
        assert not blame.failed(ticket, on(f"brain_{ticket}"), 61.0 * ticket).outage
        others_work(blame, 61.0 * ticket + 1)


def test_damaged_files_among_good_ones_are_no_outage() -> None:
    blame = book()
    for ticket in range(1, 10):
        assert not blame.failed(ticket, on(f"brain_{ticket}", TRUNCATED), float(ticket)).outage
        others_work(blame, ticket + 0.5)
    assert blame.outage_since is None


def test_damaged_files_do_not_make_an_outage_of_an_unreadable_one() -> None:
    blame = book()
    blame.failed(1, on("brain_1", TRUNCATED), 1.0)
    blame.failed(2, on("brain_2", TRUNCATED), 1.0)
    others_work(blame, 1.5)
    assert not blame.failed(3, on("brain_3"), 2.0).outage


def test_an_outage_that_was_none_ends_with_the_next_batch_and_forgives_nothing() -> None:
    """Three damaged files at once, before any other batch was made."""
    blame = book()
    for ticket in (1, 2, 3):
        verdict = blame.failed(ticket, on(f"brain_{ticket}", TRUNCATED), 10.0)
    assert len(verdict.outage) == 3
    assert blame.succeeded(4, ("brain_4",), 12.0, begun=9.0) is None, "it was begun before"
    assert blame.succeeded(5, ("brain_5",), 14.0, begun=11.0) == 4.0
    now, fates = 14.0, []
    for _ in range(2 * READ_TRIES - 1):
        verdict = blame.failed(1, on("brain_1", TRUNCATED), now)
        fates.append(verdict.fate)
        now += verdict.in_s
        others_work(blame, now)
    assert fates[-1] is Fate.DRAW_ANEW and verdict.quarantined == "brain_1"


def test_hangs_of_all_workers_are_an_outage_even_before_any_success() -> None:
    blame = book(worked=False)
    verdicts = [blame.died(ticket, None, 300.0, Cause.HUNG) for ticket in range(3)]
    assert verdicts[2] == Verdict(Fate.AGAIN, 1.0, outage=("?", "?", "?"))


def test_hangs_one_after_the_other_are_an_outage_if_nothing_works_in_between() -> None:
    """One worker, and storage that does not answer: the watchdog takes minutes for each."""
    blame = book()
    assert not blame.died(1, "brain_1", 200.0, Cause.HUNG).outage
    assert not blame.died(2, "brain_2", 500.0, Cause.HUNG).outage
    assert len(blame.died(3, "brain_3", 800.0, Cause.HUNG).outage) == 3


# ---- whole pools ----


def test_undisturbed() -> None:
    pool = Simulation(workers=4).run(500)
    assert [draw.ticket for draw in pool.taken] == list(range(500))
    assert not pool.all(events.Mourn, events.Retry, events.Redraw, events.Resize)


def test_a_total_outage_of_ten_minutes_costs_nothing_but_ten_minutes() -> None:
    def weather(draw: Draw) -> Failure | None:
        return unreadable() if 20.0 <= draw.now < 620.0 else None

    pool = Simulation(weather, workers=12, num_cached=6, train_s=0.05).run(2000, within_s=1000.0)
    assert [draw.ticket for draw in pool.taken] == list(range(2000))
    assert all(draw.attempt == 0 for draw in pool.taken), "the same stream"
    assert [bool(action.cases) for action in pool.all(events.Outage)] == [True, False]
    assert pool.at(events.Outage) < 25.0
    assert not pool.all(events.Quarantine, events.Redraw, events.Resize, events.Mourn)


@pytest.mark.parametrize("workers", [1, 2, 12])
def test_an_outage_in_which_every_read_hangs(workers: int) -> None:
    """Stalled NFS: the watchdog's deaths are no evidence against the pool, and no case is blamed for good."""

    def weather(draw: Draw) -> Cause | None:
        return HANG if 20.0 <= draw.now < 1820.0 else None

    pool = Simulation(weather, workers=workers, num_cached=6).run(1000, within_s=4000.0)
    assert [draw.ticket for draw in pool.taken] == list(range(1000))
    assert pool.all(events.Outage)
    assert not pool.all(events.Quarantine, events.GiveUp, events.SwitchMethod)


@pytest.mark.parametrize("workers", [1, 2, 12])
@pytest.mark.parametrize("seconds", [1, 5, 12, 20, 60])
def test_short_outages_quarantine_nothing(workers: int, seconds: int) -> None:
    def weather(draw: Draw) -> Failure | None:
        return unreadable() if 20.0 <= draw.now < 20.0 + seconds else None

    pool = Simulation(weather, workers=workers, num_cached=2, batch_s=2.0).run(300, within_s=2000.0)
    assert len(pool.taken) == 300
    assert not pool.all(events.Quarantine, events.GiveUp)


@pytest.mark.parametrize("workers", [1, 2, 12])
def test_one_truncated_file_among_good_ones(workers: int) -> None:
    pool = Simulation(bad(["brain_007"], unreadable(broken=True)), workers=workers, num_cached=3).run(1500)
    assert len(pool.taken) == 1500
    (quarantine,) = pool.all(events.Quarantine)
    assert (quarantine.case, quarantine.quarantined, quarantine.limit) == ("brain_007", 1, 5)
    first = pool.at(events.Retry)
    assert pool.at(events.Quarantine) - first < 15.0
    assert not pool.all(events.Outage)


@pytest.mark.parametrize("batch_s", [0.3, 30.0])
@pytest.mark.parametrize("workers", [1, 12])
@pytest.mark.parametrize("cases", [["brain_001", "brain_050", "brain_099"], [f"brain_00{n}" for n in range(5)]])
def test_truncated_files_among_good_ones(workers: int, batch_s: float, cases: list[str]) -> None:
    fault = bad(cases, unreadable(broken=True))
    pool = Simulation(fault, workers=workers, num_cached=6, batch_s=batch_s).run(1500, within_s=10**6)
    assert len(pool.taken) == 1500
    assert sorted(action.case for action in pool.all(events.Quarantine)) == cases
    assert len(pool.all(events.Outage)) == 0 or batch_s == 30.0
    assert not pool.all(events.GiveUp)


@pytest.mark.parametrize("workers", [1, 12])
def test_missing_files_among_good_ones(workers: int) -> None:
    """It looks like an outage of a part of the storage, but not for ever."""
    cases = ["brain_001", "brain_050", "brain_099"]
    pool = Simulation(bad(cases, unreadable()), workers=workers, num_cached=6).run(1500)
    assert len(pool.taken) == 1500
    assert sorted(action.case for action in pool.all(events.Quarantine)) == cases
    assert pool.now < 1500.0


@pytest.mark.parametrize("workers", [1, 12])
def test_truncated_files_in_every_slot_of_the_ring(workers: int) -> None:
    """Nothing else can be tried while they are, so it looks like an outage: after a minute something else is drawn."""

    def weather(draw: Draw) -> Failure | None:
        return unreadable(broken=True) if 30 <= draw.ticket < 60 and draw.attempt == 0 else None

    pool = Simulation(weather, workers=workers, num_cached=3, cases=10_000).run(1000)
    assert [draw.ticket for draw in pool.taken] == list(range(1000))
    assert not pool.all(events.GiveUp)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("workers", [1, 3, 12])
@pytest.mark.parametrize("train_s", [0.01, 1.0])
def test_a_case_that_kills_its_worker(seed: int, workers: int, train_s: float) -> None:
    fault = bad(["brain_007"], Cause.ITSELF)
    pool = Simulation(fault, workers=workers, num_cached=3, train_s=train_s, seed=seed).run(1000)
    assert len(pool.taken) == 1000
    assert [action.case for action in pool.all(events.Quarantine)] == ["brain_007"]
    assert len(pool.all(events.Mourn)) <= 3, "two, and one more if nothing else had worked in between"
    assert not pool.all(events.Resize)


def test_a_case_that_hangs_its_worker() -> None:
    pool = Simulation(bad(["brain_007"], HANG), workers=4).run(1500, within_s=10**5)
    assert len(pool.taken) == 1500
    assert [action.case for action in pool.all(events.Quarantine)] == ["brain_007"]
    assert len(pool.all(events.Mourn)) <= 3


@pytest.mark.parametrize("every", [3, 20, 100])
def test_what_hangs_on_the_random_numbers_quarantines_nothing(every: int) -> None:
    """The same draw fails again, another one of the same case does not."""

    def weather(draw: Draw) -> Failure | None:
        return bug() if random.Random(f"{draw.ticket} {draw.attempt}").randrange(every) == 0 else None

    pool = Simulation(weather, workers=4, batch_s=0.1, train_s=0.01, cases=50).run(10_000)
    assert len(pool.all(events.Quarantine)) <= (2 if every == 3 else 0)
    if every > 3:
        assert [draw.ticket for draw in pool.taken] == list(range(10_000))


def test_deaths_that_hang_on_the_random_numbers_and_nothing_else() -> None:
    """Nobody knows the case (two in hand): the ticket is drawn anew, and the stream goes on."""

    def weather(draw: Draw) -> Cause | None:
        return Cause.ITSELF if random.Random(f"{draw.ticket} {draw.attempt}").randrange(50) == 0 else None

    pool = Simulation(weather, workers=4, batch=2).run(1500)
    assert len(pool.taken) == 1500
    assert pool.all(events.Redraw) and not pool.all(events.Quarantine)


def test_kills_from_outside_blame_nobody() -> None:
    pool = Simulation(workers=3)
    for number in range(200):
        pool.run(len(pool.taken) + 1 + number % 3)
        pool.kill(random.Random(number).choice(sorted(pool._workers)))
    pool.run(1000)
    assert [draw.ticket for draw in pool.taken] == list(range(1000))
    assert all(draw.attempt == 0 for draw in pool.taken)
    assert not pool.all(events.Quarantine, events.Redraw)


def test_everything_kills_from_a_moment_on() -> None:
    """Not the cases: a library was replaced under it. No case is blamed; the error says that workers die."""

    def weather(draw: Draw) -> Cause | None:
        return Cause.ITSELF if draw.now > 20.0 else None

    pool = Simulation(weather, workers=12, num_cached=6, cases=10, other_method=True).run(1000)
    assert not pool.all(events.Quarantine)
    assert [type(action) for action in pool.all(events.Resize, events.SwitchMethod, events.GiveUp)] == [
        events.Resize,
        events.SwitchMethod,
        events.GiveUp,
    ]
    assert pool.all(events.GiveUp)[0].why is Why.DEATHS
    assert pool.at(events.GiveUp) < 600.0


def test_a_bug_from_a_moment_on_is_raised_and_no_case_is_blamed() -> None:
    pool = Simulation(lambda draw: bug() if draw.now > 20.0 else None, workers=12, num_cached=6, cases=10).run(1000)
    assert pool.raised is not None and pool.raised.place == bug().place
    assert not pool.all(events.Quarantine)
    assert pool.now < 30.0


def test_nothing_can_be_read_from_the_start() -> None:
    pool = Simulation(lambda draw: unreadable(), workers=12, num_cached=6, batch_s=0.05).run(10)
    assert pool.raised is not None
    assert pool.now < 5.0


def test_a_bug_from_the_start() -> None:
    pool = Simulation(lambda draw: bug(), workers=12, num_cached=6, batch_s=0.05).run(10)
    assert pool.raised is not None
    assert pool.now < 0.5


def test_too_many_bad_cases() -> None:
    cases = [f"brain_00{number}" for number in range(7)]
    pool = Simulation(bad(cases, bug()), workers=4, train_s=0.05, batch_s=0.05).run(10_000)
    (end,) = pool.all(events.GiveUp)
    assert end.why is Why.QUARANTINE and end.case in cases
    assert len(pool.all(events.Quarantine)) == 5


def test_on_bad_case_raise_ends_with_the_case() -> None:
    policy = Policy(OnBadCase.RAISE)
    pool = Simulation(bad(["brain_007"], Cause.ITSELF), workers=4, policy=policy).run(10_000)
    assert pool.all(events.GiveUp) == [events.GiveUp(Why.BAD_CASE, case="brain_007")]
    pool = Simulation(bad(["brain_007"], unreadable()), workers=4, policy=policy).run(10_000)
    assert pool.raised is not None and pool.raised.case == "brain_007"


def test_on_bad_case_retry_survives_what_passes() -> None:
    def weather(draw: Draw) -> Cause | None:
        return Cause.ITSELF if draw.now < 200.0 and draw.cases == ("brain_007",) else None

    pool = Simulation(weather, workers=4, policy=Policy(OnBadCase.RETRY)).run(1500)
    assert len(pool.taken) == 1500 and all(draw.attempt == 0 for draw in pool.taken)


def test_an_outage_ends_the_pool_after_its_limit() -> None:
    def weather(draw: Draw) -> Failure | None:
        return unreadable() if draw.now > 20.0 else None

    pool = Simulation(weather, workers=4, policy=Policy(outage_s=900.0)).run(10_000)
    (end,) = pool.all(events.GiveUp)
    assert end.why is Why.OUTAGE
    assert 900.0 < end.seconds < 940.0


def test_unknown_cases_and_an_unreadable_one() -> None:
    """Nothing can be quarantined: the exception is raised, after eleven seconds of trying."""

    def weather(draw: Draw) -> Failure | None:
        return Failure("OSError at user.py:3", reading=True) if draw.ticket == 30 else None

    pool = Simulation(weather, workers=4, reports_cases=False).run(1000)
    assert pool.raised is not None and len(pool.taken) == 30


def test_a_loader_whose_batches_name_no_cases_but_whose_failures_do() -> None:
    pool = Simulation(bad(["brain_007"], bug()), workers=4, reports_cases=False).run(1500)
    assert len(pool.taken) == 1500
    assert [action.case for action in pool.all(events.Quarantine)] == ["brain_007"]


# ---- in lanes of their own ----


def ordered() -> Blame:
    """As `book`, of a pool in which nothing else can be tried while a ticket fails."""
    blame = Blame(Policy(), ordered=True)
    blame.draws_from(100)
    blame.succeeded(0, ("brain_000",), 0.0, begun=0.0)
    return blame


def test_in_a_lane_a_bad_case_is_quarantined_although_nothing_else_is_tried() -> None:
    blame = ordered()
    verdicts = [blame.failed(1, KEY_ERROR, n / 10) for n in range(4)]
    assert verdicts == [AGAIN, Verdict(Fate.DRAW_ANEW, case=CASE), AGAIN, Verdict(Fate.DRAW_ANEW, quarantined=CASE)]


def test_in_a_lane_a_case_that_kills_twice_is_quarantined() -> None:
    blame = ordered()
    assert blame.died(1, CASE, 1.0, Cause.ITSELF) == AGAIN
    assert blame.died(1, CASE, 2.0, Cause.ITSELF) == Verdict(Fate.DRAW_ANEW, quarantined=CASE)


def test_in_a_lane_a_damaged_file_gets_the_time_to_be_written() -> None:
    blame, now = ordered(), 1.0
    while (verdict := blame.failed(1, TRUNCATED, now)).fate is Fate.AGAIN:
        now += verdict.in_s
    assert verdict.quarantined == CASE
    assert now > 8.0


def test_in_a_lane_storage_that_does_not_answer_is_waited_for() -> None:
    blame, now = ordered(), 1.0
    while now < 1800.0:
        verdict = blame.failed(1, UNREADABLE, now)
        assert verdict.fate is not Fate.END and verdict.quarantined is None
        now += verdict.in_s
    assert blame.outage_since is not None
    assert blame.succeeded(1, (CASE,), now, begun=now) == pytest.approx(now - 1.0)
    assert not blame.quarantined


# ---- many tickets at once ----


def test_many_tickets_that_fail_at_the_same_moment_are_one_try() -> None:
    """A pool that begins while the storage is away for a moment: few cases, many tickets."""
    blame = book(worked=False, cases=8)
    due = [(0.001 * ticket, ticket) for ticket in range(12)]
    raised_at = None
    while raised_at is None:
        now, ticket = min(due)
        due.remove((now, ticket))
        verdict = blame.failed(ticket, on(f"brain_{ticket % 3:03}"), now)
        assert verdict.fate in (Fate.AGAIN, Fate.RAISE)
        if verdict.fate is Fate.RAISE:
            raised_at = now
        due.append((now + verdict.in_s + 0.001, ticket))
    assert 3.5 <= raised_at < 4.0


def test_a_case_that_many_tickets_meet_at_the_same_moment_has_no_strike_for_it() -> None:
    blame = book()
    for moment in range(3):
        for ticket in range(1, 9):
            now = 0.1 * moment + 0.001 * ticket
            verdict = blame.failed(ticket, UNREADABLE, now)
            assert verdict.fate is Fate.AGAIN and verdict.quarantined is None
            others_work(blame, now)
    assert not blame.quarantined
