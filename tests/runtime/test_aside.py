"""What runs aside: in a thread of the system's, whatever has been put in the place of Python's."""

import _thread
import sys
import threading
import types

import pytest

from nhwconv.runtime import aside
from nhwconv.runtime.aside import Aside


def begun(function, *arguments, stack=0):
    call = Aside(function, *arguments)
    call.begin(stack)
    return call


@pytest.mark.parametrize("stack", [0, 2**20])
def test_a_call_has_a_thread_of_its_own(stack):
    before = threading.stack_size()
    call = begun(lambda *arguments: (_thread.get_ident(), arguments), 1, 2, stack=stack)
    for _ in range(2):
        ident, arguments = call.result()
        assert ident != _thread.get_ident()
        assert arguments == (1, 2)
    assert threading.stack_size() == before


def test_what_it_raises_is_raised_where_it_is_waited_for():
    with pytest.raises(ZeroDivisionError):
        begun(lambda: 1 // 0).result()
    with pytest.raises(SystemExit):
        begun(sys.exit).result()


@pytest.mark.parametrize("stack", [0, 2**20])
def test_without_threads_it_does_not_begin(stack, monkeypatch):
    def refused(*_):
        raise RuntimeError("can't start new thread")

    before = threading.stack_size()
    monkeypatch.setattr(_thread, "start_new_thread", refused)
    with pytest.raises(RuntimeError):
        begun(int, stack=stack)
    assert threading.stack_size() == before


def test_as_python_ends_it_does_not_begin(monkeypatch):
    """A thread that is started then would never run, and who waits for it would not end."""
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    with pytest.raises(RuntimeError, match="ending"):
        begun(int)


def test_threads_and_locks_are_those_that_gevent_replaced(monkeypatch):
    taken = []

    def get_original(module, name):
        taken.append((module, name))
        return getattr(_thread, name)

    gevent = types.SimpleNamespace(get_original=get_original)
    monkeypatch.setitem(sys.modules, "gevent.monkey", gevent)
    assert begun(int, "7", stack=2**20).result() == 7
    assert sorted(taken) == [("_thread", name) for name in ("allocate_lock", "stack_size", "start_new_thread")]
    assert type(aside.compiler_lock._lock) is type(aside.parallel._backend_init_thread_lock) is _thread.RLock
