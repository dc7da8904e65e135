"""What every store does: the same tests over TCP and in memory, and the bounds of both."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro.errors import RendezvousError, UsageError
from ferro.rendezvous import MemoryStore, StoreClient, StoreServer, StoreTimeout
from ferro.rendezvous.store import memory, wire

SECRET = b"a job's secret"
NOW = 0.0  # a deadline long past: ask once


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture(params=["memory", "tcp"])
def store(request):
    if request.param == "memory":
        store = MemoryStore()
        yield store
        store.close()
        return
    with StoreServer(secret=SECRET) as server, StoreClient(server.address, SECRET, deadline=soon()) as client:
        yield client


def test_set_then_get(store):
    store.set("key", b"value")
    assert store.get("key", deadline=NOW) == b"value"
    store.set("key", b"")
    assert store.get("key", deadline=NOW) == b""


@pytest.mark.parametrize("key", ["k" * 1024, "ü" * 512, "a/b c\n\0"])
def test_any_text_is_a_key(store, key):
    store.set(key, b"value")
    assert store.get(key, deadline=NOW) == b"value"


def test_a_large_value_goes_through_whole(store):
    value = bytes(range(256)) * (wire.MAX_VALUE_BYTES // 256)
    store.set("large", value)
    assert store.get("large", deadline=soon()) == value


@pytest.mark.parametrize("key", ["", "k" * 1025, "ü" * 513, "\ud800", b"bytes", None])
def test_a_key_out_of_bounds_is_a_usage_error_everywhere(store, key):
    for use in (
        lambda: store.set(key, b""),
        lambda: store.get(key, deadline=NOW),
        lambda: store.add(key, 1),
        lambda: store.delete(key),
    ):
        with pytest.raises(UsageError, match="key"):
            use()
    assert store.add("count", 1) == 1


@pytest.mark.parametrize("value", ["text", None, 7, bytes((16 << 20) + 1)])
def test_a_value_out_of_bounds_is_a_usage_error(store, value):
    with pytest.raises(UsageError, match="'key'"):
        store.set("key", value)
    with pytest.raises(StoreTimeout):
        store.get("key", deadline=NOW)


def test_add_counts_from_nothing_and_is_read_as_decimal(store):
    assert store.add("n", 5) == 5
    assert store.add("n", -7) == -2
    assert store.get("n", deadline=NOW) == b"-2"
    store.set("n", b"40")
    assert store.add("n", 2) == 42
    assert store.add("n", 0) == 42


@pytest.mark.parametrize("value", [b"", b"text", b"1.5", b"9" * 5000, b"\xff", b" 1", b"1_0"])
def test_add_to_something_else_is_a_usage_error_and_changes_nothing(store, value):
    store.set("n", value)
    with pytest.raises(UsageError, match=r"add\('n'\).*something else than a number"):
        store.add("n", 1)
    assert store.get("n", deadline=NOW) == value


def test_add_stays_within_64_bits(store):
    assert store.add("n", 2**63 - 1) == 2**63 - 1
    with pytest.raises(UsageError, match="64 bits"):
        store.add("n", 1)
    for amount in (2**63, -(2**63) - 1, 1.5, None):
        with pytest.raises(UsageError, match="64-bit integer"):
            store.add("n", amount)
    assert store.add("n", -(2**63)) == -1


def test_delete_tells_whether_there_was_anything(store):
    store.set("key", b"value")
    assert store.delete("key") is True
    assert store.delete("key") is False
    with pytest.raises(StoreTimeout):
        store.get("key", deadline=NOW)


@pytest.mark.parametrize("writer", ["set", "add"])
def test_get_waits_until_somebody_writes(store, writer):
    with ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(store.get, "late", deadline=soon()) for _ in range(4)]
        other = pool.submit(store.get, "other", deadline=soon())
        # Nothing wakes them but the key itself.
        assert not wait([*waiting, other], timeout=0.02).done
        if writer == "set":
            store.set("late", b"3")
        else:
            store.add("late", 3)
        assert [get.result(20) for get in waiting] == [b"3"] * 4
        assert not other.done()
        store.set("other", b"")
        assert other.result(20) == b""


def test_a_key_deleted_meanwhile_is_waited_for_again(store):
    store.set("key", b"old")
    store.delete("key")
    with ThreadPoolExecutor(1) as pool:
        get = pool.submit(store.get, "key", deadline=soon())
        store.set("key", b"new")
        assert get.result(20) == b"new"


def test_a_timeout_names_key_seconds_and_store(store):
    with pytest.raises(StoreTimeout, match=r"get\('group/never'\) waited 0\.\d s.*store") as error:
        store.prefix("group").get("never", deadline=soon(0.02))
    assert isinstance(error.value, TimeoutError)
    assert error.value.key == "group/never"
    assert error.value.seconds >= 0.02
    if isinstance(store, StoreClient):
        assert "store at 127.0.0.1:" in str(error.value)
    store.set("group/never", b"well")
    assert store.get("group/never", deadline=NOW) == b"well"


def test_prefixes_keep_names_apart_and_nest(store):
    a, b = store.prefix("a"), store.prefix("b")
    inner = a.prefix("inner")
    for view, value in ((store, b"0"), (a, b"1"), (b, b"2"), (inner, b"3")):
        view.set("key", value)
    keys = ("key", "a/key", "b/key", "a/inner/key")
    assert [store.get(key, deadline=NOW) for key in keys] == [b"0", b"1", b"2", b"3"]
    assert inner.add("n", 2) == 2
    assert a.delete("inner/n") is True
    assert inner.delete("n") is False


def test_closing_a_view_leaves_the_store_open(store):
    store.prefix("a").close()
    store.set("key", b"value")
    assert store.get("key", deadline=NOW) == b"value"


def test_sixteen_threads_adding_lose_nothing(store):
    with ThreadPoolExecutor(16) as pool:
        sums = list(pool.map(lambda _: [store.add("n", 1) for _ in range(25)], range(16)))
    assert sorted(total for thread in sums for total in thread) == list(range(1, 401))
    assert store.get("n", deadline=NOW) == b"400"


def test_sixteen_threads_meeting_over_the_store(store):
    def rank(number: int) -> list[bytes]:
        store.set(f"rank/{number}", str(number).encode())
        return [store.get(f"rank/{other}", deadline=soon()) for other in range(16)]

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(rank, range(16)))
    assert results == [[str(number).encode() for number in range(16)]] * 16


def test_close_wakes_those_who_wait_and_ends_all_use(store):
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(store.get, "never", deadline=soon()) for _ in range(2)]
        assert not wait(waiting, timeout=0.02).done
        store.close()
        for get in waiting:
            with pytest.raises(RendezvousError, match="was closed"):
                get.result(20)
    store.close()
    for use in (
        lambda: store.set("k", b""),
        lambda: store.get("k", deadline=NOW),
        lambda: store.add("k", 1),
        lambda: store.delete("k"),
    ):
        with pytest.raises(RendezvousError, match="was closed"):
            use()


def test_a_full_store_says_so_and_keeps_what_it_has(store, monkeypatch):
    monkeypatch.setattr(memory, "MAX_TOTAL_BYTES", 100)
    monkeypatch.setattr(memory, "MAX_KEYS", 3)
    store.set("a", bytes(89))
    store.set("b", b"123456789")
    with pytest.raises(RendezvousError, match=r"full \(100 of 100 bytes in use\): 'c'"):
        store.set("c", b"")
    with pytest.raises(RendezvousError, match="full"):
        store.add("c", 1)
    with pytest.raises(RendezvousError, match="full"):
        store.set("b", b"1234567890")
    assert store.get("b", deadline=NOW) == b"123456789"
    store.set("a", b"")
    store.set("c", b"")
    with pytest.raises(RendezvousError, match="3 of 3 keys"):
        store.set("d", b"")
    store.set("c", b"an old key may change")
    assert store.delete("a")
    store.set("d", b"")
    with pytest.raises(StoreTimeout):
        store.get("a", deadline=NOW)


KEYS = st.sampled_from([b"a", b"bb", b"ccc"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), KEYS, st.binary(max_size=12)),
        st.tuples(st.just("add"), KEYS, st.integers(-9, 9)),
        st.tuples(st.just("delete"), KEYS, st.none()),
    ),
    max_size=30,
)


@given(steps=STEPS)
@settings(max_examples=200, deadline=None)
def test_the_table_knows_its_size_whatever_happens(steps):
    content = memory.BoundedTable()
    model: dict[bytes, bytes] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "MAX_TOTAL_BYTES", 20)
        patch.setattr(memory, "MAX_KEYS", 2)
        for verb, key, argument in steps:
            wanted = dict(model)
            if verb == "set":
                wanted[key] = argument
            elif verb == "delete":
                wanted.pop(key, None)
            elif re.fullmatch(rb"-?\d+", model.get(key, b"0")):
                wanted[key] = str(int(model.get(key, b"0")) + argument).encode()
            fits = len(wanted) <= 2 and sum(len(k) + len(v) for k, v in wanted.items()) <= 20
            try:
                if verb == "delete":
                    content.perform(wire.Request(wire.StoreOp.DELETE, key))
                else:
                    getattr(content, verb)(key, argument)
                assert fits
                model = wanted
            except RendezvousError:
                assert not fits
            except UsageError:
                assert verb == "add"
                assert wanted == model
            for name in (b"a", b"bb", b"ccc"):
                assert content.get(name) == model.get(name)
