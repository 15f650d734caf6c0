package driver

import (
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"scoria/alba/vfs"
	"scoria/driver/block"
)

// Config is what one Engine (one per daemon) is made from.
type Config struct {
	FS      vfs.FS
	DataDir string // volumes live in DataDir/volumes/UUID
	// PoolFile is the tmpfs file that holds the log's head and outlives the
	// daemon; PoolBytes its size. All volumes share it.
	PoolFile  string
	PoolBytes int64
	// CacheBytes is the budget for local copies of uploaded SCOs, all volumes together.
	CacheBytes int64
	// ReadCacheBytes is the RAM for clusters read back from disk or store.
	ReadCacheBytes int64
	// SSDCacheBytes, if positive, adds a second tier on the local disk behind it.
	SSDCacheBytes int64
	// ReserveBytes of the local disk are left for what gives room back: a full
	// disk pauses writers that many bytes early.
	ReserveBytes int64
	// BootID changes when the host restarts: a pool file from before is worthless.
	// Empty means the kernel's.
	BootID string
	// Ticks, if not nil, makes the housekeeper work at other times than once a second,
	// too, as if it were then.
	Ticks <-chan time.Time
	Log   zerolog.Logger
}

// VolumeConfig describes a volume to the engine. The registry is where it is kept.
type VolumeConfig struct {
	ID           uuid.UUID
	Name         string // POOL/VOLUME
	Serial       string
	Size         uint64 // bytes
	LogicalBlock uint32 // 512 or 4096
	SCOBytes     int64  // data bytes of a SCO: a multiple of 1 MiB, 1 MiB to 1 GiB
	ReadOnly     bool
	Epoch        uint64 // the owner's fencing number, at least 1
	Store        Store
	// Snapshots are those that the registry has, in any order, Deleting those of them
	// whose deletion has begun: whoever opens the volume calls DeleteSnapshot for
	// them. One that is in neither but whose root is there is adopted: Volume.Snapshots
	// lists it, with the name that it was made with. One whose root says that it was
	// deleted does not come back by being named.
	Snapshots []Snapshot
	Deleting  []Snapshot
}

// Limits of VolumeConfig.
const (
	MinSCOBytes     = 1 << 20
	MaxSCOBytes     = 1 << 30
	DefaultSCOBytes = 64 << 20
	MaxVolumeBytes  = 64 << 40
)

// Validate names the first field that is wrong and what would be right.
func (c *VolumeConfig) Validate() error {
	switch {
	case c.ID == uuid.Nil:
		return fmt.Errorf("volume %s: id is empty", c.Name)
	case c.LogicalBlock != 512 && c.LogicalBlock != 4096:
		return fmt.Errorf("volume %s: logical block size %d: must be 512 or 4096", c.Name, c.LogicalBlock)
	case c.Size == 0 || c.Size%block.ClusterSize != 0:
		return fmt.Errorf("volume %s: size %d: must be a positive multiple of %d bytes", c.Name, c.Size, block.ClusterSize)
	case c.Size > MaxVolumeBytes:
		return fmt.Errorf("volume %s: size %d: must be at most %d bytes (64T)", c.Name, c.Size, uint64(MaxVolumeBytes))
	case c.SCOBytes < MinSCOBytes || c.SCOBytes > MaxSCOBytes || c.SCOBytes%MinSCOBytes != 0:
		return fmt.Errorf("volume %s: SCO size %d: must be a multiple of 1 MiB from 1 MiB to 1 GiB", c.Name, c.SCOBytes)
	case len(c.Serial) > 20:
		return fmt.Errorf("volume %s: serial %q: must be at most 20 bytes", c.Name, c.Serial)
	case c.Epoch == 0:
		return fmt.Errorf("volume %s: epoch 0: must be at least 1", c.Name)
	case c.Store == nil:
		return fmt.Errorf("volume %s: no store", c.Name)
	}
	return nil
}

// Condition is something that slows, pauses or degrades a volume now, for
// `scoria volume show`, the log and the metrics.
type Condition struct {
	Code    string `json:"code"`    // stable, e.g. "write-buffer-full", "disk-full", "sync-failed", "store-unreachable"
	Message string `json:"message"` // what happens, why, and what to do
}

// Stats is a snapshot of a volume's counters. Bytes and counts grow until the
// daemon ends; the space figures are current.
type Stats struct {
	Ops [5]OpStats `json:"-"` // by block.Op
	// Latencies are the stages that were passed at all.
	Latencies []Latency `json:"-"`
	Space     Space     `json:"space"`

	LogHeadBytes    uint64 `json:"log_head_bytes"`    // in SCOs that are not sealed yet
	UploadBacklog   uint64 `json:"upload_backlog"`    // bytes of closed SCOs not yet in the store
	SyncCount       uint64 `json:"sync_count"`        // fdatasync calls
	SpilledBytes    uint64 `json:"spilled_bytes"`     // written to the local disk by the log
	ScrubbedBytes   uint64 `json:"scrubbed_bytes"`    // rewritten by the scrubber
	CompactedBytes  uint64 `json:"compacted_bytes"`   // of SCOs that were written anew without their garbage, as snapshots reach them
	ReclaimedBytes  uint64 `json:"reclaimed_bytes"`   // given back by deleting SCOs
	UploadedBytes   uint64 `json:"uploaded_bytes"`    // put into the store, linked files included
	BufferBytes     uint64 `json:"buffer_bytes"`      // of the write buffer, in chunks that the local disk does not have
	StoreReadBytes  uint64 `json:"store_read_bytes"`  // partial reads through the store
	ReadCacheHits   uint64 `json:"read_cache_hits"`   // clusters
	ReadCacheMisses uint64 `json:"read_cache_misses"` // clusters
	ChecksumErrors  uint64 `json:"checksum_errors"`   // clusters that failed their CRC32C
	ReplayedRecords uint64 `json:"replayed_records"`  // at the last opening
	Checkpoints     uint64 `json:"checkpoints"`       // written since the opening

	Conditions []Condition `json:"conditions"`
}

// OpStats counts one kind of request.
type OpStats struct {
	Count, Bytes, Errors uint64
}

// Space splits what a volume occupies, in bytes.
type Space struct {
	Live      uint64 `json:"live"`      // mapped clusters, those in ancestors included
	Inherited uint64 `json:"inherited"` // of these, what lies in ancestors of a clone
	Snapshots uint64 `json:"snapshots"` // clusters that only snapshots need
	Garbage   uint64 `json:"garbage"`   // clusters that nothing needs, still in SCOs
	Overhead  uint64 `json:"overhead"`  // headers, footers, checkpoints
	Local     uint64 `json:"local"`     // on the local disk, caches included
	Store     uint64 `json:"store"`     // in the store
}

// CheckReport is what Volume.Check found.
type CheckReport struct {
	SCOs     int      `json:"scos"`
	Clusters uint64   `json:"clusters"` // verified
	Bytes    uint64   `json:"bytes"`
	Problems []string `json:"problems"`
}
