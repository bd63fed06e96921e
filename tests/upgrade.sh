#!/bin/sh
# A rolling restart from an earlier commit's release to this one and back, under load, with real processes.
#
#     tests/upgrade.sh [COMMIT]     default: the commit before this one
set -eu
cd "$(dirname "$0")/.."
commit=$(git rev-parse --verify --short "${1:-HEAD~1}^{commit}")
work=target/upgrade/$commit
if [ ! -x "$work/debug/mainstay" ]; then
    tree=$(mktemp -d)
    trap 'rm -rf "$tree"' EXIT
    git archive "$commit" | tar -x -C "$tree"
    target=$PWD/$work
    (cd "$tree" && CARGO_TARGET_DIR=$target cargo build --locked --bin mainstay)
fi
MAINSTAY_OLD_BINARY=$PWD/$work/debug/mainstay \
    cargo test --test process a_rolling_restart -- --nocapture
