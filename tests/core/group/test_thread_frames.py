"""Several threads may ask for frames at once, whatever the collector of garbage calls meanwhile."""

import subprocess
import sys

# Collections begin anywhere, and each lets another thread run; without care, one begins with the interpreter locked.
PROGRAM = """
import gc, sys, threading, time
from ferro.group.thread_frames import thread_frames

def ask(step):
    kept = []
    for number in range(4000):
        kept.append([[] for _ in range(number * step % 11)])
        if len(kept) > 20:
            kept.clear()
        assert threading.get_ident() in thread_frames()

gc.callbacks.append(lambda phase, info: time.sleep(0))
gc.set_threshold(11)
sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=ask, args=(step,)) for step in (1, 2, 3, 5)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert gc.isenabled()
gc.disable()
thread_frames()
assert not gc.isenabled()
print("all have ended")
"""


def test_threads_that_ask_at_once_all_end():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "all have ended\n"), ended.stderr
