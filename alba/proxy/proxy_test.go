package proxy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/proxy"
)

const ns = "9b2f0c4e-5d1a-4a63-8f5e-2f1f4f1f7a10"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func put(t testing.TB, p *proxy.Proxy, name string, b []byte) {
	t.Helper()
	must(t, p.Put(t.Context(), ns, name, 1, bytes.NewReader(b), int64(len(b))))
}

func expect(t testing.TB, p *proxy.Proxy, name string, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	must(t, p.ReadAt(t.Context(), ns, name, got, 0))
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: wrong bytes", name)
	}
}

func manifest(t testing.TB, c *albatest.Cluster, name string) *alba.Manifest {
	t.Helper()
	kvs, err := c.Reg.List(t.Context(), alba.ObjectPrefix)
	must(t, err)
	for _, kv := range kvs {
		if strings.HasSuffix(kv.Key, "/"+name) {
			m, err := alba.DecodeManifest(kv.Value)
			must(t, err)
			return m
		}
	}
	t.Fatalf("no manifest of %s", name)
	return nil
}

// presets of each kind.
func presets() map[string]alba.Preset {
	out := map[string]alba.Preset{}
	for c := range alba.Compression(3) {
		for e := range alba.Encryption(2) {
			ps := albatest.Preset(alba.Policy{K: 3, M: 2, C: 4, X: 1})
			ps.Compression, ps.Encryption = c, e
			out[fmt.Sprint(c, "-", e)] = ps
		}
	}
	return out
}

func withKeys(t testing.TB) func(o *proxy.Options) {
	return func(o *proxy.Options) { o.Keys = albatest.Keys(t, "a") }
}

// TestReadWrite: objects of all sizes under all kinds of presets come back, whole and
// in parts, while up to m devices are gone.
func TestReadWrite(t *testing.T) {
	for name, ps := range presets() {
		t.Run(name, func(t *testing.T) {
			c := albatest.NewCluster(6, 6)
			p := c.Proxy(t, ps, withKeys(t))
			must(t, p.CreateNamespace(t.Context(), ns))
			objects := map[string][]byte{}
			for i, size := range []int{0, 1, 4096, 4097, 100_000, 1 << 20} {
				objects[fmt.Sprint("o", i)] = albatest.Pattern(uint64(i), size)
			}
			for name, b := range objects {
				put(t, p, name, b)
			}
			rng := rand.New(rand.NewPCG(1, 2))
			for _, down := range [][]int{nil, {0}, {1, 4}, {5, 2}} {
				for i, d := range c.Disks {
					d.Faulty.Set(asdtest.Fault{})
					for _, j := range down {
						if i == j {
							d.Faulty.Set(asdtest.Fault{Down: true})
						}
					}
				}
				for name, b := range objects {
					expect(t, p, name, b)
					for range 5 {
						off := rng.IntN(len(b) + 1)
						got := make([]byte, rng.IntN(len(b)-off+1))
						must(t, p.ReadAt(t.Context(), ns, name, got, int64(off)))
						if !bytes.Equal(got, b[off:off+len(got)]) {
							t.Fatalf("%s: wrong bytes at %d", name, off)
						}
					}
				}
			}
		})
	}
}

// TestReadAmplification: a read of 4 KiB moves 4 KiB (and a tag) from one device.
func TestReadAmplification(t *testing.T) {
	for e, most := range []float64{1.0, 1.1} {
		ps := albatest.Preset(alba.Policy{K: 4, M: 2, C: 5, X: 1})
		ps.Encryption = alba.Encryption(e)
		c := albatest.NewCluster(6, 6)
		p := c.Proxy(t, ps, withKeys(t))
		must(t, p.CreateNamespace(t.Context(), ns))
		b := albatest.Pattern(1, 2<<20)
		put(t, p, "o", b)
		for off := 0; off < len(b); off += 4096 {
			got := make([]byte, 4096)
			must(t, p.ReadAt(t.Context(), ns, "o", got, int64(off)))
		}
		k := p.Counters()
		// Hedged reads, on a machine that is slow just now, are not the layout's doing.
		if amp := float64(k.FetchedBytes.Load()) / float64(k.ReadBytes.Load()); amp > most && k.Hedged.Load() == 0 {
			t.Errorf("encryption %d: %.3f bytes fetched per byte read, want at most %v", e, amp, most)
		}
	}
}

