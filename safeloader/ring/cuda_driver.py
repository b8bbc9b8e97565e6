"""The few calls of CUDA's driver that `pinning` needs, and nothing of CUDA before `start`.

The driver's API and not the runtime's, because a failed call of the runtime leaves a "last error" behind, which torch
would report as that of the user's next kernel, and because its calls act on the thread's current device. Here every
call leaves the thread as it was: its current context, and how strict it is about captures.

Source of what is said about CUDA: the comments in `cuda.h` of CUDA 13.0. `cuCtxRecordEvent` came with CUDA 12.5.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import defaultdict, deque
from collections.abc import Iterator
from ctypes import byref, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from typing import Any, Final

import torch

LIBRARY: Final = "libcuda.so.1"
CAPTURE_UNSUPPORTED: Final = 900
"""CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: the call does not go together with a capture that was running."""
_NOT_REGISTERED: Final = 713  # CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED
_PORTABLE: Final = 0x01  # CU_MEMHOSTREGISTER_PORTABLE: pinned for all contexts
_BLOCKING_SYNC: Final = 0x1  # CU_EVENT_BLOCKING_SYNC: who waits sleeps
_DISABLE_TIMING: Final = 0x2  # CU_EVENT_DISABLE_TIMING
_RELAXED: Final = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

_FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "cuDeviceGetCount": (c_void_p,),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDevicePrimaryCtxGetState": (c_int, c_void_p, c_void_p),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuCtxGetCurrent": (c_void_p,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxRecordEvent": (c_void_p, c_void_p),
    "cuCtxSynchronize": (),
    "cuEventCreate": (c_void_p, c_uint),
    "cuEventSynchronize": (c_void_p,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuThreadExchangeStreamCaptureMode": (c_void_p,),
    "cuGetErrorName": (c_int, c_void_p),
}
"""Name in the library and arguments; all return a CUresult."""


class UnavailableError(RuntimeError):
    """Slots can't be registered in this process; the text says why, and what to do."""


class NoDeviceError(UnavailableError):
    """There is no CUDA: nothing is pinned, as with `torch.Tensor.pin_memory` nothing could be."""


class CudaError(RuntimeError):
    """A call of the driver failed.

    Attributes:
        code: the CUresult.
    """

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call} says {name} ({code})")
        self.code = code


@dataclass(frozen=True)
class Mark:
    """All that was asked of one device's primary context until a moment: an event."""

    device: int
    event: int


