#!/usr/bin/env python3
"""P1 committed durable writes, P2 linearizable reads: Mainstay beside etcd, three members each as three
processes on one disk, the same closed-loop generator, rounds in turn. Prints rows for the README, and the
processor time of each side.

    benches/versus/p1_p2.py [rounds] [seconds] [writes|reads|both] [clients, ...]
"""

import sys
from lab import Etcd, Lab, Mainstay, Steal, load_and_cpu, spread

rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
seconds = int(sys.argv[2]) if len(sys.argv) > 2 else 4
works = {"writes": "durable writes/s, 256 bytes, {} clients (P1)", "reads": "linearizable reads/s by id, {} clients (P2)"}
if len(sys.argv) > 3 and sys.argv[3] != "both":
    works = {sys.argv[3]: works[sys.argv[3]]}
sizes = [int(n) for n in sys.argv[4].split(",")] if len(sys.argv) > 4 else [1, 16, 64, 256]

how = f"`benches/versus/p1_p2.py {rounds} {seconds}`"
costs = []
with Lab() as lab, Steal():
    ours, etcd = Mainstay(lab), Etcd(lab)
    ours.template()
    print(f"{rounds} rounds of {seconds} s in turn: median (min-max)\n")
    print("| what | Mainstay | yardstick | ratio | how |\n| --- | --- | --- | --- | --- |")
    for work, what in works.items():
        for clients in sizes:
            a, b = [], []
            for _ in range(rounds):
                b.append(load_and_cpu(etcd, work, clients, seconds))
                a.append(load_and_cpu(ours, work, clients, seconds))
            of = lambda rows, key, form="{:.0f}": spread([r[key] for r in rows], form)
            over = lambda key: [x[key] / y[key] for x, y in zip(a, b)]
            middle = lambda values: sorted(values)[len(values) // 2]
            p99 = lambda rows: f"p99 {middle([r['p99_ms'] for r in rows]):.2f} ms"
            ratio = spread(over("per_second")).split(" ", 1)
            print(f"| {what.format(clients)} | {of(a, 'per_second')}, {p99(a)} | etcd {of(b, 'per_second')}, {p99(b)} "
                  f"| **{ratio[0]}x** {ratio[1]}, p99 {middle(over('p99_ms')):.2f}x | {how} |", flush=True)
            failed = sum(r["failed"] for r in a), sum(r["failed"] for r in b)
            if any(failed):
                print(f"failed requests: mainstay {failed[0]}, etcd {failed[1]}")
            costs.append(f"| {what.format(clients)} | {of(a, 'members_us')} | {of(b, 'members_us')} "
                         f"| {of(a, 'generator_us')} | {of(b, 'generator_us')} |")
print("\nProcessor time in microseconds a request: all three members, and the generator beside them\n")
print("| what | our members | etcd's members | generator with ours | generator with etcd |")
print("| --- | --- | --- | --- | --- |")
print("\n".join(costs))
