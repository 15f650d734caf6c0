package blocktest

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"scoria/driver/block"
)

func (d *RAM) shard(cluster uint64) *shard { return &d.shards[cluster%uint64(len(d.shards))] }

func (d *RAM) mapped(cluster uint64) bool {
	s := d.shard(cluster)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.clusters[cluster] != nil
}

// carryOut does what a request asks for and returns its outcome.
func (d *RAM) carryOut(r *block.Request) (err error) {
	d.qmu.Lock()
	closed := d.closed
	d.qmu.Unlock()
	if closed {
		return block.ErrClosed
	}
	d.sizeMu.RLock()
	defer d.sizeMu.RUnlock()
	info := d.info()
	if err := block.CheckRange(&info, r); err != nil {
		return fmt.Errorf("%s of %d bytes at %d: %w", r.Op, r.Length, r.Offset, err)
	}
	if d.opts.Fail != nil {
		if err := d.opts.Fail(r); err != nil {
			return err
		}
	}
	switch r.Op {
	case block.OpFlush:
		return nil
	case block.OpDiscard, block.OpWriteZeroes:
		d.zero(r.Offset, r.Length)
		return nil
	case block.OpRead, block.OpWrite:
		return d.transfer(r)
	}
	return fmt.Errorf("blocktest: unknown operation %s", r.Op)
}

// transfer walks clusters and segments side by side. Each cluster is copied by
// way of a buffer, so that memory which vanishes half-way tears no cluster.
func (d *RAM) transfer(r *block.Request) error {
	segs, skip := r.Segments, 0
	var buf [block.ClusterSize]byte
	for at, end := r.Offset, r.Offset+r.Length; at < end; {
		cluster, from := at/block.ClusterSize, at%block.ClusterSize
		part := buf[:min(block.ClusterSize-from, end-at)]
		if r.Op == block.OpRead {
			d.loadCluster(cluster, from, part)
		}
		for len(part) > 0 {
			if len(segs) == 0 {
				return fmt.Errorf("blocktest: segments end before the length %d", r.Length)
			}
			seg := segs[0][skip:]
			n := min(len(part), len(seg))
			if r.Op == block.OpRead {
				if err := copyShared(seg[:n], part[:n]); err != nil {
					return err
				}
			} else if err := copyShared(part[:n], seg[:n]); err != nil {
				return err
			}
			part = part[n:]
			if skip += n; skip == len(segs[0]) {
				segs, skip = segs[1:], 0
			}
		}
		n := min(block.ClusterSize-from, end-at)
		if r.Op == block.OpWrite {
			d.storeCluster(cluster, from, buf[:n])
		}
		at += n
	}
	return nil
}

func (d *RAM) loadCluster(cluster, from uint64, p []byte) {
	s := d.shard(cluster)
	s.mu.RLock()
	defer s.mu.RUnlock()
	if c := s.clusters[cluster]; c != nil {
		copy(p, c[from:])
		return
	}
	clear(p)
}

func (d *RAM) storeCluster(cluster, from uint64, p []byte) {
	s := d.shard(cluster)
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.clusters[cluster]
	if c == nil {
		c = new([block.ClusterSize]byte)
		s.clusters[cluster] = c
	}
	copy(c[from:], p)
}

// zero forgets whole clusters and clears parts of others.
func (d *RAM) zero(off, length uint64) {
	if length == 0 {
		return
	}
	first, last := off/block.ClusterSize, (off+length-1)/block.ClusterSize
	for i := range d.shards {
		s := &d.shards[i]
		s.mu.Lock()
		if last-first < 4096 {
			// Few clusters: look at the shard's share of them.
			n := uint64(len(d.shards))
			for c := first + (uint64(i)+n-first%n)%n; c <= last; c += n {
				s.zeroPart(c, off, length)
			}
		} else {
			for c := range s.clusters {
				if c >= first && c <= last {
					s.zeroPart(c, off, length)
				}
			}
		}
		s.mu.Unlock()
	}
}

func (s *shard) zeroPart(cluster, off, length uint64) {
	data := s.clusters[cluster]
	if data == nil {
		return
	}
	start := cluster * block.ClusterSize
	from, to := max(off, start)-start, min(off+length, start+block.ClusterSize)-start
	if from == 0 && to == block.ClusterSize {
		delete(s.clusters, cluster)
		return
	}
	clear(data[from:to])
}

// copyShared copies from or to memory that a peer may have taken away.
func copyShared(dst, src []byte) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if e := recover(); e != nil {
			if _, ok := e.(interface {
				runtime.Error
				Addr() uintptr
			}); !ok {
				panic(e)
			}
			err = block.ErrFault
		}
	}()
	copy(dst, src)
	return nil
}
