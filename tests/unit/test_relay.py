"""What a process writes to its stderr: all of it on the screen, its tail kept, and nobody waits for a terminal."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from safeloader.pool import relay as relay_module
from safeloader.pool.relay import PENDING_NBYTES, TAIL_LINES, TAIL_NBYTES, Outlet, Relay
from safeloader.testing import wait_until

PROMPT_S = 0.5
"""Far below any wait for a terminal, far above what a busy machine takes for a call that waits for nothing."""

HEADER = """\
import os, sys, time
from safeloader.pool.relay import Outlet, Relay, adopt, flush
"""


def script(body: str) -> list[str]:
    return [sys.executable, "-c", HEADER + textwrap.dedent(body)]


class Screen:
    """A pipe in the place of this process's stderr. (pytest moves descriptor 2 itself while a test goes on.)"""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.reading, False)
        self.seen = b""

    def read(self) -> bytes:
        with contextlib.suppress(BlockingIOError):
            while said := os.read(self.reading, 1 << 20):
                self.seen += said
        return self.seen

    def shows(self, text: bytes) -> bool:
        return text in self.read()

    def fill(self) -> None:
        os.set_blocking(self.writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.writing, b"." * select.PIPE_BUF)
        os.set_blocking(self.writing, True)

    def close(self) -> None:
        for fd in (self.reading, self.writing):
            with contextlib.suppress(OSError):
                os.close(fd)


@contextlib.contextmanager
def stderr_is(fd: int) -> Iterator[None]:
    kept = os.dup(2)
    os.dup2(fd, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@pytest.fixture
def screen() -> Iterator[Screen]:
    screen = Screen()
    yield screen
    screen.close()


@pytest.fixture
def outlet(screen: Screen) -> Outlet:
    return Outlet(screen.writing)


@pytest.fixture
def pair(outlet: Outlet) -> Iterator[tuple[Relay, int]]:
    relay, theirs = Relay.create(outlet)
    yield relay, theirs
    relay.close()
    with contextlib.suppress(OSError):
        os.close(theirs)


def readable_nbytes(fd: int) -> int:
    found = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, found)
    return found[0]


