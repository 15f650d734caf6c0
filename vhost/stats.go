package vhost

import (
	"time"

	"scoria/shm/worker"
)

// Stats is a snapshot of an endpoint's counters. They grow while the endpoint
// listens; Sessions, Rings and InFlight are current. OtherRequests are GET_ID
// and requests refused as malformed or unsupported.
type Stats struct {
	Name string // POOL/VOLUME
	Path string // of the socket

	Sessions int // open connections

	worker.Stats

	Connections uint64 // accepted
	Disconnects uint64 // sessions ended for a fault of the front end or the device

	// Resubmitted are the requests that an earlier connection, or daemon, had taken
	// and not answered, and that were carried out when their ring started again.
	Resubmitted uint64

	// DirtyPages are the pages of guest memory that were marked for live migrations to
	// copy again, counted each time.
	DirtyPages uint64

	// LastDisconnect is the reason of the last such end, with its time; empty if
	// there was none.
	LastDisconnect     string
	LastDisconnectTime time.Time

	// Silent are the processes that have been connected for silentTime without a
	// word, and Resumed those that use the volume without having negotiated: QEMU
	// before 9.1 that lost its connection at a bad moment. See the package doc.
	Silent, Resumed []int32
}
