// Package client reads and writes volumes through Scoria's shared-memory rings:
// see packages wire and ring for the protocol.
//
// A Disk is an open volume. Its ReadAt, WriteAt, Flush and so on are plain calls
// from any goroutine; Start runs an Op and calls back. Data in memory from Alloc
// is not copied; other data is, once.
//
// # When the daemon dies
//
// A Disk connects again, sends its memory along, and submits anew, in their
// order, the requests that had no completion; callers see a pause. What a write
// that was not answered did to the volume is then done again, which changes
// nothing, as long as its data stays as it is until the write ends.
//
// # Contexts
//
// A request that was submitted can't be taken back. A call whose context ends
// returns its error, and the request goes on: whether a write happened is then
// not known. Data of its caller is not touched any more, unless it is memory from
// Alloc, which must be left alone until Close.
//
// # Goroutines
//
// Per Disk one that reads the socket and connects again; per ring one that waits
// for the server's calls. A caller that waits polls the ring itself for a while.
// Lock order: Disk.mu, then one ring's mu. Callbacks run without locks.
package client