def took_s(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


# ---- the way to the screen ----


def test_lines_reach_the_screen_as_they_were_written(screen: Screen, outlet: Outlet, pair: tuple[Relay, int]) -> None:
    relay, theirs = pair
    text = "Warnung: für Fall 脳_007\n\x1b[31mrot\x1b[0m\n\n".encode() + b"\xff\x00 not text\n"
    os.write(theirs, text)
    assert relay.on_readable()
    assert outlet.flush(5)
    assert screen.read() == text


def test_a_flush_of_the_process_is_one_of_its_only_outlet(screen: Screen) -> None:
    relay, theirs = Relay.create()
    os.write(theirs, b"hello\n")
    with stderr_is(screen.writing):
        relay.on_readable()
        assert relay_module.flush(5)
    assert screen.read() == b"hello\n"
    relay.close()
    os.close(theirs)


def test_an_unfinished_line_waits_for_its_end(screen: Screen, outlet: Outlet, pair: tuple[Relay, int]) -> None:
    relay, theirs = pair
    os.write(theirs, b"first\nsecond, be")
    relay.on_readable()
    outlet.flush(5)
    assert screen.read() == b"first\n"
    os.write(theirs, b"gun\n")
    relay.on_readable()
    outlet.flush(5)
    assert screen.read() == b"first\nsecond, begun\n"


def test_a_long_unfinished_line_does_not_wait(screen: Screen, outlet: Outlet, pair: tuple[Relay, int]) -> None:
    relay, theirs = pair
    os.write(theirs, b"x" * 1024)
    relay.on_readable()
    outlet.flush(5)
    assert screen.read() == b""
    os.write(theirs, b"x")
    relay.on_readable()
    outlet.flush(5)
    assert screen.read() == b"x" * 1025


def test_a_progress_bar_moves(screen: Screen, outlet: Outlet, pair: tuple[Relay, int]) -> None:
    relay, theirs = pair
    for percent in (10, 20, 30):
        os.write(theirs, b"\r%d%%" % percent)
        relay.on_readable()
    outlet.flush(5)
    assert screen.read() == b"\r10%\r20%\r"


def test_the_end_of_a_process_ends_its_line(screen: Screen, outlet: Outlet, pair: tuple[Relay, int]) -> None:
    relay, theirs = pair
    os.write(theirs, b"terminate called without an active exception")
    relay.drain()
    assert screen.read() == b"terminate called without an active exception\n"
    relay.drain()
    assert relay.tail() == "terminate called without an active exception"
    assert outlet.flush(5)
    assert screen.read().count(b"\n") == 1


def test_lines_of_several_workers_do_not_mix(screen: Screen, outlet: Outlet) -> None:
    pairs = [Relay.create(outlet) for _ in range(4)]
    lines = [b"<%d %s>\n" % (worker, bytes([65 + worker]) * (50 + 200 * worker)) for worker in range(4)]
    for turn in range(200):
        for worker, (relay, theirs) in enumerate(pairs):
            cut = turn % len(lines[worker])
            os.write(theirs, lines[worker][:cut])
            relay.on_readable()
            os.write(theirs, lines[worker][cut:])
        for relay, _ in pairs:
            relay.on_readable()
        assert outlet.flush(5)
        screen.read()
    assert screen.seen.count(b"\n") == 800
    assert set(screen.seen.splitlines(keepends=True)) == set(lines)
    for relay, theirs in pairs:
        relay.close()
        os.close(theirs)


# ---- nobody waits for a terminal ----


def test_a_full_pipe_makes_nobody_wait(screen: Screen, outlet: Outlet, pair: tuple[Relay, int]) -> None:
    relay, theirs = pair
    screen.fill()
    for number in range(40):
        os.write(theirs, (b"line %02d " % number).ljust(4999, b".") + b"\n")
        assert took_s(relay.on_readable) < PROMPT_S
        assert outlet.pending_nbytes <= PENDING_NBYTES + select.PIPE_BUF
    assert relay.tail().splitlines()[-1].startswith("line 39"), "evidence does not wait for the screen"
    wait_until(lambda: screen.shows(b"line 39") and outlet.flush(0))
    (left_out,) = re.findall(rb"\n\[\xe2\x80\xa6 (\d+) bytes of worker output left out\]\n", screen.seen)
    lines = re.findall(rb"line \d\d \.*\n", screen.seen)
    assert 5000 * len(lines) + int(left_out) == 5000 * 40, "all there was"
    assert [line[5:7] for line in lines[-10:]] == [b"%d" % number for number in range(30, 40)], "the oldest is left out"


def test_output_that_comes_faster_than_the_writing_thread_is_not_left_out(outlet: Outlet, screen: Screen) -> None:
    reader = threading.Thread(target=lambda: wait_until(lambda: screen.shows(b"end\n"), timeout_s=60))
    reader.start()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(relay_module, "_SETTLE_S", 30.0)  # a busy machine must not make the difference
        for number in range(1000):
            outlet.put(b"%04d" % number * 1000 + b"\n")
        outlet.put(b"end\n")
        reader.join()
    assert screen.seen == b"".join(b"%04d" % number * 1000 + b"\n" for number in range(1000)) + b"end\n"


def test_a_stopped_terminal_costs_the_supervisor_one_moment(
    screen: Screen, outlet: Outlet, pair: tuple[Relay, int]
) -> None:
    relay, theirs = pair
    screen.fill()
    os.write(theirs, b"last words")
    assert took_s(relay.drain) < PROMPT_S
    assert took_s(lambda: [relay.drain() for _ in range(100)]) < PROMPT_S, "it waits once, not each time"
    wait_until(lambda: screen.shows(b"last words\n") and outlet.flush(0))
    relay.drain()
    os.write(theirs, b"more words")
    relay.drain()
    assert screen.shows(b"more words\n"), "it waits again once the screen has caught up"


def _talk_to_stopped(body: str, stderr: int, go_on: Callable[[], bytes]) -> tuple[str, bytes]:
    """Run a script that prints "done" while its stderr is stuck; then let that go on."""
    with subprocess.Popen(
        script(body), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], 30)
        first = process.stdout.readline() if ready else ""
        if first:
            screen = b""
            process.stdin.close()
            deadline = time.monotonic() + 30
            while process.poll() is None and time.monotonic() < deadline:
                screen += go_on()
            first += process.stdout.read()
            screen += go_on()
        process.kill()
    return first, screen if first else b""


FLOOD = """
    relay, theirs = Relay.create()
    began = time.monotonic()
    for number in range(100):
        os.write(theirs, (b"line %03d " % number).ljust(4095, b".") + b"\\n")
        relay.on_readable()
    relay.drain()
    print(f"done {time.monotonic() - began:.3f}", flush=True)
    sys.stdin.read()
    print(flush(20))
"""


