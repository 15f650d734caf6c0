// Package limit bounds what a volume may do: requests and bytes per second, for
// reads, for writes and for both together, with bursts. Device wraps a
// block.Device, so that every front end is held to the same limits, and they can
// be changed while requests run.
//
// # Arithmetic
//
// Each limit is a token bucket that fills at its rate up to its depth. A request
// passes when every bucket that concerns it holds what it costs, or is full; then
// it takes its cost from all of them, below zero if it costs more than a bucket
// can hold. So in any t seconds at most
//
//	rate × t + max(depth, cost of the largest request)
//
// passes, and a request larger than any burst still does. Flushes, discards and
// zeroing cost a write request, and no bytes, as they move none. A write that is to be
// durable (FUA) is one request, and costs what the write alone does: so who syncs each
// write pays once for it with FUA, and twice without.
//
// # Order and fairness
//
// Reads and writes wait in a line each, oldest first. Where a limit on both
// together holds up the older head of the two, the younger waits behind it, so
// that small requests can't keep a large one waiting for ever. A flush waits in the
// line of writes if a limit counts those; else it is not held up. It covers the writes
// that had completed before it was submitted, and a write that waits has not; that it
// begins later only adds to them.
//
// # Shares
//
// Other devices with the same data, such as a volume's snapshots, can be put under the
// same limits (Share): their requests wait in the same lines and take from the same
// buckets. Their flushes cost nothing, as there is nothing to write.
//
// # Goroutines and locks
//
// A Device has one goroutine while requests wait, none otherwise. Device.mu is
// held for the arithmetic alone, never while the device below is called. Without
// a limit Submit costs one atomic load.
package limit
