// Package client is a vhost-user-blk front end: what QEMU and a guest's driver
// are together. Tests use it, and the load generator (package load) that
// `scoria bench` and `make bench` are made of. The daemon doesn't.
//
// It follows QEMU where the specification leaves a choice: the order of the
// handshake, memory slots one by one, the base of a ring after the server died,
// a kick for every ring that is started, the config space read before a change
// is acknowledged. Sources: QEMU's docs/interop/vhost-user.rst; virtio 1.2, 2.7
// and 5.2.
//
// Memory: one memfd per client, known to the server as one region:
//
//	queue 0: ring | slots | indirect tables
//	…
//	queue n: ring | slots | indirect tables
//	arena: the data of requests; its use is the caller's business
//
// A slot is the header, the status and the small payloads of one request; there
// is one per descriptor. AddMemory makes further regions.
//
// Goroutines of a Client: a reader of the connection, a watcher that notices
// its end (and comes back, with Options.Reconnect), and a reader of the backend
// channel. None of them touches a ring. A Queue belongs to one goroutine at a
// time; Disk is the layer for many goroutines, and owns all queues of its
// client. A client with a broken connection keeps its requests: when Reconnect
// succeeds, the server finds them in the in-flight region and the rings.
//
// Locks: Client.mu, then Conn.mu. Disk's locks are never held together with
// these.
package client