// TestP5BitRot: a bad byte anywhere in any fragment is never returned, is counted and
// reported, and the read succeeds from others.
func TestP5BitRot(t *testing.T) {
	for name, ps := range presets() {
		t.Run(name, func(t *testing.T) {
			c := albatest.NewCluster(5, 5)
			var mu sync.Mutex
			faults := map[string]bool{}
			p := c.Proxy(t, ps, func(o *proxy.Options) {
				withKeys(t)(o)
				o.Report = func(f proxy.Fault) { mu.Lock(); defer mu.Unlock(); faults[fmt.Sprint(f.Device, f.Shard)] = true }
			})
			must(t, p.CreateNamespace(t.Context(), ns))
			b := albatest.Pattern(1, 300_000)
			put(t, p, "o", b)
			m := manifest(t, c, "o")
			for shard := range ps.Policies[0].K {
				id := m.Shards[shard]
				key := alba.FragmentKey(m.NamespaceID, m.Upload, shard, 0)
				if !c.Disk(id).Model.Corrupt(key, int64(17+shard*4096)) {
					t.Fatalf("no %s on %s", key, id)
				}
				// A shard that answers late is done without, and its fault not seen.
				albatest.Eventually(t, fmt.Sprintf("the fault of shard %d is reported", shard), func() bool {
					expect(t, p, "o", b)
					mu.Lock()
					defer mu.Unlock()
					return faults[fmt.Sprint(id, shard)]
				})
				if shard == 1 {
					break // as many as there is parity
				}
			}
		})
	}
}

// TestTooManyLost: with more than m devices gone reads say so, and work again when
// the devices are back.
func TestTooManyLost(t *testing.T) {
	c := albatest.NewCluster(5, 5)
	p := c.Proxy(t, albatest.Preset(alba.Policy{K: 3, M: 2, C: 5, X: 1}), nil)
	must(t, p.CreateNamespace(t.Context(), ns))
	b := albatest.Pattern(1, 100_000)
	put(t, p, "o", b)
	for _, d := range c.Disks[:3] {
		d.Faulty.Set(asdtest.Fault{Down: true})
	}
	err := p.ReadAt(t.Context(), ns, "o", make([]byte, len(b)), 0)
	if !errors.Is(err, proxy.ErrUnreadable) || !strings.Contains(err.Error(), "of 5 shards") {
		t.Fatalf("read with 3 of 5 devices gone: %v", err)
	}
	for _, d := range c.Disks[:3] {
		d.Faulty.Set(asdtest.Fault{})
	}
	expect(t, p, "o", b)
}

// TestHedge: a device that stops answering costs a read the hedge, not for ever, and
// after some reads it is not asked any more.
func TestHedge(t *testing.T) {
	c := albatest.NewCluster(5, 5)
	p := c.Proxy(t, albatest.Preset(alba.Policy{K: 3, M: 2, C: 5, X: 1}), nil)
	must(t, p.CreateNamespace(t.Context(), ns))
	b := albatest.Pattern(1, 400_000)
	put(t, p, "o", b)
	m := manifest(t, c, "o")
	stopped := []*albatest.Disk{c.Disk(m.Shards[0]), c.Disk(m.Shards[2])} // of data, not of parity
	for _, d := range stopped {
		d.Faulty.Set(asdtest.Fault{Stopped: true})
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 50 {
			expect(t, p, "o", b)
		}
	}()
	albatest.Await(t, done, "reads with two of five devices stopped")
	if p.Counters().Decoded.Load() == 0 {
		t.Error("nothing was decoded")
	}
	for _, d := range stopped {
		albatest.Eventually(t, d.ID+" is known to be down", func() bool {
			reason, _ := p.Fleet().Member(d.ID).Down()
			return reason != ""
		})
		d.Faulty.Set(asdtest.Fault{})
	}
	for _, d := range stopped {
		albatest.Eventually(t, d.ID+" is up again", func() bool {
			reason, _ := p.Fleet().Member(d.ID).Down()
			return reason == ""
		})
	}
}

