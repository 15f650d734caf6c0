// Package host is the daemon behind cmd/scoriad: it opens registry, store and
// engine, creates, opens, resizes, checks and deletes volumes, runs the front
// ends on their sockets and answers the control API.
//
// # What lies where
//
//	DATA/lock          held while a daemon uses DATA; has its pid
//	DATA/instance.json who this daemon is, and how it ended (instance.go)
//	DATA/registry.db   pools, volumes, nodes (package registry)
//	DATA/volumes/UUID  the engine's
//	DATA/store         the embedded directory store
//	RUN/lock           held while a daemon uses RUN; has its pid
//	RUN/control.sock, RUN/nbd.sock, RUN/vhost/POOL/VOLUME.sock
//
// Volumes of pools with a preset are in the object store (objects.go), on storage
// daemons that the registry lists: directories, which this daemon serves itself, and
// addresses HOST:PORT.
//
// # Durability order
//
// A volume's creation: record in state creating; the engine's directories and
// namespace; record in state ready; socket. Its deletion: record in state deleting;
// socket gone, front ends disconnected; volume closed; the engine's files and the
// namespace gone; record gone. Both are finished at the next start if the daemon
// dies in between. A resize: record; engine; guests are told. A renaming: sockets
// of the old name gone; record under the new key; volume closed, opened anew when it is
// wanted; sockets. An attachment is recorded late and only for speed.
//
// A snapshot: record in state creating; the engine's root, with which it exists;
// record in state ready. Its deletion: record in state deleting; the engine; record
// gone. Whoever opens the volume settles what is between (settle.go): a snapshot that
// the engine has becomes ready, one that was being deleted goes, and one that has no
// record at all is adopted and shown: the registry may have been restored from an
// older copy. So it does, soon, when the registry fails at the last step. A rollback: RollingBack in the volume's record; the
// engine; records of the dropped snapshots gone; size and RollingBack. The opening
// does it again. A clone: record in state creating, which from then on keeps parent
// and snapshot (see package registry); the engine; record in state ready; undone by
// the next start. What a client makes for the time of an operation (an import's volume, an
// export's snapshot) goes with the client (holds.go). Making a volume smaller: engine; record. Incomplete volumes: see
// receive.go.
//
// A start: locks; registry; engine; instance.json says unclean; unfinished volumes; volumes
// that were attached lately begin to open; sockets of all other volumes; control
// socket; sockets of the former, each when it is open (awaited.go says why).
// A stop: front ends drained and closed; engine closed (flush, checkpoint);
// instance.json says clean; the write buffer's file removed; locks.
//
// # Locks
//
// Order: volume.gate (a semaphore held across everything that changes one
// volume's state, by several seconds at times), VolumeSet.limitMu (from reading
// limits until they hold), then VolumeSet.mu, a leaf. Nothing
// calls into the engine, a front end or the registry with VolumeSet.mu held.
//
// # Goroutines
//
// Of Host: one per listener (control, metrics, nbd), one that records
// attachments once a second, one that carries out snapshot schedules
// (scheduler.go), one per volume being opened, one per volume whose snapshots could
// not be recorded (settle.go), one per thing that a dead client left (holds.go), one that starts the maintenance of the
// object store once it has a storage daemon (package repair has its goroutines).
package host
