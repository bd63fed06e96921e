#!/bin/sh
# Builds the tiny guest: one self-contained BIOS-bootable qcow2 of about 16 MB, without root, from
# Debian's own packages and our static guest agent. Demo and tests run real VMs from it.
#
#   guest/build.sh OUT.qcow2
#
# Layout of the disk:   MBR | 1: FAT, syslinux + kernel + initrd | 2: ext4, the root file system
#
# Environment, all optional:
#   MAINSTAY_GUEST_CACHE   where downloaded packages are kept   (default: ~/.cache/mainstay-guest)
#   MAINSTAY_GUEST_AGENT   a static mainstay-guest, instead of building it here
#   MAINSTAY_GUEST_TARGET  cargo target dir of the static build (default: target/guest-static)
set -eu
umask 022
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"

here=$(cd "$(dirname "$0")" && pwd)
repo=$(dirname "$here")
out=${1:?usage: guest/build.sh OUT.qcow2}
cache=${MAINSTAY_GUEST_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/mainstay-guest}

# Everything that would change from one build to the next is pinned: times, ids, seeds.
epoch=1700000000
export SOURCE_DATE_EPOCH=$epoch E2FSPROGS_FAKE_TIME=$epoch MTOOLS_SKIP_CHECK=1
fs_uuid=6d61696e-7374-4179-8000-000000000001
boot_mb=24
root_mb=232

die() { echo "guest/build.sh: $*" >&2; exit 1; }
say() { echo "guest/build.sh: $*" >&2; }

check_tools() {
    missing=
    for tool in apt-get dpkg-deb qemu-img syslinux mcopy mkfs.vfat mkfs.ext4 debugfs cpio xz zstd; do
        command -v "$tool" >/dev/null || missing="$missing $tool"
    done
    [ -z "$missing" ] || die "these tools are missing:$missing
  run deploy/install-deps.sh, or: apt-get install $(grep -v '^#' "$here/packages.txt" | tr '\n' ' ')"
}

# The version that apt would install: (package) -> version.
candidate() {
    apt-cache policy "$1" | sed -n 's/^  Candidate: //p'
}

