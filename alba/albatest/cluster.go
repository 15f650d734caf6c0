package albatest

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/proxy"
)

// Deadline bounds every wait of tests.
const Deadline = 3 * time.Minute

// Disk is one storage daemon of a Cluster.
type Disk struct {
	ID     string
	Model  *asdtest.Model
	Faulty *asdtest.Faulty
	// Capacity is what its statistics say, in bytes; 0: what the model says.
	Capacity atomic.Int64
}

// sized is a client that says it has the disk's capacity.
type sized struct {
	asd.Client
	d *Disk
}

func (s sized) Stats(ctx context.Context) (asd.Stats, error) {
	st, err := s.Client.Stats(ctx)
	if n := s.d.Capacity.Load(); n > 0 {
		st.Capacity = n
	}
	return st, err
}

// Keys returns all keys of the device.
func (d *Disk) Keys(t testing.TB) []string {
	t.Helper()
	r, err := d.Model.Range(context.Background(), asd.RangeRequest{}, asd.PriorityGuest)
	if err != nil || r.More {
		t.Fatalf("keys of %s: more %v, %v", d.ID, r.More, err)
	}
	keys := make([]string, len(r.Infos))
	for i, info := range r.Infos {
		keys[i] = info.Key
	}
	return keys
}

// Drop deletes a key behind everybody's back.
func (d *Disk) Drop(t testing.TB, key string) {
	t.Helper()
	if err := d.Model.Apply(context.Background(), nil, []asd.Update{asd.Delete(key)}, asd.PriorityGuest); err != nil {
		t.Fatal(err)
	}
}

// Cluster is a registry and storage daemons in memory.
type Cluster struct {
	Reg   *Registry
	Disks []*Disk
	hosts int
}

// NewCluster returns n devices on so many hosts, and a preset "p" with the policies.
// They are in the registry once Add was called, which Proxy does.
func NewCluster(n, hosts int) *Cluster {
	c := &Cluster{Reg: NewRegistry(), hosts: hosts}
	for range n {
		c.NewDisk()
	}
	return c
}

// NewDisk adds an empty device, which is not in the registry yet.
func (c *Cluster) NewDisk() *Disk {
	d := &Disk{ID: fmt.Sprintf("disk-%02d", len(c.Disks))}
	d.Model = asdtest.NewModel(d.ID)
	d.Faulty = asdtest.NewFaulty(sized{d.Model, d})
	c.Disks = append(c.Disks, d)
	return d
}

// Disk returns a device by its ID.
func (c *Cluster) Disk(id string) *Disk {
	for _, d := range c.Disks {
		if d.ID == id {
			return d
		}
	}
	return nil
}

// shared is a client whose Close leaves the device open for others.
type shared struct{ asd.Client }

func (shared) Close() error { return nil }

// Dial implements proxy.Dial.
func (c *Cluster) Dial(_ context.Context, d alba.Device) (asd.Client, error) {
	if disk := c.Disk(d.Address); disk != nil {
		return shared{disk.Faulty}, nil
	}
	return nil, fmt.Errorf("nobody at %q", d.Address)
}

// Record is what Add takes into the registry for a device.
func (c *Cluster) Record(d *Disk) alba.Device {
	var i int
	_, _ = fmt.Sscanf(d.ID, "disk-%d", &i)
	return alba.Device{ID: d.ID, Address: d.ID, Host: fmt.Sprint("host-", i%c.hosts), Rack: "rack", Datacentre: "dc"}
}

// Proxy returns a proxy, closed at the end of the test. Change may alter the options.
// The first one takes all devices and the preset into the registry.
func (c *Cluster) Proxy(t testing.TB, ps alba.Preset, change func(o *proxy.Options)) *proxy.Proxy {
	t.Helper()
	o := proxy.Options{Registry: c.Reg, Dial: c.Dial, Node: "node", Location: proxy.Location{Host: "host-0", Rack: "rack", Datacentre: "dc"},
		Preset: ps.Name, Log: zerolog.Nop()}
	if change != nil {
		change(&o)
	}
	p, err := proxy.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	if kvs, err := c.Reg.List(t.Context(), alba.PresetPrefix); err != nil || len(kvs) > 0 {
		return p
	}
	for _, d := range c.Disks {
		if _, err := p.AddDevice(t.Context(), c.Record(d)); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.SetPreset(t.Context(), ps); err != nil {
		t.Fatal(err)
	}
	return p
}

// Preset returns a preset "p" with these policies, small fragments and no frills.
func Preset(policies ...alba.Policy) alba.Preset {
	return alba.Preset{Name: "p", Policies: policies, FragmentBytes: alba.MinFragmentBytes}
}

// Keys returns master keys.
func Keys(t testing.TB, digits ...string) *alba.MasterKeys {
	t.Helper()
	var text strings.Builder
	for _, d := range digits {
		text.WriteString(strings.Repeat(d, 2*alba.KeyBytes) + "\n")
	}
	k, err := alba.ParseMasterKeys([]byte(text.String()))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Pattern returns n bytes that differ by seed and offset; about half of them compress.
func Pattern(seed uint64, n int) []byte {
	b := make([]byte, n)
	x := seed*0x9e3779b97f4a7c15 + 1
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		if i&4096 == 0 {
			b[i] = byte(x)
		} else {
			b[i] = byte(seed)
		}
	}
	return b
}

// Await waits for ch and fails with all goroutines when that takes too long.
func Await[T any](t testing.TB, ch <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(Deadline):
		buf := make([]byte, 1<<20)
		t.Fatalf("%s: nothing after %v\n%s", what, Deadline, buf[:runtime.Stack(buf, true)])
		panic("not reached")
	}
}

// Eventually waits until fn holds.
func Eventually(t testing.TB, what string, fn func() bool) {
	t.Helper()
	for end := time.Now().Add(Deadline); !fn(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%s: not after %v\n%s", what, Deadline, buf[:runtime.Stack(buf, true)])
		}
	}
}