@pytest.mark.parametrize("stopped_by", ["Ctrl-S", "nobody reads"])
def test_a_terminal_that_takes_nothing(stopped_by: str) -> None:
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    if stopped_by == "Ctrl-S":
        termios.tcflow(theirs, termios.TCOOFF)

    def go_on() -> bytes:
        termios.tcflow(theirs, termios.TCOON)
        try:
            ready, _, _ = select.select([ours], [], [], 0.05)
            return os.read(ours, 1 << 16) if ready else b""
        except BlockingIOError:
            return b""

    said, screen = _talk_to_stopped(FLOOD, theirs, go_on)
    os.close(ours)
    os.close(theirs)
    match = re.fullmatch(r"done ([\d.]+)\nTrue\n", said)
    assert match is not None, said
    assert float(match[1]) < 2, "it waited for the terminal"
    assert b"bytes of worker output left out" in screen
    assert b"line 099" in screen


def test_an_interpreter_ends_although_the_terminal_is_stopped() -> None:
    ours, theirs = pty.openpty()
    termios.tcflow(theirs, termios.TCOOFF)
    body = FLOOD.replace("flush(20)", "flush(0.1)")
    ended = subprocess.run(script(body), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs, timeout=30)
    os.close(ours)
    os.close(theirs)
    assert ended.returncode == 0
    assert ended.stdout.endswith(b"False\n")


@pytest.mark.parametrize(
    "made",
    [
        pytest.param("os.close(2)", id="closed"),
        pytest.param("r, w = os.pipe(); os.dup2(w, 2); os.close(w); os.close(r)", id="pipe without reader"),
        pytest.param("r, w = os.openpty(); os.dup2(w, 2); os.close(w); os.close(r)", id="terminal that is gone"),
        pytest.param("os.dup2(os.open('/dev/full', os.O_WRONLY), 2)", id="disk full"),
        pytest.param("os.dup2(os.open('/dev/null', os.O_RDONLY), 2)", id="not writable"),
    ],
)
def test_a_stderr_that_nobody_reads_costs_only_the_screen(made: str) -> None:
    body = f"""
        import signal
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as some command line tools do
        kept = os.dup(2)
        {made}
        relay, theirs = Relay.create()
        assert min(relay.fileno(), theirs) > 2
        os.write(theirs, b"lost words\\n")
        relay.on_readable()
        assert flush(5)
        os.dup2(kept, 2)
        os.write(theirs, b"back again\\n")
        relay.on_readable()
        assert flush(5)
        print(relay.tail())
    """
    ended = subprocess.run(script(body), capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout) == (0, "lost words\nback again\n"), ended.stderr
    assert ended.stderr == "[… 11 bytes of worker output left out]\nback again\n"


def test_a_non_blocking_stderr_that_is_full(screen: Screen, outlet: Outlet) -> None:
    screen.fill()
    os.set_blocking(screen.writing, False)
    outlet.put(b"hello\n")
    assert not outlet.flush(0.05)
    wait_until(lambda: screen.shows(b"hello\n"))
    assert not os.get_blocking(screen.writing), "it is shared with others, and left as it is"
    assert outlet.flush(5)


def test_a_thread_that_can_not_be_had_is_asked_for_again(
    screen: Screen, outlet: Outlet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        outlet.put(b"one\n")
        assert not outlet.flush(0.01)
    outlet.put(b"two\n")
    assert outlet.flush(5)
    assert screen.read() == b"one\ntwo\n"


def test_a_flood_takes_one_turn_of_many(screen: Screen, outlet: Outlet, pair: tuple[Relay, int]) -> None:
    relay, theirs = pair
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 1 << 20)
    screen.fill()
    os.write(theirs, b"x" * (1 << 20))
    assert relay.on_readable()
    assert readable_nbytes(relay.fileno()) == (1 << 20) - (32 << 10)
    relay.drain()
    assert readable_nbytes(relay.fileno()) == 0
    assert len(relay.tail()) <= TAIL_NBYTES + 1
    assert outlet.pending_nbytes <= PENDING_NBYTES + select.PIPE_BUF
    wait_until(lambda: bool(screen.read()) and outlet.flush(0))


