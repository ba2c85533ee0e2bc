#!/bin/busybox sh
# PID 1 of the guest: loads the modules, puts a writable layer over the host's file system, runs one command script
# there and turns the machine off. ROOT_TYPE comes from the kernel's command line.
export PATH=/bin
/bin/busybox --install -s /bin

fail() {
    echo "init: $*"
    poweroff -f
}

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module.ko" || fail "module $module does not load"
done </modules/order

over_virtio=trans=virtio,version=9p2000.L,msize=512000
case $ROOT_TYPE in
    virtiofs) mount -t virtiofs -o ro root /host ;;
    9p) mount -t 9p -o "ro,cache=loose,$over_virtio" root /host ;;
    *) false ;;
esac || fail "the host's file system does not mount as '$ROOT_TYPE'"
mount -t tmpfs layer /layer && mkdir /layer/upper /layer/work || fail "no writable layer"
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work root /newroot || fail "no overlay"

cd /newroot || fail "no root"
mount -t proc proc proc
mount -t sysfs sys sys
mount -t devtmpfs dev dev
mkdir -p dev/shm dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
mount -t devpts devpts dev/pts
[ -e dev/fd ] || ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=755 run run
mkdir run/guest run/out
mount -t 9p -o "rw,cache=none,$over_virtio" control run/guest || fail "no control folder"
mount -t 9p -o "rw,cache=none,$over_virtio" out run/out || fail "no output folder"

hostname localhost
ip link set lo up
ulimit -l unlimited
chroot . /bin/sh /run/guest/command </dev/null
echo $? >run/guest/status
umount run/out run/guest
poweroff -f
