#!/usr/bin/env python3
"""P14: what a snapshot of many instances does to writes. Snapshots come by themselves, every 64 MiB of log on each
member; the load runs until each member has made some, and each tenth of a second in which a member was at it (by
its own log) is told from those in which none was. Prints a row for the README.

    benches/versus/p14.py [instances] [seconds] [clients] [bytes of a value] [rounds]
"""

import datetime, os, re, statistics, sys
from lab import Lab, Mainstay, Steal, load, spread

instances = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
seconds = int(sys.argv[2]) if len(sys.argv) > 2 else 60
clients = int(sys.argv[3]) if len(sys.argv) > 3 else 16
size = int(sys.argv[4]) if len(sys.argv) > 4 else 256
rounds = int(sys.argv[5]) if len(sys.argv) > 5 else 5


def snapshots(lab, names):
    """[begin, end] of each in milliseconds of the Unix epoch, by the members' own logs."""
    spans = []
    for name in names:
        begin = None
        for line in open(os.path.join(lab.dir, name + ".log"), errors="replace"):
            stamp = re.match(r"(\d{4}-\d\d-\d\dT[\d:.]+)Z", line)
            if not stamp:
                continue
            at = datetime.datetime.fromisoformat(stamp[1]).replace(tzinfo=datetime.timezone.utc).timestamp() * 1000
            if "snapshot due" in line:
                begin = at
            elif "snapshot made" in line and begin:
                spans.append((begin, at))
                begin = None
    return spans


p99 = lambda rows: statistics.median(r[1] for r in rows)
worst = lambda rows: max(r[2] for r in rows)
stall = lambda rows: sum(r[0] == 0 for r in rows)


def measure():
    """One round, on a new cluster: (slices with a snapshot, slices without)."""
    with Lab() as lab:
        ours = Mainstay(lab)
        ours.template()
        row = load(ours, "writes", clients, seconds, objects=instances, value_bytes=size, timeline=True)
        spans = snapshots(lab, ours.names)
    began = row["begin_unix_ms"]
    during, other = [], []
    for n, (done, slice_p99, longest) in enumerate(row["slices"]):
        at = began + n * 100
        busy = any(begin < at + 100 and at < end for begin, end in spans)
        (during if busy else other).append((done, slice_p99, longest))
    spans = [s for s in spans if s[1] > began]
    if not during or not other:
        sys.exit(f"no snapshot within {seconds} s ({row['done']} writes), or nothing else: let it run longer")
    took = [end - begin for begin, end in spans]
    print(f"{row['done']} writes, {len(spans)} snapshots of {statistics.median(took):.0f} ms (longest {max(took):.0f}); "
          f"slices with one {len(during)}, without {len(other)}; slices without a write: {stall(during)} and {stall(other)}; "
          f"p99 {p99(during):.1f} and {p99(other):.1f} ms, longest {worst(during):.0f} and {worst(other):.0f} ms", flush=True)
    return during, other


with Steal():
    found = [measure() for _ in range(rounds)]
of = lambda side, what, form: spread([what(r[side]) for r in found], form)
middle, rest = spread([p99(during) / p99(other) for during, other in found], "{:.2f}").split(" ", 1)
print("\n| what | Mainstay | yardstick | ratio | how |\n| --- | --- | --- | --- | --- |")
print(f"| writes while a member makes a snapshot of {instances} instances, {clients} clients (P14) | p99 {of(0, p99, '{:.1f}')} ms, longest "
      f"{of(0, worst, '{:.0f}')} ms | without: p99 {of(1, p99, '{:.1f}')} ms, longest {of(1, worst, '{:.0f}')} ms "
      f"| **{middle}x** {rest} | `benches/versus/p14.py {instances} {seconds} {clients} {size} {rounds}` |")
