"""Who of a store's users is in the pool, who leaves next, and what has still to be written."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from lora_engine import atomic
from lora_engine.adapters import store_file
from lora_engine.adapters.pool import AdapterPool
from lora_engine.adapters.store_file import Arrays, Stored
from lora_engine.safetensors_file import short

_WRITERS = 8  # files that are synced at the same time share a commit of the disk's journal
_MOST_AHEAD = 256


class Companion(Protocol):
    """What keeps a state beside each adapter, by slot; ``le.EWC`` does."""

    def slot_version(self, slot: int) -> Any:
        """Something that differs after every change."""

    def slot_state(self, slot: int) -> Arrays:
        """Copies, float32 or int64; {} where there is nothing."""

    def load_slot_state(self, slot: int, state: Arrays) -> None:
        """Raises ValueError or TypeError where it cannot be that slot's, changing nothing."""

    def remove(self, slot: int) -> None:
        """Forgets it."""


class Resident:
    """A user's adapter that is in the pool."""

    __slots__ = ("kept", "lock", "path", "pins", "saved", "slot", "user")

    def __init__(self, user: str, path: str, slot: int, kept: Arrays) -> None:
        self.user, self.path, self.slot = user, path, slot  # slot -1: it has left
        self.kept = kept  # of its file, and with no companion
        self.pins = 0  # batches that use it now
        self.saved: Any = None  # the version that is on disk, or need not be
        self.lock = threading.Lock()  # held while it is written, and while it leaves


