package vhost

import (
	"os"
	"testing"

	"scoria/shm/mem"
	"scoria/vhost/wire"
)

// TestP7MemoryThatMayNeverCome: wherever a front end passes memory, it ends the session
// if that lies on a file system that may make whoever touches it wait for ever. Of
// those, /proc is always there; package mem tries FUSE.
func TestP7MemoryThatMayNeverCome(t *testing.T) {
	file, err := os.Open("/proc/self/environ")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	fd := int(file.Fd())
	region := wire.Region{GuestAddr: testGuestBase, UserAddr: testUserBase, Size: 4096}
	for _, c := range []struct {
		request wire.Request
		payload []byte
	}{
		{wire.SetMemTable, wire.AppendMemTable(nil, []wire.Region{region})},
		{wire.AddMemReg, wire.AppendRegion(nil, region)},
		{wire.SetLogBase, wire.Log{Size: 4096}.Append(nil)},
		{wire.SetInflightFD, wire.Inflight{MmapSize: 4096, Queues: 1, QueueSize: 16}.Append(nil)},
	} {
		t.Run(c.request.String(), func(t *testing.T) {
			b := newBed(t, Config{})
			f := dial(t, b.path)
			f.hello(testFeatures | wire.FeatureProtocolFeatures)
			if err := f.send(c.request, 0, c.payload, fd); err != nil {
				t.Fatal(err)
			}
			f.ends(b, mem.ErrFileSystem.Error())
			g := newGuest(t, 1, 16, testFeatures)
			start(t, b.path, g)
			if st, _ := g.do(0, blkOut, 0, pattern(512, 1), 0); st != statusOK {
				t.Fatal(st)
			}
		})
	}
}
