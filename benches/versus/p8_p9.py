#!/usr/bin/env python3
"""P8 and P9: a fleet of simulated nodes (`mainstay bench schedule`: each with the two connections and the whole protocol of a real
agent, none with VMs) on a cluster of three members on this machine; and what it costs the members: processor time and memory.

    benches/versus/p8_p9.py [nodes] [instances] [rounds]
"""

import json, subprocess, sys, time
from lab import BIN, Lab, Mainstay, Steal, spread

nodes = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000
instances = int(sys.argv[2]) if len(sys.argv) > 2 else 100_000
rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 3


def measure():
    with Lab() as lab:
        ours = Mainstay(lab)
        ours.template()
        leader = ours.leader()
        row, used, at = {}, {n: lab.cpu([n]) for n in ours.names}, time.time()
        bench = subprocess.Popen([BIN, "bench", "schedule", "--nodes", str(nodes), "--instances", str(instances),
                                  "--idle-seconds", "20", "--endpoints", ours.endpoints, "--output", "json"],
                                 stdout=subprocess.PIPE, text=True)
        for line in bench.stdout:
            line = json.loads(line)
            now, cpu = time.time(), {n: lab.cpu([n]) for n in ours.names}
            cores = {n: (cpu[n] - used[n]) / (now - at) for n in ours.names}
            row[line["phase"]] = line["figures"] | {
                "leader_cores": cores[leader], "follower_cores": max(c for n, c in cores.items() if n != leader),
                "leader_mb": lab.status(leader, "VmRSS") / 1024,
                "follower_mb": max(lab.status(n, "VmRSS") for n in ours.names if n != leader) / 1024}
            print(line["phase"], {k: round(v, 2) if isinstance(v, float) else v for k, v in row[line["phase"]].items()}, flush=True)
            used, at = cpu, now
        if bench.wait():
            sys.exit("the bench failed")
        if leader != ours.leader():
            print("another member leads now")
        return row


with Steal():
    rows = [measure() for _ in range(rounds)]


def of(phase, key, form="{:.1f}"):
    return spread([r[phase][key] for r in rows if phase in r], form)


print(f"\n{nodes} nodes joined in {of('join', 'seconds')} s")
if instances:
    print(f"P8: {instances} instances on {nodes} nodes: placed and told {of('fill', 'placed_per_second', '{:.0f}')}/s, all Started after "
          f"{of('fill', 'started_s')} s; single starts at {rows[0]['paced']['per_second']}/s: answered p50 {of('paced', 'answer_p50_ms')}, p99 "
          f"{of('paced', 'answer_p99_ms')} ms; node told p50 {of('paced', 'told_p50_ms')}, p99 {of('paced', 'told_p99_ms')} ms")
print(f"P9: {nodes} nodes, heartbeats {of('idle', 'reports_per_second', '{:.0f}')}/s: leader {of('idle', 'leader_cores', '{:.2f}')} cores, "
      f"{of('idle', 'leader_mb', '{:.0f}')} MB; follower at most {of('idle', 'follower_cores', '{:.2f}')} cores, {of('idle', 'follower_mb', '{:.0f}')} MB; "
      f"log entries {of('idle', 'log_entries', '{:.0f}')} in {of('idle', 'seconds')} s")
