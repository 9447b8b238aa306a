"""From when a command's budget counts."""

import subprocess
import sys
import time
from pathlib import Path

from leakatlas.cli import clock

TOLD = "from leakatlas.cli import clock; import time; print(time.perf_counter() - clock.began())"


def test_another_program_that_calls_a_command_has_not_waited_before() -> None:
    before = time.perf_counter()
    assert clock.began() >= before


def test_a_command_counts_from_the_start_of_its_process(tmp_path: Path) -> None:
    """Imports are waited for too, where the script bears the name of the command."""
    script = tmp_path / "leakatlas"
    script.write_text(TOLD)
    other = tmp_path / "other"
    other.write_text(TOLD)
    ours, theirs = (
        float(subprocess.run([sys.executable, file], capture_output=True, check=True).stdout)
        for file in (script, other)
    )
    assert theirs < ours or not Path("/proc/self/stat").exists()
