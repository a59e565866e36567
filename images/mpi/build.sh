#!/bin/sh
# Builds the guest image "mpi" from Debian's packages, as root on Debian 12:
#
#   images/mpi/build.sh OUTDIR
#
# OUTDIR gets vmlinuz, initrd.img (busybox and the modules to reach the disk),
# rootfs.squashfs (Debian with OpenMPI; read-only, a tmpfs above it) and
# image.json. An OUTDIR that was built from the same recipe is left as it is.
# The host's own apt sources are used. What mmdebstrap mounts lives in a mount
# namespace of its own, so that nothing stays behind however the build ends.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
out=${1:?usage: images/mpi/build.sh OUTDIR}
key=$(cat "$here"/* "$top/examples/mandelbrot/mandelbrot.c" "$top/examples/ledger/ledger.c" | sha256sum | cut -d' ' -f1)
if [ -f "$out/image.json" ] && grep -q "\"recipe\": \"$key\"" "$out/image.json"; then
	echo "image mpi: up to date in $out"
	exit 0
fi

work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
root=$work/root
total=6
step() {
	n=$1; shift
	bar=$(printf '%*s' "$n" '' | tr ' ' '#')$(printf '%*s' $((total - n)) '' | tr ' ' '.')
	printf 'image mpi [%s] %s\n' "$bar" "$*"
}

step 1 "Debian userland with OpenMPI (about a minute)"
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
sources=
for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list; do
	[ -s "$f" ] && sources="$sources $f"
done
# shellcheck disable=SC2086 # a list of files
unshare --mount mmdebstrap --quiet --variant=minbase --mode=root --skip=check/empty \
	--include=openmpi-bin,dropbear-bin,qemu-guest-agent,iproute2,iputils-ping,iperf3,busybox-static \
	--aptopt='APT::Install-Recommends "false"' \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
	--dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
	"$release" "$root" $sources

step 2 "kernel"
kernel=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-/ { print $2; exit }')
(cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$kernel" && dpkg-deb -x "$kernel"_*.deb kernel)
version=$(ls "$work/kernel/lib/modules")
depmod -b "$work/kernel" "$version"

step 3 "initrd"
ird=$work/initrd
mkdir -p "$ird/bin" "$ird/lib/modules/$version" "$ird/proc" "$ird/sys" "$ird/dev" "$ird/ro" "$ird/rw" "$ird/root"
cp "$root/bin/busybox" "$ird/bin/busybox"
ln -s busybox "$ird/bin/sh"
copy_module() {
	line=$(grep -E "/$1\.ko:" "$work/kernel/lib/modules/$version/modules.dep") || return 0 # built in
	for m in $(echo "$line" | tr -d ':'); do
		mkdir -p "$ird/lib/modules/$version/$(dirname "$m")"
		cp "$work/kernel/lib/modules/$version/$m" "$ird/lib/modules/$version/$m"
	done
}
for m in virtio_pci virtio_blk virtio_net virtio_console virtio-rng squashfs overlay qemu_fw_cfg; do
	copy_module "$m"
done
cp "$work/kernel/lib/modules/$version/modules.builtin" "$work/kernel/lib/modules/$version/modules.order" "$ird/lib/modules/$version/"
depmod -b "$ird" "$version"
install -m 755 "$here/initrd-init" "$ird/init"
(cd "$ird" && find . | cpio --quiet -o -H newc | gzip -1) >"$work/initrd.img"

step 4 "the examples' programs"
mpicc -O2 -Wall -o "$root/usr/local/bin/mandelbrot" "$top/examples/mandelbrot/mandelbrot.c"
gcc -O2 -Wall -o "$root/usr/local/bin/ledger" "$top/examples/ledger/ledger.c"

step 5 "configuration"
install -D -m 755 "$here/boot" "$root/etc/violin/boot"
install -D -m 644 "$here/inittab" "$root/etc/inittab"
install -D -m 644 "$here/openmpi-mca-params.conf" "$root/etc/openmpi/openmpi-mca-params.conf"
ln -sf /bin/busybox "$root/sbin/init"
mkdir -p "$root/etc/dropbear" "$root/root/.ssh" "$root/var/lib/violin"
chroot "$root" dropbearkey -t ed25519 -f /etc/dropbear/dropbear_ed25519_host_key >/dev/null 2>&1
chroot "$root" dropbearkey -t ed25519 -f /etc/violin/id >/dev/null 2>&1
chroot "$root" dropbearkey -y -f /etc/violin/id | grep '^ssh-' >"$root/root/.ssh/authorized_keys"
chmod 700 "$root/root/.ssh"
chmod 600 "$root/root/.ssh/authorized_keys"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/var/log/* "$root"/usr/share/doc "$root"/usr/share/man
rm -f "$root/etc/hosts" "$root/etc/hostname" "$root/etc/resolv.conf"
ln -s /run/hosts "$root/etc/hosts"
ln -s /run/resolv.conf "$root/etc/resolv.conf"

step 6 "squashfs"
mksquashfs "$root" "$work/rootfs.squashfs" -quiet -no-progress -comp lz4 -Xhc -noappend

mkdir -p "$out"
rm -f "$out/image.json"
mv "$work/kernel/boot/vmlinuz-$version" "$out/vmlinuz"
mv "$work/initrd.img" "$out/initrd.img"
mv "$work/rootfs.squashfs" "$out/rootfs.squashfs"
sum() { sha256sum "$out/$1" | cut -d' ' -f1; }
cat >"$work/image.json" <<JSON
{
  "format": 1,
  "name": "mpi",
  "recipe": "$key",
  "kernel": "$version",
  "sha256": {"vmlinuz": "$(sum vmlinuz)", "initrd.img": "$(sum initrd.img)", "rootfs.squashfs": "$(sum rootfs.squashfs)"}
}
JSON
mv "$work/image.json" "$out/image.json"
echo "image mpi: built in $out ($(du -ch "$out"/* | tail -n 1 | cut -f1))"
