package disk

import (
	"encoding/binary"
	"fmt"
	"testing"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

// TestVerifyEndedLogs: logs that the key-value store has ended, and keeps to write them
// again, are sound: their last bytes are the mark of their end, not damage.
func TestVerifyEndedLogs(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", testOptions)
	defer d.Close()
	for i := range 20 {
		must(t, d.Apply(background, nil, []asd.Update{asd.Put(fmt.Sprint("key-", i), asd.NewValue(make([]byte, 300)))}, guest))
	}
	must(t, d.db.Flush())
	ended := 0
	for _, name := range d.durable.list() {
		number, ok := walNumber(name)
		if !ok {
			continue
		}
		size, _ := d.durable.of(name)
		b, err := readAll(fsys, name)
		must(t, err)
		if int64(len(b)) < size || size < walHead || binary.LittleEndian.Uint32(b[size-4:size]) != number+1 {
			continue // it has no mark
		}
		ended++
		before := d.db.Metrics().Flush.Count
		if reason, err := d.verifyLog(name, number, size); err != nil || reason != "" {
			t.Errorf("%s: %q, %v", name, reason, err)
		}
		if n := d.db.Metrics().Flush.Count; n != before {
			t.Errorf("%s: %d tables were written for a sound log", name, n-before)
		}
		must(t, fsys.Corrupt(name, size/2))
		if reason, err := d.verifyLog(name, number, size); err != nil || reason == "" {
			t.Errorf("%s: damage is not found: %v", name, err)
		}
	}
	if ended == 0 {
		t.Fatal("no log that has ended is there")
	}
}