class CudaDriver:
    """See the module. All methods may be called in any thread, but in no forked child."""

    def __init__(self, library: Any) -> None:
        self._functions = {}
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
            self._functions[name] = function
        self._contexts: dict[int, int] = {}  # of devices, retained; for as long as the process lives
        self._spare: defaultdict[int, deque[int]] = defaultdict(deque)  # events by device, for the next use
        self._devices = self._all_devices()
        self._home = next(self._active(), (None, 0))[1]  # which one does not matter: what is pinned is portable
        if not self._home:
            raise UnavailableError("no device has a primary context, although torch has pinned memory")

    # ---- what pinning needs ----

    def capturing(self) -> bool:
        """Whether the calling thread is in the middle of capturing a graph, as far as torch can say."""
        return torch.cuda.is_current_stream_capturing()

    def register(self, address: int, nbytes: int) -> None:
        """Pin memory of this process, for all contexts; whole pages.

        Raises:
            CudaError: it can't be pinned.
        """
        with self._current(self._home):
            self._call("cuMemHostRegister_v2", address, nbytes, _PORTABLE)

    def unregister(self, address: int) -> None:
        """The reverse. Nothing may be copied from there any more.

        Raises:
            CudaError: CUDA is broken, or gone.
        """
        with self._current(self._home):
            try:
                self._call("cuMemHostUnregister", address)
            except CudaError as error:
                if error.code != _NOT_REGISTERED:  # Ctrl-C came just before it was
                    raise

    def record(self) -> list[Mark]:
        """Mark what all devices have been asked to do until now, on whatever streams; `wait` waits for that.

        Raises:
            CudaError: with CAPTURE_UNSUPPORTED, a stream was capturing, and that capture is broken now.
        """
        marks: list[Mark] = []
        try:
            for device, context in self._active():
                marks.append(Mark(device, self._event(device, context)))
                with self._current(context):  # the caller's thread may have none
                    self._call("cuCtxRecordEvent", context, marks[-1].event)
        except CudaError:
            self._put_back(marks)
            raise
        return marks

    def wait(self, marks: list[Mark]) -> None:
        """Block until all that is done.

        Raises:
            CudaError: a context is broken, or gone.
        """
        for mark in marks:
            with self._current(self._contexts[mark.device]):
                self._call("cuEventSynchronize", mark.event)
        self._put_back(marks)

    def wait_idle(self) -> None:
        """Block until no device has anything left to do of what it has been asked until now.

        Raises:
            CudaError: as `record` and `wait`.
        """
        for _, context in self._active():
            with self._current(context):
                self._call("cuCtxSynchronize")

    # ---- how ----

    def _call(self, name: str, *arguments: Any) -> None:
        code = self._functions[name](*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            known = self._functions["cuGetErrorName"](code, byref(text)) == 0 and text.value is not None
            raise CudaError(name, code, (text.value or b"").decode() if known else "an unknown error")

    def _all_devices(self) -> list[int]:
        count, device = c_int(), c_int()
        self._call("cuDeviceGetCount", byref(count))
        devices = []
        for ordinal in range(count.value):
            self._call("cuDeviceGet", byref(device), ordinal)
            devices.append(device.value)
        return devices

    def _active(self) -> Iterator[tuple[int, int]]:
        """Devices that somebody uses, and their primary contexts. One that nobody uses must not get one from us."""
        for device in self._devices:
            flags, active = c_uint(), c_int()
            self._call("cuDevicePrimaryCtxGetState", device, byref(flags), byref(active))
            if not active.value:
                continue
            if device not in self._contexts:
                context = c_void_p()
                self._call("cuDevicePrimaryCtxRetain", byref(context), device)
                self._contexts[device] = context.value or 0
            yield device, self._contexts[device]

    def _event(self, device: int, context: int) -> int:
        with contextlib.suppress(IndexError):
            return self._spare[device].pop()
        event = c_void_p()
        with self._current(context):
            self._call("cuEventCreate", byref(event), _BLOCKING_SYNC | _DISABLE_TIMING)
        return event.value or 0

    def _put_back(self, marks: list[Mark]) -> None:
        for mark in marks:
            self._spare[mark.device].append(mark.event)

    @contextlib.contextmanager
    def _current(self, context: int) -> Iterator[None]:
        """Inside the `with` block, the thread's context is this one, and a capture in another thread forbids nothing.

        Registering memory and waiting for an event would else break a capture that another thread has begun in the
        default mode, although they have nothing to do with it.
        """
        before, mode = c_void_p(), c_int(_RELAXED)
        self._call("cuCtxGetCurrent", byref(before))
        self._call("cuThreadExchangeStreamCaptureMode", byref(mode))
        try:
            self._call("cuCtxSetCurrent", context)
            yield
        finally:
            self._functions["cuCtxSetCurrent"](before)
            self._functions["cuThreadExchangeStreamCaptureMode"](byref(mode))


def start() -> CudaDriver:
    """The driver, once torch has begun to use CUDA; torch does so here if it has not, as `pin_memory()` would.

    Raises:
        NoDeviceError: there is no CUDA.
        UnavailableError: the driver is too old, or refuses.
        RuntimeError: torch's own, if it can't use CUDA.
    """
    if not torch.cuda.is_available():
        raise NoDeviceError("torch finds no CUDA device")
    torch.empty(1).pin_memory()  # torch chooses the device, and initialises it
    try:
        return CudaDriver(ctypes.CDLL(LIBRARY))
    except OSError as error:
        raise UnavailableError(f"CUDA's driver library can't be loaded: {error}") from error
    except AttributeError as error:
        raise UnavailableError(f"the driver is older than CUDA 12.5: {error}; update it") from error
    except CudaError as error:
        raise UnavailableError(str(error)) from error
