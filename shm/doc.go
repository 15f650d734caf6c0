// Package shm is the shared-memory front end: programs on the host read and
// write volumes through rings in memory that they share with the daemon, without
// the kernel in between. Package wire has the messages on the socket, package
// ring the layout of the memory; both are a protocol that any language can speak.
// Packages client and client/c speak it.
//
// # Goroutines
//
//   - Server: one that accepts connections; one for each client that is being
//     refused, of which there are at most maxRefusals; the workers of package
//     worker, which it shares with the other front ends.
//   - session: one that reads messages and answers them; while it has a volume
//     open, a second one that sends notices of a resize.
//
// A ring belongs to one worker while it is served; see package worker. Lock
// order: Server.mu, session.mu. No lock is held while a worker is waited for.
//
// # When a client dies
//
// Its socket closes, and that ends its session: its rings are taken nothing more
// from, requests that wait for room are canceled, and when the last one that a
// device carries out has ended, memory, descriptors and the claim on the volume
// are given back. An entry that the client had not finished is never taken.
// Nothing waits for a client: answers that it does not read end its session.
//
// # When the daemon dies
//
// The memory lives on in the client, which sends it along when it connects to
// the next daemon and submits again what had no completion. A daemon that stops
// in order lets requests under way end, and leaves those that wait for room
// without a completion, which comes to the same.
//
// # A hostile client
//
// What it writes into its memory is copied before it is checked. Sizes are
// checked against what was agreed on over the socket. Memory that it sends must
// be sealed against shrinking. Connections, the descriptors of connections and
// rings, and the memory of rings are limited, in all and, but for root, to half of
// that per user; the answer to hello or to the request for a ring says which limit
// there was. An idle connection costs a goroutine and some 16 KiB. Whoever breaks
// the rules is disconnected, with a logged reason; nobody else notices.
package shm
