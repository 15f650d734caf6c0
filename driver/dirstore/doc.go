// Package dirstore is a driver.Store on a directory: the store of a single host
// without an erasure-coded backend, or of one that mounts a shared file system
// whose flock holds between hosts.
//
// # Layout
//
//	DIR/.format                 "scoria directory store 1\n"
//	DIR/.tmp/INSTANCE/lock      held as long as an opened Store lives
//	DIR/.tmp/INSTANCE/N         puts under way, namespaces being deleted
//	DIR/NAMESPACE/epoch         the fence, below; absent: 0
//	DIR/NAMESPACE/lock          held while something is checked against the epoch
//	DIR/NAMESPACE/objects/NAME  whole objects, never changed
//
// The epoch file, all numbers little-endian:
//
//	0       8       12      16      24      28      32
//	+-------+-------+-------+-------+-------+-------+
//	| magic |version|   0   | epoch |   0   | CRC32C|
//	+-------+-------+-------+-------+-------+-------+
//
// magic is "SCOEPOCH", version 1; the CRC covers bytes 0 to 27. A damaged epoch
// file fails every change of its namespace rather than fence nobody.
//
// # Order of durability
//
// Put: the contents are written to a temporary file and synced; then, under the
// namespace's lock, the epoch is checked, the file renamed to its final name and
// the directory synced. So an object is whole or absent at any moment, Put
// returns when it would survive a loss of power, and a put that was held up
// anywhere before the lock meets the epoch that is valid when it resumes.
// Fence and Delete check, change and sync the directory under the same lock;
// when Fence returns, every earlier put has either happened or will be refused.
//
// The lock is a file lock, so several processes may open one directory. Temporary
// files of instances that died are removed at the next Open.
//
// # Linking
//
// Where Object.LocalPath is on the same file system, Put links that file in
// place of copying it: the local copy and the object then are one file on one
// disk. A file whose sync failed can't be trusted by a later successful sync,
// so after such a failure a Store copies for the rest of its life.
//
// # Locks
//
// A slot of Store.gates (at most one Put, Fence, Delete or DeleteNamespace of this
// process per slot is in its locked part) is taken before the namespace's file
// lock; fdCache.mu is a leaf. There are no goroutines.
package dirstore
