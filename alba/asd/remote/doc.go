// Package remote carries asd.Client over TCP: New makes a client of an ASD on
// another host, Server serves an ASD. The bytes are those of scoria/alba/wire.
//
// # Client
//
// A client has two connections, lanes: one for what is small, one for requests
// and answers of 64 KiB and more and for repair, so that a 4 KiB read does not
// wait behind a fragment. A lane connects when a request needs it. If that fails
// it is not tried again for a while (Options.MinBackoff, doubled up to
// MaxBackoff), and requests fail at once with asd.ErrUnavailable. A request that
// met a dying connection before it was sent, or that only reads, is tried once
// more on a new one.
//
// A server that owes an answer and sends nothing for Options.PingAfter gets a
// ping, which it answers whatever its disk does; if nothing comes for
// DeadAfter more, the connection is given up.
//
// Goroutines per connection: reader, sender, pinger. They end with it. A small request
// is written by its caller, as far as the socket takes it at once, the rest by the
// sender.
//
// # Server
//
// Memory is bounded in requests under way per connection, and in bytes of
// requests and of answers, per connection and in all. A connection that is at a
// limit isn't read from (back-pressure), one that doesn't take its answers for
// WriteTimeout is closed. Bytes of requests are taken before those of answers,
// from pools of their own, so that they can't wait for each other in a circle.
//
// Goroutines per connection: reader, sender, and one per request under way. Small
// answers are written by those, too. A small read that is alone is done by the reader
// itself: if that takes longer than a millisecond it stops being the reader, and another
// goroutine reads on, so that nobody waits behind a slow disk.
//
// # Locks
//
// Client: lane.mu, then conn.mu. Server: Server.mu, serverConn.mu and inline.mu, none
// with another held. sender.mu is a leaf at both ends.
package remote
