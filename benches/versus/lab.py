"""Side by side: start a Mainstay cluster and its yardstick on this machine, drive both in turn,
print ratios. Standard library only. Everything started here is ended here, by process id."""

import json, os, random, resource, shutil, signal, socket, statistics, subprocess, sys, tempfile, time, urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BIN = os.environ.get("MAINSTAY_BIN", os.path.join(ROOT, "target", "release", "mainstay"))


GIVEN = set()


def port():
    """One that is free, below those that the system gives to outgoing connections: a member that dials
    another one while a third has not started yet must not take the third one's."""
    while True:
        found = random.randrange(12_000, 30_000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", found))
                if found not in GIVEN:  # a member that has not started yet holds none of its own
                    GIVEN.add(found)
                    return found
            except OSError:
                continue


class Lab:
    """A directory on the disk under test, and the processes that live in it."""

    def __init__(self):
        self.dir = tempfile.mkdtemp(prefix="versus-", dir=os.environ.get("VERSUS_DIR"))
        self.children = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in self.children.values():
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                child.wait()
        shutil.rmtree(self.dir, ignore_errors=True)

    def spawn(self, name, command):
        log = open(os.path.join(self.dir, name + ".log"), "ab")
        child = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.children[name] = child
        return child

    def kill(self, name, how=signal.SIGKILL):
        child = self.children.pop(name)
        child.send_signal(how)
        child.wait()

    def status(self, name, field):
        """A field of /proc/PID/status, in kB where the kernel says kB."""
        for line in open(f"/proc/{self.children[name].pid}/status"):
            if line.startswith(field + ":"):
                return int(line.split()[1])

    def cpu(self, names):
        """CPU seconds that these processes have used so far."""
        ticks = 0
        for name in names:
            fields = open(f"/proc/{self.children[name].pid}/stat").read().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


class Mainstay:
    """Three members, with these flags more."""

    def __init__(self, lab, count=3, flags=()):
        self.flags = flags
        self.lab, self.names = lab, [f"c{n + 1}" for n in range(count)]
        self.api = {n: port() for n in self.names}
        self.registry = {n: port() for n in self.names}
        self.peer = {n: port() for n in self.names}
        for name in self.names:
            self.start(name)
        for name in self.names:
            self.wait_ready(name)

    def start(self, name):
        cluster = ",".join(f"{n}=http://127.0.0.1:{self.peer[n]}" for n in self.names)
        self.lab.spawn(name, [
            BIN, "server", "--name", name, "--data-dir", os.path.join(self.lab.dir, name),
            "--initial-cluster", cluster, "--listen", f"127.0.0.1:{self.api[name]}",
            "--registry-listen", f"127.0.0.1:{self.registry[name]}",
            "--peer-listen", f"127.0.0.1:{self.peer[name]}", *self.flags])

    def wait_ready(self, name, limit=60):
        end = time.time() + limit
        while time.time() < end:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.api[name]}/readyz", timeout=2).read()
                return
            except OSError:
                time.sleep(0.05)
        said = open(os.path.join(self.lab.dir, name + ".log"), errors="replace").read()[-2000:]
        sys.exit(f"{name} did not become ready:\n{said}")

    @property
    def endpoints(self):
        return ",".join(f"http://127.0.0.1:{p}" for p in self.api.values())

    def cli(self, *args):
        return subprocess.run([BIN, *args, "--endpoints", self.endpoints], check=True,
                              capture_output=True, text=True).stdout

    def cli_json(self, *args):
        return json.loads(self.cli(*args, "--output", "json"))

    def template(self, name="bench", size=100_000):
        path = os.path.join(self.lab.dir, name + ".raw")
        with open(path, "wb") as f:
            f.write(os.urandom(size))
        self.cli("template", "push", name, "--tag", "v1", "--disk", path)

    def leader(self):
        for _ in range(200):
            for p in self.api.values():
                try:
                    url = f"http://127.0.0.1:{p}/api/v1/members"
                    body = json.load(urllib.request.urlopen(url, timeout=2))["body"]
                    for m in body:
                        if m["is_leader"] and self.lab.children[m["name"]].poll() is None:
                            return m["name"]
                except (OSError, KeyError, ValueError):
                    continue
            time.sleep(0.05)
        sys.exit("no leader")


