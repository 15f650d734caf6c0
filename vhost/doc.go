// Package vhost is the vhost-user-blk front end: it serves block.Devices to
// QEMU, or to any other vhost-user client, over unix sockets. It is the "back
// end" of the vhost-user protocol and the "device" of virtio-blk.
//
// Sources: QEMU's docs/interop/vhost-user.rst, virtio 1.1 section 5.2, and the
// behaviour of QEMU 7.2 where they leave room.
//
// # Goroutines
//
//   - Server: the workers of package worker, its own or shared with other front
//     ends.
//   - Endpoint: one that accepts connections.
//   - session: one that reads messages, changes the session's state and
//     answers; a second, short-lived one sends notices of a resize.
//
// A queue, once started, belongs to one worker: only that goroutine touches its
// rings, its in-flight region and the dirty log. How workers take requests, poll
// and sleep is package worker's.
//
// Lock order: Server.mu, Endpoint.mu, session.mu. No lock is held while a
// worker is waited for. The workers take none of them in the steady state.
//
// # Memory
//
// Guest memory is unmapped when the session has dropped it and no request in
// flight points to it. A fault on it (the front end shrank its file) is
// recovered from, and ends that session only. What is mapped is counted (mem.Budget),
// per endpoint and in all: address space and mappings are the whole process's. Memory
// whose pages could keep a worker waiting (FUSE, network file systems, devices) ends
// the session (mem.ErrFileSystem). The session itself may hang on such a descriptor
// until its file system answers, since the kernel lets FUSE delay even close(2); that
// costs its front end one of its connections, and the end of its endpoint waits for it.
//
// # When a session ends
//
// Rings stop, requests that wait for room are canceled, and requests that did
// not succeed for that reason are left in the in-flight area instead of being
// failed: the guest may be alive and its front end connect again, and then they
// are resubmitted.
//
// # What QEMU can't take
//
// QEMU from 7.2 (its commit 71e076a0 "hw/virtio: generalise CHR_EVENT_CLOSED
// handling") to 9.0 forgets its event handler when a connection ends while it has
// no started device: vhost_user_async_close removes it, and the function that
// would bring it back runs only if vhost_dev.vdev is set. The socket is connected
// again, and nobody in QEMU looks at it. "vhost-user: fix lost reconnect again" in
// 9.1 mends that; f02a4b8e "vhost-user: fix lost reconnect" in 8.2, which was
// taken back for it, mended a part. There are two cases:
//
//   - The connection ends inside QEMU's vhost_dev_init, from connect() to the
//     answer to its second GET_FEATURES (or the SET_VRING_CALL after it that finds
//     the connection closed). The device is lost until QEMU is restarted.
//     integration.TestP3DaemonDiesWhileQEMUConnects ends a connection at every
//     message: those before SET_FEATURES are lost, all others come back. A daemon
//     that is killed there can't help it, but keeps the time short: the volume
//     that the socket stands for is open before it listens (package driver/host),
//     and a planned end waits (Endpoint.Close).
//   - The connection ends while the guest has no driver on the device: before its
//     BIOS or kernel started it, or while it waits for an incoming migration. When
//     the driver starts, QEMU goes on over the new connection as if it had
//     negotiated; so the session does too (session.resume). Of memory QEMU then
//     tells only what it has not told before: a device that was started before,
//     stopped, and lost its connection in between stays without memory, and QEMU
//     must be restarted.
//
// Stats names the processes in either state.
//
// When a connection ends during a live migration, QEMU drops what was marked in the
// dirty log since it last looked: vhost_user_async_close has the device count as
// stopped, and vhost_sync_dirty_bitmap looks at no stopped device. So a log that comes
// before any ring of its connection is started begins with all of memory marked.
//
// If the guest writes the configuration space (the write cache) while there is
// no connection, QEMU 7.2 aborts (vhost_dev_set_config).
package vhost
