"""All victims of a cell in one process of breaching, each with the same CPU time.

python rival.py BENCHMARKS JOBS.json OUT.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

PROBE = 30
"""Iterations from which the pace is measured."""


def main() -> None:
    """Read the jobs, measure the pace, attack every victim."""
    benchmarks, asked, out = map(Path, sys.argv[1:])
    sys.path.insert(0, str(benchmarks))
    import rival  # the benchmark that speaks breaching's interface

    torch.set_num_threads(1)
    breaching = rival.rival()
    wanted = json.loads(asked.read_text(encoding="utf-8"))
    jobs = [rival.Job(**job) for job in wanted["jobs"]]
    probe = rival.run(breaching, replace(jobs[0], steps=PROBE))
    steps = max(1, round(wanted["allowed"] / probe["cpu_seconds_per_iteration"]))
    found = [rival.run(breaching, replace(job, steps=steps))["psnr"] for job in jobs]
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