class Etcd:
    """Three members of Debian's etcd-server, default settings."""

    def __init__(self, lab, extra=()):
        self.lab, self.names, self.extra = lab, ["e1", "e2", "e3"], list(extra)
        self.client = {n: port() for n in self.names}
        self.peer = {n: port() for n in self.names}
        for name in self.names:
            self.start(name)
        for name in self.names:
            self.wait_ready(name)

    def start(self, name):
        cluster = ",".join(f"{n}=http://127.0.0.1:{self.peer[n]}" for n in self.names)
        client, peer = (f"http://127.0.0.1:{p[name]}" for p in (self.client, self.peer))
        self.lab.spawn(name, [
            "etcd", "--name", name, "--data-dir", os.path.join(self.lab.dir, name),
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", cluster, "--log-level", "error", *self.extra])

    def wait_ready(self, name, limit=60):
        end = time.time() + limit
        while time.time() < end:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.client[name]}/health", timeout=2).read()
                return
            except OSError:
                time.sleep(0.05)
        sys.exit(f"etcd {name} did not become healthy")

    @property
    def endpoints(self):
        return ",".join(f"http://127.0.0.1:{p}" for p in self.client.values())

    def leader(self):
        ctl = ["etcdctl", "--endpoints", self.endpoints.replace("http://", ""), "--command-timeout", "2s",
               "endpoint", "status", "-w", "json"]
        for _ in range(200):
            out = subprocess.run(ctl, capture_output=True, text=True, env={**os.environ, "ETCDCTL_API": "3"})
            try:
                for row in json.loads(out.stdout):
                    status = row["Status"]
                    if status["header"]["member_id"] == status["leader"]:
                        at = int(row["Endpoint"].rsplit(":", 1)[1])
                        return next(n for n, p in self.client.items() if p == at)
            except (ValueError, KeyError, StopIteration):
                pass
            time.sleep(0.05)
        sys.exit("etcd has no leader")


def generator_cpu():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def load_and_cpu(system, work, clients, seconds, **more):
    """The same, and the processor time of the members and of the generator in microseconds a request: on two
    cores that everybody shares it says more than the rate."""
    members, generator = system.lab.cpu(system.names), generator_cpu()
    row = load(system, work, clients, seconds, **more)
    per_request = lambda used: used * 1e6 / max(1, row["all"])
    row["members_us"] = per_request(system.lab.cpu(system.names) - members)
    row["generator_us"] = per_request(generator_cpu() - generator)
    return row


def load(system, work, clients, seconds, **more):
    """One run of `mainstay bench` against either system; its figures."""
    against = "etcd" if isinstance(system, Etcd) else "mainstay"
    command = [BIN, "bench", work, "--clients", str(clients), "--seconds", str(seconds),
               "--against", against, "--endpoints", system.endpoints, "--output", "json"]
    for key, value in more.items():
        command += ["--" + key.replace("_", "-")] + ([] if value is True else [str(value)])
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode != 0:
        sys.exit(f"{' '.join(command)}: {out.stderr}{out.stdout}")
    return json.loads(out.stdout)


def spread(values, form="{:.2f}"):
    """median (min-max)"""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{form.format(middle)} ({form.format(low)}-{form.format(high)})"


def steal():
    """CPU time stolen from this machine so far, in ticks, and all time."""
    fields = [int(x) for x in open("/proc/stat").readline().split()[1:]]
    return fields[7], sum(fields)


class Steal:
    """Share of CPU time that was stolen during a run."""

    def __enter__(self):
        self.begin = steal()
        return self

    def __exit__(self, *_):
        stolen, total = steal()
        self.share = (stolen - self.begin[0]) / max(1, total - self.begin[1])
        print(f"CPU steal during this run: {self.share:.1%}")