// TestLocality: a replicated object is read from the copy that is nearest.
func TestLocality(t *testing.T) {
	c := albatest.NewCluster(3, 3)
	p := c.Proxy(t, albatest.Preset(alba.Policy{K: 1, M: 2, C: 3, X: 1}), nil)
	must(t, p.CreateNamespace(t.Context(), ns))
	b := albatest.Pattern(1, 100_000)
	put(t, p, "o", b)
	var far atomic.Int64
	for _, d := range c.Disks[1:] { // disk-00 is on our host
		d.Faulty.Set(asdtest.Fault{Hook: func(op, _ string) error {
			if op == "ReadAt" {
				far.Add(1)
			}
			return nil
		}})
	}
	for range 10 {
		expect(t, p, "o", b)
	}
	// On a machine that is slow just now a read may be hedged.
	if n := far.Load(); n > 0 && p.Counters().Hedged.Load() == 0 {
		t.Errorf("%d reads of copies on other hosts", n)
	}
}

// TestAcknowledgedAtC: an upload is acknowledged when c shards are durable, and the
// late ones are added when they are.
func TestAcknowledgedAtC(t *testing.T) {
	c := albatest.NewCluster(5, 5)
	p := c.Proxy(t, albatest.Preset(alba.Policy{K: 3, M: 2, C: 4, X: 1}), nil)
	must(t, p.CreateNamespace(t.Context(), ns))
	slow := c.Disks[2]
	hold := make(chan struct{})
	slow.Faulty.Set(asdtest.Fault{Hook: func(op, key string) error {
		if op == "Apply" && strings.HasPrefix(key, alba.FragmentPrefix) {
			<-hold
		}
		return nil
	}})
	b := albatest.Pattern(1, 150_000)
	put(t, p, "o", b)
	m := manifest(t, c, "o")
	if m.Live() != 4 {
		t.Fatalf("%d shards after the acknowledgement, want 4", m.Live())
	}
	expect(t, p, "o", b)
	close(hold)
	albatest.Eventually(t, "the late shard is added", func() bool { return manifest(t, c, "o").Live() == 5 })
	kvs, err := c.Reg.List(t.Context(), alba.IntentPrefix)
	if err != nil || len(kvs) != 0 {
		t.Fatalf("intents are left: %v, %v", kvs, err)
	}
	expect(t, p, "o", b)
}

// TestDevicesFailDuringPut: an upload that loses more devices than it can is begun
// anew on others, and what it left is deleted.
func TestDevicesFailDuringPut(t *testing.T) {
	for what, fault := range map[string]asdtest.Fault{"down": {Down: true}, "full": {Full: true}, "stopped": {Stopped: true}} {
		t.Run(what, func(t *testing.T) {
			c := albatest.NewCluster(7, 7)
			p := c.Proxy(t, albatest.Preset(alba.Policy{K: 3, M: 1, C: 4, X: 1}), nil)
			must(t, p.CreateNamespace(t.Context(), ns))
			put(t, p, "first", nil)
			for _, d := range c.Disks[:3] {
				d.Faulty.Set(asdtest.Fault{Hook: func(op, key string) error {
					if op == "Apply" && strings.HasSuffix(key, "/00000001") {
						d.Faulty.Set(fault)
						return errors.New("was hit")
					}
					return nil
				}})
			}
			for i := range 4 {
				b := albatest.Pattern(uint64(i), 500_000)
				put(t, p, fmt.Sprint("o", i), b)
				expect(t, p, fmt.Sprint("o", i), b)
			}
			for _, d := range c.Disks {
				d.Faulty.Set(asdtest.Fault{})
			}
		})
	}
}

