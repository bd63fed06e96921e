#!/usr/bin/env bash
# A three-member cloud with one real VM on this machine; its leader is killed on the way.
#
#   make demo            leaves the cloud running; Ctrl-C stops all of it
#   DEMO_EXIT=1          stops by itself at the end (also with CI=true); exit code 0 iff all went well
#
# Environment, all optional:
#   DEMO_DIR   where everything is kept            (default: .demo; emptied at the start)
#   DEMO_PORT  API port of member c1; c2, c3: +100, +200   (default: 8090)
#   DEMO_BIN   a mainstay binary, instead of building it
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${DEMO_DIR:-$PWD/.demo}
port=${DEMO_PORT:-8090}
bin=${DEMO_BIN:-}
begun=$SECONDS
timings=()
declare -A pids=()

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
die() { echo "demo: $*" >&2; exit 1; }

# step "what it is" command...: say it, do it, remember how long it took.
step() {
    local what=$1 from
    shift
    say "$what"
    from=$(date +%s%N)
    "$@"
    timings+=("$(printf '%7.1f s  %s' "$(awk "BEGIN{print ($(date +%s%N)-$from)/1e9}")" "$what")")
}

# until_true SECONDS "what" command...
until_true() {
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < until)) || die "not in time: $what (logs are in $dir)"
        sleep 0.1
    done
}

api() { echo "http://127.0.0.1:$((port + ($1 - 1) * 100))"; }
endpoints="$(api 1),$(api 2),$(api 3)"
list="c1=http://127.0.0.1:$((port + 1)),c2=http://127.0.0.1:$((port + 101)),c3=http://127.0.0.1:$((port + 201))"
cloud() { "$bin" "$@" --endpoints "$endpoints"; }

