#!/usr/bin/env python3
"""P4: the leader is killed with -9 under load; the gap until the next acknowledged write through any
member. Mainstay beside etcd (default settings), in turn. Then the leader is stopped cleanly (SIGTERM),
which hands over the lead first. Prints rows for the README.

    benches/versus/p4.py [kills] [stops]
"""

import signal, statistics, sys, threading, time
from lab import Etcd, Lab, Mainstay, Steal, load


def one_end(system, lab, how):
    leader, result = system.leader(), {}
    def run():
        result.update(load(system, "writes", 8, 7, objects=64))
    writer = threading.Thread(target=run)
    writer.start()
    time.sleep(3)  # well inside the counted time: the generator warms up for 1 s
    lab.kill(leader, how)
    writer.join()
    system.start(leader)
    system.wait_ready(leader)
    return result["longest_gap_ms"]


def quiet(system):
    """The longest gap when nobody is killed: what a gap is told from."""
    return load(system, "writes", 8, 6, objects=64)["longest_gap_ms"]


kills = int(sys.argv[1]) if len(sys.argv) > 1 else 10
stops = int(sys.argv[2]) if len(sys.argv) > 2 else kills // 2
rows = []
with Lab() as lab, Steal():
    ours, etcd = Mainstay(lab), Etcd(lab)
    ours.template()
    for what, count, how in (("killed with -9", kills, signal.SIGKILL), ("stopped cleanly", stops, signal.SIGTERM)):
        gaps = {"mainstay": [], "etcd": []}
        for n in range(count):
            gaps["etcd"].append(one_end(etcd, lab, how))
            gaps["mainstay"].append(one_end(ours, lab, how))
            print(f"{what} {n + 1}: mainstay {gaps['mainstay'][-1]:.0f} ms, etcd {gaps['etcd'][-1]:.0f} ms", flush=True)
        if not count:
            continue
        a, b = gaps["mainstay"], gaps["etcd"]
        p50 = lambda values: statistics.median(values)
        rows.append(f"| leader {what}: gap in acknowledged writes, {count} times (P4) | p50 {p50(a):.0f} ms, max {max(a):.0f} ms "
                    f"| etcd p50 {p50(b):.0f} ms, max {max(b):.0f} ms | **{p50(a) / p50(b):.2f}x** p50, {max(a) / max(b):.2f}x max "
                    f"| `benches/versus/p4.py {kills} {stops}` |")
    print(f"longest gap with nobody killed: mainstay {quiet(ours):.0f} ms, etcd {quiet(etcd):.0f} ms")
print("\n| what | Mainstay | yardstick | ratio | how |\n| --- | --- | --- | --- | --- |")
print("\n".join(rows))
