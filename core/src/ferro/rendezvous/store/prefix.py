"""A view of a store under a prefix."""

from __future__ import annotations

from ferro.rendezvous.store.interface import Store


class PrefixStore:
    """The keys of `store` that begin with `name/`; as thread-safe as `store` is."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name

    def set(self, key: str, value: bytes) -> None:
        """See `Store.set`."""
        self._store.set(self._full(key), value)

    def get(self, key: str, *, deadline: float) -> bytes:
        """See `Store.get`."""
        return self._store.get(self._full(key), deadline=deadline)

    def add(self, key: str, amount: int) -> int:
        """See `Store.add`."""
        return self._store.add(self._full(key), amount)

    def delete(self, key: str) -> bool:
        """See `Store.delete`."""
        return self._store.delete(self._full(key))

    def will(self, key: str, value: bytes) -> None:
        """See `Store.will`; it is the store's one will."""
        self._store.will(self._full(key), value)

    def prefix(self, name: str) -> Store:
        """See `Store.prefix`."""
        return PrefixStore(self._store, self._full(name))

    def close(self) -> None:
        """Do nothing: the store belongs to whoever made it."""

    def _full(self, key: str) -> str:
        return f"{self._name}/{key}"
