package disk

import (
	"math/rand/v2"
	"testing"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

// TestWipe: a wiped ASD is gone with its ID, whatever the power failed at on the way;
// another one is not touched, nor one that is open.
func TestWipe(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", crashOptions)
	id := d.ID()
	must(t, d.Apply(background, nil, []asd.Update{asd.Put("large", asd.NewValue(make([]byte, 20_000))), asd.Put("small", asd.NewValue(nil))}, guest))
	wantErr(t, Wipe(fsys, "/asd", id), vfs.ErrLocked)
	must(t, d.Close())
	wantErr(t, Wipe(fsys, "/asd", "another"), asd.ErrWrongASD)
	must(t, open(t, fsys, "/asd", crashOptions).Close())

	rng := rand.New(rand.NewPCG(1, 7))
	var cuts []*vfs.Mem
	crashHook(fsys, rng, 1, func(vfs.Op, string) { cuts = append(cuts, fsys.CrashClone(rng)) })
	must(t, Wipe(fsys, "/asd", id))
	fsys.SetHook(nil)
	for i, c := range append(cuts, fsys) {
		if err := Wipe(c, "/asd", id); err != nil && !isNotExist(err) {
			t.Fatalf("repeated after cut %d: %v", i, err)
		}
		again := open(t, c, "/asd", crashOptions)
		if again.ID() == id {
			t.Fatalf("cut %d: ID %s is used again", i, id)
		}
		if st := stats(t, again); st.Keys != 0 {
			t.Fatalf("cut %d: %d keys", i, st.Keys)
		}
		must(t, again.Close())
	}
	if len(cuts) < 4 {
		t.Errorf("only %d cuts", len(cuts))
	}
}
