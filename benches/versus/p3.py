#!/usr/bin/env python3
"""P3: the list of all instances, compressed, from any member, beside a static file of the same bytes from the same server stack.
Rounds in turn, all three members asked: still (nothing changes between two requests) and moving (16 clients write beside it).

    benches/versus/p3.py [instances] [clients] [rounds]
"""

import os, subprocess, sys, time, urllib.request
from lab import BIN, Lab, Mainstay, Steal, load, port, spread

instances = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
clients = int(sys.argv[2]) if len(sys.argv) > 2 else 1
rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 5
SECONDS = 5


class Static:
    """`bench serve-file`, as a system that can be loaded."""

    def __init__(self, lab, path):
        self.lab, self.at = lab, port()
        lab.spawn("static", [BIN, "bench", "serve-file", path, "--listen", f"127.0.0.1:{self.at}"])
        self.endpoints = f"http://127.0.0.1:{self.at}"
        for _ in range(200):
            try:
                urllib.request.urlopen(self.endpoints, timeout=2).read()
                return
            except OSError:
                time.sleep(0.05)
        sys.exit("the static server did not start")


def fetch(system):
    return load(system, "fetch", clients, SECONDS, path="/api/v1/vm")


with Lab() as lab, Steal():
    ours = Mainstay(lab)
    ours.template()
    load(ours, "reads", 1, 1, objects=instances)  # makes them
    request = urllib.request.Request(ours.endpoints.split(",")[0] + "/api/v1/vm", headers={"accept-encoding": "gzip"})
    answer = urllib.request.urlopen(request).read()
    path = os.path.join(lab.dir, "list.gz")
    open(path, "wb").write(answer)
    static = Static(lab, path)
    print(f"list of {instances} instances: {len(answer)} bytes compressed; {clients} clients, {rounds} rounds in turn", flush=True)
    rows = {"static": [], "still": [], "moving": []}
    for n in range(rounds):
        rows["static"].append(fetch(static))
        rows["still"].append(fetch(ours))
        writes = subprocess.Popen([BIN, "bench", "writes", "--clients", "16", "--seconds", str(SECONDS + 1), "--objects", str(instances),
                                   "--endpoints", ours.endpoints], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows["moving"].append(fetch(ours))
        writes.wait()
        print(f"round {n + 1}: " + ", ".join(f"{k} p50 {v[-1]['p50_ms']:.2f} p99 {v[-1]['p99_ms']:.2f} ms" for k, v in rows.items()), flush=True)
    of = lambda kind, what: [r[what] for r in rows[kind]]
    for kind in ("still", "moving"):
        ratios = [a / b for a, b in zip(of(kind, "p50_ms"), of("static", "p50_ms"))]
        print(f"{kind}: p50 {spread(of(kind, 'p50_ms'))} ms, p99 {spread(of(kind, 'p99_ms'))} ms; static p50 {spread(of('static', 'p50_ms'))} ms, "
              f"p99 {spread(of('static', 'p99_ms'))} ms; ratio of p50 {spread(ratios)}")
