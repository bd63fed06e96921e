#!/usr/bin/env python3
"""Watch a member's system calls: every acknowledged append and chunk was written and fdatasync'ed first.

Runs a cluster of one member under strace (of one, because in a cluster of three the leader may rightly
acknowledge on the strength of the two others), sends it metadata updates and a push, and reads the trace:

* append: between a PUT's arrival and its 200, the log was written and then synced;
* chunk:  between a chunk batch's arrival and its 200, a pack was written and then synced.

Votes go through the same queue of the same writer thread as appends; the storage tests check, on a disk that
forgets what was not synced, that no callback of either kind comes before its sync.

    tests/durability_strace.py [path of the mainstay binary]
"""

import json, os, re, signal, socket, subprocess, sys, tempfile, time, urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BIN = sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "target", "release", "mainstay")
CALLS = "read,recvfrom,readv,write,writev,sendto,sendmsg,pwrite64,pwritev,fdatasync,fsync"


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def call(api, method, path, body=None):
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"http://127.0.0.1:{api}{path}", method=method, data=data)
    answer = json.load(urllib.request.urlopen(request, timeout=12))
    assert answer["status"] == "OK", answer
    return answer.get("body")


def run(work):
    """Start the member, make the traffic, end it; path of the trace."""
    names = ["c1"]
    api, registry, peer = ({n: port() for n in names} for _ in range(3))
    cluster = ",".join(f"{n}=http://127.0.0.1:{peer[n]}" for n in names)
    trace, children = os.path.join(work, "trace"), {}
    try:
        for n in names:
            command = [BIN, "server", "--name", n, "--data-dir", os.path.join(work, n), "--initial-cluster", cluster,
                       "--listen", f"127.0.0.1:{api[n]}", "--registry-listen", f"127.0.0.1:{registry[n]}",
                       "--peer-listen", f"127.0.0.1:{peer[n]}"]
            if n == "c1":
                command = ["strace", "-f", "-y", "-s", "64", "-o", trace, "-e", "trace=" + CALLS] + command
            log = open(os.path.join(work, n + ".log"), "wb")
            children[n] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                           start_new_session=True)
        for n in names:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{api[n]}/readyz", timeout=3)
                    break
                except OSError:
                    time.sleep(0.1)
            else:
                sys.exit(f"{n} did not become ready: " + open(os.path.join(work, n + ".log")).read()[-2000:])
        disk = os.path.join(work, "disk")
        with open(disk, "wb") as f:
            f.write(os.urandom(8 << 20))
        subprocess.run([BIN, "template", "push", "t", "--tag", "v1", "--disk", disk, "--endpoints",
                        f"http://127.0.0.1:{api['c1']}"], check=True, capture_output=True)
        template = call(api["c1"], "GET", "/api/v1/registry/vm")[0]["id"]
        [vm] = call(api["c1"], "POST", "/api/v1/vm", {"vmid": template})
        for n in range(50):
            call(api["c1"], "PUT", f"/api/v1/vm?id={vm}", {"metadata": {"n": n}})
    finally:
        for child in children.values():
            os.killpg(child.pid, signal.SIGTERM)  # strace alone would let the member go on
        for child in children.values():
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
    return trace


LINE = re.compile(r"^(\d+) +(?:<\.\.\. (\w+) resumed>(.*)|(\w+)\((\d+)<(.*?)>(.*))$")


def events(trace):
    """(kind, call, descriptor's path, text) in order; kind is 'begin' or 'end' of the call."""
    open_calls = {}
    for line in open(trace, errors="replace"):
        found = LINE.match(line.rstrip("\n"))
        if not found:
            continue
        pid, resumed, rest, name, _, path, text = found.groups()
        if resumed:
            name, path, begun = open_calls.pop(pid, (resumed, "", ""))
            yield "end", name, path, begun + rest
            continue
        yield "begin", name, path, text
        if "<unfinished ...>" in text:
            open_calls[pid] = (name, path, text)
        else:
            yield "end", name, path, text


WRITES, SENDS, READS = {"write", "pwrite64", "pwritev", "writev"}, {"write", "writev", "sendto", "sendmsg"}, {"read", "recvfrom", "readv"}


def check(trace):
    """Counts of acknowledgements seen and of those that came too early."""
    synced_after_write = {"log": 0, "chunks": 0}
    written = {"log": False, "chunks": False}
    pending = {}  # socket -> (what, count of write-then-sync pairs when the request arrived)
    seen, early = {"append": 0, "chunk": 0}, []
    syncs = {"log": 0, "chunks": 0}
    for kind, name, path, text in events(trace):
        area = next((a for a in ("log", "chunks") if f"/c1/{a}/" in path), None)
        if area and name in WRITES and kind == "end":
            written[area] = True
        elif area and name in ("fdatasync", "fsync") and kind == "end" and "= 0" in text:
            syncs[area] += 1
            if written[area]:
                synced_after_write[area] += 1
                written[area] = False
        elif path.startswith(("TCP", "socket")) and name in READS and kind == "end":
            if '"PUT /api/v1/vm?id=' in text:
                pending[path] = ("append", "log", synced_after_write["log"])
            elif "/registry/mainstay/v1/chunks HTTP" in text:
                pending[path] = ("chunk", "chunks", synced_after_write["chunks"])
        elif path in pending and name in SENDS and kind == "begin" and "HTTP/1.1 200" in text:
            what, area, before = pending.pop(path)
            seen[what] += 1
            if synced_after_write[area] == before:
                early.append(what)
    return seen, early, syncs


with tempfile.TemporaryDirectory(prefix="strace-") as work:
    seen, early, syncs = check(run(work))
print(f"acknowledged: {seen['append']} appends, {seen['chunk']} chunk batches; "
      f"syncs of log {syncs['log']}, of packs {syncs['chunks']}; acknowledged before write and sync: {len(early)}")
if early or seen["append"] < 40 or seen["chunk"] < 1:
    sys.exit("too early, or too little was seen to say anything")
