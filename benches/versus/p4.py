#!/usr/bin/env python3
"""P4: the leader is killed with -9 under load; the gap until the next acknowledged write through any
member. Mainstay beside etcd (default settings), in turn.

    benches/versus/p4.py [kills]
"""

import statistics, sys, threading, time
from lab import Etcd, Lab, Mainstay, Steal, load


def one_kill(system, lab):
    leader, result = system.leader(), {}
    def run():
        result.update(load(system, "writes", 8, 7, objects=64))
    writer = threading.Thread(target=run)
    writer.start()
    time.sleep(3)  # well inside the counted time: the generator warms up for 1 s
    lab.kill(leader)
    writer.join()
    system.start(leader)
    system.wait_ready(leader)
    return result["longest_gap_ms"]


kills = int(sys.argv[1]) if len(sys.argv) > 1 else 10
with Lab() as lab, Steal():
    ours, etcd = Mainstay(lab), Etcd(lab)
    ours.template()
    gaps = {"mainstay": [], "etcd": []}
    for n in range(kills):
        gaps["etcd"].append(one_kill(etcd, lab))
        gaps["mainstay"].append(one_kill(ours, lab))
        print(f"kill {n + 1}: mainstay {gaps['mainstay'][-1]:.0f} ms, etcd {gaps['etcd'][-1]:.0f} ms", flush=True)
    print("\n| | p50 ms | max ms |\n| --- | --- | --- |")
    for name, values in gaps.items():
        print(f"| {name} | {statistics.median(values):.0f} | {max(values):.0f} |")
    a, b = gaps["mainstay"], gaps["etcd"]
    print(f"ratio: p50 {statistics.median(a) / statistics.median(b):.2f}, max {max(a) / max(b):.2f}")
