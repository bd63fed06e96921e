#!/usr/bin/env python3
"""P13: what endless churn leaves on disk and in memory.

    benches/versus/p13.py [writes] [objects] [rounds]

Three members; metadata updates of 256 bytes over a few instances, with no operator action; each round is a new
cluster. Prints log, state, snapshots and RSS of a member over time; at the end the bound: disk <= 3 x live
+ 256 MiB, live being the newest snapshot (every key and value, once). As many puts into etcd (default settings, once)
stand beside it, and a row for the README."""

import os, sys, time
from lab import Etcd, Lab, Mainstay, load, spread

WRITES = int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000
OBJECTS = int(sys.argv[2]) if len(sys.argv) > 2 else 2_000
ROUNDS = int(sys.argv[3]) if len(sys.argv) > 3 else 5
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


def measure():
    """One round: (worst bytes on disk, the bound for it, highest RSS)."""
    with Lab() as lab:
        cloud = Mainstay(lab)
        cloud.template()
        written, begun, worst = 0, time.time(), 0
        print(f"{'writes':>9} {'seconds':>8} {'log':>7} {'state':>7} {'snaps':>7} {'RSS':>7} {'peak':>7}  p50, p99, max of the stretch (ms)")
        while written < WRITES:
            run = load(cloud, "writes", 64, 10, objects=OBJECTS, warmup=0)
            written += run["done"]
            at = os.path.join(lab.dir, "c1")
            log, state, snaps = (size(os.path.join(at, part)) for part in ("log", "state", "snapshots"))
            now, peak = rss(lab.children["c1"].pid)
            worst = max(worst, log + state + snaps)
            print(f"{written:9} {time.time() - begun:8.0f} {log // MIB:7} {state // MIB:7} {snaps // MIB:7} "
                  f"{now // MIB:7} {peak // MIB:7}  {run['p50_ms']:.1f} {run['p99_ms']:.1f} {run['max_ms']:.0f}", flush=True)
        saved = os.path.join(at, "snapshots")
        live = max(os.path.getsize(os.path.join(saved, name)) for name in os.listdir(saved))
        bound = 3 * live + 256 * MIB
        print(f"live {live / MIB:.1f} MiB; at most {worst // MIB} MiB on disk during {written} writes: "
              f"{'within' if worst <= bound else 'OVER'} the bound of {bound // MIB} MiB", flush=True)
        return worst, bound, peak


def etcd():
    """What as many puts leave in a member of etcd: (bytes on disk, highest RSS)."""
    with Lab() as lab:
        cluster, written = Etcd(lab), 0
        while written < WRITES:
            written += load(cluster, "writes", 64, 10, objects=OBJECTS, warmup=0)["done"]
        return size(os.path.join(lab.dir, "e1")), rss(lab.children["e1"].pid)[1]


rows = [measure() for _ in range(ROUNDS)]
theirs, their_peak = etcd()
of = lambda n: spread([row[n] / MIB for row in rows], "{:.0f}")
ratio, rest = spread([row[0] / theirs for row in rows], "{:.2f}").split(" ", 1)
print("\n| what | Mainstay | yardstick | ratio | how |\n| --- | --- | --- | --- | --- |")
print(f"| disk of a member, at most, during {WRITES} writes over {OBJECTS} objects (P13) | {of(0)} MiB, RSS at most {of(2)} MiB "
      f"| the bound, 3x live + 256 MiB: {of(1)} MiB; etcd, nobody compacting: {theirs // MIB} MiB, RSS at most {their_peak // MIB} MiB "
      f"| **{ratio}x** {rest} | `benches/versus/p13.py {WRITES} {OBJECTS} {ROUNDS}` |")
sys.exit(any(worst > bound for worst, bound, _ in rows))
