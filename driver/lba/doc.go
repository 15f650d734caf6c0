// Package lba is the map of a volume: cluster number (LBA) to location. It is
// asked for every cluster that is read and changed for every one that is
// written, so its two hot calls, Get and Set, neither allocate nor block nor
// enter the kernel.
//
// # Shape
//
//	directory          leaf page, 4 KiB
//	one word per leaf  512 locations, one per cluster
//	┌──────────┐       ┌──────────┐
//	│ entry 0  │──────►│ location │  cluster 0
//	│ entry 1  │──┐    │    …     │
//	│    0     │  │    └──────────┘
//	│    …     │  └───►┌──────────┐
//	└──────────┘       │    …     │  clusters 512 to 1023
//	                   └──────────┘
//
// All of it lies outside the Go heap in lazily backed memory: an empty volume
// of 64 TiB occupies a few KiB. The tables are made for the largest volume and
// made accessible as far as needed, so that nothing moves when a volume grows.
// Leaf pages are never unmapped while the map lives. A span counter per 512
// entries lets walks and discards skip empty stretches of 1 GiB.
//
// # Who may call what when
//
// The driver has a gate per volume. Calls fall into four classes:
//
//   - at any time, from any goroutine: Get, GetRange, Walk, Extents, Resident,
//     Load, Diff, MarkObjectDirty, Mapped, Stats, LivePages, Objects;
//   - with the gate held shared, or exclusively: Set, Replace;
//   - with the gate held exclusively (no Set or Replace runs): Clear,
//     BeginCheckpoint, Resize, Revert;
//   - in the one goroutine of a checkpoint, without the gate: the methods of
//     Checkpoint. RestoreDirectory and Close run alone.
//
// Load, Walk, Extents, Diff and MarkObjectDirty wait for reads of stored pages; the
// others never wait for anything but a short lock.
//
// # Newer wins
//
// Locations of a volume only grow, and Set keeps the larger one. Writers of one
// cluster may therefore reach the map in any order: it ends up with what the
// log says last.
//
// # Checkpoints
//
// Time is cut into generations by BeginCheckpoint, which only begins the next
// one. A directory entry bears the generation in which its leaf was last made
// dirty. Set writes in place if that is the current one; else it goes, once per
// leaf and generation, through a slow path: under the leaf's stripe lock, and
// if a running checkpoint has not written this leaf yet, the page is copied to a
// shadow, then the entry is moved to the current generation. WritePages goes
// over the directory and takes each leaf that was dirty from its shadow or,
// under the lock, from its page. So a checkpoint has exactly the contents of its
// beginning, costs at most one copy per leaf changed meanwhile, and gives each
// shadow back as soon as it is written.
//
// Order of durability, which the driver keeps: the log up to the position of
// BeginCheckpoint, then the page objects, then the root object that names them,
// then Commit; only then may objects with no live pages be deleted. After Abort,
// or a crash before the root is durable, the checkpoint before is still whole.
//
// # Readers and freed pages
//
// Get takes no lock: it reads the entry, the slot, and the entry again. If
// both readings of the entry agree, the slot was the leaf's own (see entry).
// Pages are reused by other leaves while such a reader may look at them, which
// is harmless as it discards what it saw.
//
// # Locks
//
// objectsMu, then a stripe lock (one at a time), then the arena's. No lock is
// held across a call of the driver's functions or of a PageReader, except that
// RestoreDirectory, which runs alone, iterates under objectsMu. The package
// starts no goroutines that outlive a call.
package lba
