// Package control is the operator's way into a daemon: the types of the control
// API, the client that the CLI and the libvirt hook use, and the server that the
// daemon runs on RUN/control.sock.
//
// # Protocol
//
// HTTP/1.1 with JSON over a unix socket. Who may connect is decided by the
// socket's mode and group.
//
//	GET    /v1/status                         Status
//	GET    /v1/pools                          []Pool
//	POST   /v1/pools                          CreatePool → Pool (201)
//	GET    /v1/pools/POOL                     Pool
//	DELETE /v1/pools/POOL                     (204)
//	GET    /v1/volumes[?pool=POOL]            []Volume
//	POST   /v1/volumes                        CreateVolume → Volume (201)
//	GET    /v1/volumes/POOL/VOLUME            Volume
//	GET    /v1/volumes/POOL/VOLUME/stats      VolumeStats
//	POST   /v1/volumes/POOL/VOLUME/resize     ResizeVolume → Volume
//	POST   /v1/volumes/POOL/VOLUME/check      Job (202)
//	POST   /v1/volumes/POOL/VOLUME/set        SetVolume → Volume
//	POST   /v1/volumes/POOL/VOLUME/rename     RenameVolume → Volume
//	GET    /v1/volumes/POOL/VOLUME/limits     Limits
//	POST   /v1/volumes/POOL/VOLUME/limits     ChangeLimits → Limits
//	GET    /v1/pools/POOL/limits              Limits
//	POST   /v1/pools/POOL/limits              ChangeLimits → Limits
//	DELETE /v1/volumes/POOL/VOLUME[?force=true] Job (202); with its snapshots
//	POST   /v1/volumes/POOL/VOLUME/template   SetTemplate → Volume
//	POST   /v1/volumes/POOL/VOLUME/flatten    Job (202)
//	POST   /v1/volumes/POOL/VOLUME/complete   Volume; an import has ended
//	DELETE /v1/volumes/POOL/VOLUME/incomplete (204); a receive is not to be resumed
//	POST   /v1/volumes/POOL/VOLUME/receive[?resumable=true]  stream → Received
//	POST   /v1/clones                         CloneVolume → Volume (201)
//	GET    /v1/schedules                      []Schedule
//	GET    /v1/schedules/POOL[/VOLUME]        Schedule, of a pool or a volume's own
//	POST   /v1/schedules/POOL[/VOLUME]        SetSchedule → Schedule
//	DELETE /v1/schedules/POOL[/VOLUME]        (204)
//	GET    /v1/presets                        []Preset
//	POST   /v1/presets                        Preset → Preset (201)
//	GET    /v1/presets/NAME                   Preset
//	POST   /v1/presets/NAME                   Preset → Preset
//	GET    /v1/asds                           []ASD
//	POST   /v1/asds                           AddASD → ASD (201)
//	GET    /v1/asds/ID                        ASD
//	POST   /v1/asds/ID/drain                  ASD
//	DELETE /v1/asds/ID[?force=true]           ASD; what it had is rebuilt elsewhere
//	GET    /v1/backend                        BackendStatus
//	GET    /v1/backend/jobs/NAME              BackendJob; repair, verify, rebalance, orphans
//	POST   /v1/backend/jobs/NAME/start|stop   BackendJob
//	POST   /v1/backend/keys/rotate            RotatedKeys
//	GET    /v1/jobs                           []Job
//	GET    /v1/jobs/ID[?wait=SECONDS]         Job; waits for a change or the end
//	DELETE /v1/jobs/ID                        Job; asks it to stop
//	GET    /metrics                           Prometheus text
//
// With S for /v1/volumes/POOL/VOLUME/snapshots:
//
//	GET    S                                  []Snapshot, oldest first
//	POST   S                                  CreateSnapshot → Snapshot (201)
//	GET    S/NAME                             Snapshot
//	DELETE S/NAME                             (204)
//	POST   S/NAME/rename                      RenameSnapshot → Snapshot
//	POST   S/NAME/rollback                    Rollback → Volume
//	GET    S/NAME/export[?since=NAME&start=BYTE]  stream
//
// Every error is {"error": {"code": …, "message": …}} with the HTTP status that
// codeStatus gives. A request body holds one JSON object of at most MaxBodyBytes,
// with no field that its type doesn't have.
//
// This package knows nothing of the engine, so that its clients need not link it.
//
// Within v1 fields may be added to answers; clients ignore what they don't know.
package control

import (
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/google/uuid"
)

// MaxBodyBytes bounds the body of a request.
const MaxBodyBytes = 64 << 10

