#!/usr/bin/env python3
"""P5: a first tag from the member that took the push to the two others, verified and durable on both, beside
`rsync -a` and `rsync -aS` to two targets at once and `cp` + sync to two targets at once (the bound).

The push is acknowledged with one copy; the clock runs from then until all members say that they hold it. Rounds in
turn, each on a fresh cluster. 2048 MiB take about six minutes.

    benches/versus/p5.py [megabytes of data] [rounds]
"""

import os, shutil, sys, time
import images
from lab import Lab, Mainstay, Steal, spread

megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5

with Lab() as lab, Steal():
    (first,) = images.make(lab.dir, megabytes, later=0)
    print(f"disk: {images.size(first)}; {rounds} rounds in turn", flush=True)
    rows = {"cp + sync": [], "rsync -a": [], "rsync -aS": [], "mainstay, member to two members": [],
            "mainstay, client push": []}
    for n in range(rounds):
        rows["cp + sync"].append(images.copy_sync(first, images.targets(lab)))
        source = images.source_folder(lab, first, False)
        for flags in ("-a", "-aS"):
            rows[f"rsync {flags}"].append(images.rsync(flags, source, images.targets(lab)))
        for folder in [source, *images.targets(lab)]:
            shutil.rmtree(folder)
        cluster = Mainstay(lab)
        rows["mainstay, client push"].append(images.push(cluster, first, "v1", "one")[0])
        begin = time.time()
        images.wait_whole(cluster, "v1")
        rows["mainstay, member to two members"].append(time.time() - begin)
        images.end(lab, cluster)
        print(f"round {n + 1}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in rows.items()), flush=True)
    print("\n| P5, two targets | seconds, median (min-max) |\n| --- | --- |")
    for name, values in rows.items():
        print(f"| {name} | {spread(values)} |")
    ours = rows["mainstay, member to two members"]
    for other in ("rsync -a", "rsync -aS", "cp + sync"):
        print(f"{other} / mainstay: {spread([x / y for x, y in zip(rows[other], ours)])}")
