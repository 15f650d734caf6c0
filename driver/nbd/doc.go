// Package nbd is the helper socket: an NBD server through which qemu-img,
// qemu-io, nbdinfo, nbdcopy, fio and any other NBD client reach every volume.
//
// It speaks the fixed newstyle protocol of
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md with
// structured replies, metadata contexts, FLUSH, FUA, TRIM, WRITE_ZEROES
// (NO_HOLE, FAST_ZERO), DF and multi-conn; without TLS, extended headers and
// NBD_CMD_CACHE. The section titles in comments are those of that document.
//
// # Exports
//
// An export is called POOL/VOLUME; VOLUME alone means default/VOLUME. There is
// no default export. NBD_OPT_LIST lists what block.Opener.Names returns.
//
//	qemu-img info 'nbd+unix:///default/vm1?socket=/run/scoria/nbd.sock'
//
// POOL/VOLUME@SNAPSHOT is a snapshot, read-only, kept as long as a connection
// reads it. Besides base:allocation there are, for every snapshot of a volume (of a
// snapshot, for those before it), two metadata contexts of one meaning: state 1
// where something may have changed since, else 0. Backup tools read only the
// former. The second name is the one under which QEMU's server exports dirty
// bitmaps, for tools that know it.
//
//	nbdinfo --map=scoria:since=monday 'nbd+unix:///default/vm1?socket=/run/scoria/nbd.sock'
//	qemu-img map --image-opts driver=nbd,…,x-dirty-bitmap=qemu:dirty-bitmap:monday
//
// # Creating volumes
//
// NBD has no command that creates an export, and a client never says which size
// it would like: `qemu-img create -f raw nbd+unix:///default/vm1?socket=S 10G`
// opens the export, fails if there is none or if it is smaller than 10G, and
// zeroes its first sector. (QEMU 7.2: block/nbd.c has no create of its own, so
// bdrv_co_create_opts_simple applies, and nbd_co_truncate cannot grow.) A
// server that made a volume for every unknown name would make one for every
// mistyped name, of a size that nobody asked for. So an unknown export becomes
// a volume in exactly two cases, at NBD_OPT_GO or NBD_OPT_EXPORT_NAME:
//
//   - The peer is a `qemu-img create` for raw of this very export: the server
//     reads the peer's command line (/proc/PID/cmdline; the PID comes from
//     SO_PEERCRED) and takes the size from there. This makes the stock command
//     work. It needs a peer whose PID is visible from the server.
//   - The name asks for it: POOL/VOLUME:size=10G. The volume is made if there is
//     none and otherwise opened, if it is at least that large. This works with
//     every client, for instance as the target of qemu-img convert or nbdcopy.
//
// Sizes take the suffixes of qemu-img (powers of 1024) and are rounded up to a
// whole cluster. On a volume that exists, `qemu-img create` does what QEMU does
// on every NBD export: it fails if the volume is smaller and otherwise zeroes
// its first sector; the server neither resizes nor empties it.
// `qemu-img convert` without -n goes the same way, but names no size, so its
// target has to exist or to be called with :size=.
//
// # One writer
//
// All connections of one process are one claimant (block.Claimant kind "nbd",
// the peer's PID), so multi-conn is safe: every volume's data and cache are
// shared, and FLUSH and FUA count for all connections. The claim is taken at a
// connection's first command that changes data and held until the connection
// ends. While another front end or process holds it, such commands fail with
// EPERM and, in structured replies, the reason in words. Reading is always
// possible. Programs that write from several processes (fio with numjobs, unless
// thread=1) are therefore refused all but one. A peer whose PID is unknown is a claimant of its own per connection
// and is not offered multi-conn.
//
// # Block sizes
//
// The server announces a minimum block of one byte, the cluster as the preferred
// block, and 32 MiB as the largest payload. It can do better than the devices,
// whose unit is the logical block, because clients need it: libnbd refuses what
// is smaller than the announced minimum, so nbdcopy could not copy a file whose
// size is odd. Unaligned reads are widened; unaligned writes and zeroes are
// read-modify-write, exclusive within this server against all other changes of
// the same volume; unaligned trims shrink to whole blocks. FAST_ZERO of an
// unaligned range is refused with ENOTSUP, as it would not be fast.
//
// # Goroutines and bounds
//
// Every connection has a reader, which takes commands off the socket and
// submits them to the device in batches, and a writer, which alone writes to
// the socket in the transmission phase. Device completions only put an
// operation into the writer's queue. Operations that take several steps
// (unaligned ones, large reads that look for holes, block status, what exceeds
// the device's limits) get a goroutine each. At most maxOps operations and
// Server.BytesPerConn bytes of payload are under way per connection, whatever
// their kind; beyond that the reader stops reading. The writer's queue has room
// for all of them, so a completion never blocks, and a client that reads slowly
// or not at all stops only itself. Payload buffers are pooled and belong to an
// operation from its command until its reply is written.
//
// A connection ends when its client says so or hangs up, breaks the protocol
// (the reason is logged), or the server closes. Requests that wait for room are
// then canceled, the others awaited, and only then is the claim released.
//
// Lock order: Server.mu; export.mu; conn's budget. None is held while calling
// into a device or the socket.
package nbd
