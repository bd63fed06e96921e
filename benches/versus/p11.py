#!/usr/bin/env python3
"""P11: a template pulled by ten nodes at once from three members, beside one node's pull, in turn; and how many copies
left the members. Nodes are real agents with empty caches and the fake driver: what they pull, verify and write is real.
The clock runs from the request until the last image is whole and durable on its node.

On one machine all nodes share its cores and its disk, which ten machines do not. So the same work is also measured
without the network: as many `cp` + sync of the image at once as there are nodes, beside one. VERSUS_DIR=/dev/shm takes
the disk out of it.

    benches/versus/p11.py [megabytes of data] [rounds] [nodes] [share: yes|no]
"""

import json, os, shutil, sys, time, urllib.request
import images
from lab import BIN, Lab, Mainstay, Steal, spread

megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 512
rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
count = int(sys.argv[3]) if len(sys.argv) > 3 else 10
share = sys.argv[4] != "no" if len(sys.argv) > 4 else True


def rest(cluster, method, path, body=None):
    url = f"http://127.0.0.1:{next(iter(cluster.api.values()))}{path}"
    request = urllib.request.Request(url, method=method, data=json.dumps(body).encode() if body else None)
    answer = json.load(urllib.request.urlopen(request, timeout=12))
    if answer["status"] != "OK":
        sys.exit(f"{path}: {answer['message']}")
    return answer.get("body")


def sent(cluster):
    total = 0
    for port in cluster.api.values():
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        line = next(l for l in page.splitlines() if l.startswith("mainstay_sent_bytes_total "))
        total += int(line.split()[1])
    return total


def pull(lab, cluster, template, names):
    """Fresh nodes with these names pull it at once: seconds, bytes that left the members, CPU seconds of all."""
    ids = {}
    for name in names:
        lab.spawn(name, [BIN, "node", "join", cluster.endpoints, "--name", name, "--driver", "fake",
                         "--host", "127.0.0.1", "--share-listen", "127.0.0.1:0" if share else "no",
                         "--reserve-space", "100M", "--data-dir", os.path.join(lab.dir, name)])
    while len(ids) < len(names):
        ids = {n["node_name"]: n["node_id"] for n in rest(cluster, "GET", "/api/v1/node") if n["node_name"] in names}
        time.sleep(0.05)
    before, everyone = sent(cluster), cluster.names + names
    cpu = lab.cpu(everyone)
    begin = time.time()
    vms = [rest(cluster, "POST", "/api/v1/vm", {"vmid": template, "node_id": ids[n]})[0] for n in names]
    folder = lambda n: os.path.join(lab.dir, n, "images")
    whole = lambda n: os.path.isdir(folder(n)) and any(
        os.path.exists(os.path.join(folder(n), f, "whole")) for f in os.listdir(folder(n)))
    while not all(whole(n) for n in names):
        if time.time() - begin > 600:
            sys.exit("not whole within 600 s")
        time.sleep(0.01)
    took, used = time.time() - begin, sent(cluster) - before
    cpu = lab.cpu(everyone) - cpu
    for vm in vms:
        rest(cluster, "DELETE", "/api/v1/vm", {"id": vm})
    for name in names:
        lab.kill(name)
        rest(cluster, "DELETE", "/api/v1/node", {"node_id": ids[name]})
        shutil.rmtree(os.path.join(lab.dir, name))
    return took, used, cpu


def copies(lab, disk, number):
    folders = [os.path.join(lab.dir, f"copy{n}") for n in range(number)]
    for folder in folders:
        os.mkdir(folder)
    took = images.copy_sync(disk, folders)
    for folder in folders:
        shutil.rmtree(folder)
    return took


with Lab() as lab, Steal():
    (disk,) = images.make(lab.dir, megabytes, later=0)
    print(f"disk: {images.size(disk)}; {count} nodes, sharing: {share}; {rounds} rounds in turn", flush=True)
    rows = {k: [] for k in ("one node", f"{count} nodes", "cp + sync, one", f"cp + sync, {count} at once")}
    used, cpus = {1: [], count: []}, {1: [], count: []}
    for n in range(rounds):
        # A fresh cluster each time: nothing is remembered of who was given what.
        cluster = Mainstay(lab)
        images.push(cluster, disk, "v1", "all")
        images.wait_whole(cluster, "v1")
        [template] = [t["id"] for t in rest(cluster, "GET", "/api/v1/registry/vm")]
        for number, row in ((1, "one node"), (count, f"{count} nodes")):
            rows["cp + sync, one" if number == 1 else f"cp + sync, {count} at once"].append(copies(lab, disk, number))
            if number > 1:
                # The node before is gone, but remembered: begin anew.
                for name in cluster.names:
                    lab.kill(name)
                for name in cluster.names:
                    cluster.start(name)
                for name in cluster.names:
                    cluster.wait_ready(name)
                images.wait_whole(cluster, "v1")
            took, bytes_, cpu = pull(lab, cluster, template, [f"n{n}-{number}-{i}" for i in range(number)])
            rows[row].append(took)
            used[number].append(bytes_)
            cpus[number].append(cpu)
        images.end(lab, cluster)
        print(f"round {n + 1}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in rows.items())
              + f"; copies from the members {used[count][-1] / used[1][-1]:.2f}", flush=True)
    print("\n| P11 | seconds, median (min-max) |\n| --- | --- |")
    for name, values in rows.items():
        print(f"| {name} | {spread(values)} |")
    ratio = lambda a, b: spread([x / y for x, y in zip(rows[a], rows[b])])
    print(f"{count} nodes / one node: {ratio(f'{count} nodes', 'one node')}")
    print(f"the same of plain copies: {ratio(f'cp + sync, {count} at once', 'cp + sync, one')}")
    print(f"copies that left the members: {spread([a / b for a, b in zip(used[count], used[1])])}")
    print(f"CPU seconds, all processes: one node {spread(cpus[1])}, {count} nodes {spread(cpus[count])}")
