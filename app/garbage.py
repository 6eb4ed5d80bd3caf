"""When a serving process looks for objects that refer to themselves: often among new ones, seldom among all.

Python counts new objects less freed ones, and looks when there are many. In a service whose new histories and answers
take the place of old ones, that count stays low while all that is new waits for one look, and a look at everything
comes about once a second under load: each holds up every request, a third of a second with 6,000 users' histories.
"""

import gc
import itertools
import threading
import time

# Answers leave no such objects behind, changes some dozens. So many are new after this time that a look takes well
# below a millisecond.
NEW_SECONDS = 0.02
# What outlived a look at the new ones is looked at once more, then only with all others, every ten minutes.
OLDER_EVERY = 4
ALL_EVERY = 30_000


def settle() -> None:
    """Take over from Python's own schedule, once a process has loaded what stays for good."""
    gc.collect()
    gc.freeze()
    gc.disable()
    threading.Thread(target=_look, name="garbage", daemon=True).start()


def _look() -> None:
    for turn in itertools.count(1):
        time.sleep(NEW_SECONDS)
        if turn % ALL_EVERY == 0:
            gc.collect()
        else:
            gc.collect(0 if turn % OLDER_EVERY else 1)
