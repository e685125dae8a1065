"""Ranks that send by copies, for the tests: ``python -m tests.dig.copying_job FOLDER DEVICE`` is one of them.

What each check finds is in ``rank-N.json`` in the folder, by name: an error's text, or None.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

from dig.training.parallel import joined
from tests.dig.copying_collectives import averages, captures_refused, gathers, reductions, sums_in_order, ways
from tests.dig.copying_models import buckets, graphs, places, shards
from tests.dig.copying_ranks import Job
from tests.dig.parallel_job import free_port

CHECKS = (gathers, reductions, sums_in_order, averages, shards, buckets, places, ways)
GPU_CHECKS = (*CHECKS, graphs, captures_refused)


def run(folder: Path, device: str, ranks: int, seconds: float) -> list[dict[str, str | None]]:
    """Start the ranks, and wait for what each of them finds."""
    folder.mkdir(parents=True)
    port, started = free_port(), []
    for rank in range(ranks):
        places = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(one) for name, one in places.items()}}
        words = [sys.executable, "-m", "tests.dig.copying_job", str(folder), device]
        started.append(subprocess.Popen(words, env=environment))
    deadline = time.monotonic() + seconds
    try:
        for process in started:
            process.wait(timeout=deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        pass  # What was found until then says which check never ended.
    finally:
        for process in started:
            process.kill()
    found = [folder / f"rank-{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in found]


def main(folder: Path, device: str) -> None:
    found: dict[str, str | None] = {}
    with joined(device, hang_seconds=300) as ranks:
        job = Job(folder, ranks)
        for check in GPU_CHECKS if device == "cuda" else CHECKS:
            try:
                check(job)
                found[check.__name__] = None
            except Exception:  # Whatever it is: it is what the check found, and the test of that name fails of it.
                found[check.__name__] = traceback.format_exc()
                print(f"rank {ranks.rank}, {check.__name__}: {found[check.__name__]}", flush=True)
            (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(found))
            if any(ranks.gather(found[check.__name__])):
                break  # Ranks may stand at different places now.
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
