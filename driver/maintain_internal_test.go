package driver

import "testing"

// TestP9LogIsCheckpointed: a checkpoint comes when the log has grown by many times what it
// would write, so that pages do not take the disk from the log; and, whatever it would
// write, before the log takes long to replay.
func TestP9LogIsCheckpointed(t *testing.T) {
	for _, c := range []struct {
		since, dirty int64
		due, must    bool
	}{
		{0, 0, false, false},
		{checkpointMin, 1, false, false},
		{checkpointMin + 1, 1, true, false},
		{checkpointMin + 1, 32 << 10, false, false}, // each page of 64 GiB: an eighth of what was logged is too much
		{16 * 32 << 10, 32 << 10, false, false},
		{16*32<<10 + 1, 32 << 10, true, false},
		{checkpointMax, checkpointMax, false, false},
		{checkpointMax + 1, checkpointMax, true, true},
	} {
		if due, must := logGrown(c.since, c.dirty); due != c.due || must != c.must {
			t.Errorf("%d records, %d dirty pages: due %v, must %v", c.since, c.dirty, due, must)
		}
	}
}
