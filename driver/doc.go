// Package driver turns a virtual disk into a log: a Volume takes block requests,
// appends what they write to Storage Container Objects (SCOs), keeps the map
// from cluster to location, and hands closed SCOs to a Store. An Engine holds
// what the volumes of one daemon share.
//
// # The path of a write
//
// Submit → submitWrites (gate shared) → writeClusters: logSCO.reserve, one
// compare-and-swap that orders the write → fill: copy into a chunk of the pool,
// CRC32C of the copy, tlog record, map → answered. No allocation, no system
// call. What can't be done at once goes to another goroutine: no room
// (admit), part of a cluster (writePartial), a map page on disk.
//
// # What is durable when
//
//  1. A completed write is in the pool, a mapped tmpfs file that outlives the
//     daemon (P3): first the data, then the record, which becomes visible with
//     one atomic store. A daemon that dies in between leaves a hole that nobody
//     was told about; recovery voids it.
//  2. In the background, and at large flushes, clusters are written to the SCO's
//     file before the records that name them; a small flush writes both at the
//     same time. Until the sync neither is promised, and recovery believes a
//     record that is not known to be synced only if its cluster has its checksum.
//  3. A flush ends after every SCO up to its moment has been written and synced,
//     oldest first (P1). A record carries how many records before it were known
//     to be synced, which tells recovery a torn tail from rot.
//  4. A SCO is sealed (footer, sync, truncate, sync) oldest first, then uploaded.
//  5. A checkpoint: page objects and log are synced before the root; in the
//     store the SCOs come before the page objects, these before the root. A SCO
//     is deleted only when a published root no longer refers to it.
//  6. A SCO that snapshots reach is compacted in place (compact.go): the new
//     generation is written and synced here, then put into the store and read back,
//     then a root names it; the old one is deleted when that root is published.
//
// After any crash the checkpoint plus the chain of SCOs behind it, up to the
// first break, is a prefix of the log (P2); recovery reads only that (P9).
//
// Each SCO's first record names its predecessor and how many records that one
// ended with. A checkpoint always lies between two SCOs.
//
// # Snapshots and clones
//
// A snapshot is a checkpoint whose root is kept (snapshot.go); a view of one is its
// root's map over the same SCOs (view.go). A clone's SCO numbers go on above those of
// its parent's snapshot, so a location says by itself whose it is (ancestry.go).
// Neither shows in the path of a write. A SCO goes when it has no live cluster, no
// snapshot pins any, and a root that says so is in the store; what snapshots pin is
// not moved by the scrubber, as that would double it, but compacted where it is. The
// SCO's number and its clusters' indices stay, so locations do. Which generation of
// it counts is in the volume's newest root alone, never in a snapshot's or a clone's.
//
// What a rollback, a shrink and a flattened clone leave behind goes the same way. A
// rollback's root takes its name with the gate closed: with it the map changes.
//
// # The gate
//
// Writers hold Volume.gate shared from reservation to map update. What must not
// interleave with them holds it exclusively, for microseconds: opening the next
// SCO, discards, the commit of a read-modify-write, relocations, the beginning
// of a checkpoint. That is why the log's order and the map never disagree
// although writers run side by side: of two concurrent writes to a cluster the
// map keeps the larger location, which is the later record.
//
// # Shares
//
// The pool is shared by all volumes. One that writes faster than the disk is slowed
// down as the pool fills; a volume that has less than half of its fair share of it
// is not, and the last sixteenth goes only to volumes that have no more than their
// share (pool.share). A head that is being written to is not closed to make room
// for another volume, unless heads are what fills the pool.
//
// # Space
//
// Guests get no room in the log beyond 1.3 times what is reached plus the write buffer
// (space.go has how much exactly); before that they are slowed in proportion to the rate
// at which space comes back, a few microseconds per cluster. The scrubber empties SCOs
// (relocate.go), and beside it others are given back (giveback.go): checkpoint, upload of
// the SCOs before it, publication, deletion, in this order. Nothing about what may be
// deleted when is different for that: only what no published root refers to.
//
// # Lock order
//
//	resizeMu → house → checkMu → checkpoints.mu → ioMu → gate → extendMu → metaMu → pool.mu
//	                    rmw → gate → io.mu
//	                    checkMu → snapshotState.mu → metaMu
//	                    lost.mu → conds.mu, lostObjects.mu → metaMu
//
// A clone takes its ancestors' metaMu with its own checkpoints.mu held, never the
// other way round.
//
// fileCache.mu, crcCache.mu, spaceGate.mu, sumCache.mu, liveTable.mu, parked.mu, storeWaits.mu, conds.mu, claims.mu, users.mu, diskRoom.mu are
// leaves. Nothing waits for a disk, a store or the pool while it holds gate, except
// the end of a rollback, when no front end has the volume.
//
// # Goroutines
//
// Per engine: housekeeper (ticks volumes once a second), populate (at start: the
// pool's pages, then huge ones).
// Per volume, only while there is work: ioLoop (spill, sync, seal), upload,
// admit (writes that wait for room), housekeep (checkpoint, publish, scrub), while
// it scrubs one that gives back, one that reads map pages ahead, one that asks for what
// the store has lost, one that stores that anew, and one per request that waits. An idle volume has none.
//
// # Failure
//
// Close waits for the clones of the volume, which read through it. Then it first ends what works with the store, then housekeep, then waits for
// whoever is inside without a request (users) and for requests, and only then
// writes the last checkpoint: nothing else writes to the log by then.
//
// A full disk pauses (P8): a write is taken only if the disk has room for it beside the
// reserve, for all volumes together (room.go), so that what is in the pool can always be
// written out and go into a checkpoint, by which room is given back. If others have used
// up the disk, flushes wait too, and what needs a checkpoint tries again. So does a store that does not answer
// (storewait.go). A failed sync is final for the volume: flushes and writes fail
// until the daemon is restarted, because nobody can say what the disk kept; what
// it has in the pool is written out without a sync, so that others get the room. A
// store that refuses our epoch ends the volume's service (P4).
package driver
