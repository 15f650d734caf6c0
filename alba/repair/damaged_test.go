package repair_test

import (
	"bytes"
	"context"
	"fmt"
	"path"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd"
	"scoria/alba/asd/disk"
	"scoria/alba/proxy"
	"scoria/alba/repair"
	"scoria/alba/vfs"
)

// engines are ASDs as they are on disks, on one file system in memory.
type engines struct {
	t    *testing.T
	fs   *vfs.Mem
	mu   sync.Mutex
	open map[string]*disk.Disk
}

type engine struct{ *disk.Disk }

func (engine) Close() error { return nil }

func (e *engines) dial(_ context.Context, d alba.Device) (asd.Client, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.open[d.Address] == nil {
		opened, err := disk.Open(e.fs, d.Address, disk.Options{CapacityBytes: 1 << 30, ReserveBytes: 1 << 20, Log: zerolog.Nop()})
		if err != nil {
			return nil, err
		}
		e.open[d.Address] = opened
	}
	return engine{e.open[d.Address]}, nil
}

func (e *engines) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, d := range e.open {
		must(e.t, d.Close())
	}
	clear(e.open)
}

// daemon is a proxy and its maintainer on the engines.
func (e *engines) daemon(reg alba.Registry) (*proxy.Proxy, *repair.Maintainer) {
	faults := repair.NewFaults()
	p, err := proxy.New(e.t.Context(), proxy.Options{Registry: reg, Dial: e.dial, Node: "node", Preset: "p", Report: faults.Add, Log: zerolog.Nop()})
	must(e.t, err)
	return p, repair.New(repair.Options{Proxy: p, Faults: faults, DownAfter: time.Hour, Log: zerolog.Nop()})
}

// verifyOnce runs a verification and returns the problems that it found.
func verifyOnce(t *testing.T, m *repair.Maintainer) int64 {
	t.Helper()
	must(t, m.Start(t.Context(), repair.JobVerify))
	must(t, m.RunJob(t.Context(), repair.JobVerify))
	jobs, err := m.Jobs(t.Context())
	must(t, err)
	for _, j := range jobs {
		if j.Name == repair.JobVerify && j.State == repair.JobDone {
			return j.Problems
		}
	}
	t.Fatalf("jobs %+v", jobs)
	return 0
}

// TestP5DamagedKeyValueStore: a bad bit anywhere in a table of a device's key-value store
// never gives a wrong byte, is found by a verification, and all that the device held is
// whole elsewhere after a repair; without it, nothing is damaged any more.
func TestP5DamagedKeyValueStore(t *testing.T) {
	for part := range 6 {
		t.Run(fmt.Sprint(part), func(t *testing.T) { damagedTable(t, part) })
	}
}

func damagedTable(t *testing.T, part int) {
	e := &engines{t: t, fs: vfs.NewMem(), open: map[string]*disk.Disk{}}
	defer e.close()
	reg := albatest.NewRegistry()
	p, _ := e.daemon(reg)
	for i := range 5 {
		_, err := p.AddDevice(t.Context(), alba.Device{Address: fmt.Sprint("/asd", i), Host: fmt.Sprint("h", i)})
		must(t, err)
	}
	must(t, p.SetPreset(t.Context(), albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1})))
	must(t, p.CreateNamespace(t.Context(), ns))
	objects := map[string][]byte{}
	for i := range 20 {
		name, b := fmt.Sprint("o", i), albatest.Pattern(uint64(i), 100+i*1000)
		must(t, p.Put(t.Context(), ns, name, 1, bytes.NewReader(b), int64(len(b))))
		objects[name] = b
	}
	p.Close()
	e.close()
	p, _ = e.daemon(reg) // the start brings what was in logs into tables
	p.Fleet().Poll(t.Context())
	p.Close()
	e.close()

	table, size := "", int64(0)
	names, err := e.fs.List("/asd0/kv")
	must(t, err)
	for _, n := range names {
		if info, err := e.fs.Stat(path.Join("/asd0/kv", n)); err == nil && strings.HasSuffix(n, ".sst") && info.Size() > size {
			table, size = path.Join("/asd0/kv", n), info.Size()
		}
	}
	must(t, e.fs.Corrupt(table, size/7*int64(part)))
	p, m := e.daemon(reg)
	defer p.Close()
	p.Fleet().Poll(t.Context())
	expect := func() {
		t.Helper()
		for name, want := range objects {
			got := make([]byte, len(want))
			if err := p.ReadAt(t.Context(), ns, name, got, 0); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%s: wrong bytes, or %v", name, err)
			}
		}
	}
	expect()
	if n := verifyOnce(t, m); n == 0 {
		t.Fatalf("damage at %d of %d of %s is not found", size/7*int64(part), size, table)
	}
	var id string
	albatest.Eventually(t, "everything is elsewhere", func() bool {
		p.Fleet().Poll(t.Context())
		_, err := m.Pass(t.Context())
		must(t, err)
		st, err := m.Status(t.Context())
		must(t, err)
		for _, d := range st.Devices {
			if d.Address == "/asd0" {
				id = d.ID
				return d.Stats.Damaged != "" && d.Shards == 0 && st.Classes[0].Disks[1] == int64(len(objects))
			}
		}
		return false
	})
	expect()
	must(t, p.SetDeviceState(t.Context(), id, alba.DeviceRemoved))
	expect()
	if n := verifyOnce(t, m); n != 0 {
		t.Fatalf("%d problems without the damaged device", n)
	}
}
