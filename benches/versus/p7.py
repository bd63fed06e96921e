#!/usr/bin/env python3
"""P7: from the acknowledgement of a push (majority, the default) until all members hold the tag, verified and durable;
for a first tag and for two next ones, beside the time in which the same bytes are copied plainly and synced (the
transfer). The reference deployment's is a cron of three to six hours.

    benches/versus/p7.py [megabytes of data] [rounds]
"""

import os, sys, time
import images
from lab import Lab, Mainstay, Steal, spread

megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5

with Lab() as lab, Steal():
    disks = images.make(lab.dir, megabytes, later=2)
    print(f"disk: {images.size(disks[0])}; {rounds} rounds in turn", flush=True)
    kinds = ["first", "next", "next again"]
    parts = []
    for kind, before, disk in zip(kinds, [None, *disks], disks):
        raw, small = images.new_bytes(before, disk)
        part = os.path.join(lab.dir, f"part{len(parts)}")
        with open(part, "wb") as f:
            f.write(os.urandom(small))
        parts.append(part)
        print(f"{kind}: {raw >> 20} MiB new, {small / 1048576:.1f} MiB compressed")
    lags, transfers = {k: [] for k in kinds}, {k: [] for k in kinds}
    for n in range(rounds):
        cluster = Mainstay(lab)
        for kind, disk, part in zip(kinds, disks, parts):
            transfers[kind].append(images.copy_sync(part, images.targets(lab)[:1]))
            images.push(cluster, disk, kind)
            begin = time.time()
            images.wait_whole(cluster, kind)
            lags[kind].append(time.time() - begin)
        images.end(lab, cluster)
        print(f"round {n + 1}: " + ", ".join(f"{k} {v[-1]:.3f} s" for k, v in lags.items()), flush=True)
    print("\n| P7 | lag in seconds, median (min-max) | plain copy + sync | lag less the copy |\n| --- | --- | --- | --- |")
    for kind in kinds:
        over = [x - y for x, y in zip(lags[kind], transfers[kind])]
        print(f"| {kind} | {spread(lags[kind], '{:.3f}')} | {spread(transfers[kind], '{:.3f}')} | {spread(over, '{:.3f}')} |")
