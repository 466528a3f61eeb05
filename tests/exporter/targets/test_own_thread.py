"""A thread of an object's own."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest

from exporter.targets.own_thread import OwnThread


def test_everything_is_done_in_one_thread_in_order_and_errors_come_back() -> None:
    mine, seen = OwnThread("planish-test"), []

    def work(number: int) -> Any:
        seen.append((number, threading.current_thread().name))
        return number

    assert [mine.do(lambda number=number: work(number)) for number in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        mine.do(lambda: 1 // 0)
    with pytest.raises(SystemExit):
        mine.do(lambda: (_ for _ in ()).throw(SystemExit))
    assert mine.do(threading.current_thread).is_alive()
    assert seen == [(number, "planish-test") for number in range(3)]


def test_it_ends_after_the_last_thing_it_is_given() -> None:
    mine, done = OwnThread("planish-test"), threading.Event()
    thread = mine.do(threading.current_thread)
    mine.give(done.set)
    mine.stop()
    assert done.wait(60)
    thread.join(60)
    assert not thread.is_alive()


def test_it_holds_nothing_of_what_it_has_done() -> None:
    class Large:
        pass

    mine, large = OwnThread("planish-test"), Large()
    seen = weakref.ref(large)
    assert mine.do(lambda held=large: held) is large
    del large
    mine.do(lambda: None)
    assert seen() is None


def test_after_ctrl_c_the_process_ends_when_what_it_was_given_is_done() -> None:
    code = """
import signal, threading, time
from exporter.targets.own_thread import OwnThread
mine = OwnThread("planish-test")
threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
mine.do(lambda: (time.sleep(1), print("done", flush=True)))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "done\n"
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt")
    assert ended.returncode == -2


def test_when_the_process_ends_daemon_threads_have_nothing_more_done_and_others_may_close_what_they_hold() -> None:
    code = """
import atexit, threading, time
def last():  # registered first: called last
    before = count
    time.sleep(0.3)
    print(count - before, mine.do(lambda: "closed"), flush=True)
atexit.register(last)
from exporter.targets.own_thread import OwnThread
mine, count = OwnThread("planish-test"), 0
def one():
    global count
    count += 1
def more():
    while True:
        mine.do(one)
threading.Thread(target=more, daemon=True).start()
while count < 100:
    time.sleep(0.01)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0 closed\n", "")
