import subprocess
import sys

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
