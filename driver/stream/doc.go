// Package stream is the format in which volumes travel: the contents of a
// snapshot, or what changed from one snapshot to another, as a sequence of bytes
// that `scoria volume export` writes and `scoria volume receive` reads, through a
// pipe, ssh or a file.
//
// # Format, version 1
//
// Everything is little endian.
//
//	0         8         10   12       16       20   24
//	| "SCORIAST" | version | 0 | length | crc32c | 0 | header: length bytes of JSON |
//
// crc32c is over the header, which is a Header. Then records, in the order of the
// volume's bytes:
//
//	0      1     4        8        16       24
//	| type | 0 0 0 | crc32c | offset | length | length bytes (data and end only) |
//
//	1 data  length bytes, at most 1 MiB, are at offset
//	2 zero  length bytes from offset on read as zeroes and occupy nothing
//	3 end   offset: number of records before; the payload is: bytes of data u64,
//	        bytes of zeroes u64
//
// What no record names is as in the base, or reads as zeroes if there is none.
//
// A record's crc32c is over the crc32c of the record before it (of the first, the
// header's) as four bytes, the record without its own crc32c, and the payload. So a
// record that is missing, double or out of place is found like one that is damaged.
//
// # Resumption
//
// A sender can begin anywhere: Header.Start is the first byte of the volume that
// the records describe, and all before must have been received by then. Applying a
// stream twice, or from an earlier Start than needed, does no harm.
//
// A Writer or Reader belongs to one goroutine.
package stream
