"""A driver in a process of its own, for tests: ``python -m tests.registry.driver MODE HOME URI NAME``.

``write`` publishes a whole sequence under its lease. ``hold`` takes the lease, says ``held``, waits for a line on
standard input, tries to publish and says ``published`` or ``lost``.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path

from amlora_dist.errors import LeaseLostError
from amlora_dist.registry.leases import Timing
from amlora_dist.registry.store import Store
from tests.registry.tiny_banks import TASKS, fingerprint, publish_sequence

TIMING = Timing(heartbeat_s=0.3, dead_after_s=3.0, poll_s=0.2)


def main(mode: str, home: str, uri: str, name: str) -> None:
    store = Store.open(Path(home), uri or None)
    with tempfile.TemporaryDirectory() as work:
        if mode == "write":
            lease = store.hold_run(name, name, Timing())
            run = store.stage_run(store.parent_run(name, name, {}), "0 noise", fingerprint(name, "noise"))
            for step in range(40):
                moment = int(time.time() * 1000)
                store.log_metrics_batch(run, [(f"metric-{k}", step / 40, step, moment) for k in range(10)])
            publish_sequence(store, name, Path(work), epoch=lease.epoch, guard=lease.check)
            lease.release()
            print("done", flush=True)
            return
        lease = store.hold_run(name, name, TIMING)
        print("held", flush=True)
        sys.stdin.readline()
        try:
            publish_sequence(store, name, Path(work), tasks=TASKS[:1], epoch=lease.epoch, guard=lease.check)
            print("published", flush=True)
        except LeaseLostError as error:
            print("lost", error, flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(*sys.argv[1:])
