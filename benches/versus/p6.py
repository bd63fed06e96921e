#!/usr/bin/env python3
"""P6: a next tag, about 8% of its data new: (a) copies only, from the member that took the push to the two others, with
nothing sent ahead; (b) from the client's start until all three hold it, verified and durable; beside `rsync -avz` to two targets at once, which have
the tag before (the reference deployment's own command). And what was sent, beside the new bytes in `zstd -1`.

Rounds in turn, each on a fresh cluster. 1024 MiB take about five minutes, for each kind of image.

    benches/versus/p6.py [megabytes of data] [rounds] [sparse|dense]
"""

import os, shutil, sys, time
import images
from lab import Lab, Mainstay, Steal, spread

megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
kind = sys.argv[3] if len(sys.argv) > 3 else "sparse"
dense = kind == "dense"

with Lab() as lab, Steal():
    first, second = images.make(lab.dir, megabytes, dense)
    raw, small = images.new_bytes(first, second)
    print(f"{kind} disk: {images.size(second)}; new in the next tag: {raw >> 20} MiB, {small / 1048576:.1f} MiB compressed; "
          f"{rounds} rounds in turn", flush=True)
    rows = {"rsync -avz": [], "mainstay (a), member to two members": [], "mainstay (b), client until all hold it": []}
    sent = {"client": [], "each member": []}
    for n in range(rounds):
        source, folders = images.source_folder(lab, first, dense), images.targets(lab)
        for folder in folders:
            images.run("cp", "-p", "--sparse=never" if dense else "--sparse=always",
                       os.path.join(source, "disk"), os.path.join(folder, "disk"))
        images.source_folder(lab, second, dense)
        images.run("sync", "-f", lab.dir)
        rows["rsync -avz"].append(images.rsync("-avz --no-whole-file", source, folders))
        for folder in [source, *folders]:
            shutil.rmtree(folder)
        for name, flags in (("mainstay (a), member to two members", images.COPIES_ONLY),
                            ("mainstay (b), client until all hold it", ())):
            cluster = Mainstay(lab, flags=flags)
            images.push(cluster, first, "v1", "all")
            images.wait_whole(cluster, "v1")
            images.run("sync", "-f", lab.dir)
            before, begin = images.moved(cluster), time.time()
            _, bytes_sent = images.push(cluster, second, "v2", "one" if flags else "majority")
            acknowledged = time.time()
            images.wait_whole(cluster, "v2")
            rows[name].append(time.time() - (acknowledged if flags else begin))
            sent["client"].append(bytes_sent / small)
            sent["each member"].append((images.moved(cluster) - before) / 2 / small)
            images.end(lab, cluster)
        print(f"round {n + 1}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in rows.items())
              + f", sent / compressed new bytes {sent['client'][-1]:.2f}, {sent['each member'][-1]:.2f}", flush=True)
    print(f"\n| P6, {kind}, two targets | seconds, median (min-max) |\n| --- | --- |")
    for name, values in rows.items():
        print(f"| {name} | {spread(values, '{:.3f}')} |")
    for ours in list(rows)[1:]:
        print(f"rsync -avz / {ours}: {spread([x / y for x, y in zip(rows['rsync -avz'], rows[ours])], '{:.1f}')}")
    for who, values in sent.items():
        print(f"bytes sent to {'the first member' if who == 'client' else who} / compressed new bytes: {spread(values)}")
