#!/usr/bin/env bash
# Every side-by-side figure of the README, one after the other. About three hours on two cores.
# Needs a release build (make bench makes it) and, beyond deploy/install-deps.sh: etcd-server etcd-client rsync python3.
set -euo pipefail
cd "$(dirname "$0")/../.."
for tool in etcd etcdctl rsync python3 debugfs; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "$tool" >/dev/null || {
    echo "missing: $tool (apt-get install etcd-server etcd-client rsync python3 e2fsprogs)" >&2
    exit 1
  }
done
export PATH="$PATH:/usr/sbin:/sbin"
guest=$(mktemp -d)/tiny.qcow2
guest/build.sh "$guest"
benches/versus/p1_p2.py
benches/versus/p3.py
benches/versus/p4.py 50 10
benches/versus/p12.py
benches/versus/p13.py
benches/versus/p14.py
benches/versus/p5.py
benches/versus/p6.py 1024 5 sparse
benches/versus/p6.py 1024 5 dense
benches/versus/p7.py
benches/versus/p8_p9.py 5000 100000
benches/versus/p8_p9.py 10000 0
benches/versus/p10.py "$guest"
benches/versus/p11.py
benches/versus/curves.py
