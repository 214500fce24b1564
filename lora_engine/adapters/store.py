"""AdapterStore: a folder of many users' adapters behind a pool that holds some of them."""

from __future__ import annotations

import atexit
import json
import math
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from lora_engine import atomic
from lora_engine.adapters import initial, store_file
from lora_engine.adapters.adapter import Adapter, LoraWeights
from lora_engine.adapters.pool import AdapterPool
from lora_engine.adapters.store_file import Shape, Stored
from lora_engine.adapters.store_lock import FolderLock
from lora_engine.adapters.store_residents import Companion, Resident, Residents
from lora_engine.errors import FormatError
from lora_engine.safetensors_file import open_file, read_json, short

_SETTINGS, _ADAPTERS = "store.json", "adapters"
_FORMAT = 1
_MAX_SETTINGS = 1 << 16

_open_stores: set[AdapterStore] = set()


class AdapterStore:
    """Adapters of any number of users in a folder, ``resident`` of them in ``pool``.

    folder: made where there is none; one process has it open at a time. in_features,
    out_features, dtype, device, max_rank, seed: those of the pool. rank, alpha: of adapters
    made here (scaling = alpha / rank).

    ``slot`` and ``slots`` bring users' adapters into the pool, where they are served and taught
    as in any pool; every change shows in ``pool.version``. The least recently asked for makes
    room for the next once it is on disk, where a background writer puts those whose turn comes
    soon. ``flush`` and ``close`` write all that has changed. A process that is killed loses
    what it had not written; of every adapter the last state that was written is there, whole.

    A user who has no file gets a fresh adapter, whose delta is zero (A drawn from the hash of
    the id, B zero), and a file once that has changed; with ``create=False`` slot -1, the base.
    A user whose file is damaged gets -1 with a warning, and is in ``damaged`` with the reason;
    the file stays until ``remove``.

    Safe to use from several threads. A fork cannot use it, and does not hold the folder. A
    store lives until it is closed, at the latest when the interpreter ends.

    Raises StoreLocked, FormatError (it is no store, or a damaged one), ValueError (a store of
    another shape), OSError.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        resident: int = 1000,
        *,
        in_features: int,
        out_features: int | Sequence[int],
        dtype: str = "float32",
        device: Any = None,
        rank: int = 2,
        alpha: float = 4.0,
        max_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("resident", resident), ("rank", rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"AdapterStore: {name}: expected at least 1, got {value!r}")
        if not math.isfinite(alpha):
            raise ValueError(f"AdapterStore: alpha: expected a finite number, got {alpha!r}")
        if max_rank is not None and rank > max_rank:
            raise ValueError(f"AdapterStore: rank: expected at most {max_rank}, got {rank}")
        self.folder = Path(os.path.realpath(folder))
        self.rank, self.scaling, self._max_rank = rank, float(alpha) / rank, max_rank
        self.pool = AdapterPool(
            in_features, out_features, dtype, device, resident, max_rank, seed=seed
        )
        self._adapters = os.fspath(self.folder / _ADAPTERS)
        self.damaged: dict[str, str] = {}
        self._shape = Shape(self.pool.in_features, self.pool.slices, self.pool.dtype)
        self._residents = Residents(self.pool, resident)
        self._fetching: set[str] = set()
        self._fetched = threading.Condition(self._residents.lock)
        self._closed = ""  # why it cannot be used
        self.folder.mkdir(parents=True, exist_ok=True)
        self._folder_lock = FolderLock(self.folder)
        try:
            _check_settings(self.folder, self._shape)
        except BaseException:
            self._folder_lock.release()
            raise
        _open_stores.add(self)
        atexit.register(self.close)

    def __repr__(self) -> str:
        state = self._closed or f"{len(self._residents)} of {self._residents.most} resident"
        return f"AdapterStore({str(self.folder)!r}): {state}"

    @property
    def evictions(self) -> int:
        """How many adapters have left the pool for others, so far."""
        return self._residents.evictions

    # ---- users' slots ----

    def slot(self, user: str, create: bool = True) -> int:
        """The slot of a user's adapter, or -1.

        It is that user's until ``resident`` others were asked for, by all threads together:
        threads that share a store take theirs by ``slots``. Raises TypeError, ValueError (an
        id that is no text, or of more than 65,536 bytes in UTF-8), OSError (the adapter cannot
        be read, or none can be written to make room), RuntimeError (the store is closed, or all
        other adapters are in use).
        """
        residents = self._residents
        with residents.lock:
            found = residents.find(user)
        if found is None:
            found = self._fetch(user, create, 0)
        return -1 if found is None else found.slot

    @contextmanager
    def slots(self, users: Iterable[str], create: bool = True) -> Iterator[np.ndarray]:
        """ids int32, one a user, for a batch: ``with store.slots(users) as ids``.

        Until the block ends none of these adapters leaves the pool (nor does one whose
        gradient waits for ``pool.apply_updates``). Raises what ``slot`` does, and ValueError
        where the users are more than ``resident``.
        """
        if isinstance(users, str):
            raise TypeError("AdapterStore.slots: users: expected several ids, got text")
        users = list(users)
        distinct, most = len(set(users)), self._residents.most
        if distinct > most:
            raise ValueError(
                f"AdapterStore.slots: users: expected at most resident = {most}, got {distinct}"
            )
        pinned: dict[str, Resident | None] = {}
        try:
            for user in users:
                if user not in pinned:
                    with self._residents.lock:
                        found = self._residents.find(user, 1)
                    pinned[user] = found or self._fetch(user, create, 1)
            slots = {user: -1 if it is None else it.slot for user, it in pinned.items()}
            yield np.array([slots[user] for user in users], np.int32)
        finally:
            with self._residents.lock:
                for it in pinned.values():
                    if it is not None:
                        it.pins -= 1

    def remove(self, user: str) -> bool:
        """Deletes a user's adapter, damaged or not; whether there was one.

        Raises RuntimeError where a batch uses it, OSError.
        """
        path = Path(self._path(store_file.user_hash(user)))
        with self._alone_with(user):
            there = self._residents.remove(user)
            if path.exists():
                path.unlink()
                atomic.sync_folder(path.parent)
                there = True
            self.damaged.pop(user, None)
        return there

    def export(
        self, user: str, folder: str | os.PathLike[str], target_modules: str | Sequence[str]
    ) -> None:
        """A user's adapter as a folder that PEFT loads, its weights only.

        target_modules: the path in the model of the layer that the pool adapts, one a slice of
        out_features. Raises ValueError (there is no adapter, or another number of modules),
        FormatError (it is damaged), OSError.
        """
        names = [target_modules] if isinstance(target_modules, str) else [*target_modules]
        slices = len(self._shape.slices)
        if len(set(names)) != len(names) or len(names) != slices:
            raise ValueError(
                f"AdapterStore.export: target_modules: expected {slices} different names,"
                f" got {names}"
            )
        path = self._path(store_file.user_hash(user))
        with self._alone_with(user):
            stored = self._residents.stored(user) or self._read(user, path)
        if stored is None:
            raise ValueError(
                f"AdapterStore.export: user: expected one with an adapter, got {short(user)!r}"
            )
        modules = {
            name: LoraWeights(A, B, stored.scaling)
            for name, A, B in zip(names, stored.A, stored.B, strict=True)
            if A is not None
        }
        Adapter(modules, dtype=self._shape.dtype).save(folder)

    def carry(self, companion: Companion) -> None:
        """Has a companion's state of each adapter travel with it: ``store.carry(ewc)``.

        companion: an ``le.EWC`` of ``pool``, or what has the methods of ``Companion``. What a
        file holds and the companion refuses (EWC of the other form) is kept as it is, with a
        warning. Without a companion all of it is kept so. Raises ValueError for a second one.
        """
        self._check_open()
        self._residents.accompany(companion)

    # ---- bringing in ----

    def _path(self, hashed: bytes) -> str:
        return store_file.path_of(self._adapters, hashed)

    @contextmanager
    def _alone_with(self, user: str) -> Iterator[None]:
        """Nobody else brings this user's adapter in, or deletes it."""
        with self._fetched:
            while user in self._fetching:
                self._fetched.wait()
            self._check_open()
            self._fetching.add(user)
        try:
            yield
        finally:
            with self._fetched:
                self._fetching.discard(user)
                self._fetched.notify_all()

    def _fetch(self, user: str, create: bool, pins: int) -> Resident | None:
        """Brings an adapter in, and pins it so often; None: the base."""
        self._check_open()
        hashed = store_file.user_hash(user)
        with self._alone_with(user):
            with self._residents.lock:
                found = self._residents.find(user, pins)
            if found is not None or user in self.damaged:
                return found
            path = self._path(hashed)
            try:
                stored = self._read(user, path)
            except FormatError as error:
                self.damaged[user] = str(error)
                warnings.warn(
                    f"AdapterStore: user {short(user)!r} is served the base: {error}", stacklevel=3
                )
                return None
            if stored is None:
                if not create:
                    return None
                stored = self._fresh(hashed)
            return self._admit(user, path, stored, pins)

    def _read(self, user: str, path: str) -> Stored | None:
        data = store_file.read(path)
        if data is None:
            return None
        stored = store_file.decode(data, user, self._shape, path)
        most = self._max_rank
        for s, A in enumerate(stored.A):
            if most is not None and A is not None and len(A) > most:
                raise FormatError(
                    f"{path}: lora_A.{s}: expected a rank of at most max_rank = {most},"
                    f" got {len(A)}"
                )
        return stored

    def _fresh(self, hashed: bytes) -> Stored:
        rng = np.random.default_rng(int.from_bytes(hashed, "little"))
        width = self._shape.in_features
        pairs = [initial.weights(rng, self.rank, width, out) for out in self._shape.slices]
        A, B = map(list, zip(*pairs, strict=True))
        return Stored(A, B, self.scaling, {})

    def _admit(self, user: str, path: str, stored: Stored, pins: int) -> Resident:
        residents = self._residents
        while True:
            with residents.lock:
                self._check_open()
                if residents.make_room():
                    added = residents.add(user, path, stored)
                    added.pins = pins
                    return added
                oldest = residents.oldest()
            if oldest is None:
                raise RuntimeError(
                    f"AdapterStore: resident: expected an adapter that is not in use,"
                    f" got {residents.most} that are"
                )
            residents.write(oldest)  # where it cannot be written it stays, and this raises

    # ---- the end ----

    def flush(self) -> int:
        """Writes every adapter that has changed; how many had.

        Raises OSError where some could not be written: those stay resident, and changed.
        """
        self._check_open()
        changed, errors = self._residents.write_all()
        if errors:
            first = errors[0]
            raise OSError(
                first.errno,
                f"{len(errors)} of {changed} changed adapters stay resident, as they could not be"
                f" written: {first.strerror}",
                first.filename,
            )
        return changed

    def close(self) -> None:
        """Flushes, and lets others open the folder. Once it is closed this does nothing.

        Other threads have stopped teaching by then. Raises OSError as ``flush`` does; the store
        then stays open.
        """
        if self._closed:
            return
        self.flush()
        self._closed = "closed"
        self._residents.clear()
        self._residents.stop()
        self._folder_lock.release()
        _open_stores.discard(self)
        atexit.unregister(self.close)

    def __enter__(self) -> AdapterStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(
                f"AdapterStore: expected an open store, got one that is {self._closed}"
            )

    def _forget(self) -> None:
        """In a fork."""
        self._closed = "open in the process that this is a fork of"
        self._folder_lock.forget()
        self._residents.forget()


