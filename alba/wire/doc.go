// Package wire is the protocol between a client and an ALBA Storage Daemon as a
// pure codec: bytes to messages and back, without I/O. scoria/alba/asd/remote
// moves the bytes.
//
// # Connection
//
// The client opens a TCP (or TLS) connection and sends a hello; the server
// answers with a welcome and, if its status isn't 0, closes. All integers are
// little-endian; CRC is CRC32C (Castagnoli).
//
//	hello, 64 bytes                          welcome, 64 bytes
//	 0  "SCORIASD"                            0  "SCORIASD"
//	 8  u16 lowest version that it speaks     8  u16 version that will be spoken
//	10  u16 highest                          10  u16 status: 0 welcome, 1 no common version,
//	12  u32 0                                       2 another ASD is here, 3 too many connections
//	16  UUID of the ASD that it wants,       12  u32 requests that may be under way
//	    or zeroes for any                    16  UUID of the ASD
//	32  zeroes                               32  zeroes
//	60  u32 CRC of the 60 bytes              60  u32 CRC of the 60 bytes
//
// Then both sides send frames. The client numbers its requests as it likes, no
// two under way with one number; answers bear the request's number and come in
// any order.
//
//	frame
//	 0  u32 length of the body, at most MaxBodyBytes
//	 4  u32 length of the data, at most asd.MaxValueBytes
//	 8  u64 number of the request
//	16  u8 operation
//	17  u8 request: priority (0 guest, 1 repair); answer: status, see below
//	18  u16 0
//	20  u32 request: milliseconds after which the client no longer waits, 0 for never
//	24  u32 CRC of the body
//	28  u32 CRC of the 28 bytes
//	32  body, then data
//
// The data are the bytes of values, one behind the other in the order of the
// body. They have no checksum of their own: the body holds those of the values'
// blocks, which whoever receives them verifies before use. A frame that breaks a
// rule other than that ends the connection: nothing behind it can be trusted.
//
// # Bodies
//
// str is a u16 length and bytes, blob a u32 length and bytes, list a u32 count
// and elements. A value is u32 block size, u64 size, and a u32 CRC per block (as
// many as the size has blocks); its bytes are the next in the data.
//
//	op           request                             answer of status 0
//	1 get        str key                             value
//	2 multi-get  list of str key                     list of (u8 status; 0: value, else error)
//	3 read       str key, u64 offset, u64 size       u64 size of the value, u32 block size,
//	                                                 u32 first block, list of u32 CRC; data: the blocks
//	4 range      str from, str to, u8 after,         u8 more, list of info
//	             u32 limit
//	5 exists     list of str key                     list of info
//	6 apply      list of assert, list of update      nothing
//	7 epochs     str after                           u8 more, list of (str namespace, u64 epoch)
//	8 verify     str cursor, u64 bytes               str next, u8 done, u64 keys, u64 bytes,
//	                                                 list of (str key, u64 offset, u64 size, str reason)
//	9 stats      nothing                             blob: asd.Stats as JSON
//	10 ping      nothing                             nothing
//	11 cancel    nothing                             no answer: the request of this number is no
//	                                                 longer waited for, and answered early if possible
//
//	info     str key, u8 exists, u64 size, u32 block size, u32 sum
//	assert   u8 kind, str key, and  kind 2: blob value  3: u64 size, u32 sum  4: u64 epoch
//	update   u8 kind, str key, and  kind 1: value       3: u64 epoch
//	error    str text, and by status
//	         StatusStaleEpoch: str namespace, u64 epoch, u64 known
//	         StatusAssert: u32 index, u8 kind, str key, u64 size, u32 sum, str reason
//	         StatusCorrupt: str key, u64 offset, u64 size, str reason
//
// The body of an answer whose status isn't 0 is an error. A body must be used up.
package wire
