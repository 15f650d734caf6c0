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
// passes, and a request larger than any burst still does. Flushes cost nothing;
// discards and zeroing cost a write request, and no bytes, as they move none.
//
// # Order and fairness
//
// Reads and writes wait in a line each, oldest first. Where a limit on both
// together holds up the older head of the two, the younger waits behind it, so
// that small requests can't keep a large one waiting for ever. A flush is never
// held up: it covers the writes that had completed before it, and a write that
// waits has not.
//
// # Goroutines and locks
//
// A Device has one goroutine while requests wait, none otherwise. Device.mu is
// held for the arithmetic alone, never while the device below is called. Without
// a limit Submit costs one atomic load.
package limit