// TestLesserPolicy: the first policy that the live devices can meet is used; if none
// can be met the put fails and says what is wrong with which device.
func TestLesserPolicy(t *testing.T) {
	c := albatest.NewCluster(5, 5)
	p := c.Proxy(t, albatest.Preset(alba.Policy{K: 3, M: 2, C: 5, X: 1}, alba.Policy{K: 2, M: 1, C: 3, X: 1}), nil)
	must(t, p.CreateNamespace(t.Context(), ns))
	put(t, p, "a", albatest.Pattern(1, 10_000))
	if m := manifest(t, c, "a"); m.Policy.K != 3 {
		t.Fatalf("stored with %v", m.Policy)
	}
	c.Disks[0].Faulty.Set(asdtest.Fault{Down: true})
	c.Disks[1].Faulty.Set(asdtest.Fault{Full: true})
	put(t, p, "b", albatest.Pattern(2, 10_000))
	if m := manifest(t, c, "b"); m.Policy.K != 2 || m.Live() != 3 {
		t.Fatalf("stored with %v on %q", m.Policy, m.Shards)
	}
	c.Disks[2].Faulty.Set(asdtest.Fault{Down: true})
	ctx, cancel := context.WithTimeout(t.Context(), albatest.Deadline)
	defer cancel()
	err := p.Put(ctx, ns, "c", 1, bytes.NewReader(nil), 0)
	if err == nil || !strings.Contains(err.Error(), "disk-00") || !strings.Contains(err.Error(), "disk-01 is full") {
		t.Fatalf("put with two devices left: %v", err)
	}
}

// noLeftovers waits until nothing is left but what the objects need.
func noLeftovers(t *testing.T, c *albatest.Cluster, p *proxy.Proxy) {
	t.Helper()
	albatest.Eventually(t, "no trash and no orphan is left", func() bool {
		for _, prefix := range []string{alba.TrashPrefix, alba.IntentPrefix} {
			if kvs, err := c.Reg.List(t.Context(), prefix); err != nil || len(kvs) > 0 {
				return false
			}
		}
		kvs, err := c.Reg.List(t.Context(), alba.ObjectPrefix)
		must(t, err)
		want := 0
		for _, kv := range kvs {
			m, err := alba.DecodeManifest(kv.Value)
			must(t, err)
			want += m.Live() * (m.Layout().Chunks() + 1)
		}
		got := 0
		for _, m := range p.Fleet().Members() {
			for _, prefix := range []string{alba.FragmentPrefix, alba.ShardPrefix, alba.TombstonePrefix} {
				r, err := m.Range(t.Context(), rangeOf(prefix), 0)
				if err != nil {
					return false
				}
				got += len(r.Infos)
			}
		}
		return got == want
	})
}

// TestDeleteWhileDown: the fragments on a device that is down are deleted later; until
// then the others remember that the object is gone.
func TestDeleteWhileDown(t *testing.T) {
	c := albatest.NewCluster(3, 3)
	p := c.Proxy(t, albatest.Preset(alba.Policy{K: 1, M: 2, C: 2, X: 1}), nil)
	must(t, p.CreateNamespace(t.Context(), ns))
	put(t, p, "o", albatest.Pattern(1, 10_000))
	m := manifest(t, c, "o")
	c.Disks[1].Faulty.Set(asdtest.Fault{Down: true})
	must(t, p.Delete(t.Context(), ns, "o", 1))
	albatest.Eventually(t, "the others remember", func() bool {
		infos, err := c.Disks[0].Model.Exists(t.Context(), []string{alba.TombstoneKey(m.NamespaceID, m.Upload)}, 0)
		return err == nil && infos[0].Exists
	})
	c.Disks[1].Faulty.Set(asdtest.Fault{})
	albatest.Eventually(t, "the trash is emptied", func() bool {
		kvs, err := c.Reg.List(t.Context(), alba.TrashPrefix)
		must(t, err)
		for _, kv := range kvs {
			rec, err := alba.Decode[alba.Intent](kv.Value)
			must(t, err)
			if p.Purge(t.Context(), m.NamespaceID, m.Upload, rec, kv.Revision) != nil {
				return false
			}
		}
		return true
	})
	noLeftovers(t, c, p)
}