tools() {
    local missing=()
    for tool in cargo curl qemu-img qemu-system-x86_64 syslinux mcopy mkfs.vfat mkfs.ext4 cpio; do
        [[ $tool == cargo && -n $bin ]] && continue
        PATH="$PATH:/usr/sbin:/sbin" command -v "$tool" >/dev/null || missing+=("$tool")
    done
    ((${#missing[@]} == 0)) && return
    echo "missing: ${missing[*]}"
    if [[ ! -x deploy/install-deps.sh ]]; then
        die "install them first"
    elif ((EUID == 0)); then
        deploy/install-deps.sh
    elif sudo -n true 2>/dev/null; then
        sudo deploy/install-deps.sh
    else
        die "run this once: sudo deploy/install-deps.sh"
    fi
}

build() {
    [[ -n $bin ]] && return
    cargo build --release
    bin=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/release/mainstay
}

# The disk outlives the demo's directory: it only changes with guest/.
guest() {
    local cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/mainstay-guest key
    key=$(find guest -type f -print0 | sort -z | xargs -0 cat Cargo.lock | cksum | cut -d' ' -f1)
    disk=$cache/guest-$key.qcow2
    if [[ ! -s $disk ]]; then
        mkdir -p "$cache"
        guest/build.sh "$disk.part"
        mv "$disk.part" "$disk"
    fi
    echo "$disk ($(du -h "$disk" | cut -f1))"
}

# A process of its own group, so that Ctrl-C reaches this script only.
background() {
    local name=$1
    shift
    setsid "$@" >>"$dir/$name.log" 2>&1 </dev/null &
    pids[$name]=$!
}

member() {
    local n=$1 at=$((port + ($1 - 1) * 100))
    background "c$n" "$bin" server --name "c$n" --data-dir "$dir/c$n" --initial-cluster "$list" \
        --listen "127.0.0.1:$at" --registry-listen "127.0.0.1:$((at - 1))" --peer-listen "127.0.0.1:$((at + 1))"
}

ready() { until_true 60 "member c$1 is ready" curl -fs "$(api "$1")/readyz"; }

members() {
    for n in 2 3 1; do member "$n"; done
    for n in 1 2 3; do ready "$n"; done
    until_true 30 "three voters" three_voters
    cloud status
}

three_voters() { [[ $(cloud member list | grep -c voter) == 3 ]]; }
node_active() { curl -fs "$(api 1)/api/v1/node" | grep -q '"Active"'; }

node() {
    background node1 "$bin" node join "$endpoints" --name node1 --host 127.0.0.1 --data-dir "$dir/node1" --reserve-space 1G
    until_true 30 "the node has joined" node_active
    cloud node list
}

push() { cloud template push demo --tag v1 --disk "$disk"; }

on_every_member() {
    for n in 1 2 3; do
        curl -fs "$(api "$n")/api/v1/registry/vm?apiVer=v1" | grep -q '"demo"' || return 1
    done
}

start_instance() {
    cat >"$dir/hello.sh" <<'SCRIPT'
echo "hello from $(uname -n), Linux $(uname -r), up $(cut -d' ' -f1 /proc/uptime) s"
SCRIPT
    cloud instance start demo --script "$dir/hello.sh" --wait --timeout 180
    instance=$(cloud instance list | awk '$2 == "Started" {print $1; exit}')
    [[ -n $instance ]] || die "no instance is Started"
    say "the startup script printed:"
    cloud instance show "$instance" | grep -i 'script' | sed 's/^/  /'
    cloud instance show "$instance" | grep -q 'hello from' || die "the script's output is missing"
}

leader() { cloud status --output json | awk -F'"' '$2=="name"{n=$4} /"is_leader": true/{print n}' | head -n 1; }

kill_leader() {
    killed=$(leader)
    [[ -n $killed ]] || die "no leader"
    echo "kill -9 ${pids[$killed]}    # member $killed, the leader"
    kill -9 "${pids[$killed]}"
    wait "${pids[$killed]}" 2>/dev/null || true
    local n
    for n in 1 2 3; do
        [[ c$n == "$killed" ]] && continue
        until_true 30 "c$n lists the instance without $killed" \
            bash -c "curl -fs '$(api "$n")/api/v1/vm' | grep -q '$instance'"
        echo "c$n still lists instance $instance"
    done
}

write_without_leader() {
    local n
    for n in 1 2 3; do
        [[ c$n == "$killed" ]] && continue
        curl -fs -X PUT "$(api "$n")/api/v1/vm" -d "{\"id\":\"$instance\",\"name\":\"named-by-c$n\"}" |
            grep -q '"OK"' || die "c$n refused a write"
        echo "c$n accepted a write"
    done
    cloud status
}

restart_killed() {
    member "${killed#c}"
    ready "${killed#c}"
    curl -fs "$(api "${killed#c}")/api/v1/vm" | grep -q named-by || die "$killed lacks what was written without it"
    echo "$killed is back and knows what was written without it"
}

# VMs first, then the node, then the members; by process id, nothing else.
stop_all() {
    trap '' INT TERM
    local name deadline
    if ((${#pids[@]})) && [[ -n ${instance:-} ]]; then
        timeout 40 "$bin" instance terminate "$instance" --wait --timeout 30 --endpoints "$endpoints" >/dev/null 2>&1 || true
    fi
    for name in "${!pids[@]}"; do kill -TERM "${pids[$name]}" 2>/dev/null || true; done
    deadline=$((SECONDS + 15))
    for name in "${!pids[@]}"; do
        while kill -0 "${pids[$name]}" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.1; done
        kill -9 "${pids[$name]}" 2>/dev/null || true
    done
    # A VM outlives its agent on purpose; one whose end was not waited for is ended here.
    for proc in /proc/[0-9]*; do
        if tr '\0' ' ' 2>/dev/null <"$proc/cmdline" | grep -q "qemu-system.*$dir/"; then
            kill -9 "${proc#/proc/}" 2>/dev/null || true
        fi
    done
}

finish() {
    local code=$?
    ((code == 0)) || for log in "$dir"/*.log; do
        [[ -e $log ]] && echo "--- the end of $log" && tail -n 15 "$log"
    done >&2
    stop_all
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

step "tools" tools
step "build" build
step "guest disk" guest
rm -rf "$dir"
mkdir -p "$dir"
step "three members, started in the order c2, c3, c1" members
step "one node" node
step "push the template to one member, visible on a majority" push
step "the template on every member" until_true 60 "the template on every member" on_every_member
step "one instance with a startup script" start_instance
step "kill -9 the leader: the others still list the instance" kill_leader
step "writes go on" write_without_leader
step "the killed member comes back" restart_killed

say "it all worked, in $((SECONDS - begun)) s:"
printf '%s\n' "${timings[@]}"
if [[ ${CI:-} == true || ${DEMO_EXIT:-} == 1 ]]; then
    exit 0
fi
cat <<TRY

try, in another terminal:
  export MAINSTAY_ENDPOINTS=$endpoints
  $bin status
  $bin instance list
  $bin instance start demo --count 2 --wait
  curl $(api 2)/api/v1/vm
  kill -9 ${pids[c1]}     # member c1
logs and data: $dir        Ctrl-C here stops all of it
TRY
while true; do sleep 3600 & wait $!; done
