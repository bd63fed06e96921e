#!/usr/bin/env python3
"""P10: an instance from a cached template until `Started`, by booting and, of a suspended tag of the same disk, by
going on in its memory; beside plain qemu booting the same disk to the same point (its guest agent opens its port), in turn.

    benches/versus/p10.py GUEST.qcow2 [rounds]
"""

import json, os, socket, statistics, subprocess, sys, time, urllib.request
from lab import BIN, Lab, Mainstay, Steal, spread

if len(sys.argv) < 2:
    sys.exit(__doc__)
disk, rounds = os.path.abspath(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5


def plain(lab):
    overlay, qga = os.path.join(lab.dir, "plain.qcow2"), os.path.join(lab.dir, "plain.sock")
    for path in (overlay, qga):
        if os.path.exists(path):
            os.remove(path)
    begin = time.time()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", overlay], check=True)
    lab.spawn("plain", [
        "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "256", "-smp", "1", "-nodefaults", "-no-user-config",
        "-display", "none", "-drive", f"file={overlay},if=virtio,discard=unmap,detect-zeroes=unmap",
        "-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n", "-device", "virtio-serial",
        "-chardev", f"socket,id=q,path={qga},server=on,wait=off",
        "-device", "virtserialport,chardev=q,name=org.qemu.guest_agent.0"])
    while not os.path.exists(qga):
        time.sleep(0.01)
    s = socket.socket(socket.AF_UNIX)
    s.connect(qga)
    s.settimeout(0.2)
    answer = b""
    while b"return" not in answer:
        try:
            s.send(b'{"execute":"guest-ping"}\n')
            answer += s.recv(4096)
        except TimeoutError:
            pass
    taken = time.time() - begin
    s.close()
    lab.kill("plain")
    return taken


def rest(cluster, method, path, body=None):
    url = f"http://127.0.0.1:{next(iter(cluster.api.values()))}{path}"
    request = urllib.request.Request(url, method=method, data=json.dumps(body).encode() if body else None)
    return json.load(urllib.request.urlopen(request, timeout=12)).get("body")


def instance(cluster, template, tag):
    begin = time.time()
    [vm] = rest(cluster, "POST", "/api/v1/vm", {"vmid": template, "tag": tag})
    while True:
        state = rest(cluster, "GET", f"/api/v1/vm?id={vm}")
        if state["instance_state"] == "Started":
            how = state["vminfo"]["accelerator"]
            if how.endswith("resumed") != (tag == "suspended"):
                sys.exit(f"{tag}: {how}")
            break
        if state["instance_state"] == "Error":
            sys.exit(state["message"])
        time.sleep(0.02)
    taken = time.time() - begin
    rest(cluster, "DELETE", "/api/v1/vm", {"id": vm})
    while rest(cluster, "GET", f"/api/v1/vm?id={vm}")["instance_state"] != "Terminated":
        time.sleep(0.05)
    return taken


with Lab() as lab, Steal():
    cluster = Mainstay(lab)
    cluster.cli("template", "push", "guest", "--tag", "v1", "--disk", disk)
    cluster.cli("template", "push", "guest", "--tag", "suspended", "--disk", disk, "--suspend", "--accel", "tcg")
    [template] = [t["id"] for t in rest(cluster, "GET", "/api/v1/registry/vm") if t["name"] == "guest"]
    lab.spawn("node", [BIN, "node", "join", cluster.endpoints, "--name", "node1", "--driver", "qemu", "--accel", "tcg",
                       "--reserve-space", "100M",
                       "--data-dir", os.path.join(lab.dir, "node")])
    for tag in ("v1", "suspended"):
        instance(cluster, template, tag)  # fills the image cache
    a, b, c = [], [], []
    for n in range(rounds):
        b.append(plain(lab))
        a.append(instance(cluster, template, "v1"))
        c.append(instance(cluster, template, "suspended"))
        print(f"round {n + 1}: booted {a[-1]:.2f} s, resumed {c[-1]:.2f} s, plain qemu {b[-1]:.2f} s", flush=True)
    print(f"\nresumed {spread(c)} s, {spread([x / y for x, y in zip(c, a)])} of a boot, {spread([x / y for x, y in zip(c, b)])} of plain qemu")
    print(f"booted {spread(a)} s, plain qemu {spread(b)} s, ratio {spread([x / y for x, y in zip(a, b)])}, "
          f"difference of medians {statistics.median(a) - statistics.median(b):+.2f} s")
