#!/usr/bin/env python3
"""P5: a first tag on all three members, verified and durable. Twice:

* whole: from the moment the client begins to push until three members hold it, beside what one does without Mainstay: `cp`
  + sync to one place, then `rsync -a` or `rsync -aS` from there to two others at once; the bound is `cp` + sync to three places at once;
* copies only, as a member makes them that was away, with nothing sent ahead during the push: from the acknowledgement with one copy until
  three members hold it, beside rsync to two targets, and `cp` + sync to two.

Rounds in turn, each on a fresh cluster. 2048 MiB take about ten minutes.

    benches/versus/p5.py [megabytes of data] [rounds]
"""

import os, shutil, sys, time
import images
from lab import Lab, Mainstay, Steal, spread

megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5


def ours(lab, disk, durability, flags=()):
    """Seconds until the push was acknowledged, and until all hold it."""
    cluster = Mainstay(lab, flags=flags)
    begin = time.time()
    images.push(cluster, disk, "v1", durability)
    pushed = time.time() - begin
    images.wait_whole(cluster, "v1")
    whole = time.time() - begin
    images.end(lab, cluster)
    return pushed, whole


with Lab() as lab, Steal():
    (first,) = images.make(lab.dir, megabytes, later=0)
    print(f"disk: {images.size(first)}; {rounds} rounds in turn", flush=True)
    rows = {}

    def note(name, seconds):
        rows.setdefault(name, []).append(seconds)

    for n in range(rounds):
        one, two = images.copy_sync(first, images.targets(lab)[:1]), images.copy_sync(first, images.targets(lab))
        note("cp + sync to two", two)
        note("cp + sync to three at once", images.copy_sync(first, images.folders(lab, 3)))
        source = images.source_folder(lab, first, False)
        for flags in ("-a", "-aS"):
            took = images.rsync(flags, source, images.targets(lab))
            note(f"rsync {flags} to two", took)
            note(f"cp + sync to one, then rsync {flags} to two", one + took)
        for folder in [source, *images.folders(lab, 3)]:
            shutil.rmtree(folder)
        pushed, whole = ours(lab, first, "majority")
        note("mainstay, acknowledged with a majority", pushed)
        note("mainstay, whole", whole)
        note("mainstay, lag after the acknowledgement", whole - pushed)
        pushed, whole = ours(lab, first, "one", images.COPIES_ONLY)
        note("mainstay, copies only: push to one member", pushed)
        note("mainstay, copies only: member to two members", whole - pushed)
        print(f"round {n + 1}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in rows.items()), flush=True)
    print("\n| P5 | seconds, median (min-max) |\n| --- | --- |")
    for name, values in rows.items():
        print(f"| {name} | {spread(values)} |")
    for mine, others in {
        "mainstay, whole": ["cp + sync to one, then rsync -a to two", "cp + sync to one, then rsync -aS to two", "cp + sync to three at once"],
        "mainstay, copies only: member to two members": ["rsync -a to two", "rsync -aS to two", "cp + sync to two"],
    }.items():
        for other in others:
            print(f"{other} / {mine}: {spread([x / y for x, y in zip(rows[other], rows[mine])])}")
