package driver

import (
	"time"

	"scoria/driver/block"
)

// Stats returns the volume's counters. Safe from any goroutine.
func (v *Volume) Stats() Stats {
	var s Stats
	for i := range s.Ops {
		o := &v.stats.ops[i]
		s.Ops[i] = OpStats{Count: o.count.Load(), Bytes: o.bytes.Load(), Errors: o.errors.Load()}
	}
	for i := range v.stats.stages {
		if l := v.stats.stages[i].snapshot(Stage(i)); l.Count > 0 {
			s.Latencies = append(s.Latencies, l)
		}
	}
	s.SyncCount = v.stats.syncs.Load()
	s.SpilledBytes = v.stats.spilled.Load()
	s.ScrubbedBytes = v.stats.scrubbed.Load()
	s.CompactedBytes = v.stats.compacted.Load()
	s.ReclaimedBytes = v.stats.reclaimed.Load()
	s.UploadedBytes = v.stats.uploaded.Load()
	s.BufferBytes = uint64(v.dirtyChunks.Load()) * chunkBytes
	s.StoreReadBytes = v.stats.storeRead.Load()
	s.ReadCacheHits = v.stats.cacheHits.Load()
	s.ReadCacheMisses = v.stats.cacheMisses.Load()
	s.ChecksumErrors = v.stats.checksumErrors.Load()
	s.ReplayedRecords = v.stats.replayed.Load()
	s.Checkpoints = v.stats.checkpointed.Load()

	mapped := v.m.Mapped()
	s.Space.Live = mapped * block.ClusterSize
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	var clusters, reached uint64
	for _, m := range v.scos {
		live := uint64(max(v.live.at(m.number).Load(), 0))
		pin := max(uint64(v.pins[m.number]), live)
		clusters += uint64(m.clusters)
		reached += pin
		s.Space.Snapshots += (pin - live) * block.ClusterSize
		s.Space.Overhead += uint64(m.size) - uint64(m.clusters)*block.ClusterSize
		if m.local {
			s.Space.Local += uint64(m.size)
		}
		if m.uploaded {
			s.Space.Store += uint64(m.size)
		} else if !m.unwanted {
			s.UploadBacklog += uint64(m.size)
		}
	}
	for _, r := range v.retired {
		clusters += uint64(r.clusters)
		s.Space.Overhead += uint64(r.size) - uint64(r.clusters)*block.ClusterSize
		if r.local {
			s.Space.Local += uint64(r.size)
		}
		if r.uploaded {
			s.Space.Store += uint64(r.size)
		}
	}
	s.Space.Garbage = (clusters - min(clusters, reached)) * block.ClusterSize
	s.Space.Inherited = v.inherited() * block.ClusterSize
	for _, l := range v.unsealed {
		_, c := unpack(l.head.Load())
		s.LogHeadBytes += uint64(c) * block.ClusterSize
	}
	s.Conditions = v.conds.list(time.Now())
	return s
}
