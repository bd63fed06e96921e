"""Disks for the image benches: an ext4 file system of this machine's own /usr files, and the same one later, with
about 8% more files in it, put there with debugfs. Also how many bytes of the later one are new, and copies."""

import hashlib, json, os, shutil, subprocess, threading, time, urllib.parse, urllib.request, zlib

CHUNK = 64 << 10


def run(*command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def timed(*command):
    begin = time.time()
    run(*command)
    return time.time() - begin


def both(*commands):
    """Seconds until the commands, begun at once, have ended."""
    begin, failed = time.time(), []

    def one(command):
        try:
            run(*command)
        except subprocess.CalledProcessError as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(command,)) for command in commands]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
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
            if size > min(200 << 20, limit // 2):
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


def add_files(image, tree, name):
    script = tree + ".debugfs"
    with open(script, "w") as f:
        for folder in sorted(os.listdir(tree)):
            f.write(f"mkdir /{name}-{folder}\ncd /{name}-{folder}\n")
            for file in os.listdir(os.path.join(tree, folder)):
                f.write(f"write {os.path.join(tree, folder, file)} {file}\n")
    run("debugfs", "-w", "-f", script, image)
    shutil.rmtree(tree)


def make(folder, megabytes, dense=False, later=1):
    """Paths of the first disk and of `later` ones, each with 8% more. Sparse ones are three times as long as their
    data; of dense ones every block is written."""
    sparse = "--sparse=never" if dense else "--sparse=always"
    tree = os.path.join(folder, "tree")
    os.mkdir(tree)
    collect(tree, megabytes << 20)
    first = os.path.join(folder, "disk1.raw")
    length = megabytes * 5 // 4 + 64 if dense else megabytes * 3
    run("mkfs.ext4", "-q", "-F", "-d", tree, first, f"{length}M")
    shutil.rmtree(tree)
    disks, skip = [first], megabytes << 20
    for n in range(later):
        part = (megabytes << 20) * 8 // 100
        os.mkdir(tree)
        collect(tree, part, skip)
        skip += part
        disk = os.path.join(folder, f"disk{n + 2}.raw")
        run("cp", "--sparse=always", disks[-1], disk)
        add_files(disk, tree, f"new{n}")
        disks.append(disk)
    if dense:
        for disk in disks:
            run("cp", sparse, disk, disk + ".dense")
            os.replace(disk + ".dense", disk)
    run("sync")
    return disks


def size(path):
    used = os.stat(path).st_blocks * 512
    return f"{os.path.getsize(path) >> 20} MiB, {used >> 20} MiB of them on disk"


def chunks(path):
    """Digest and bytes of every chunk that is not all zeros."""
    zeros = bytes(CHUNK)
    with open(path, "rb") as f:
        while piece := f.read(CHUNK):
            if piece != zeros[: len(piece)]:
                yield hashlib.blake2b(piece, digest_size=16).digest(), piece


def new_bytes(before, after):
    """New bytes of `after`, and what they are compressed: each new chunk once, in one stream of `zstd -1`."""
    known = {digest for digest, _ in chunks(before)} if before else set()
    raw, zstd = 0, shutil.which("zstd")
    if not zstd:
        small = 0
        for digest, piece in chunks(after):
            if digest not in known:
                known.add(digest)
                raw += len(piece)
                small += len(zlib.compress(piece, 1))
        return raw, small
    with subprocess.Popen([zstd, "-1", "-q", "-c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        small = [0]

        def count():
            while piece := child.stdout.read(1 << 20):
                small[0] += len(piece)

        reader = threading.Thread(target=count)
        reader.start()
        for digest, piece in chunks(after):
            if digest not in known:
                known.add(digest)
                raw += len(piece)
                child.stdin.write(piece)
        child.stdin.close()
        reader.join()
    return raw, small[0]


def call(url):
    return json.load(urllib.request.urlopen(url, timeout=5))["body"]


def push(cluster, disk, tag, durability="majority"):
    """Seconds until the push was acknowledged, and bytes sent by the client."""
    begin = time.time()
    told = cluster.cli_json("template", "push", "disk", "--tag", tag, "--disk", disk, "--durability", durability)
    return time.time() - begin, told["sent_bytes"]


def wait_whole(cluster, tag, limit=600):
    """Until every member says that it holds every byte, verified and durable."""
    at = f"http://127.0.0.1:{cluster.registry[cluster.names[0]]}"
    url = f"{at}/registry/mainstay/v1/replicas?template=disk&tag={urllib.parse.quote(tag)}"
    end = time.time() + limit
    while time.time() < end:
        try:
            rows = call(url)
        except OSError:
            rows = []
        if len(rows or []) == len(cluster.names) and all(r["state"] == "complete" for r in rows):
            return
        time.sleep(0.01)
    raise SystemExit(f"{tag} was not whole on every member within {limit} s: {rows}")


# A rate that limits nothing, and switches off what is sent ahead during a push: a member copies all by itself, as one does that was away.
COPIES_ONLY = ("--replicate-rate", "1T")


def moved(cluster):
    """Bytes that members have sent each other so far: fetched by the one, or sent ahead by the other."""
    total = 0
    for port in cluster.api.values():
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        for name in ("mainstay_fetched_bytes_total ", "mainstay_sent_ahead_bytes_total "):
            line = next(l for l in page.splitlines() if l.startswith(name))
            total += int(line.split()[1])
    return total


def end(lab, cluster):
    for name in cluster.names:
        lab.kill(name)
        shutil.rmtree(os.path.join(lab.dir, name))


def targets(lab):
    """Two empty folders."""
    return folders(lab, 2)


def folders(lab, count):
    """Empty folders."""
    made = [os.path.join(lab.dir, f"target{n + 1}") for n in range(count)]
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)
        os.mkdir(folder)
    return made


def copy_sync(source, folders):
    """Plain copies into all folders at once, durable: the bound."""
    commands = [("sh", "-c", f'cp --sparse=auto "$0" "$1/cp" && sync "$1/cp"', source, t) for t in folders]
    took = both(*commands)
    for folder in folders:
        os.remove(os.path.join(folder, "cp"))
    return took


def rsync(flags, source, folders):
    """From a folder into all others at once, and durable as ours is. `--no-whole-file`: as it is between machines."""
    script = f'rsync {flags} "$0/" "$1/" && sync -f "$1"'
    return both(*[("sh", "-c", script, source, t) for t in folders])


def source_folder(lab, disk, dense):
    """A folder with the disk as `disk`; replaced, as the reference deployment's is."""
    folder = os.path.join(lab.dir, "source")
    os.makedirs(folder, exist_ok=True)
    run("cp", "--sparse=never" if dense else "--sparse=always", disk, os.path.join(folder, "disk"))
    return folder
