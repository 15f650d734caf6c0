#!/bin/sh
# First process of the test guest. Loads the drivers, then carries out jobs that
# come over the second serial port: one line each, "NUMBER LENGTH BASE64-OF-SCRIPT
# NUMBER". A job's output goes back over the same port and ends with a line
# "#scoria# NUMBER EXITCODE". The kernel's messages have the first port alone.
#
# The port has no flow control, and a guest that the host starves loses bytes. A
# line that is not whole is answered with "#scoria# 0 1": the host then sends
# again whatever has no answer. Jobs run in order, each once.
#
# With root_disk=DEVICE on the kernel's command line, systemd on that disk is the first
# process from there on, and has this script run as a service.
export PATH=/bin:/sbin HOME=/tmp LC_ALL=C
if [ $$ = 1 ]; then
	mount -t proc proc /proc
	mount -t sysfs sys /sys
	mount -t devtmpfs dev /dev
	mount -t tmpfs tmp /tmp
	for m in $(cat /modules/order); do
		insmod "/modules/$m.ko" || echo "init: module $m failed" >/dev/console
	done
	if [ -n "$root_disk" ]; then
		mount -t ext4 "$root_disk" /mnt
		for d in proc sys dev; do
			mount --move /$d /mnt/$d
		done
		exec switch_root /mnt /usr/lib/systemd/systemd
	fi
fi
port=/dev/ttyS1
stty -F $port raw -echo 115200
exec 3<>$port
echo "#scoria# 0 0" >&3
last=
while read -r number length script again <&3; do
	if [ "${#script}" != "$length" ] || [ "$number" != "$again" ]; then
		echo "#scoria# 0 1" >&3
		continue
	fi
	if [ -n "$last" ] && [ "$number" -ne $((last + 1)) ]; then
		continue
	fi
	last=$number
	echo "$script" | base64 -d >/tmp/job.$number
	sh /tmp/job.$number >&3 2>&1 </dev/null
	echo "#scoria# $number $?" >&3
	rm -f /tmp/job.$number
done
poweroff -f
