#!/usr/bin/env python3
"""How cost grows with the number of instances: reads by id (P2), the whole list (P3), placements (P8), memory of a member (P12).
Prints a table and draws docs/curves.svg. Each point is the median of some rounds, each round two new clusters.

    benches/versus/curves.py [rounds] [instances ...]
"""

import json, math, os, statistics, subprocess, sys, time
from lab import BIN, ROOT, Lab, Mainstay, Steal, load

rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
sizes = [int(a) for a in sys.argv[2:]] or [1_000, 10_000, 100_000]
NODE_TAKES = 20

PANELS = [
    ("reads", "linearizable read by id, 16 clients: p50", "ms"),
    ("list", "list of all, gzip, unchanged: p50", "ms"),
    ("moving", "list of all, gzip, 16 clients writing beside it: p50", "ms"),
    ("placed", "placed on nodes of 20, and the node told", "1/s"),
    ("told", "one start at 100/s until its node is told: p99", "ms"),
    ("memory", "memory of a member (RSS)", "MB"),
]


def standing(n):
    """Reads, list and memory of a cluster whose instances wait for a node."""
    with Lab() as lab:
        ours = Mainstay(lab)
        ours.template()
        row = {"reads": load(ours, "reads", 16, 5, objects=n)["p50_ms"]}
        time.sleep(5)  # what allocators and snapshots give back
        row["memory"] = statistics.median(lab.status(m, "VmRSS") for m in ours.names) / 1024
        row["list"] = load(ours, "fetch", 1, 5)["p50_ms"]
        writes = subprocess.Popen([BIN, "bench", "writes", "--clients", "16", "--seconds", "6", "--objects", str(n), "--endpoints",
                                   ours.endpoints], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        row["moving"] = load(ours, "fetch", 1, 5)["p50_ms"]
        writes.wait()
        return row


def placing(n):
    """Placements on a fleet that has room for all."""
    with Lab() as lab:
        ours = Mainstay(lab)
        ours.template()
        out = subprocess.run([BIN, "bench", "schedule", "--nodes", str(max(1, n // NODE_TAKES)), "--instances", str(n), "--idle-seconds", "0",
                              "--endpoints", ours.endpoints, "--output", "json"], check=True, capture_output=True, text=True).stdout
        phases = {p["phase"]: p["figures"] for p in map(json.loads, out.splitlines())}
        return {"placed": phases["fill"]["placed_per_second"], "told": phases["paced"]["told_p99_ms"]}


def ticks(low, high):
    """Powers of ten around the values."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0 ** e for e in range(first, max(last, first + 1) + 1)]


def draw(points):
    """Small logarithmic panels as one SVG file."""
    width, height, per_row, left, top = 330, 210, 2, 62, 34
    rows = math.ceil(len(PANELS) / per_row)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * per_row}" height="{height * rows}" font-family="sans-serif" font-size="11">',
           '<rect width="100%" height="100%" fill="white"/>']
    for k, (key, title, unit) in enumerate(PANELS):
        x0, y0 = (k % per_row) * width + left, (k // per_row) * height + top
        w, h = width - left - 22, height - top - 40
        values = [points[n][key] for n in sizes]
        marks = ticks(min(values), max(values))
        y = lambda v: y0 + h - h * (math.log10(v) - math.log10(marks[0])) / (math.log10(marks[-1]) - math.log10(marks[0]))
        span = max(1e-9, math.log10(sizes[-1]) - math.log10(sizes[0]))
        x = lambda n: x0 + w * (math.log10(n) - math.log10(sizes[0])) / span
        svg.append(f'<text x="{x0 - left + 8}" y="{y0 - 14}" font-weight="bold">{title}</text>')
        for mark in marks:
            svg.append(f'<line x1="{x0}" x2="{x0 + w}" y1="{y(mark):.1f}" y2="{y(mark):.1f}" stroke="#ddd"/>')
            svg.append(f'<text x="{x0 - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g} {unit}</text>')
        for n in sizes:
            svg.append(f'<text x="{x(n):.1f}" y="{y0 + h + 16}" text-anchor="middle">{n:,}</text>')
        line = " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in zip(sizes, values))
        svg.append(f'<polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="2"/>')
        for n, v in zip(sizes, values):
            svg.append(f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="3" fill="#1f5fa8"/>')
            svg.append(f'<text x="{x(n):.1f}" y="{y(v) - 7:.1f}" text-anchor="middle">{v:.3g}</text>')
    svg.append("</svg>")
    with open(os.path.join(ROOT, "docs", "curves.svg"), "w") as f:
        f.write("\n".join(svg) + "\n")


points = {}
with Steal():
    for n in sizes:
        runs = []
        for _ in range(rounds):
            runs.append(standing(n) | placing(n))
            print(n, {k: round(v, 2) for k, v in runs[-1].items()}, flush=True)
        points[n] = {key: statistics.median(r[key] for r in runs) for key, _, _ in PANELS}
print("\n| instances | " + " | ".join(f"{title} ({unit})" for _, title, unit in PANELS) + " |\n" + "| --- " * (len(PANELS) + 1) + "|")
for n in sizes:
    print(f"| {n:,} | " + " | ".join(f"{points[n][key]:.3g}" for key, _, _ in PANELS) + " |")
draw(points)
