package repair_test

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/proxy"
	"scoria/alba/repair"
)

// held is a source that waits once, when its second half is read.
type held struct {
	b            []byte
	once         sync.Once
	half, resume chan struct{}
}

func (s *held) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(s.b)/2) {
		s.once.Do(func() { close(s.half); <-s.resume })
	}
	n := copy(p, s.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// TestP4TakenForDead: an upload whose intent another daemon removed, because it was
// paused for so long, can't commit what was collected; it is begun anew and whole.
func TestP4TakenForDead(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1})
	r := newRig(t, 4, ps, nil)
	src := &held{b: albatest.Pattern(5, 3<<20), half: make(chan struct{}), resume: make(chan struct{})}
	result := make(chan error, 1)
	go func() { result <- r.p.Put(t.Context(), ns, "o", 1, src, int64(len(src.b))) }()
	albatest.Await(t, src.half, "the upload's middle")
	albatest.Eventually(t, "fragments are on the devices", func() bool { return len(r.keys(alba.FragmentPrefix)) > 0 })

	// The same daemon does not take its own upload for dead, another does.
	if _, err := r.m.Collect(t.Context()); err != nil || len(r.keys(alba.FragmentPrefix)) == 0 {
		t.Fatalf("the daemon collected its own upload: %v", err)
	}
	other := r.Proxy(t, ps, func(o *proxy.Options) { o.Node = "other" })
	collector := repair.New(repair.Options{Proxy: other, IntentAge: time.Nanosecond})
	albatest.Eventually(t, "the other collects it", func() bool {
		_, err := collector.Collect(t.Context())
		must(t, err)
		kvs := mustList(t, r.Reg, alba.IntentPrefix)
		return len(kvs) == 0
	})
	close(src.resume)
	must(t, albatest.Await(t, result, "the paused upload"))
	if got := r.p.Counters().Attempts.Load(); got != 2 {
		t.Errorf("%d attempts, want 2: the first must not be committed", got)
	}
	r.objects["o"] = src.b
	r.expectAll(other)
	r.settle()
	r.expectSafe(1)
	r.expectClean()
}

// TestP4EachDeviceRefuses: a device that knows the new owner's epoch refuses the old
// one, whatever the registry says.
func TestP4EachDeviceRefuses(t *testing.T) {
	r := newRig(t, 3, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}), nil)
	r.put("o", 1000)
	must(t, r.p.Fence(t.Context(), ns, 9))
	var id string
	for _, kv := range mustList(t, r.Reg, alba.NamespacePrefix) {
		n, err := alba.Decode[alba.Namespace](kv.Value)
		must(t, err)
		id = n.ID.String()
	}
	for _, d := range r.Disks {
		err := d.Model.Apply(t.Context(), []asd.Assert{asd.AssertEpoch(id, 8)}, []asd.Update{asd.Put("x", asd.NewValue(nil))}, 0)
		if !errors.Is(err, asd.ErrStaleEpoch) {
			t.Errorf("%s: %v", d.ID, err)
		}
	}
	// One that was away learns it from the new owner's first write.
	r.Disks[0].Faulty.Set(asdtest.Fault{Down: true})
	must(t, r.p.Fence(t.Context(), ns, 12))
	r.Disks[0].Faulty.Set(asdtest.Fault{})
	albatest.Eventually(t, "the device is up", func() bool {
		r.p.Fleet().Poll(t.Context())
		reason, _ := r.p.Fleet().Member(r.Disks[0].ID).Down()
		return reason == ""
	})
	must(t, r.p.Put(t.Context(), ns, "p", 12, bytes.NewReader(nil), 0))
	epochs, _, err := r.Disks[0].Model.Epochs(t.Context(), "")
	epochs = slices.DeleteFunc(epochs, func(e asd.NamespaceEpoch) bool { return e.Namespace[0] == '~' })
	if err != nil || len(epochs) != 1 || epochs[0].Epoch != 12 {
		t.Errorf("epochs %v: %v", epochs, err)
	}
}
