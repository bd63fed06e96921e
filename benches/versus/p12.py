#!/usr/bin/env python3
"""P12: memory of an idle member, and of one that holds many instances, beside etcd's after as many puts of the
same size; then the time from exec to `/readyz` of a member that was killed with many log entries behind it.
Each round is a new pair of clusters. Prints rows for the README.

    benches/versus/p12.py [instances] [log entries] [rounds]
"""

import signal, statistics, sys, time
from lab import Etcd, Lab, Mainstay, Steal, load, spread

instances = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
entries = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000
rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 5


def memory(lab, names, field="VmRSS"):
    """Median over the members, in MB."""
    return statistics.median(lab.status(n, field) for n in names) / 1024


def settled(lab, names):
    """The same when it no longer moves: allocators and collectors take a while."""
    last = memory(lab, names)
    for _ in range(30):
        time.sleep(1)
        now = memory(lab, names)
        if abs(now - last) < 0.01 * last:
            return now
        last = now
    return last


def start_time(ours, lab, name, how):
    lab.kill(name, how)
    begun = time.time()
    ours.start(name)
    ours.wait_ready(name)
    return time.time() - begun


def measure():
    """One round: [ours, etcd's] for each kind of memory, and the two kinds of start."""
    with Lab() as lab:
        ours, etcd = Mainstay(lab), Etcd(lab)
        ours.template()
        row = {"idle": (settled(lab, ours.names), settled(lab, etcd.names))}
        # Objects are made before the load; five seconds of it follow on both sides.
        load(ours, "writes", 16, 5, objects=instances)
        load(etcd, "writes", 16, 5, objects=instances)
        row["full"] = settled(lab, ours.names), settled(lab, etcd.names)
        row["peak"] = memory(lab, ours.names, "VmHWM"), memory(lab, etcd.names, "VmHWM")
        done = 0
        while done < entries:
            done += load(ours, "writes", 64, 20, objects=256)["all"]
        names = [n for n in ours.names if n != ours.leader()]
        row["killed"] = max(start_time(ours, lab, n, signal.SIGKILL) for n in names)
        row["stopped"] = max(start_time(ours, lab, n, signal.SIGTERM) for n in names)
        row["after"] = settled(lab, ours.names)
        return row


with Steal():
    rows = []
    for n in range(rounds):
        rows.append(measure())
        print(f"round {n + 1}: " + ", ".join(f"{key} {value if isinstance(value, tuple) else round(value, 2)}"
                                             for key, value in rows[-1].items()), flush=True)


def of(key, side):
    return spread([r[key][side] for r in rows], "{:.0f}")


def ratio(key):
    middle, rest = spread([r[key][0] / r[key][1] for r in rows], "{:.2f}").split(" ", 1)
    return f"**{middle}x** {rest}"


print("\n| what | Mainstay | yardstick | ratio | how |\n| --- | --- | --- | --- | --- |")
how = f"`benches/versus/p12.py {instances} {entries} {rounds}`"
print(f"| memory of an idle member (P12) | {of('idle', 0)} MB | etcd {of('idle', 1)} MB | {ratio('idle')} | {how} |")
print(f"| memory with {instances} instances (P12) | {of('full', 0)} MB, peak {of('peak', 0)} MB | etcd, as many keys of 256 bytes: "
      f"{of('full', 1)} MB, peak {of('peak', 1)} MB | {ratio('full')} | {how} |")
seconds = lambda key: spread([r[key] for r in rows], "{:.2f}")
print(f"| start to `/readyz` with {instances} instances and {entries} log entries behind it (P12) | after -9 {seconds('killed')} s, "
      f"after a clean stop {seconds('stopped')} s | goal 3 s | - | {how} |")