// Volume describes a volume.
type Volume struct {
	Name      string    `json:"name"` // POOL/VOLUME
	ID        uuid.UUID `json:"id"`
	Size      uint64    `json:"size"`       // bytes
	BlockSize uint32    `json:"block_size"` // logical block in bytes
	SCOSize   int64     `json:"sco_size"`   // data bytes of a SCO
	Serial    string    `json:"serial"`
	ReadOnly  bool      `json:"read_only"`
	Created   time.Time `json:"created"`
	State     string    `json:"state"` // creating, ready, deleting, failed
	Owner     string    `json:"owner"` // node
	Epoch     uint64    `json:"epoch"`
	Open      bool      `json:"open"`              // the daemon has it in memory
	UsedBy    string    `json:"used_by,omitempty"` // the front end that writes to it
	Socket    string    `json:"socket"`            // of vhost-user-blk
	NBD       string    `json:"nbd,omitempty"`     // URI for qemu-img and others

	// LastDisconnect is why a guest's connection was last ended for a fault of its
	// own or of the volume; empty if that never happened since the start.
	LastDisconnect     string    `json:"last_disconnect,omitempty"`
	LastDisconnectTime time.Time `json:"last_disconnect_time,omitzero"`

	Preset     string      `json:"preset,omitempty"`     // of the object store; empty: the directory store
	Template   bool        `json:"template,omitempty"`   // refuses writes, is there to be cloned
	Snapshots  int         `json:"snapshots"`            // how many
	Parent     string      `json:"parent,omitempty"`     // POOL/VOLUME@SNAPSHOT it was cloned from
	Clones     []string    `json:"clones,omitempty"`     // volumes that read from it
	Incomplete *Incomplete `json:"incomplete,omitempty"` // its contents are being brought in
	Space      *Space      `json:"space,omitempty"`      // of an open volume

	// Conditions is whatever slows, pauses or degrades the volume now.
	Conditions []Condition `json:"conditions"`
}

// CreateVolume asks for a new volume. Zero values take the pool's defaults.
type CreateVolume struct {
	Name      string `json:"name"`                 // [POOL/]VOLUME
	Size      uint64 `json:"size"`                 // bytes, a multiple of 4096
	BlockSize uint32 `json:"block_size,omitempty"` // 512 or 4096
	SCOSize   int64  `json:"sco_size,omitempty"`   // bytes, a multiple of 1 MiB
	Serial    string `json:"serial,omitempty"`     // at most 20 bytes; default: from the ID
	ReadOnly  bool   `json:"read_only,omitempty"`
	// Import: no guest gets the volume before Complete, and it goes if that is not
	// called: with the client that keeps the hold Owner, or at the daemon's next start.
	Import bool   `json:"import,omitempty"`
	Owner  string `json:"owner,omitempty"`
}

// ResizeVolume asks for a new size.
type ResizeVolume struct {
	Size  uint64 `json:"size"`            // bytes, a multiple of 4096
	Force bool   `json:"force,omitempty"` // allow less than now; what lies behind is lost
}

// Condition is something that slows, pauses or degrades a volume or the daemon.
type Condition struct {
	Code    string `json:"code"`    // stable, for programs
	Message string `json:"message"` // what happens, why, and what to do
}

// VolumeStats are a volume's counters since the daemon started, and its space.
type VolumeStats struct {
	Name  string             `json:"name"`
	Ops   map[string]OpStats `json:"ops"` // by operation: read, write, flush, …
	Space Space              `json:"space"`

	// Counters has everything else that the engine counts, by name: bytes and
	// numbers of things. The names are those of driver.Stats and of the metrics.
	Counters   map[string]uint64 `json:"counters"`
	Conditions []Condition       `json:"conditions"`
}

// OpStats counts one kind of request.
type OpStats struct {
	Count  uint64 `json:"count"`
	Bytes  uint64 `json:"bytes"`
	Errors uint64 `json:"errors"`
}

// Space splits what a volume occupies, in bytes.
type Space struct {
	Live      uint64 `json:"live"`      // mapped clusters
	Snapshots uint64 `json:"snapshots"` // what only snapshots hold
	Garbage   uint64 `json:"garbage"`   // what nothing needs any more and is still in SCOs
	Overhead  uint64 `json:"overhead"`  // headers, footers, checkpoints
	Inherited uint64 `json:"inherited"` // of Live, what a clone has in its ancestors
	Local     uint64 `json:"local"`     // on the local disk, caches included
	Store     uint64 `json:"store"`     // in the store
}

