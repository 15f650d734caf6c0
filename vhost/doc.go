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
// recovered from, and ends that session only.
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
// Seen with QEMU 7.2, and not to be helped from this side when the daemon is
// killed: if the connection ends while QEMU negotiates or the guest is just
// starting its driver, QEMU connects again and never says a word ("Fix lost
// reconnect", f02a4b8e); if the guest writes the configuration space (the write
// cache) while there is no connection, QEMU aborts (vhost_dev_set_config).
// Endpoint.Close, the planned end, avoids the first.
package vhost
