import subprocess
import sys

# In a process of its own: that of the tests stays open to a debugger. 3 is PR_GET_DUMPABLE.
ASK = """
import ctypes, resource
from whaled.ops import dumps
before = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
dumps.forbid()
dumps.forbid()
print(before, *resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""


def test_a_process_that_forbids_core_dumps_has_no_room_for_one_and_is_not_dumpable() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0", "0", "0"]