def _forget_in_fork() -> None:
    for store in _open_stores:
        store._forget()
    _open_stores.clear()


os.register_at_fork(after_in_child=_forget_in_fork)


# ---- the settings' file -----------------------------------------------------


def _check_settings(folder: Path, shape: Shape) -> None:
    """Writes them where there are none; raises where they are others."""
    file = folder / _SETTINGS
    mine = {
        "format": _FORMAT,
        "in_features": shape.in_features,
        "out_features": list(shape.slices),
        "dtype": shape.dtype,
    }
    try:
        with open_file(file) as opened:
            data = opened.read(_MAX_SETTINGS + 1)
    except FileNotFoundError:
        if (folder / _ADAPTERS).exists():
            raise FormatError(f"{file}: expected these adapters' settings, got none") from None
        text = json.dumps(mine, indent=2) + "\n"

        def write(to: BinaryIO) -> None:
            to.write(text.encode())

        atomic.replace_file(file, write)
        return
    if len(data) > _MAX_SETTINGS:
        raise FormatError(f"{file}: expected at most {_MAX_SETTINGS} bytes, got more")
    found = read_json(data, str(file))
    if found.get("format") != _FORMAT:
        raise FormatError(
            f"{file}: format: expected {_FORMAT}, got {short(repr(found.get('format')))}"
        )
    for name, value in mine.items():
        if found.get(name) != value:
            there = short(repr(found.get(name)))
            raise ValueError(f"AdapterStore: {name}: expected {there} as in {file}, got {value!r}")
