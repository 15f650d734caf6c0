// Package proxy stores objects on a fleet of ASDs, as package alba lays them out,
// and reads them back. Its methods have the meaning of driver.Store's, which it
// does not import; driver/host adapts it.
//
// # Order of durability
//
// Put commits an intent, sends fragments to all shards at once, as soon as each is
// read or computed and as many as the upload's window of memory holds, each shard's
// manifest when its fragments are durable (or with the last of them), and commits the
// object's manifest when c shards are durable. Every Apply asserts the owner's epoch and raises the device's
// to the namespace's; the commit asserts that the namespace's record is the one
// that the epoch was compared with, that the intent is still there, and that the devices
// it names were not removed (retire.go). Shards
// that are late complete in the background under the intent and are added by a
// second commit, or else are left to repair. An upload that fails becomes trash.
//
// Fence commits the epoch first, then tells the devices that are up. Delete commits
// first (object to trash), then deletes fragments.
//
// # Reads
//
// A range is read from the fragments that hold it, exactly. A fragment whose device
// is down, fails, has a bad checksum, or does not answer within its hedge
// (mean + 4 deviations of that device's small reads) is computed from k others,
// nearest first, with one more asked for each that is late. What is bad is
// reported to Options.Report.
//
// # Health
//
// Requests tell whether a device is up. One that fails is left alone for a while
// that doubles from 0.1 to 15 seconds; one that is late three times in a row counts as
// failed. A device that failed is given nothing new until its statistics answer.
//
// # Goroutines
//
//	follow        one: the registry's events, to caches and fleet
//	poll          one: statistics of all devices every two seconds
//	tell          one: tells devices how far the registry is
//	shardWriter   one per shard of an upload under way, and one per fragment of its that is being sent
//	finish        one per upload that completes in the background, at most 8
//	purge         one per deletion whose fragments are being deleted, at most 8
//	piece, decode one per fragment read under way; they end with the read
//
// # Locks
//
// Fleet.mu before Member.mu before health.mu; shardWriter.mu before upload.mu;
// cache.mu, Proxy.mu and position.mu are leaves. None is held during I/O.
package proxy
