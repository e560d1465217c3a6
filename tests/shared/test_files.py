"""What is claimed is one process's alone, for as long as that lives."""

import subprocess
import sys
import time
from pathlib import Path

from shared.files import claimed

HOLD = """
import sys, time, pathlib, shared.files
with shared.files.claimed(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_a_claim_ends_with_its_block(tmp_path: Path) -> None:
    with claimed(tmp_path / "lock") as first:
        with claimed(tmp_path / "lock") as second:
            assert (first, second) == (True, False)
        with claimed(tmp_path / "other") as other:
            assert other
    with claimed(tmp_path / "lock") as again:
        assert again


def test_a_claim_goes_with_a_process_that_is_killed_and_whoever_waits_has_it_then(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mine\n"
        with claimed(tmp_path / "lock") as mine:
            assert not mine
        killer = subprocess.Popen([sys.executable, "-c", f"import time, os; time.sleep(0.5); os.kill({holder.pid}, 9)"])
        started = time.monotonic()
        with claimed(tmp_path / "lock", wait=True) as mine:
            assert mine
        assert time.monotonic() - started > 0.3
        killer.wait()
