#!/usr/bin/env bash
# tests/emulator/run.sh PROGRAM [NAME=VALUE...]: boots Bochs, an emulator of a PC whose
# CPU has AVX-512 F, BW, DQ, VL and BF16, into a Linux kernel that runs PROGRAM (a static
# x86-64 executable without arguments) in that environment. Prints what it prints and
# exits with its status; 125 where the emulator failed.
#
# Needs Debian 12, root and the network, for its first run only: that installs packages,
# fetches Debian's kernel and the source of Bochs 3.0 and builds it, 3 to 8 minutes on
# two cores. Kept, with the logs, in EMULATOR_CACHE (build/emulator of the repository).
# QEMU emulates no AVX-512, and in Debian 12's own Bochs, 2.7, the kernel finds none.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${EMULATOR_CACHE:-$here/../../build/emulator}
seconds=3600 # a program that takes longer hangs
packages=(bochsbios vgabios cpio isolinux syslinux-common xorriso gcc g++ libc6-dev make patch
  xz-utils)

say() { echo "emulator: $*" >&2; }
fail() {
  say "$*"
  exit 125
}

[ $# -ge 1 ] && [ -f "$1" ] || fail "usage: $0 PROGRAM [NAME=VALUE...]"
program=$1
shift
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

install_packages() {
  dpkg -s "${packages[@]}" && return
  apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"
}

# The cloud kernel: it has few drivers to try, so that it boots within seconds.
fetch_kernel() {
  [ -f "$cache/vmlinuz" ] && return
  local scratch name
  scratch=$(mktemp -d "$cache/kernel.XXXX")
  apt-get update
  name=$(apt-cache depends linux-image-cloud-amd64 | awk '$1 == "Depends:" { print $2; exit }')
  (cd "$scratch" && apt-get -o APT::Sandbox::User=root download "$name")
  dpkg -x "$scratch"/*.deb "$scratch/unpacked"
  mv "$scratch"/unpacked/boot/vmlinuz-* "$cache/vmlinuz"
  rm -rf "$scratch"
}

build_init() {
  [ "$cache/init" -nt "$here/init.c" ] && return
  gcc -O2 -Wall -Wextra -Werror -static -o "$cache/init" "$here/init.c"
}

# Debian 13 has Bochs 3.0. Its lists are kept apart from the machine's, which stay as
# they are. Of the source package only the upstream tar is needed, and apt checks its
# hash, so that a mirror that fails at the other files does no harm.
fetch_bochs() { # FOLDER
  local mirror # the machine's own, of what is no security update
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' |
    grep -v security | head -n 1)
  mkdir -p "$1/sources" "$1/lists/partial"
  cat >"$1/sources/trixie.sources" <<END
Types: deb-src
URIs: $mirror
Suites: trixie
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
  local options=(-o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$1/sources"
    -o "Dir::State::Lists=$1/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
    -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update
  (cd "$1" && apt-get "${options[@]}" source --download-only bochs) || true
  mkdir "$1/bochs"
  tar -xf "$1"/bochs_3*.orig.tar.* -C "$1/bochs" --strip-components=1
  patch -d "$1/bochs" -p1 <"$here/bochs.patch"
}

build_bochs() {
  [ -x "$cache/bochs" ] && return
  local scratch
  scratch=$(mktemp -d "$cache/bochs.XXXX")
  fetch_bochs "$scratch"
  mkdir "$scratch/build"
  cd "$scratch/build"
  ../bochs/configure --enable-x86-64 --enable-cpu-level=6 --enable-avx --enable-evex \
    --enable-all-optimizations --enable-pci --disable-plugins --disable-docbook \
    --disable-large-ramfile --disable-logging --with-nogui CFLAGS=-O2 CXXFLAGS=-O2
  make -j"$(nproc)"
  strip bochs
  mv bochs "$cache/bochs"
  rm -rf "$scratch"
}

# A subshell of its own, not a function in a condition: those run without `set -e`.
step() { # FUNCTION
  set +e
  (set -e; "$1") >"$cache/$1.log" 2>&1
  local status=$?
  set -e
  [ $status = 0 ] || fail "$1 failed: see $cache/$1.log"
}

# One at a time builds; the others wait.
exec 9>"$cache/lock"
flock 9
[ -x "$cache/bochs" ] || say "first run: packages, a kernel, Bochs from source (minutes)"
for part in install_packages fetch_kernel build_init build_bochs; do step $part; done
exec 9>&-

disc=$(mktemp -d)
trap 'rm -rf "$disc"' EXIT
mkdir "$disc/files" "$disc/iso"
install -m 755 "$program" "$disc/files/check"
install -m 755 "$cache/init" "$disc/files/init"
printf '%s\0' "$@" >"$disc/files/environment"
(cd "$disc/files" && find . | cpio -o -H newc --quiet) >"$disc/iso/initrd"
cp "$cache/vmlinuz" /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 \
  "$disc/iso/"
cat >"$disc/iso/isolinux.cfg" <<'END'
default check
prompt 0
label check
 kernel vmlinuz
 initrd initrd
 append console=ttyS0 quiet nokaslr mitigations=off panic=-1
END
xorriso -as mkisofs -quiet -o "$disc/disc.iso" -b isolinux.bin -no-emul-boot \
  -boot-load-size 4 -boot-info-table "$disc/iso" >"$disc/xorriso.log" 2>&1 ||
  fail "no boot image: $(tail -n 2 "$disc/xorriso.log")"

# Of Bochs' CPUs with AVX-512, skylake_x is the newest under which Debian 12's kernel
# boots; avx512bf16 is added, which bochs.patch makes its CPUID tell of.
cat >"$disc/bochsrc" <<END
plugin_ctrl: speaker=false
display_library: nogui
config_interface: textconfig
cpu: model=corei7_skylake_x, add_features="avx512bf16", count=1, ips=100000000, reset_on_triple_fault=0
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
memory: guest=256, host=256
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=$disc/disc.iso, status=inserted
boot: cdrom
floppya: type=none
clock: sync=none, time0=utc
com1: enabled=1, mode=file, dev=$disc/console
parport1: enabled=1, file=$disc/output
log: $disc/log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
END
# Bochs ends with status 1 when the guest shuts it down.
timeout $seconds "$cache/bochs" -q -f "$disc/bochsrc" </dev/null >"$disc/bochs.out" 2>&1 || true
touch "$disc/output" "$disc/console" "$disc/log"
status=$(tail -n 1 "$disc/output" | sed -n 's/^exit status \([0-9]*\)$/\1/p')
if [ -n "$status" ]; then
  head -n -2 "$disc/output"
  exit "$status"
fi
cat "$disc/output"
tail -n 5 "$disc/console" "$disc/log" >&2
fail "the program did not come to its end; above, the guest's console and Bochs' log"
