package driver

import (
	"context"
	"fmt"

	"scoria/alba/vfs"
	"scoria/driver/block"
	"scoria/driver/lba"
	"scoria/driver/sco"
	"scoria/driver/tlog"
)

// replaySCO is one SCO behind the checkpoint.
type replaySCO struct {
	number  uint64
	records []tlog.Record
	cut     uint32   // records that count
	bound   uint32   // records that are known to have been synced
	log     *logSCO  // in the pool
	meta    *scoMeta // sealed
	hdr     sco.Header
	file    vfs.File // open format, not in the pool
}

// discard lets go of what loadSCO took.
func (s *replaySCO) discard() {
	if s.log != nil {
		s.log.releaseChunks()
	}
	s.closeFiles()
}

func (s *replaySCO) closeFiles() {
	if s.log != nil {
		s.log.closeFiles()
	}
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}

// replay applies a SCO's records to the map, in order.
func (v *Volume) replay(ctx context.Context, s *replaySCO) error {
	v.live.ensure(s.number)
	freed := func(old lba.Location) { v.live.at(old.SCO()).Add(-1) }
	for i := range s.records[:s.cut] {
		r := &s.records[i]
		n := uint64(1)
		if r.Type == tlog.Discard {
			n = r.Arg
		}
		if !r.HasData() && r.Type != tlog.Discard {
			continue
		}
		if r.LBA >= v.m.Clusters() || n > v.m.Clusters()-r.LBA {
			// It was larger then; unless it never can have been.
			if r.LBA > lba.MaxClusters || n > lba.MaxClusters-r.LBA {
				return fmt.Errorf("record %d: cluster %d behind the end of any volume: %w", i, r.LBA, block.ErrCorrupt)
			}
			if err := v.m.Resize(r.LBA + n); err != nil {
				return err
			}
		}
		if !v.m.Resident(r.LBA, n) {
			if err := v.m.Load(ctx, v.ckpt, r.LBA, n); err != nil {
				return err
			}
		}
		loc := lba.MakeLocation(s.number, r.Cluster&lba.MaxCluster)
		switch r.Type {
		case tlog.Write:
			old, ok := v.m.Set(r.LBA, loc)
			if !ok {
				return lba.ErrMemory
			}
			v.live.at(s.number).Add(1)
			if old != 0 {
				freed(old)
			}
		case tlog.Relocate:
			done, ok := v.m.Replace(r.LBA, lba.Location(r.Arg), loc)
			if !ok {
				return lba.ErrMemory
			}
			if done {
				v.live.at(s.number).Add(1)
				freed(lba.Location(r.Arg))
			}
		case tlog.Discard:
			if !v.m.Clear(r.LBA, n, freed) {
				return lba.ErrMemory
			}
		}
	}
	v.stats.replayed.Add(uint64(s.cut))
	v.logSince.Add(int64(s.cut))
	return nil
}

// settleReplayed puts a replayed SCO where the running volume expects it.
func (v *Volume) settleReplayed(s *replaySCO) error {
	v.live.ensure(s.number)
	switch {
	case s.meta != nil:
		v.addSealed(s.meta)
	case s.log != nil:
		l := s.log
		l.cutAt(s.records[:s.cut])
		if !v.install(l) {
			return fmt.Errorf("SCO %d: too many SCOs are not sealed", s.number)
		}
	default:
		return v.sealReplayed(s)
	}
	return nil
}

// sealReplayed seals a SCO that was found as an open file, cut where the log
// ends.
func (v *Volume) sealReplayed(s *replaySCO) error {
	clusters := uint32(0)
	for i := range s.records[:s.cut] {
		if r := &s.records[i]; r.Cluster != tlog.NoCluster {
			clusters = max(clusters, r.Cluster+1)
		}
	}
	crcs := make([]uint32, clusters)
	encoded := make([]byte, sco.RecordBytes(s.cut))
	key := tlog.Key(v.cfg.ID, s.number)
	for i := range s.records[:s.cut] {
		r := &s.records[i]
		if r.HasData() {
			crcs[r.Cluster] = r.DataCRC
		}
		tlog.Put(encoded[i*tlog.Size:], key, uint32(i), r)
	}
	t, footer := s.hdr.Footer(clusters, s.cut, encoded, crcs)
	m, err := sealFile(s.file, &t, footer, s.file.Sync)
	if err != nil {
		return fmt.Errorf("SCO %d: %w", s.number, err)
	}
	v.addSealed(m)
	v.eng.files.put(v.fileKey(m), s.file)
	s.file = nil
	return nil
}
