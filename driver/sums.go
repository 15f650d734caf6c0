package driver

import (
	"io"
	"slices"
	"sync"

	"scoria/driver/block"
	"scoria/driver/sco"
)

// maxSums bounds the checksums that wait for an upload, all volumes together: 4 MiB.
const maxSums = 1 << 20

// sumCache keeps the checksums of the pages of SCOs from their sealing to their upload
// (Object.Sums). To read them from the file costs as much as the rest of an upload that
// links it, and turns at the disk: what was written directly is in no page cache. What
// does not fit goes, oldest first, and is read. From any goroutine; mu is a leaf.
type sumCache struct {
	mu    sync.Mutex
	m     map[fileKey][]uint32
	order []fileKey // oldest first
	held  int       // checksums
}

// put keeps sums, unless there are none.
func (c *sumCache) put(key fileKey, sums []uint32) {
	if len(sums) == 0 || len(sums) > maxSums {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil {
		c.m = map[fileKey][]uint32{}
	}
	if _, ok := c.m[key]; ok {
		return
	}
	for c.held+len(sums) > maxSums {
		oldest := c.order[0]
		c.order = c.order[1:]
		c.held -= len(c.m[oldest])
		delete(c.m, oldest)
	}
	c.m[key], c.held = sums, c.held+len(sums)
	c.order = append(c.order, key)
}

// take returns what was put and forgets it; nil if it is not there (any more).
func (c *sumCache) take(key fileKey) []uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	sums := c.m[key]
	if sums != nil {
		delete(c.m, key)
		c.held -= len(sums)
		c.order = slices.DeleteFunc(c.order, func(k fileKey) bool { return k == key })
	}
	return sums
}

// pageSums returns the checksums of the pages of m, whose local file is r: those from
// when it was sealed, the first time that they are asked for.
func (v *Volume) pageSums(m *scoMeta, r io.ReaderAt) ([]uint32, error) {
	if sums := v.eng.sums.take(v.fileKey(m)); int64(len(sums)) == m.size/block.ClusterSize {
		return sums, nil
	}
	return sco.PageSums(r, m.size)
}
