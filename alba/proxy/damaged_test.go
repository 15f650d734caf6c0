package proxy_test

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/proxy"
)

// TestP5DamagedForGood: an object of which too few shards are whole is told from one whose
// devices are away, which can be read again when they are back.
func TestP5DamagedForGood(t *testing.T) {
	encrypted := func(ps alba.Preset) alba.Preset {
		ps.Encryption = alba.EncryptAES256GCM
		return ps
	}
	one := albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1})
	two := albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1})
	for _, c := range []struct {
		what                string
		ps                  alba.Preset
		rot, drop, lie, off int // so many shards
		damaged             bool
	}{
		{"one copy, rotten", one, 1, 0, 0, 0, true},
		{"one copy, missing", one, 0, 1, 0, 0, true},
		{"one copy, away", one, 0, 0, 0, 1, false},
		{"one copy, encrypted, changed", encrypted(one), 0, 0, 1, 0, true},
		{"two rotten of 2+1", two, 2, 0, 0, 0, true},
		{"one rotten and one missing of 2+1", two, 1, 1, 0, 0, true},
		{"one rotten and one away of 2+1", two, 1, 0, 0, 1, false},
		{"two changed of 2+1, encrypted", encrypted(two), 0, 0, 2, 0, true},
		{"one changed and one away of 2+1, encrypted", encrypted(two), 0, 0, 1, 1, false},
	} {
		t.Run(c.what, func(t *testing.T) {
			cl := albatest.NewCluster(3, 3)
			p := cl.Proxy(t, c.ps, withKeys(t))
			must(t, p.CreateNamespace(t.Context(), ns))
			b := albatest.Pattern(1, 100_000)
			put(t, p, "o", b)
			m := manifest(t, cl, "o")
			var away []*albatest.Disk
			for shard, id := range m.Shards {
				d, key := cl.Disk(id), alba.FragmentKey(m.NamespaceID, m.Upload, shard, 0)
				switch {
				case shard < c.rot:
					for off := range int64(12) {
						d.Model.Corrupt(key, off*4096+5)
					}
				case shard < c.rot+c.drop:
					d.Drop(t, key)
				case shard < c.rot+c.drop+c.lie:
					v, err := d.Model.Get(t.Context(), key, asd.PriorityGuest)
					must(t, err)
					data := slices.Clone(v.Data)
					for off := 5; off < len(data); off += 4096 {
						data[off] ^= 1
					}
					must(t, d.Model.Apply(t.Context(), nil, []asd.Update{asd.Put(key, asd.NewValue(data))}, asd.PriorityGuest))
				case shard < c.rot+c.drop+c.lie+c.off:
					d.Faulty.Set(asdtest.Fault{Down: true})
					away = append(away, d)
				}
			}
			err := p.ReadAt(t.Context(), ns, "o", make([]byte, len(b)), 0)
			if err == nil || errors.Is(err, proxy.ErrLost) != c.damaged {
				t.Fatalf("read: %v; damaged for good should be %v", err, c.damaged)
			}
			for _, d := range away {
				d.Faulty.Set(asdtest.Fault{})
			}
			if !c.damaged {
				albatest.Eventually(t, "it can be read when the devices are back", func() bool {
					got := make([]byte, len(b))
					return p.ReadAt(t.Context(), ns, "o", got, 0) == nil && bytes.Equal(got, b)
				})
			}
		})
	}
}
