#!/bin/sh
# Lets schemathesis look for answers that /openapi.json does not describe, and for 5xx, on each of three real
# members. Needs python3 with venv and a package index; keeps both in target/schemathesis. About ten minutes.
#
#   tests/schemathesis.sh [examples for each call]
set -eu
cd "$(dirname "$0")/.."
examples=${1:-100}
binary=${MAINSTAY_BIN:-target/release/mainstay}
home=$PWD/target/schemathesis
[ -x "$binary" ] || cargo build --release

if [ ! -x "$home/venv/bin/schemathesis" ]; then
    python3 -m venv "$home/venv"
    "$home/venv/bin/pip" install --quiet --disable-pip-version-check schemathesis==4.32.5
fi

dir=$(mktemp -d)
port=$((20000 + $$ % 5000))
"$binary" dev --dir "$dir" --port "$port" --driver fake >"$dir/log" 2>&1 &
cloud=$!
trap 'kill $cloud 2>/dev/null; wait $cloud; rm -rf "$dir"' EXIT INT TERM
until grep -q "in another terminal" "$dir/log"; do
    kill -0 $cloud || { cat "$dir/log"; exit 1; }
    sleep 1
done

# Not the checks of what is refused: the dialect takes what it can make sense of.
for member in 0 100 200; do
    "$home/venv/bin/schemathesis" run "http://127.0.0.1:$((port + member))/openapi.json" \
        --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,response_headers_conformance \
        --exclude-path-regex '^/api/v1/member/' --max-examples "$examples" --workers 1 --generation-deterministic
done
