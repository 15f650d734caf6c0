package vfs

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path"
	"testing"
)

// verdict is what callers distinguish about an error.
func verdict(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, fs.ErrNotExist):
		return "no such file"
	case errors.Is(err, fs.ErrExist):
		return "exists"
	}
	return "refused"
}

// tree lists all names below dir, files with their contents.
func tree(t *testing.T, x FS, dir string) (out string) {
	names, err := x.List(dir)
	must(t, err)
	for _, name := range names {
		full := path.Join(dir, name)
		info, err := x.Stat(full)
		must(t, err)
		if info.IsDir() {
			out += name + "{" + tree(t, x, full) + "}"
		} else {
			out += name + "=" + get(t, x, full) + ";"
		}
	}
	return out
}

// TestTwins does the same random things to the host's file system and to its
// twin: they must answer alike and hold the same names in the end.
func TestTwins(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 0))
		m := NewMem()
		must(t, m.MkdirAll("/root"))
		twins := []target{{OS(), t.TempDir()}, {m, "/root"}}
		names := []string{"a", "b", "d", "d/a", "d/b", "d/e", "d/e/a", "e", "e/a"}
		for step := range 400 {
			op, one, two := rng.IntN(7), names[rng.IntN(len(names))], names[rng.IntN(len(names))]
			contents := fmt.Sprint(step)
			var got [2]string
			for i, x := range twins {
				a, b := x.name(one), x.name(two)
				var err error
				switch op {
				case 0, 1:
					var f File
					if f, err = x.Open(a, Create); err == nil {
						_, err = f.WriteAt([]byte(contents), 0)
						must(t, f.Close())
					}
				case 2:
					err = x.Remove(a)
				case 3:
					err = x.Rename(a, b)
				case 4:
					err = x.Link(a, b)
				case 5:
					err = x.MkdirAll(a)
				case 6:
					if rng.IntN(4) == 0 && i == 0 || i == 1 && got[0] != "" {
						err = x.RemoveAll(a)
					} else {
						continue
					}
				}
				got[i] = verdict(err)
			}
			if got[0] != got[1] {
				t.Fatalf("seed %d, step %d: op %d on %s, %s: host %s, twin %s", seed, step, op, one, two, got[0], got[1])
			}
		}
		if host, twin := tree(t, twins[0], twins[0].dir), tree(t, twins[1], twins[1].dir); host != twin {
			t.Fatalf("seed %d: host %s, twin %s", seed, host, twin)
		}
	}
}
