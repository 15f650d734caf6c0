// Package metamorphic holds the test of the whole daemon against a flat model: random
// operations on volumes, snapshots, clones and copies, with restarts, kills and losses
// of power in between, over many configurations, and the answers that a table of
// clusters would give.
//
// # What runs
//
// A daemon as scoriad starts it (host.StartOn), in this process: control API and
// shared-memory rings on their real sockets, the embedded registry, the engine, the
// directory store and the object store with embedded storage daemons, four at first. All that
// it keeps on disk, but for the registry, is on a vfs.Mem, so a kill is its KillClone
// and a loss of power its CrashClone, at any call to the disk; the registry, whose
// commits are durable when they return and whose own crashes are tested in its
// package, is a file in a temporary directory that stops taking commits at the same
// instant. Requests go to the device that front ends get, some through the rings.
//
// # The model
//
// A volume is a list of clusters, a snapshot a copy of that list. A cluster is a
// pointer, a new one for each write, so that two states have a cluster in common if
// and only if their pointers are equal: from that follow contents, changes since a
// snapshot, and the space that volumes and snapshots take. Behind the last flush the
// model keeps the steps in which the log grew, of which a loss of power may take the
// last ones (P1, P2) and a kill none that was answered (P3).
//
// Storage daemons are added, drained, removed and replaced, and master keys too; the model
// knows nothing of either: contents must stay right. At least three storage daemons are
// in use at any time, one of which fails, and what may need that one is looked at before it
// does. In the end every object must be able to lose a disk, those that are drained must be
// empty, and a daemon that has the last master key only must read everything.
//
// Where all volumes are in the object store the registry is lost at times, with the daemon
// stopped, killed or without power, and made anew from the storage daemons (P10). What is
// lost by that are later names of snapshots, and pools without volumes.
//
// An operation during which the daemon dies has alternatives: before, after, and what
// else the packages' docs allow. What is found after the restart must be one of them.
//
// # Traces
//
// A trace is a configuration and a list of operations, in text, with all that is
// random in it, so that it can be read, cut down by hand, and kept in testdata, where
// it goes on working when the generator changes. That, and that a failure which needs
// a moment between two goroutines comes back in one of several attempts only, is why
// generation and shrinking are not left to pgregory.net/rapid, which the smaller
// models of this repository use: its record of a failure is the generator's random
// bits, and it gives up on a failure that does not come back at once. Each operation
// can be done in any state, and the model says what must be answered, so every part
// of a trace is a trace, and the shrinker may leave out whatever it likes.
//
// # Running
//
//	go test -race ./integration/metamorphic                       # 10 000 operations
//	go test ./integration/metamorphic -run Soak -soak 10m         # until then, one new seed after the other
//	go test ./integration/metamorphic -run Metamorphic -seed 17   # that seed only
//	go test ./integration/metamorphic -run Replay -replay FILE    # a trace
//
// A failure prints its seed and the trace, shrunk; the whole trace is in the file that
// the test names, which is written as it goes, for the case that the process dies.
package metamorphic
