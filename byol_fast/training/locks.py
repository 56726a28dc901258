"""Locks: one process writes to a run folder, and one run at a time is built or trained in a process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from byol_fast.config import ConfigError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# Of file systems without locks: some network and FUSE mounts.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class RunLock:
    """Advisory lock of a run folder, released by `release`, or when the process ends, however that happens.

    The lock file names the host and the process. Where the file system has no locks, a warning says so and the run
    goes on. A second lock of the same folder in one process takes over from the first, whose run has not begun or is
    over (`exclusive`).

    Args:
        folder: the run folder; created if it does not exist.
        created: folders that were created for the run, the innermost first; removed on release if nothing is in them.

    Raises:
        ConfigError: another process holds the lock.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, created: Sequence[Path] = ()) -> None:
        self.folder = folder.resolve()
        for other in list(_locks):
            if other.folder == self.folder:
                other.release()
        handle = _locked_file(self.folder)
        self._finalizer = weakref.finalize(self, _unlock, handle, self.folder, tuple(created))
        _locks.add(self)
        try:
            os.ftruncate(handle, 0)
            os.write(handle, f"{socket.gethostname()} {os.getpid()}\n".encode())
        except OSError:
            self.release()
            raise

    @property
    def held(self) -> bool:
        """True until the lock is released."""
        return self._finalizer.alive

    def release(self) -> None:
        """Release the lock and remove its file; does nothing the second time."""
        self._finalizer()

    def close_in_child(self) -> None:
        """Close the descriptor that a forked process has inherited; the lock stays with the parent."""
        if (finalizer := self._finalizer.detach()) is not None:
            os.close(finalizer[2][0])


def _locked_file(folder: Path) -> int:
    """Descriptor of the folder's lock file, locked by this process."""
    path = folder / LOCK_FILE
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder was removed at the end of a start that failed
            folder.mkdir(parents=True, exist_ok=True)
            continue
        try:
            _lock(handle, folder)
            if _is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the process before has removed this file after it was opened here


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        host, process = (*os.pread(handle, 300, 0).decode(errors="replace").split(), "unknown", "unknown")[:2]
        raise ConfigError(
            f"run folder: {folder} must be used by one run at a time, process {process} on host {host} is running in "
            "it; wait until it ends or stop it, or choose another name"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("run folder: %s cannot be locked (%s); do not start a second run in it", folder, error.strerror)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _unlock(handle: int, folder: Path, created: Sequence[Path]) -> None:
    """Remove the lock file, and the created folders if they are empty, then release the lock."""
    with suppress(OSError):
        if _is_at(handle, folder / LOCK_FILE):  # otherwise it was removed by hand, and may be another process's now
            (folder / LOCK_FILE).unlink()
        for path in created:
            path.rmdir()
    os.close(handle)


@contextmanager
def exclusive() -> Iterator[None]:
    """Refuse to build or train two runs at the same time: they would share torch's random numbers and settings.

    Raises:
        RuntimeError: another run is being built or trained in this process.
    """
    lock = _working
    if not lock.acquire(blocking=False):
        raise RuntimeError(
            "training: one run at a time can be built or trained in a process, because torch's random number "
            "generators and settings are shared, and another one is running; wait until it ends, or start this one "
            "in another process"
        )
    try:
        yield
    finally:
        lock.release()


def _after_fork_in_child() -> None:
    """Leave all locks to the parent, so that its death releases them."""
    global _working  # noqa: PLW0603  (the parent's may be locked, by a run that goes on there)
    _working = threading.Lock()
    for lock in list(_locks):
        lock.close_in_child()


_locks: weakref.WeakSet[RunLock] = weakref.WeakSet()
_working = threading.Lock()
os.register_at_fork(after_in_child=_after_fork_in_child)
