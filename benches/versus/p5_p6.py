#!/usr/bin/env python3
"""P5, P6: a first tag and a next tag from a client until all three members hold verified, durable bytes, beside
rsync to two targets (the reference deployment's way) and `cp` + sync twice (the bound).

The disk is an ext4 image of this machine's own /usr files; the next tag has more files added to the same
file system with debugfs, about 8% of its data. Rounds in turn, each on a fresh cluster.

    benches/versus/p5_p6.py [megabytes of data] [rounds]
"""

import os, shutil, subprocess, sys, time
from lab import Lab, Mainstay, Steal, spread

megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3


def run(*command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def timed(*command):
    begin = time.time()
    run(*command)
    return time.time() - begin


def collect(into, limit, skip=0):
    """Copy files of /usr into a folder, `limit` bytes of them, leaving out the first `skip` bytes."""
    total = 0
    for folder, _, files in os.walk("/usr"):
        for name in sorted(files):
            path = os.path.join(folder, name)
            if os.path.islink(path) or not os.path.isfile(path):
                continue
            size = os.path.getsize(path)
            if size > 200 << 20:
                continue
            total += size
            if total <= skip:
                continue
            # Small folders: mkfs and debugfs search a folder from its start for every file.
            inside = os.path.join(into, f"{total >> 24:06d}")
            os.makedirs(inside, exist_ok=True)
            target = os.path.join(inside, f"{total:014d}-{name}")
            try:
                shutil.copyfile(path, target)
            except OSError:
                continue
            if total - skip >= limit:
                return


def make_disks(lab):
    first, second = (os.path.join(lab.dir, n) for n in ("tag1.raw", "tag2.raw"))
    tree, more = (os.path.join(lab.dir, n) for n in ("tree", "more"))
    os.mkdir(tree), os.mkdir(more)
    collect(tree, megabytes << 20)
    collect(more, (megabytes << 20) * 8 // 100, skip=megabytes << 20)
    run("mkfs.ext4", "-q", "-F", "-d", tree, first, f"{megabytes * 3}M")
    run("cp", "--sparse=always", first, second)
    script = os.path.join(lab.dir, "debugfs")
    with open(script, "w") as f:
        for folder in sorted(os.listdir(more)):
            f.write(f"mkdir /new-{folder}\ncd /new-{folder}\n")
            for name in os.listdir(os.path.join(more, folder)):
                f.write(f"write {os.path.join(more, folder, name)} {name}\n")
    run("debugfs", "-w", "-f", script, second)
    shutil.rmtree(tree), shutil.rmtree(more)
    return first, second


def push(cluster, disk, tag):
    begin = time.time()
    cluster.cli("template", "push", "disk", "--tag", tag, "--disk", disk, "--durability", "all")
    return time.time() - begin


with Lab() as lab, Steal():
    first, second = make_disks(lab)
    used = os.stat(first).st_blocks * 512
    print(f"disk: {os.path.getsize(first) >> 20} MiB, {used >> 20} MiB of data; {rounds} rounds in turn")
    rows = {"cp + sync twice": [], "rsync -aS twice, first": [], "mainstay push until all hold it, first": [],
            "rsync -avz twice, next": [], "mainstay push until all hold it, next": []}
    for n in range(rounds):
        targets = [os.path.join(lab.dir, f"target{i}") for i in (1, 2)]
        for t in targets:
            shutil.rmtree(t, ignore_errors=True)
            os.mkdir(t)
        rows["cp + sync twice"].append(
            sum(timed("cp", first, os.path.join(t, "cp")) + timed("sync", os.path.join(t, "cp")) for t in targets))
        for t in targets:
            os.remove(os.path.join(t, "cp"))
        source = os.path.join(lab.dir, "source")
        shutil.rmtree(source, ignore_errors=True)
        os.mkdir(source)
        run("cp", "--sparse=always", first, os.path.join(source, "disk"))
        rows["rsync -aS twice, first"].append(sum(timed("rsync", "-aS", source + "/", t + "/") for t in targets))
        run("cp", "--sparse=always", second, os.path.join(source, "disk"))
        rows["rsync -avz twice, next"].append(
            sum(timed("rsync", "-avz", "--no-whole-file", source + "/", t + "/") for t in targets))
        shutil.rmtree(source)
        for t in targets:
            shutil.rmtree(t)
        cluster = Mainstay(lab)
        rows["mainstay push until all hold it, first"].append(push(cluster, first, "v1"))
        rows["mainstay push until all hold it, next"].append(push(cluster, second, "v2"))
        for name in cluster.names:
            lab.kill(name)
            shutil.rmtree(os.path.join(lab.dir, name))
        print(f"round {n + 1}: " + ", ".join(f"{k} {v[-1]:.1f} s" for k, v in rows.items()), flush=True)
    print("\n| what | seconds, median (min-max) |\n| --- | --- |")
    for name, values in rows.items():
        print(f"| {name} | {spread(values)} |")
    ratio = lambda a, b: spread([x / y for x, y in zip(rows[a], rows[b])])
    print(f"first: rsync / mainstay {ratio('rsync -aS twice, first', 'mainstay push until all hold it, first')}, "
          f"cp bound / mainstay {ratio('cp + sync twice', 'mainstay push until all hold it, first')}")
    print(f"next: rsync / mainstay {ratio('rsync -avz twice, next', 'mainstay push until all hold it, next')}")
