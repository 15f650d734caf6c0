// Package alba holds what all parts of the erasure-coded object store agree on:
// presets, manifests, the records in the registry, and how an object's bytes are
// laid out over fragments. It is pure but for reading the file of master keys;
// erasure, place, proxy and repair build on it.
//
// # From an object to fragments
//
//	object   ──┬─ block ─┬─ block ─┬─ … ─┐      blocks of BlockBytes
//	           ▼ compress, encrypt: each block alone
//	stream   ──┴─ block ─┴ block ┴─ … ───┴─ index ─┐
//	           ▼ cut into chunks of k × FragmentBytes
//	chunk 0: fragment 0 … k-1, parity k … k+m-1    chunk 1: …
//
// Compression and encryption come before erasure coding, not after: then parity
// shrinks with the data, repair needs no key, and any byte range of a lost fragment
// is decoded from the same range of k others.
//
//   - Neither: the stream is the object.
//   - Encryption alone: blocks of 4096 bytes, each followed by its 16-byte tag. A
//     block's place in the stream is its number times 4112.
//   - Compression, with encryption or without: blocks of 16 KiB become shorter, or
//     are kept as they are where they would not. Behind them, from a multiple
//     of 4096 on, lies the index (package erasure) with their lengths.
//
// Fragment i of a chunk holds consecutive bytes of the stream, so that a small
// read meets one fragment. A fragment is a whole number of units: 4096 bytes, or
// 4112 for encryption alone, which is also its unit of checksums on the device: so a
// small read of whole blocks reads no byte more than it needs. All fragments i of an
// object lie on one device: shard i. The last chunk has shorter fragments; its end
// is filled with zeroes.
//
// # Keys in the registry
//
//	alba/preset/NAME             Preset
//	alba/asd/ID                  Device
//	alba/removed/ID              Device that nothing refers to any more; never taken in again
//	alba/namespace/NAME          Namespace
//	alba/object/NSID/OBJECT      Manifest (binary)
//	alba/intent/NSID/UPLOAD      Intent
//	alba/trash/NSID/UPLOAD       Intent of an upload that failed or was deleted
//	alba/job/NAME                progress of maintenance (package repair)
//	alba/cluster                 an ID that all devices know too
//	alba/history                 History: the registry's generations
//
// NSID and UPLOAD are 16 random bytes in hex: a name that is used again after a
// deletion never meets what the earlier one left behind.
//
// # Order of durability
//
// An upload commits its Intent, then writes fragments, then commits the manifest
// in a transaction that asserts that the namespace is as it was when the epoch was
// compared with it and that the intent is still there, and deletes the intent.
// So a fragment that no manifest, intent or trash record speaks of is an orphan, and
// whoever deletes an intent has fenced the upload behind it, however late that one
// resumes. A deletion moves the manifest to the trash in one transaction, then
// deletes the fragments, then the trash record.
//
// # Keys on a device
//
//	f/NSID/UPLOAD/SHARD/CHUNK    fragment; SHARD 2 hex digits, CHUNK 8
//	m/NSID/UPLOAD/SHARD          Manifest, written with the shard's last fragment
//	a/NSID/UPLOAD/SHARD          16 random bytes of the attempt that moved or mended the shard, written
//	                             with its first fragment; other attempts delete nothing of it
//	n/NSID                       Namespace, a copy
//	t/NSID/UPLOAD                this upload is deleted, though another device may
//	                             still hold some of it
//	p/NAME                       Preset, a copy
//	x/ID                         Device that was removed, a copy: what is on it is old
//	c                            the cluster's ID: a registry that lost its memory
//	                             must not take what is here for orphans
//
// With these alone the registry's part can be rebuilt. Each device also
// holds the epoch of each namespace that it met (see package asd); changes with a
// smaller one are refused there. Orders of copies are kept as if they were epochs, so
// that of two copies the later one stays, and is taken in a rebuild:
//
//	NSID                         epoch of the namespace
//	~registry                    Position that the device was told last
//	~copy/NSID                   CopyOrder of n/NSID
//	~preset/NAME                 Position of the change that p/NAME is from; none: an older version wrote it
//	~device/ID                   Position at which x/ID was put or deleted
//
// # A registry that went back
//
// Devices are told how far the registry is (Position), within a second of each change;
// they keep it durably and never forget or lower it. A registry that was put back from a
// backup does not know what a device was told after that backup was taken: nothing is
// read from such a device, written to it or deleted there, for what is taken for an orphan may
// be the only copy. It is rebuilt from the devices then.
//
// A device that deletes fragments because of a change, a deletion or a move, learns of that
// change in the same Apply: what a registry of before speaks of is never gone without its
// being recognised. What was only stored in the second before the loss does not make a
// backup of that second recognised, and is taken for orphans; uploads would pay
// for it with one more sync each.
//
// A device may be away at the start, and turn out later to know more. It is shut out then:
// nothing on it is read or changed, and nothing is deleted from the others any more
// either, for what this registry makes superfluous may be what the newer state is built on.
// Volumes that are open go on. They are volumes that could be opened from devices of
// which none was told a later change: with c > m, and as many devices as shards, there are
// none, since what was stored after the backup has told c devices, and the others are
// fewer than k. With other policies they were opened as they were at the backup, and the
// operator says which state is to live: removing the device keeps what they are now; a
// rebuild takes of two objects of one name the one that was stored last, so what was
// written since must be copied away and the volumes be closed before.
package alba
