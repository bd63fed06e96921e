#!/usr/bin/env python3
"""Watch a member's system calls: every acknowledged append, chunk and vote was written and fdatasync'ed first.

Runs a cluster of one member under strace (of one, because in a cluster of three the leader may rightly
acknowledge on the strength of the two others), sends it metadata updates and a push, and reads the trace;
then a cluster of three in which the lead goes back and forth between two members, with the third under strace:

* append: between a PUT's arrival and its 200, the log was written and then synced;
* chunk:  between a chunk batch's arrival and its 200, a pack was written and then synced.
* vote:   between a vote request's arrival on the peer stream and the answer that grants it, the log was written
          and then synced. Frames and answers are decoded from the bytes (raft/src/transport: frame, wire, codec).

    tests/durability_strace.py [path of the mainstay binary]
"""

import json, os, re, signal, socket, subprocess, sys, tempfile, time, urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BIN = sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "target", "release", "mainstay")
# Transfers of the lead that the third member votes on.
VOTES = 10
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


class Cluster:
    """Members as processes, one of them under strace; all of them end with it."""

    def __init__(self, work, names, traced, strings):
        self.work, self.names, self.children = work, names, {}
        self.api, self.registry, self.peer = ({n: port() for n in names} for _ in range(3))
        self.traced, self.strings = traced, strings
        self.trace = os.path.join(work, "trace")

    def start(self, name):
        cluster = ",".join(f"{n}=http://127.0.0.1:{self.peer[n]}" for n in self.names)
        command = [BIN, "server", "--name", name, "--data-dir", os.path.join(self.work, name), "--initial-cluster", cluster,
                   "--listen", f"127.0.0.1:{self.api[name]}", "--registry-listen", f"127.0.0.1:{self.registry[name]}",
                   "--peer-listen", f"127.0.0.1:{self.peer[name]}"]
        if name == self.traced:
            command = ["strace", "-f", "-y", *self.strings, "-o", self.trace, "-e", "trace=" + CALLS] + command
        log = open(os.path.join(self.work, name + ".log"), "wb")
        self.children[name] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                               start_new_session=True)

    def ready(self, name):
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.api[name]}/readyz", timeout=3)
                return
            except OSError:
                time.sleep(0.1)
        sys.exit(f"{name} did not become ready: " + open(os.path.join(self.work, name + ".log")).read()[-2000:])

    def command_line(self, *args):
        endpoints = ",".join(f"http://127.0.0.1:{self.api[n]}" for n in self.names)
        subprocess.run([BIN, *args, "--endpoints", endpoints], check=True, capture_output=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in self.children.values():
            os.killpg(child.pid, signal.SIGTERM)  # strace alone would let the member go on
        for child in self.children.values():
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)


def run_one(work):
    """One member takes a push and metadata updates; path of the trace."""
    with Cluster(work, ["c1"], "c1", ["-s", "64"]) as cluster:
        cluster.start("c1")
        cluster.ready("c1")
        disk = os.path.join(work, "disk")
        with open(disk, "wb") as f:
            f.write(os.urandom(8 << 20))
        cluster.command_line("template", "push", "t", "--tag", "v1", "--disk", disk)
        api = cluster.api["c1"]
        template = call(api, "GET", "/api/v1/registry/vm")[0]["id"]
        [vm] = call(api, "POST", "/api/v1/vm", {"vmid": template})
        for n in range(50):
            call(api, "PUT", f"/api/v1/vm?id={vm}", {"metadata": {"n": n}})
    return cluster.trace


def run_three(work):
    """The lead goes back and forth between two members, the third votes; path of its trace."""
    with Cluster(work, ["c1", "c2", "c3"], "c3", ["-xx", "-s", "100000"]) as cluster:
        for name in cluster.names:
            cluster.start(name)
        for name in cluster.names:
            cluster.ready(name)
        for n in range(VOTES):
            cluster.command_line("member", "transfer-leader", ("c1", "c2")[n % 2])
    return cluster.trace


