// Package ring is the layout of Scoria's shared-memory rings, and what server
// and client do in it: pure code over bytes, without a system call. Package wire
// has the messages by which a client gets a ring.
//
// All numbers are little-endian. The memory is one memfd that the server makes
// and seals against shrinking and growing:
//
//	0            header, written once by the server
//	4096         submission ring: entries × 64 bytes
//	SubmitEnd    completion ring: entries × 16 bytes, up to the next page
//	ArenaOffset  data arena: ArenaBytes, for the client to use as it likes
//
// # Header
//
//	       0        4        8       12       16       20       24      28
//	  0  | magic "SCORSHMR"  | version | entries| submission offset | …
//	 24  | completion offset | arena offset     | arena bytes       |
//	 48  | zeroes                                                   |
//	128  | server wants a kick u32 | zeroes to 192: a cache line of its own
//	192  | client wants a call u32 | zeroes to 256: a cache line of its own
//	256  | zeroes to 4096
//
// # Submission entry, one cache line
//
//	      0      1      2      3      4      5      6      7
//	 0  | cookie: the client's, given back in the completion    |
//	 8  | offset in the volume, bytes                           |
//	16  | length, bytes                                         |
//	24  | address: where in the arena the data is, or the list  |
//	32  | op   | flags| segments    | zero                      |
//	40  | zero                                                  |
//	48  | zero                                                  |
//	56  | zero                      | sequence                  |
//
// Operations: 0 read, 1 write, 2 flush, 3 discard, 4 write zeroes. Flags: 1 FUA
// (done only when it would survive a loss of power), 2 keep the space of zeroes
// provisioned. segments is 0 if the data lies in one piece at address; else
// address is that of a gather list of so many elements, which lies in the arena
// at a multiple of 8 and whose lengths add up to length:
//
//	     0                         8             12
//	0  | address in the arena     | length u32  | zero u32     |
//
// Pieces may overlap; what a read leaves in overlapping ones is undefined.
//
// # Completion entry
//
//	     0                         8             12
//	0  | cookie                   | status u32  | sequence u32 |
//
// # How entries are handed over
//
// There are no indices. The n-th entry of a ring, counted from 0 since the ring
// was opened, lies at n modulo the number of entries, and is valid once its
// sequence is n+1, modulo 2^32. Whoever writes it stores the sequence last, with
// release order; whoever waits for it loads the sequence with acquire order. So
// a request travels in one cache line, and one that is half written when its
// writer dies is never taken. Of several entries written at once the sequence of
// the first may be stored last: the others become visible with it.
//
// A client has at most as many requests under way, counted from its entry until
// it has read the completion, as a ring has entries. Then neither ring can
// overflow. A server that sees more ends the connection. Completions come in any
// order.
//
// # How either side sleeps
//
// A client that is about to sleep stores 1 in "client wants a call", looks at
// the next completion once more, and then waits for the call eventfd. A server
// that has published completions exchanges that word with 0, after a full
// barrier, and signals the eventfd if it was 1. Kicks are the same with the
// roles exchanged. While either side polls, nobody makes a system call.
//
// # Trust
//
// The server copies an entry, and then a gather list, before it checks it, and
// reads neither again. Nothing in the memory tells the server where anything is:
// it goes by what it told the client.
package ring