def test_a_process_that_writes_for_ever_is_kept_up_with() -> None:
    code = "import os\nwhile True: os.write(2, b'spam ' * 13107)"
    sink = os.open(os.devnull, os.O_WRONLY)
    outlet = Outlet(sink)
    relay, theirs = Relay.create(outlet)
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs) as process:
        os.close(theirs)
        os.set_blocking(relay.fileno(), True)
        seen_nbytes = 0
        while seen_nbytes < 64 << 20:
            assert took_s(relay.on_readable) < PROMPT_S
            assert len(relay._tail) <= TAIL_NBYTES and len(relay._partial) <= 1024
            assert outlet.pending_nbytes <= PENDING_NBYTES + select.PIPE_BUF
            seen_nbytes = outlet._fed_nbytes
        os.set_blocking(relay.fileno(), False)
        assert took_s(relay.drain) < 2 * PROMPT_S, "it does not wait for the end of a stream that has none"
        process.kill()
        process.wait()
        assert outlet.flush(5)
    relay.close()
    os.close(sink)


# ---- the evidence ----


@pytest.mark.parametrize(
    ("said", "tail"),
    [
        (b"", ""),
        (b"\n\n", ""),
        (b"a\nb\n", "a\nb"),
        (b"  indented\n\nafter an empty line\n", "  indented\n\nafter an empty line"),
        (b"\x1b[1;31mError\x1b[0m: no\x1b[K\n", "Error: no"),
        (b"\x1b]0;title\x07\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\\x1b(B\x1b=\n", "link"),
        (b"\r 10%|#    |\r 50%|##   |\r100%|#####|\nnext", "100%|#####|\nnext"),
        (b"\r  5%|     |", "  5%|     |"),
        (b"working\r50%\r        \r\n", "50%"),
        (b"dos\r\nlines\r\n", "dos\nlines"),
        (b"\rbar\x1b[A\r", "bar"),
        (b"bell\x07 nul\x00 back\x08 tab\t.\n", "bell nul back tab\t."),
        (b"caf\xe9 \xc3\xa9\n", "caf� é"),
        (b"\xc2\x9b31mC1", "31mC1"),
        (b"\x1b]never ended", "never ended"),
        (b"cut at the end \x1b[3", "cut at the end"),
    ],
)
def test_the_tail_is_what_a_terminal_would_show(
    screen: Screen, pair: tuple[Relay, int], said: bytes, tail: str
) -> None:
    relay, theirs = pair
    os.write(theirs, said)
    relay.drain()
    assert relay.tail() == tail


def test_the_tail_has_at_most_40_lines(screen: Screen, pair: tuple[Relay, int]) -> None:
    relay, theirs = pair
    os.write(theirs, b"".join(b"line %d\n" % number for number in range(100)))
    relay.on_readable()
    assert relay.tail().split("\n") == [f"line {number}" for number in range(100 - TAIL_LINES, 100)]


@pytest.mark.parametrize("piece_nbytes", [1000, 3, 4096])
def test_the_tail_has_at_most_8_kib(screen: Screen, pair: tuple[Relay, int], piece_nbytes: int) -> None:
    relay, theirs = pair
    said = "脳".encode() * 4000 + b" end\n"
    for start in range(0, len(said), piece_nbytes):
        os.write(theirs, said[start : start + piece_nbytes])
        relay.on_readable()
    tail = relay.tail()
    assert tail.startswith("…脳") and tail.endswith("脳 end")
    assert TAIL_NBYTES - 10 <= len(tail.encode()) <= TAIL_NBYTES + len("…".encode())


def test_the_tail_outlives_the_relay(screen: Screen, outlet: Outlet) -> None:
    relay, theirs = Relay.create(outlet)
    os.write(theirs, b"last words\n")
    relay.drain()
    relay.close()
    relay.close()
    relay.drain()
    os.close(theirs)
    assert relay.tail() == "last words"


