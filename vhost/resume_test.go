package vhost

import (
	"os"
	"slices"
	"testing"

	"scoria/vhost/wire"
)

// QEMU before 9.1 whose guest had no driver when the daemon died uses the new
// connection without negotiating, and waits for acknowledgements all the same.
func TestP3FrontEndGoesOnWithoutNegotiating(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures)
	f := dial(t, b.path)
	f.must(wire.SetFeatures, wire.AppendU64(nil, g.features))
	f.tracked(g)
	f.memory(g)
	f.configure(g, 0, 0)
	if err := f.enable(0, 1); err != nil {
		t.Fatal(err)
	}
	if st, _ := g.do(0, blkOut, 3, pattern(512, 1), 0); st != statusOK {
		t.Fatalf("status %d", st)
	}
	if st := b.ep.Stats(); !slices.Equal(st.Resumed, []int32{int32(os.Getpid())}) || len(st.Silent) > 0 {
		t.Fatalf("resumed %v, silent %v", st.Resumed, st.Silent)
	}
	f.conn.Close()
	// One that negotiates is no such case.
	start(t, b.path, g)
	if st := b.ep.Stats(); len(st.Resumed) > 0 || len(st.Silent) > 0 {
		t.Fatalf("resumed %v, silent %v", st.Resumed, st.Silent)
	}
}

// A connection without a word is named after a while.
func TestSilentFrontEndIsNamed(t *testing.T) {
	b := newBed(t, Config{})
	f := dial(t, b.path)
	hurry(t, "session", func() bool { return b.ep.Stats().Sessions == 1 })
	if st := b.ep.Stats(); len(st.Silent) > 0 {
		t.Fatal("named at once")
	}
	b.ep.mu.Lock()
	for s := range b.ep.sessions {
		s.born = s.born.Add(-2 * silentTime)
	}
	b.ep.mu.Unlock()
	if st := b.ep.Stats(); !slices.Equal(st.Silent, []int32{int32(os.Getpid())}) {
		t.Fatalf("silent: %v", st.Silent)
	}
	f.getU64(wire.GetFeatures)
	if st := b.ep.Stats(); len(st.Silent) > 0 {
		t.Fatal("it has spoken")
	}
}