// TestRotateKeys: objects stay readable over a rotation, and the old master key is not
// needed any more.
func TestRotateKeys(t *testing.T) {
	c := albatest.NewCluster(3, 3)
	ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1})
	ps.Encryption = alba.EncryptAES256GCM
	p := c.Proxy(t, ps, func(o *proxy.Options) { o.Keys = albatest.Keys(t, "a") })
	must(t, p.CreateNamespace(t.Context(), ns))
	b := albatest.Pattern(1, 50_000)
	put(t, p, "o", b)
	both := c.Proxy(t, ps, func(o *proxy.Options) { o.Keys = albatest.Keys(t, "b", "a") })
	expect(t, both, "o", b)
	if n, err := both.RotateKeys(t.Context()); n != 1 || err != nil {
		t.Fatalf("rotated %d: %v", n, err)
	}
	if n, err := both.RotateKeys(t.Context()); n != 0 || err != nil {
		t.Fatalf("rotated %d again: %v", n, err)
	}
	expect(t, c.Proxy(t, ps, func(o *proxy.Options) { o.Keys = albatest.Keys(t, "b") }), "o", b)
	late := c.Proxy(t, ps, func(o *proxy.Options) { o.Keys = albatest.Keys(t, "a") })
	if err := late.ReadAt(t.Context(), ns, "o", make([]byte, 1), 0); !errors.Is(err, alba.ErrNoKey) {
		t.Fatalf("read with the old master key: %v", err)
	}
}

// TestForeignDevice: a device that belongs to another cluster, or to this one before
// its registry was lost, is refused.
func TestForeignDevice(t *testing.T) {
	a, b := albatest.NewCluster(1, 1), albatest.NewCluster(0, 1)
	ps := albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1})
	a.Proxy(t, ps, nil)
	p := b.Proxy(t, ps, nil)
	b.Disks = a.Disks
	if _, err := p.AddDevice(t.Context(), b.Record(a.Disks[0])); !errors.Is(err, proxy.ErrForeign) {
		t.Fatalf("added: %v", err)
	}
}

// TestManifestCache: what another daemon changes is seen.
func TestManifestCache(t *testing.T) {
	c := albatest.NewCluster(3, 3)
	ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1})
	p, q := c.Proxy(t, ps, nil), c.Proxy(t, ps, nil)
	must(t, p.CreateNamespace(t.Context(), ns))
	put(t, p, "o", []byte("x"))
	expect(t, q, "o", []byte("x"))
	misses := q.Counters().ManifestMisses.Load()
	for range 10 {
		expect(t, q, "o", []byte("x"))
	}
	if got := q.Counters().ManifestMisses.Load(); got > misses+1 {
		t.Errorf("%d of 10 reads asked the registry", got-misses)
	}
	must(t, p.Delete(t.Context(), ns, "o", 1))
	albatest.Eventually(t, "the deletion is seen", func() bool {
		return errors.Is(q.ReadAt(t.Context(), ns, "o", make([]byte, 1), 0), proxy.ErrNoObject)
	})
	if _, err := q.Size(t.Context(), ns, "o"); !errors.Is(err, proxy.ErrNoObject) {
		t.Fatalf("size: %v", err)
	}
}

func rangeOf(prefix string) asd.RangeRequest {
	return asd.RangeRequest{From: prefix, To: proxy.After(prefix)}
}
