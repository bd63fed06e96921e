#!/usr/bin/env python3
"""P12: memory of an idle member, and of one that holds many instances, beside etcd's after as many puts of the
same size; then the time from exec to `/readyz` of a member that was killed with many log entries behind it.
Prints rows for the README.

    benches/versus/p12.py [instances] [log entries]
"""

import json, signal, statistics, sys, time, urllib.request
from lab import Etcd, Lab, Mainstay, Steal, load

instances = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
entries = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000


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


def last_log(ours, name):
    url = f"http://127.0.0.1:{ours.api[name]}/api/v1/members"
    return max(m.get("applied_index") or m.get("last_log") or 0 for m in json.load(urllib.request.urlopen(url))["body"])


def start_time(ours, lab, name, how):
    lab.kill(name, how)
    begun = time.time()
    ours.start(name)
    ours.wait_ready(name)
    return time.time() - begun


with Lab() as lab, Steal():
    ours, etcd = Mainstay(lab), Etcd(lab)
    ours.template()
    idle = settled(lab, ours.names), settled(lab, etcd.names)
    print(f"idle: mainstay {idle[0]:.0f} MB, etcd {idle[1]:.0f} MB", flush=True)
    # Objects are made before the load; five seconds of it follow on both sides.
    load(ours, "writes", 16, 5, objects=instances)
    load(etcd, "writes", 16, 5, objects=instances)
    full = settled(lab, ours.names), settled(lab, etcd.names)
    peak = memory(lab, ours.names, "VmHWM"), memory(lab, etcd.names, "VmHWM")
    print(f"{instances} objects: mainstay {full[0]:.0f} MB (peak {peak[0]:.0f}), "
          f"etcd {full[1]:.0f} MB (peak {peak[1]:.0f})", flush=True)
    done = 0
    while done < entries:
        done += load(ours, "writes", 64, 20, objects=256)["all"]
        print(f"{done} entries written", flush=True)
    names = [n for n in ours.names if n != ours.leader()]
    killed = [start_time(ours, lab, n, signal.SIGKILL) for n in names]
    stopped = [start_time(ours, lab, n, signal.SIGTERM) for n in names]
    after = settled(lab, ours.names)
    print(f"after {done} entries: mainstay {after:.0f} MB")

print("\n| what | Mainstay | yardstick | ratio | how |\n| --- | --- | --- | --- | --- |")
how = f"`benches/versus/p12.py {instances} {entries}`"
print(f"| memory of an idle member (P12) | {idle[0]:.0f} MB | etcd {idle[1]:.0f} MB | **{idle[0] / idle[1]:.2f}x** | {how} |")
print(f"| memory with {instances} instances (P12) | {full[0]:.0f} MB, peak {peak[0]:.0f} MB | etcd, as many keys of 256 bytes: "
      f"{full[1]:.0f} MB, peak {peak[1]:.0f} MB | **{full[0] / full[1]:.2f}x** | {how} |")
print(f"| start to `/readyz` with {instances} instances and {done} log entries behind it (P12) | after -9 {max(killed):.2f} s, "
      f"after a clean stop {max(stopped):.2f} s | goal 3 s | - | {how} |")
