import gc
import subprocess
import sys

import httpx2
from sqlalchemy.engine import Engine

from app.security import create_key

PROGRAM = """
import gc, time, weakref
from app import garbage

class Node:
    pass

def circle():
    node = Node()
    node.itself = node
    return weakref.ref(node)

kept = Node()
garbage.settle()
assert not gc.isenabled()
young = circle()
deadline = time.monotonic() + 60
while young() is not None and time.monotonic() < deadline:
    time.sleep(garbage.NEW_SECONDS)
print(young() is None)
"""


def test_what_refers_to_itself_is_found_without_pythons_own_schedule() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout.split() == ["True"], run.stderr


def test_a_body_that_was_refused_goes_at_once(address: str, engine: Engine) -> None:
    """What is old is seldom looked at: meanwhile nobody may fill the memory with bodies that nothing can read."""
    key = create_key(engine, "shop").key
    bodies = [b"[" + b"1," * 50_000, b"[" * 100_000, b'"\xff"']
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        with httpx2.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=30) as client:
            # The second way of writing it goes past the shortcut.
            for content_type in ("application/json", "application/json; charset=utf-8"):
                for path in ("/feedback", "/sessions/recommendations", "/nowhere"):
                    for body in bodies:
                        answer = client.post(path, content=body, headers={"Content-Type": content_type})
                        assert answer.status_code == (404 if path == "/nowhere" else 422)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert [found for found in gc.garbage if isinstance(found, BaseException)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.unfreeze()
