#!/usr/bin/env python3
"""P1 committed durable writes, P2 linearizable reads: Mainstay beside etcd, three members each as three
processes on one disk, the same closed-loop generator, rounds in turn.

    benches/versus/p1_p2.py [rounds] [seconds]
"""

import sys
from lab import Etcd, Lab, Mainstay, Steal, load, spread

rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
seconds = int(sys.argv[2]) if len(sys.argv) > 2 else 4

with Lab() as lab, Steal():
    ours, etcd = Mainstay(lab), Etcd(lab)
    ours.template()
    for work in ("writes", "reads"):
        print(f"\n{work}, 256 bytes, {rounds} rounds of {seconds} s in turn: median (min-max)")
        print("| clients | mainstay /s | etcd /s | ratio | mainstay p99 ms | etcd p99 ms | p99 ratio |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for clients in (1, 16, 64, 256):
            a, b = [], []
            for _ in range(rounds):
                b.append(load(etcd, work, clients, seconds))
                a.append(load(ours, work, clients, seconds))
            rate = lambda rows: [r["per_second"] for r in rows]
            p99 = lambda rows: [r["p99_ms"] for r in rows]
            ratio = [x / y for x, y in zip(rate(a), rate(b))]
            tail = [x / y for x, y in zip(p99(a), p99(b))]
            print(f"| {clients} | {spread(rate(a), '{:.0f}')} | {spread(rate(b), '{:.0f}')} | {spread(ratio)} "
                  f"| {spread(p99(a))} | {spread(p99(b))} | {spread(tail)} |", flush=True)
            failed = sum(r["failed"] for r in a), sum(r["failed"] for r in b)
            if any(failed):
                print(f"failed requests: mainstay {failed[0]}, etcd {failed[1]}")