class Residents:
    """The users in a pool, least recently asked for first.

    ``lock`` is held while they come and go: methods that say so are called with it. It is taken
    before a resident's own lock, never after; whoever looks for room does not wait for that one,
    which is held while a file is written.
    """

    def __init__(self, pool: AdapterPool, most: int) -> None:
        self.pool, self.most = pool, most
        self.evictions = 0
        self.lock = threading.Lock()
        self.companion: Companion | None = None
        self._users: OrderedDict[str, Resident] = OrderedDict()
        self._ahead = max(1, min(most // 4, _MOST_AHEAD))  # how many are written before their turn
        self._until_sweep = 0
        self._sweep: Future[None] | None = None
        self._failed: OSError | None = None  # in the background, and not yet told
        self._writers = ThreadPoolExecutor(_WRITERS, "lora_engine-store")

    def __len__(self) -> int:
        return len(self._users)

    def find(self, user: str, pins: int = 0) -> Resident | None:
        """The user's adapter where it is in the pool, as just asked for. Needs the lock."""
        found = self._users.get(user)
        if found is not None:
            self._users.move_to_end(user)
            found.pins += pins
        return found

    # ---- coming and going ----

    def add(self, user: str, path: str, stored: Stored) -> Resident:
        """Needs the lock, and room in the pool."""
        A, B = (stored.A, stored.B) if self.pool._sliced else (stored.A[0], stored.B[0])
        added = Resident(user, path, self.pool.add(A, B, stored.scaling), stored.state)
        self._users[user] = added  # whatever comes of its state
        self._hand_over(added)
        added.saved = self._version(added)
        return added

    def make_room(self) -> bool:
        """Whether there is room now: the least recently used of those that are on disk leaves.

        Not where the next to leave have all changed and are still to be written: ``oldest``
        then. Needs the lock.
        """
        if len(self._users) < self.most:
            return True
        room, looked = False, 0
        for it in self._users.values():
            if not self._in_use(it) and it.lock.acquire(blocking=False):
                try:
                    room = it.saved == self._version(it)
                    if room:
                        self._leave(it)
                        self.evictions += 1
                finally:
                    it.lock.release()
                looked += 1
                if room or looked == self._ahead:
                    break
        self._until_sweep -= 1
        if self._until_sweep <= 0 or looked > 1:
            self._start_sweep()
        if room:
            self._tell()
        return room

    def oldest(self) -> Resident | None:
        """The least recently used that is not in use. Needs the lock."""
        return next((it for it in self._users.values() if not self._in_use(it)), None)

    def remove(self, user: str) -> bool:
        """Drops a user's adapter, changed or not. RuntimeError where it is in use."""
        with self.lock:
            it = self._users.get(user)
            if it is None:
                return False
            if it.pins:
                raise RuntimeError(
                    f"AdapterStore.remove: user: expected one that no batch uses,"
                    f" got {short(user)!r}"
                )
            with it.lock:  # its writer does not want ours
                self._leave(it)
            return True

    def clear(self) -> None:
        """Forgets all, once none is being written; none is written any more."""
        with self.lock:
            for it in self._users.values():
                with it.lock:
                    it.slot = -1
            self._users.clear()

    def stop(self) -> None:
        self._writers.shutdown()

    def forget(self) -> None:
        """In a fork, where other threads may have held the locks."""
        self.lock = threading.Lock()
        self._users = OrderedDict()

    def _in_use(self, it: Resident) -> bool:
        return it.pins > 0 or it.slot in self.pool._pending

    def _leave(self, it: Resident) -> None:
        if self.companion is not None:
            self.companion.remove(it.slot)
        self.pool.remove(it.slot)
        it.slot = -1
        del self._users[it.user]

    # ---- companions ----

    def accompany(self, companion: Companion) -> None:
        with self.lock:
            if self.companion is not None:
                raise ValueError("AdapterStore.carry: companion: expected one, got a second")
            self.companion = companion
            for it in self._users.values():
                with it.lock:
                    clean = it.saved == (self.pool.version(it.slot), None)
                    self._hand_over(it)
                    it.saved = self._version(it) if clean else None

    def _hand_over(self, it: Resident) -> None:
        if self.companion is None or not it.kept:
            return
        try:
            self.companion.load_slot_state(it.slot, it.kept)
            it.kept = {}
        except (ValueError, TypeError) as error:
            warnings.warn(
                f"AdapterStore: user {short(it.user)!r}: its state is kept, and not used:"
                f" {short(str(error))}",
                stacklevel=2,
            )

    def _version(self, it: Resident) -> Any:
        """What it.saved is compared with."""
        companion = self.companion
        return (
            self.pool.version(it.slot),
            None if companion is None else companion.slot_version(it.slot),
        )

    # ---- writing ----

    def stored(self, user: str) -> Stored | None:
        """What a resident adapter's file would hold now."""
        with self.lock:
            it = self._users.get(user)
        if it is None:
            return None
        with it.lock:
            return None if it.slot < 0 else self._snapshot(it)

    def _snapshot(self, it: Resident) -> Stored:
        A, B, scaling = self.pool.get(it.slot)
        if not self.pool._sliced:
            A, B = [A], [B]
        theirs = {} if self.companion is None else self.companion.slot_state(it.slot)
        return Stored(A, B, scaling, {**it.kept, **theirs})

    def write(self, it: Resident) -> None:
        """Puts an adapter on disk where it has changed. Raises OSError: it stays as it is."""
        with it.lock:
            if it.slot < 0:
                return
            version = self._version(it)
            if version == it.saved:
                return
            parts = store_file.encode(it.user, self._snapshot(it), self.pool.dtype)

            def write(file: BinaryIO) -> None:
                file.writelines(parts)

            path = Path(it.path)
            atomic.make_folder(path.parent)
            atomic.replace_file(path, write)
            it.saved = version

    def _changed(self, it: Resident) -> bool:
        with it.lock:
            return it.slot >= 0 and it.saved != self._version(it)

    def write_all(self) -> tuple[int, list[OSError]]:
        """(how many had changed, why some of them could not be written)."""
        with self.lock:
            users = [*self._users.values()]
        changed, errors = self._write_changed(users)
        self._failed = None  # it is mended, or told now
        return changed, errors

    def _write_changed(self, users: list[Resident]) -> tuple[int, list[OSError]]:
        def attempt(it: Resident) -> OSError | None:
            try:
                self.write(it)
            except OSError as error:
                return error
            return None

        changed = [it for it in users if self._changed(it)]
        apply: Callable[..., Any] = self._writers.map
        try:
            errors = [*apply(attempt, changed)]
        except RuntimeError:  # the interpreter is ending, and starts no thread any more
            errors = [*map(attempt, changed)]
        return len(changed), [error for error in errors if error is not None]

    def _tell(self) -> None:
        """Warns of what the background could not write."""
        if self._failed is not None:
            failed, self._failed = self._failed, None
            warnings.warn(
                f"AdapterStore: {failed}: what could not be written stays resident", stacklevel=5
            )

    def _start_sweep(self) -> None:
        """Has those that leave next put on disk, in the background."""
        if self._sweep is not None and not self._sweep.done():
            return
        self._until_sweep = max(1, self._ahead // 2)
        next_to_leave = islice(self._users.values(), self._ahead)
        changed = [it for it in next_to_leave if it.saved != self._version(it)]
        if changed:  # waking a thread takes longer than looking
            with suppress(RuntimeError):  # the interpreter is ending
                self._sweep = self._writers.submit(self._write_ahead, changed)

    def _write_ahead(self, users: list[Resident]) -> None:
        _, errors = self._write_changed(users)
        self._failed = errors[0] if errors else None