// CheckReport is what a check found.
type CheckReport struct {
	SCOs     int      `json:"scos"`
	Clusters uint64   `json:"clusters"` // verified
	Bytes    uint64   `json:"bytes"`
	Problems []string `json:"problems"`
}

// Pool is a named set of defaults for volumes.
type Pool struct {
	Name      string    `json:"name"`
	BlockSize uint32    `json:"block_size"`
	SCOSize   int64     `json:"sco_size"`
	Created   time.Time `json:"created"`
	Volumes   int       `json:"volumes"`
	Store     string    `json:"store"`            // StoreObjects or StoreDirectory
	Preset    string    `json:"preset,omitempty"` // of the object store
}

// Kinds of stores in which volumes are kept.
const (
	StoreObjects   = "objects"   // storage daemons
	StoreDirectory = "directory" // files below the data directory
)

// CreatePool asks for a new pool. Zero values take the daemon's defaults.
type CreatePool struct {
	Name      string `json:"name"`
	BlockSize uint32 `json:"block_size,omitempty"`
	SCOSize   int64  `json:"sco_size,omitempty"`
	Store     string `json:"store,omitempty"`  // StoreObjects or StoreDirectory; empty: StoreObjects with a preset, else the daemon's default
	Preset    string `json:"preset,omitempty"` // of the object store; empty: the one that is built in
}

// Status describes the daemon.
type Status struct {
	Version     string    `json:"version"`
	Instance    string    `json:"instance"` // node ID
	Host        string    `json:"host"`
	PID         int       `json:"pid"`
	Started     time.Time `json:"started"`
	DataDir     string    `json:"data_dir"`
	DataFree    uint64    `json:"data_free"` // bytes free under DataDir
	RunDir      string    `json:"run_dir"`
	PoolFile    string    `json:"pool_file"`    // of the write buffer
	WriteBuffer int64     `json:"write_buffer"` // bytes
	Volumes     int       `json:"volumes"`
	Open        int       `json:"open"`   // volumes in memory
	InUse       int       `json:"in_use"` // volumes that a front end writes to
	Stopping    bool      `json:"stopping"`

	// Conditions is whatever is wrong with the daemon as a whole.
	Conditions []Condition `json:"conditions"`
}

// JobState is how a job stands.
type JobState string

// A job is running until it is one of the others, for good.
const (
	JobRunning  JobState = "running"
	JobDone     JobState = "done"
	JobFailed   JobState = "failed"
	JobCanceled JobState = "canceled"
)

// Job is a long operation.
type Job struct {
	ID      string    `json:"id"`
	Kind    string    `json:"kind"`   // check, delete, flatten
	Volume  string    `json:"volume"` // POOL/VOLUME
	State   JobState  `json:"state"`
	Done    int64     `json:"done"`  // of Total, in whatever the job counts
	Total   int64     `json:"total"` // 0: not known
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended,omitzero"`
	Error   *Error    `json:"error,omitempty"` // when failed or canceled

	Report *CheckReport `json:"report,omitempty"` // of a check
}

// Code says what kind of error it is, for programs.
type Code string

// The codes, with the CLI's exit status where it is not 1.
const (
	CodeInvalid     Code = "invalid"     // the request is wrong; 2
	CodeNotFound    Code = "not_found"   // 3
	CodeInUse       Code = "in_use"      // 4
	CodeExists      Code = "exists"      //
	CodeNeedsForce  Code = "needs_force" // something would be lost that the message names; 6
	CodeCanceled    Code = "canceled"    //
	CodeUnavailable Code = "unavailable" // the daemon is stopping, or too much is asked of it; try again
	CodeFailed      Code = "failed"      // anything else
)

// codeStatus gives each code its HTTP status.
var codeStatus = map[Code]int{
	CodeInvalid:     http.StatusBadRequest,
	CodeNotFound:    http.StatusNotFound,
	CodeInUse:       http.StatusConflict,
	CodeExists:      http.StatusConflict,
	CodeNeedsForce:  http.StatusConflict,
	CodeCanceled:    http.StatusConflict,
	CodeUnavailable: http.StatusServiceUnavailable,
	CodeFailed:      http.StatusInternalServerError,
}

// Error is what the API answers instead of a result. Backends return it, wrapped
// or not, where they know the code; any other error is CodeFailed.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// Errorf makes an Error whose message says what is wrong and what would be right.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// CodeOf returns the code of an error, CodeFailed if it has none.
func CodeOf(err error) Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return CodeFailed
}