LINE = re.compile(r"^(\d+) +(?:<\.\.\. (\w+) resumed>(.*)|(\w+)\((\d+)<(.*?)>(.*))$")


def events(trace):
    """(kind, call, descriptor's path, text) in order; kind is 'begin' or 'end' of the call."""
    open_calls = {}
    for line in open(trace, errors="replace"):
        found = LINE.match(line.rstrip("\n"))
        if not found:
            continue
        pid, resumed, rest, name, _, path, text = found.groups()
        if path and path.startswith("\\x"):
            path = bytes.fromhex(path.replace("\\x", "")).decode(errors="replace")
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


VOTE, ANSWER, HEADER = 3, 128, 20


def payload(text, name):
    """The bytes that a call read or wrote (strace -xx); of a vector of buffers, one after the other."""
    parts = re.findall(r'"((?:\\x[0-9a-f]{2})*)"', text)
    data = bytes.fromhex("".join(parts).replace("\\x", ""))
    result = re.search(r"= (-?\d+)", text)
    return data[: max(0, int(result[1]))] if result and name in READS else data


class Stream:
    """One direction of a peer stream: the HTTP upgrade, then frames."""

    def __init__(self):
        self.bytes, self.upgraded = b"", False

    def frames(self, data):
        self.bytes += data
        if not self.upgraded:
            head, end, rest = self.bytes.partition(b"\r\n\r\n")
            if not end:
                return
            self.upgraded, self.bytes = True, rest
        while len(self.bytes) >= HEADER:
            kind, length = self.bytes[1], int.from_bytes(self.bytes[4:8], "little")
            if len(self.bytes) < HEADER + length:
                return
            yield kind, int.from_bytes(self.bytes[8:16], "little"), self.bytes[HEADER:HEADER + length]
            self.bytes = self.bytes[HEADER + length:]


def granted(answer):
    """VoteAnswer: version, term and member as variable-length integers, committed, granted."""
    at = 1
    for _ in ("term", "member"):
        at += {251: 3, 252: 5, 253: 9}.get(answer[at], 1)
    return answer[at + 1] == 1


def check_votes(trace):
    """Votes granted over the peer streams, and how many of them before they were written and synced."""
    written, synced = False, 0
    incoming, outgoing, asked = {}, {}, {}
    granted_votes = early = 0
    for kind, name, path, text in events(trace):
        if "/c3/log/" in path and kind == "end":
            if name in WRITES:
                written = True
            elif name in ("fdatasync", "fsync") and "= 0" in text and written:
                written, synced = False, synced + 1
        elif not path.startswith(("TCP", "socket")):
            continue
        elif name in READS and kind == "end":
            data = payload(text, name)
            if data.startswith(b"GET /peer/v1/raft"):
                incoming[path], outgoing[path] = Stream(), Stream()
            if path in incoming:
                for frame, number, _ in incoming[path].frames(data):
                    if frame == VOTE:
                        asked[path, number] = synced
        elif name in SENDS and kind == "begin" and path in outgoing:
            for frame, number, answer in outgoing[path].frames(payload(text, name)):
                before = asked.pop((path, number), None)
                if frame == ANSWER and before is not None and granted(answer):
                    granted_votes += 1
                    early += synced == before
    return granted_votes, early


with tempfile.TemporaryDirectory(prefix="strace-") as work:
    seen, early, syncs = check(run_one(work))
print(f"acknowledged: {seen['append']} appends, {seen['chunk']} chunk batches; "
      f"syncs of log {syncs['log']}, of packs {syncs['chunks']}; acknowledged before write and sync: {len(early)}")
if early or seen["append"] < 40 or seen["chunk"] < 1:
    sys.exit("too early, or too little was seen to say anything")
with tempfile.TemporaryDirectory(prefix="strace-") as work:
    votes, early = check_votes(run_three(work))
print(f"granted: {votes} votes; before write and sync: {early}")
if early or votes < VOTES // 2:
    sys.exit("too early, or too little was seen to say anything")