# Put a package's file into the cache and print its path. Downloads go to a fresh folder first, so
# that an interrupted one never looks like a whole one.
deb_of() {
    version=$(candidate "$1")
    case "$version" in
    '' | '(none)') # no package lists, or no network: any cached version will do
        found=$(ls -t "$cache/$1"_*.deb 2>/dev/null | head -n 1)
        [ -n "$found" ] || die "apt does not know the package $1 (run apt-get update)"
        echo "$found"
        return
        ;;
    esac
    file=$cache/$1_$(echo "$version" | sed 's/:/%3a/g').deb
    if [ ! -s "$file" ]; then
        say "fetching $1 $version"
        fetch=$(mktemp -d "$cache/.fetch.XXXXXX")
        (cd "$fetch" && apt-get -qq -o APT::Sandbox::User= download "$1=$version") >&2 || {
            rm -rf "$fetch"
            die "cannot download $1 $version (an outdated package list? run apt-get update)"
        }
        mv "$fetch"/*.deb "$file"
        rm -rf "$fetch"
    fi
    echo "$file"
}

# linux-image-cloud-amd64 is an empty package that depends on the kernel of the day.
kernel_package() {
    name=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null |
        sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
    if [ -z "$name" ]; then
        name=$(ls -t "$cache"/linux-image-[0-9]*.deb 2>/dev/null | head -n 1)
        name=$(basename "${name%%_*}")
    fi
    [ -n "$name" ] || die "apt does not know linux-image-cloud-amd64 (run apt-get update)"
    echo "$name"
}

static_agent() {
    if [ -n "${MAINSTAY_GUEST_AGENT:-}" ]; then
        echo "$MAINSTAY_GUEST_AGENT"
        return
    fi
    target=${MAINSTAY_GUEST_TARGET:-$repo/target/guest-static}
    triple=$(uname -m)-unknown-linux-gnu
    (cd "$repo" && RUSTFLAGS="-C target-feature=+crt-static -C strip=symbols" CARGO_TARGET_DIR="$target" \
        cargo build --quiet --locked --release -p mainstay-guest --target "$triple") >&2 ||
        die "the static guest agent does not build"
    echo "$target/$triple/release/mainstay-guest"
}

# Copy one module of the kernel, unpacked, to DIR/NN-name.ko: the order is the order of loading.
module() {
    found=$(find "$work/kernel/lib/modules" "$work/kernel/usr/lib/modules" \
        -name "$2.ko" -o -name "$2.ko.xz" -o -name "$2.ko.zst" 2>/dev/null | head -n 1)
    case "$found" in
    *.ko) cp "$found" "$1/$3-$2.ko" ;;
    *.xz) xz -dc "$found" >"$1/$3-$2.ko" ;;
    *.zst) zstd -qdc "$found" >"$1/$3-$2.ko" ;;
    *) say "module $2: none of its own in this kernel (taken to be built in)" ;;
    esac
}

modules() {
    dir=$1 && shift
    mkdir -p "$dir"
    number=10
    for name in "$@"; do
        module "$dir" "$name" "$number"
        number=$((number + 1))
    done
}

# What must be there before the root file system, and nothing else. Not compressed: the qcow2 is, and
# the host unpacks faster than an emulated guest.
build_initrd() {
    tree=$work/initrd
    mkdir -p "$tree/bin" "$tree/dev" "$tree/proc" "$tree/sys" "$tree/root"
    cp "$work/busybox/bin/busybox" "$tree/bin/busybox"
    cp "$here/initrd-init" "$tree/init"
    chmod 755 "$tree/init" "$tree/bin/busybox"
    modules "$tree/modules" virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev \
        virtio_pci virtio_blk virtio_console
    find "$tree" -exec touch -h -d "@$epoch" {} +
    (cd "$tree" && find . | sort | cpio --quiet -o -H newc --reproducible --owner=+0:+0) >"$work/initrd.img"
}

build_root() {
    tree=$work/root
    mkdir -p "$tree"
    (cd "$tree" && mkdir -p bin dev etc proc root run srv/www sys tmp usr/sbin usr/bin var/log)
    cp -R "$here/rootfs/." "$tree/"
    cp "$work/busybox/bin/busybox" "$tree/bin/busybox"
    "$work/busybox/bin/busybox" --list | while read -r applet; do
        [ "$applet" = busybox ] || ln -s busybox "$tree/bin/$applet"
    done
    ln -s bin "$tree/sbin"
    ln -s ../../etc/hostname "$tree/srv/www/hostname"
    ln -s /proc/self/mounts "$tree/etc/mtab"
    cp "$(static_agent)" "$tree/usr/sbin/mainstay-guest"
    modules "$tree/lib/modules" failover net_failover virtio_net button evdev
    find "$tree" -type d -exec chmod 755 {} +
    chmod 755 "$tree/bin/busybox" "$tree/usr/sbin/mainstay-guest" "$tree/etc/rc" \
        "$tree/etc/udhcpc.sh" "$tree/etc/acpi/PWRF/00000080"
    find "$tree" -exec touch -h -d "@$epoch" {} +
    truncate -s "${root_mb}M" "$work/root.img"
    mkfs.ext4 -q -F -L mainstay-guest -U "$fs_uuid" -m 0 -J size=4 -N 8192 \
        -E "hash_seed=$fs_uuid,root_owner=0:0,lazy_itable_init=1,nodiscard" -d "$tree" "$work/root.img"
    # The tree belongs to whoever builds; in the guest everything belongs to root.
    if [ "$(id -u)" != 0 ]; then
        (cd "$tree" && find . | sed 's/^\.//; s/^$/\//' | while read -r path; do
            printf 'sif "%s" uid 0\nsif "%s" gid 0\n' "$path" "$path"
        done) >"$work/owners"
        debugfs -w -f "$work/owners" "$work/root.img" >/dev/null 2>&1
    fi
}

build_boot() {
    truncate -s "${boot_mb}M" "$work/boot.img"
    mkfs.vfat --invariant -n MAINSTAY -i 6d61696e -F 16 "$work/boot.img" >/dev/null
    cp "$(ls "$work"/kernel/boot/vmlinuz-*)" "$work/vmlinuz"
    cp "$here/syslinux.cfg" "$work/syslinux.cfg"
    touch -d "@$epoch" "$work/vmlinuz" "$work/initrd.img" "$work/syslinux.cfg"
    for file in vmlinuz initrd.img syslinux.cfg; do
        mcopy -m -i "$work/boot.img" "$work/$file" "::/$file"
    done
    syslinux --install "$work/boot.img"
}

# One byte for each hexadecimal pair.
bytes() { for hex in "$@"; do printf "\\$(printf %03o "0x$hex")"; done; }
# A 32-bit little-endian number.
le32() { bytes "$(printf %02x $(($1 & 255)))" "$(printf %02x $(($1 >> 8 & 255)))" \
    "$(printf %02x $(($1 >> 16 & 255)))" "$(printf %02x $(($1 >> 24 & 255)))"; }
# A partition entry: (active flag, type, first sector, sectors). No CHS: LBA has been enough since 1996.
partition() { bytes "$1" fe ff ff "$2" fe ff ff; le32 "$3"; le32 "$4"; }

assemble() {
    sectors_mb=2048
    head -c 440 "$work/syslinux/usr/lib/syslinux/mbr/mbr.bin" >"$work/mbr"
    truncate -s 440 "$work/mbr"
    {
        bytes 4d 41 49 4e 00 00 # disk signature
        partition 80 0e $sectors_mb $((boot_mb * sectors_mb))
        partition 00 83 $(((boot_mb + 1) * sectors_mb)) $((root_mb * sectors_mb))
        head -c 32 /dev/zero
        bytes 55 aa
    } >>"$work/mbr"
    truncate -s $((boot_mb + root_mb + 1))M "$work/disk.img"
    dd if="$work/mbr" of="$work/disk.img" conv=notrunc status=none
    dd if="$work/boot.img" of="$work/disk.img" bs=1M seek=1 conv=notrunc,sparse status=none
    dd if="$work/root.img" of="$work/disk.img" bs=1M seek=$((boot_mb + 1)) conv=notrunc,sparse status=none
    mkdir -p "$(dirname "$out")"
    # Next to its final place, then renamed: whoever finds the file finds the whole file.
    qemu-img convert -q -c -f raw -O qcow2 "$work/disk.img" "$out.tmp.$$"
    mv -f "$out.tmp.$$" "$out"
}

[ "$(uname -m)" = x86_64 ] || die "the tiny guest is built on x86_64 only"
check_tools
mkdir -p "$cache"
work=$(mktemp -d)
trap 'rm -rf "$work" "$out.tmp.$$"' EXIT
trap 'exit 1' INT TERM
# Assignments first: set -e sees a failure in them, but not in a command's arguments.
kernel_deb=$(deb_of "$(kernel_package)")
busybox_deb=$(deb_of busybox-static)
syslinux_deb=$(deb_of syslinux-common)
dpkg-deb -x "$kernel_deb" "$work/kernel"
dpkg-deb -x "$busybox_deb" "$work/busybox"
[ -e "$work/busybox/bin/busybox" ] || ln -s usr/bin "$work/busybox/bin"
dpkg-deb -x "$syslinux_deb" "$work/syslinux"
build_initrd
build_root
build_boot
assemble
say "$out: $(($(stat -c %s "$out") / 1024)) KiB, kernel $(basename "$kernel_deb" .deb)"
