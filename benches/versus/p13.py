#!/usr/bin/env python3
"""P13: what endless churn leaves on disk and in memory. Usage: p13.py [WRITES [OBJECTS]]

Three members; WRITES (default 2,000,000) metadata updates of 256 bytes over OBJECTS (default 2,000) instances,
with no operator action. Prints log, state, snapshots and RSS of a member over time; at the end the bound:
disk <= 3 x live + 256 MiB, live being the newest snapshot (every key and value, once)."""

import os, sys, time
from lab import Lab, Mainstay, load

WRITES = int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000
OBJECTS = int(sys.argv[2]) if len(sys.argv) > 2 else 2_000
MIB = 1 << 20


def size(path):
    """Bytes that the files under a folder take on disk."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_blocks * 512
            except OSError:
                pass  # deleted meanwhile
    return total


def rss(pid):
    """Resident bytes now, and at most so far."""
    found = {}
    for line in open(f"/proc/{pid}/status"):
        if line.startswith(("VmRSS", "VmHWM")):
            found[line[:5]] = int(line.split()[1]) * 1024
    return found["VmRSS"], found["VmHWM"]


with Lab() as lab:
    cloud = Mainstay(lab)
    cloud.template()
    written, begun, worst, p99 = 0, time.time(), 0, []
    print(f"{'writes':>9} {'seconds':>8} {'log':>7} {'state':>7} {'snaps':>7} {'RSS':>7} {'peak':>7}  p50, p99, max of the stretch (ms)")
    while written < WRITES:
        run = load(cloud, "writes", 64, 10, objects=OBJECTS, warmup=0)
        written += run["done"]
        p99.append(run["p99_ms"])
        at = os.path.join(lab.dir, "c1")
        log, state, snaps = (size(os.path.join(at, part)) for part in ("log", "state", "snapshots"))
        now, peak = rss(lab.children["c1"].pid)
        worst = max(worst, log + state + snaps)
        print(f"{written:9} {time.time() - begun:8.0f} {log // MIB:7} {state // MIB:7} {snaps // MIB:7} "
              f"{now // MIB:7} {peak // MIB:7}  {run['p50_ms']:.1f} {run['p99_ms']:.1f} {run['max_ms']:.0f}", flush=True)
    live = max(os.path.getsize(os.path.join(at, "snapshots", name)) for name in os.listdir(os.path.join(at, "snapshots")))
    bound = 3 * live + 256 * MIB
    verdict = "within" if worst <= bound else "OVER"
    print(f"live {live / MIB:.1f} MiB; at most {worst // MIB} MiB on disk during {written} writes: {verdict} the bound of {bound // MIB} MiB")
    sys.exit(worst > bound)
