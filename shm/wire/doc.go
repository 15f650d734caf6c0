// Package wire is the codec of the messages on the shared-memory front end's
// socket, RUN/shm.sock. Package ring has the layout of the memory.
//
// The socket is a unix socket of type SOCK_SEQPACKET: one message is one packet,
// of at most MaxMessage bytes. The client asks, the server answers each request
// in turn; besides, it sends events on its own. All numbers are little-endian.
// Who the client is, the server asks the kernel (SO_PEERCRED, SO_PEERGROUPS).
//
//	        0        4        8        12       16
//	   0  | bytes  | type   | tag    | status | body …
//
//	bytes   u32 of the whole message
//	type    u32; an answer has its request's with bit 31 set
//	tag     u32 at 8, given back in the answer; 0 in events
//	status  u32 at 12, of an answer: 0, or a code with an error text as body
//
// Requests, with the body of the request → that of the answer. Names are the
// rest of a body, POOL/VOLUME, without a zero at the end.
//
//	1 hello       magic u64 "SCORSHMS", lowest u32, highest u32 version spoken →
//	              magic u64, version u32, most rings u32, most entries u32, most segments u32,
//	              largest arena u64, largest request u64 (both bytes)
//	2 open        flags u64 (1: read-only), name → volume
//	3 ring        entries u32, flags u32 (1: memory of an earlier ring is sent along), arena bytes u64 →
//	              ring u32, zero u32, memory bytes u64;
//	              with descriptors: memfd (unless it was sent), kick eventfd, call eventfd
//	4 close ring  ring u64 → nothing
//	5 stat        zero u64, name → volume
//	6 create      size u64, name → nothing
//	7 resize      size u64, name → nothing
//	8 list        zero u64, name → count u32, more u32 (1: ask again from the last one on), count × (length u16, name)
//	              of those whose names come after the one given
//	9 snapshot    length of the volume's name u64, name of the volume, name of the snapshot → nothing
//
// Event 100, changed: volume. It comes when the size of an open volume changed.
//
//	volume: size u64, largest discard u64 (bytes; 0: no limit), logical block u32, physical block u32,
//	        discard alignment u32, flags u32 (1: read-only), serial 24 bytes padded with zeroes, name
//
// hello comes first; a client over a limit gets status 7 (limit) for it, and is
// hung up on. A connection opens one volume, once, and then rings, as
// many as it likes at any time. A volume that is opened to write has no other
// writer until the connection ends, and a connection ends when its socket does.
//
// # When the server dies
//
// A server that ends a connection touches the memory no more once the socket is
// closed. The client connects anew, opens its volume, empties the submission and
// completion ring of each of its rings' memory, sends it along with ring, and
// submits again, in their order, the requests that it has no completion of.
// Addresses in the arena stay as they were.
package wire