def test_the_last_words_of_glibc(screen: Screen, outlet: Outlet) -> None:
    relay, theirs = Relay.create(outlet)
    code = """
        import ctypes
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        libc.free.argtypes = [ctypes.c_void_p]
        block = libc.malloc(5000)
        libc.malloc(5000)
        libc.free(block)
        libc.free(block)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        stderr=theirs,
        env={**os.environ, "LIBC_FATAL_STDERR_": "1"},  # glibc of old wrote to the terminal otherwise
        check=False,
    )
    os.close(theirs)
    relay.drain()
    assert ended.returncode == -signal.SIGABRT
    assert re.match(r"(double )?free\(\)|double free or corruption", relay.tail())
    assert screen.shows(relay.tail().encode())
    relay.close()


def test_a_grandchild_that_holds_the_pipe_is_not_waited_for(screen: Screen, outlet: Outlet) -> None:
    relay, theirs = Relay.create(outlet)
    code = """
        import subprocess, sys
        print("bye", file=sys.stderr)
        print(subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL).pid)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], stderr=theirs, stdout=subprocess.PIPE, check=True
    )
    os.close(theirs)
    grandchild = int(ended.stdout)
    assert took_s(relay.drain) < PROMPT_S
    assert relay.tail() == "bye"
    assert relay.on_readable(), "the stream has not ended"
    os.kill(grandchild, signal.SIGKILL)
    wait_until(lambda: not relay.on_readable(), what="the end of the stream")
    relay.close()


# ---- descriptors, forks and signals ----


def test_the_descriptors(pair: tuple[Relay, int]) -> None:
    relay, theirs = pair
    assert not os.get_inheritable(relay.fileno()) and not os.get_inheritable(theirs)
    assert not os.get_blocking(relay.fileno())
    assert os.get_blocking(theirs), "a worker that is ahead of the supervisor waits, as it would for a terminal"
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in (relay.fileno(), theirs)]
    listing = subprocess.run(["ls", "-l", "/proc/self/fd"], stdout=subprocess.PIPE, close_fds=False, text=True).stdout
    assert "pipe:" in listing and not any(link in listing for link in links)


def test_without_descriptors_nothing_is_left_open(monkeypatch: pytest.MonkeyPatch, outlet: Outlet) -> None:
    def refuse(fd: int, blocking: bool) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "set_blocking", refuse)
    with pytest.raises(OSError, match="Too many"):
        Relay.create(outlet)


def test_the_end_of_the_stream(screen: Screen, pair: tuple[Relay, int]) -> None:
    relay, theirs = pair
    assert relay.on_readable(), "nothing there yet"
    os.write(theirs, b"bye")
    os.close(theirs)
    assert relay.on_readable()
    assert not relay.on_readable()
    relay.drain()
    assert screen.shows(b"bye\n")


def test_a_process_adopts_it_for_all_that_it_starts(screen: Screen, outlet: Outlet) -> None:
    relay, theirs = Relay.create(outlet)
    body = f"adopt({theirs}); print('python', file=sys.stderr); os.system('echo shell >&2')"
    subprocess.run(script(body), pass_fds=[theirs], stderr=subprocess.DEVNULL, check=True)
    os.close(theirs)
    relay.drain()
    assert relay.tail() == "python\nshell"
    relay.close()


def test_a_forked_child_of_the_trainer_forwards_nothing(screen: Screen, outlet: Outlet) -> None:
    assert outlet._errand._busy.acquire()  # as if the writing thread were at work: it does not exist in the child
    pid = os.fork()
    if pid == 0:
        outlet.put(b"not from here\n")
        relay_module.flush(5)
        os._exit(0 if outlet.flush(5) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    outlet._errand._busy.release()
    outlet.put(b"from here\n")
    assert outlet.flush(5)
    assert screen.read() == b"from here\n"


def test_a_worker_does_not_die_of_a_print_that_nobody_reads(outlet: Outlet) -> None:
    relay, theirs = Relay.create(outlet)
    relay.close()
    code = """
        import ctypes, errno, os, signal, sys
        assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.write(2, b"from C", 6) == -1 and ctypes.get_errno() == errno.EPIPE
        libc.perror(b"from stdio")
        try:
            print("from Python", file=sys.stderr)
        except BrokenPipeError:
            print("lives", flush=True)
        os._exit(0)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], stderr=theirs, stdout=subprocess.PIPE, check=False
    )
    os.close(theirs)
    assert (ended.returncode, ended.stdout) == (0, b"lives\n")


def test_a_thread_only_while_there_is_something_to_write(screen: Screen, outlet: Outlet) -> None:
    def writers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "safeloader-stderr"]

    screen.fill()
    outlet.put(b"hello\n")
    assert writers() == ["safeloader-stderr"]
    outlet.put(b"again\n")
    assert writers() == ["safeloader-stderr"]
    wait_until(lambda: screen.shows(b"again\n"))
    wait_until(lambda: not writers())
