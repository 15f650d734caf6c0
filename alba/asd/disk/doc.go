// Package disk is the engine of an ALBA Storage Daemon: one ASD in one
// directory, which should be the root of a file system of its own. It is used in
// process by a host's embedded ASDs and behind scoria/alba/asd/remote by
// scoria-asd.
//
// # What lies in the directory
//
//	lock                     held while the ASD is open
//	probe                    what a test write leaves behind if it is cut off
//	identity                 the ASD's UUID and the version of this layout, JSON
//	kv/                      Pebble: records of values, small values, epochs, state
//	kv/MANIFEST-….twin       a second copy of Pebble's manifest of that name, byte by byte
//	kv/….log.damaged         a log as it was before it was cut by Options.Salvage
//	values/DDDDDDDDDDDD/I…   one file per large value; see valuefile.go. That of an adopted
//	                         value is a link to a file that another part of this process
//	                         wrote: the value is a part of it, without a head
//
// The keys of the key-value store are a byte that tells what it is and a name
// (integers little-endian if not said otherwise):
//
//	'k' key         record: u8 version 1, u8 kind, u32 block size, u64 size, u32 sum, and
//	                  kind 1: u32 CRC32C per block, the value
//	                  kind 2: u64 id of the value's file
//	                  kind 3: u64 id of the adopted file, u64 offset of the value in it,
//	                          u32 CRC32C per block
//	'e' namespace   u64 epoch
//	'f' u64 (big-endian) id of a file   the key that it is for
//	'm' "s"         state: u8 version 1, u8 0, the UUID, u64 number of keys, u64 bytes of all
//	                  values, u64 bytes that files take, u64 reserved: no file has this id
//	                  or a larger one
//
// A file's name is its id in 16 hexadecimal digits, in a directory named by the
// id divided by 1024, in 12.
//
// # Order of durability
//
// An Apply is acknowledged after these steps, each of which is durable before
// the next begins:
//
//  1. The value files are written and synced, or files to be adopted linked and
//     synced, by the caller's goroutine, under ids that are new (see below) and in
//     a directory that is there durably.
//  2. The committer takes a group of Applies, and syncs the directories that
//     their files lie in, each once.
//  3. It evaluates each Apply's asserts on the store as the ones before have left
//     it, and writes all that hold with one batch and one sync of Pebble's log.
//
// Value files that the batch made garbage are removed after that, in the
// background; nothing waits for their removal. A crash can therefore leave files
// that no record refers to, never a record without its file. Ids are never used
// twice: the state reserves them ahead, and a start continues behind the
// reservation. So the sweep of a start can look at leisure, with a snapshot of
// that moment, for files with smaller ids that no record names.
//
// # Adoption
//
// Adopt makes parts of a file values, without a second copy: each part's value file
// is a link of its own to it, so that values go one by one as others do, and the
// room is free when the last link is gone, the writer's included. The writer must
// not change the file any more. Its bytes and the writer's copy are one on the
// disk: damage is found here as in other files, but no other copy mends it.
//
// # Failure
//
// A failed sync, of a value file, a directory or the key-value store, is final:
// what the kernel holds and what the disk has may differ from then on in ways
// that no later sync reveals. No Apply is acknowledged any more (asd.ErrFailed)
// until the disk is opened again. Reads go on.
//
// Supervise opens it again, from 1 s after the failure on and at waits that double up
// to a minute: when a test write, dropped from the page cache, is read back as it was, calls
// are refused, the disk is closed and opened as after a crash. What the page cache
// says of writes that were not synced may be right or wrong: value files that no
// record names are removed, and Pebble reads its log back as far as it is whole and
// writes all of it anew, to new tables under a new manifest. What was acknowledged had
// been synced before, and so it is there.
//
// Pebble can't be closed once its log or manifest has failed: goroutines hold its
// locks for good. Its way to the disk is closed instead (kvAccess), so that what is
// left of it can write nothing behind the back of the one that is opened next. That
// costs memory, and is done 16 times at most.
//
// Bytes that fail their checksum make the read fail with asd.ErrCorrupt; putting
// the key again repairs it. Pebble checks its own blocks. If one of them is bad
// outside of a value's record, keys may be lost that this ASD can't name: it then
// says so in Stats.Damaged, and its data belongs elsewhere.
//
// What Pebble reads only at its start, its log and its manifest, it would take for
// shorter than it was, without an error. So the manifest is there twice and mended
// from the sound copy, and a log that is known to have been longer is refused
// (asd.ErrCorrupt) when Pebble opens it to read it. It opens none whose contents are in
// tables, and has written nothing by then. Only damage to the very last record of the
// last log can't be told from a write that the death of the daemon cut short; a second
// after the last Apply, and in Close, a record that says nothing new follows. Verify
// reads log, manifest and identity as well, and mends them from what is in memory.
//
// # Goroutines
//
//	committer  commitLoop: the only writer of the key-value store
//	remover    removeLoop: removes value files
//	sweeper    sweep: once, from the start on
//	supervisor Supervised.supervise: opens a failed disk anew
//
// and Pebble's own. All of them end in Close, but for those of a Pebble that is stuck.
//
// # Locks
//
// Disk.mu, handles.mu, gate.mu, kvAccess.mu and Supervised.mu are leaves: nothing is
// called with one of them held but the log. kvAccess.inside is held during each call
// of Pebble to the file system.
package disk
