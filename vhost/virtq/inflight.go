package virtq

import (
	"fmt"
	"slices"
)

// The in-flight area, "Inflight I/O tracking" of the vhost-user specification,
// lets a new device resubmit what a dead one had taken:
//
//	queue region, one per queue, at a multiple of 64 bytes:
//	  features u64 (0) | version u16 (1) | desc_num u16 | last_batch_head u16 | used_idx u16
//	  desc_num × { inflight u8 | pad [5]u8 | next u16 | counter u64 }
//
// Order of stores, which is all that matters when the device is killed: taking
// a chain writes its counter, then inflight = 1. Returning a batch links its
// chains to the list at last_batch_head, then stores used.idx, then clears
// inflight of each, then stores used_idx. So if used_idx differs from used.idx,
// the last (difference) members of the list have been returned.

const (
	inflightVersion     = 1
	inflightHeaderBytes = 16
	inflightDescBytes   = 16
)

// InflightBytes is the length of one queue's region for a ring of num.
func InflightBytes(num int) int { return inflightHeaderBytes + inflightDescBytes*num }

// InflightStride is the distance between two queues' regions.
func InflightStride(num int) int { return (InflightBytes(num) + 63) &^ 63 }

// attachInflight takes over a region: a fresh one is initialised, another is
// searched for chains to resubmit.
func (q *Queue) attachInflight(b []byte, areaNum int) error {
	if areaNum < q.num || areaNum > MaxSize {
		return fmt.Errorf("area for %d descriptors, ring of %d: %w", areaNum, q.num, ErrInflight)
	}
	region, states, err := viewInflight(b, areaNum)
	if err != nil {
		return err
	}
	states = states[:q.num]
	q.region, q.states = region, states
	q.batch = make([]uint16, 0, q.num)
	switch version, num := region.version, region.descNum; {
	case version == 0:
		// Whatever the used ring's index is, no batch is half returned.
		clear(states)
		region.features, region.descNum, region.lastBatchHead = 0, uint16(areaNum), 0
		region.usedIdx = q.usedIdx
		region.version = inflightVersion
	case version != inflightVersion:
		return fmt.Errorf("version %d, want %d: %w", version, inflightVersion, ErrInflight)
	case int(num) != areaNum:
		return fmt.Errorf("region made for %d descriptors, area for %d: %w", num, areaNum, ErrInflight)
	default:
		if err := q.finishBatch(); err != nil {
			return err
		}
	}
	return q.collectInflight()
}

// finishBatch completes what a dead device had published and not yet cleared.
// A batch of zero, also the very first, clears nothing: descriptor 0, to which
// last_batch_head points in a fresh region, may be in flight.
func (q *Queue) finishBatch() error {
	n := q.usedIdx - q.region.usedIdx
	if int(n) > q.num {
		// The driver reset the ring since; then the old device had returned all.
		n = 0
		clear(q.states)
		q.region.lastBatchHead = 0
	}
	head := q.region.lastBatchHead
	for range n {
		if int(head) >= q.num {
			return fmt.Errorf("last batch goes on at %d in a ring of %d: %w", head, q.num, ErrInflight)
		}
		q.states[head].inflight = 0
		head = q.states[head].next
	}
	q.region.usedIdx = q.usedIdx
	return nil
}

// collectInflight finds the chains to resubmit, oldest first, and the entry of
// the available ring that follows them. Counters are copied before they are
// compared.
func (q *Queue) collectInflight() error {
	type entry struct {
		head    uint16
		counter uint64
	}
	var entries []entry
	for i := range q.states {
		if q.states[i].inflight != 0 {
			entries = append(entries, entry{uint16(i), q.states[i].counter})
		}
	}
	slices.SortStableFunc(entries, func(a, b entry) int {
		switch {
		case a.counter < b.counter:
			return -1
		case a.counter > b.counter:
			return 1
		}
		return 0
	})
	for _, e := range entries {
		q.resubmit = append(q.resubmit, e.head)
		q.busy[e.head] = true
		q.counter = e.counter + 1
	}
	q.inuse = len(entries)
	q.lastAvail = q.usedIdx + uint16(q.inuse)
	return nil
}

func (q *Queue) markInflight(head uint16) {
	s := &q.states[head]
	s.counter = q.counter
	q.counter++
	s.inflight = 1
}

// clearInflight clears the chains just published. The list in the region says
// which, but the front end could have changed it, so a private copy is used.
func (q *Queue) clearInflight() {
	for _, head := range q.batch {
		q.states[head].inflight = 0
	}
	q.batch = q.batch[:0]
	q.region.usedIdx = q.usedIdx
}
