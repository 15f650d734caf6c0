package repair_test

import (
	"strings"
	"sync/atomic"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd/asdtest"
)

// TestVerifyBesideDeletions: an object that is deleted after verification read its
// manifest is no problem; one whose shard is gone is.
func TestVerifyBesideDeletions(t *testing.T) {
	r := newRig(t, 3, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}), nil)
	r.put("deleted", 100_000)
	r.put("kept", 100_000)
	r.settle()
	var once atomic.Bool
	for _, d := range r.Disks {
		d.Faulty.Set(asdtest.Fault{Hook: func(op, _ string) error {
			if op == "Exists" && once.CompareAndSwap(false, true) {
				must(t, r.p.Delete(t.Context(), ns, "deleted", 1))
				albatest.Eventually(t, "the shards are deleted", func() bool {
					kvs, err := r.Reg.List(t.Context(), alba.TrashPrefix)
					return err == nil && len(kvs) == 0
				})
			}
			return nil
		}})
	}
	if n := verifyOnce(t, r.m); n != 0 || !once.Load() {
		t.Fatalf("%d problems (deleted meanwhile: %v), want none", n, once.Load())
	}
	id, key, _ := strings.Cut(r.keys(alba.FragmentPrefix)[0], " ")
	r.Disk(id).Drop(t, key)
	if n := verifyOnce(t, r.m); n != 1 {
		t.Fatalf("%d problems, want one", n)
	}
}
