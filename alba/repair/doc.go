// Package repair keeps the object store as safe as its presets ask: it rebuilds
// lost shards, empties devices that are drained, brings objects to a better policy
// when devices return, moves shards from full devices to empty ones, collects what
// nobody refers to, reads everything to find what has rotted, and rebuilds the
// registry from the devices when it is lost.
//
// # Safe with several daemons
//
// Every change of an object is one transaction that asserts the object's revision
// and an intent, which only one daemon can hold (see package alba): two daemons that
// do the same work waste it and nothing else. That they rarely do is the jobs'
// doing: a job's record names the daemon that works on it and when it was last
// heard of. After leaseTimeout another one goes on where the record says.
//
// # Order
//
// Objects are repaired in the order of the devices that may still be lost, fewest
// first. Each chunk waits for Options.BytesPerSecond, and while Options.Busy says that
// guests wait it waits for them too, but never for long: a floor of bytes per second
// goes on, high for objects that can lose no more device, low for all that no lost
// device makes urgent (moves, upgrades, verification, orphans).
//
// # Orphans
//
// A fragment is deleted only if neither a manifest, an intent nor a trash record
// speaks of it in a registry that was read after the fragment was seen, and only on
// devices that know this registry's cluster ID: a registry that has lost its
// memory must not take everything for orphans. An intent is removed when the
// daemon that made it has no such upload any more, or after Options.IntentAge; that
// fences the upload, for its commit asserts the intent.
//
// Two moves of a shard to one device write the same keys: each puts the ID of its attempt
// there first, and a deletion, of an orphan or of what a move has left, asserts the one
// that was there before the registry was read.
//
// Nor is anything collected, repaired or moved while a device that is in use was told of
// changes that the registry lacks (package alba): it was put back from an older backup,
// and would take for orphans what was stored or moved since. Each deletion asserts on
// its device that it knows no later change.
//
// A device that comes back has missed deletions: its orphans are collected, and the
// trash is emptied, when it answers again, not at the next search.
//
// # Removed devices
//
// A device is removed without force when neither an intent nor a manifest speaks of it and
// nothing can come to do so; by force at any time: what is committed after that does
// not count on it (proxy/retire.go).
//
// The record of a device that was removed goes when no object and no upload refers to
// it; its ID is remembered (alba.RemovedKey), and a disk that has it is refused: what
// is on it is older than anything that has happened since.
//
// # Goroutines
//
//	repair      one: faults that were reported, passes over all objects
//	orphans     one
//	verify      one: idle unless the job was started
//	rebalance   one: idle unless the job was started
//
// Run starts them and returns when all have ended.
package repair
