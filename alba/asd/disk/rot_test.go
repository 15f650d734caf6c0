package disk

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path"
	"strings"
	"testing"

	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/vfs"

	kvrecord "github.com/cockroachdb/pebble/v2/record"
)

// rotKeys have values in tables, in the log and in files.
const rotKeys = 24

// rotRig fills an ASD: the first half of the keys lies in tables, unless it is the
// ASD's first run, the other in the log; two are put twice, and a few have files.
func rotRig(t *testing.T, first bool) (*vfs.Mem, *Disk, *asdtest.Model) {
	t.Helper()
	fsys := vfs.NewMem()
	d, m := open(t, fsys, "/asd", testOptions), asdtest.NewModel("m")
	put := func(i, seed int) {
		size := 300
		if i%8 == 7 {
			size = 20_000
		}
		v := asd.NewValue(asdtest.Bytes(rand.New(rand.NewPCG(uint64(seed), uint64(i))), size))
		us := []asd.Update{asd.Put(fmt.Sprint("key-", i), v), asd.RaiseEpoch(fmt.Sprint("ns-", i), 3)}
		must(t, d.Apply(background, nil, us, guest))
		must(t, m.Apply(background, nil, us, guest))
	}
	for i := range rotKeys / 2 {
		put(i, 1)
	}
	if !first {
		must(t, d.Close())
		d = open(t, fsys, "/asd", testOptions)
	}
	for i := rotKeys / 2; i < rotKeys; i++ {
		put(i, 1)
	}
	put(0, 2)
	put(rotKeys-2, 2)
	waitForFiles(t, fsys, "/asd", liveFiles(m, defaultInlineBytes))
	return fsys, d, m
}

// filesBelow lists all files of a directory.
func filesBelow(t *testing.T, fsys vfs.FS, dir string) (list []string) {
	t.Helper()
	names, err := fsys.List(dir)
	must(t, err)
	for _, n := range names {
		n = path.Join(dir, n)
		info, err := fsys.Stat(n)
		must(t, err)
		if info.IsDir() {
			list = append(list, filesBelow(t, fsys, n)...)
		} else if info.Size() > 0 {
			list = append(list, n)
		}
	}
	return list
}

// unreadable counts the keys and epochs that can't be read and fails for each that is
// missing or wrong.
func unreadable(t *testing.T, d *Disk, m *asdtest.Model, when string) (n int) {
	t.Helper()
	for i := range rotKeys {
		key := fmt.Sprint("key-", i)
		want, err := m.Get(background, key, guest)
		must(t, err)
		got, err := d.Get(background, key, guest)
		if errors.Is(err, asd.ErrCorrupt) {
			n++
		} else if err != nil || !bytes.Equal(got.Data, want.Data) {
			t.Errorf("%s: %s is lost or has another value: %v", when, key, err)
		}
		epoch, err := d.epoch(fmt.Sprint("ns-", i))
		if errors.Is(err, asd.ErrCorrupt) {
			n++
		} else if err != nil || epoch != 3 {
			t.Errorf("%s: epoch of ns-%d is %d: %v", when, i, epoch, err)
		}
	}
	return n
}

// offsets of a file to be damaged: all of a small one, some of a large one.
func offsets(size int64) (list []int64) {
	for off := int64(0); off < size; off += max(1, size/9) {
		list = append(list, off)
	}
	return list
}

// TestP5RotAtRest: a bit that rots in any file of an ASD that does not run, stopped or
// killed, is never taken for less data: the next start refuses it or mends it, or
// reads name it, and Verify too.
func TestP5RotAtRest(t *testing.T) {
	for _, how := range []string{"stopped", "killed", "killed in its first run"} {
		t.Run(how, func(t *testing.T) {
			fsys, d, m := rotRig(t, how == "killed in its first run")
			if how == "stopped" {
				must(t, d.Close())
			} else {
				// Of a daemon that died, damage to its last write is a write cut short.
				must(t, d.Apply(background, nil, []asd.Update{asd.RaiseEpoch("other", 1)}, guest))
				killed, err := fsys.KillClone()
				must(t, err)
				fsys = killed
			}
			refused, mended, found := map[string]int{}, map[string]int{}, map[string]int{}
			for _, name := range filesBelow(t, fsys, "/asd") {
				info, err := fsys.Stat(name)
				must(t, err)
				for _, off := range offsets(info.Size()) {
					if last := lastWrite(t, fsys, name); how != "stopped" && off >= last {
						continue
					}
					kind := strings.TrimRight(strings.TrimSuffix(path.Base(name), twinSuffix), "0123456789")
					rotted := fsys.CrashClone(rand.New(rand.NewPCG(1, 1)))
					must(t, rotted.Corrupt(name, off))
					d, err := Open(rotted, "/asd", testOptions)
					if err != nil {
						refused[kind]++
						continue
					}
					when := fmt.Sprintf("byte %d of %s", off, name)
					bad := unreadable(t, d, m, when)
					res, err := asd.VerifyAll(background, d, asd.VerifyOptions{})
					if err != nil || bad > 0 && len(res.Bad) == 0 {
						t.Errorf("%s: %d can't be read, Verify says %+v, %v", when, bad, res.Bad, err)
					}
					if len(res.Bad) > 0 {
						found[kind]++
					} else if d.n.corruptBlocks.Load() > 0 {
						mended[kind]++
					}
					must(t, d.Close())
				}
			}
			t.Logf("refused %v, mended %v, found by Verify %v", refused, mended, found)
			if refused["identity"] == 0 || mended["MANIFEST-"] == 0 || found[""] == 0 {
				t.Error("some kind of file was not damaged: the test does not reach what it is for")
			}
		})
	}
}

// lastWrite is where the last chunk of a log begins; behind the end for other files.
func lastWrite(t *testing.T, fsys vfs.FS, name string) (last int64) {
	t.Helper()
	b, err := readAll(fsys, name)
	must(t, err)
	number, ok := walNumber(name)
	if !ok {
		return int64(len(b))
	}
	for off := int64(0); ; {
		end, _, ok := walChunk(b, off, number)
		if !ok {
			return last
		}
		last, off = off, end
	}
}

// TestP5RotWhileRunning: a bit that rots in what the key-value store reads only when it
// starts is found by Verify and mended, so that the next start has everything.
func TestP5RotWhileRunning(t *testing.T) {
	for _, kind := range []string{"identity", "MANIFEST-", twinSuffix, walSuffix} {
		t.Run(kind, func(t *testing.T) {
			fsys, d, m := rotRig(t, false)
			n := 0
			for _, name := range filesBelow(t, fsys, "/asd") {
				size, used := d.durable.of(name)
				if kind == "identity" && path.Base(name) == kind {
					size, used = 40, true
				} else if kind == twinSuffix && strings.HasSuffix(name, kind) {
					size, used = d.durable.of(strings.TrimSuffix(name, kind))
				} else if !strings.Contains(name, kind) {
					continue
				}
				if !used {
					continue // Pebble keeps old ones for a while
				}
				n++
				must(t, fsys.Corrupt(name, size/2))
				res, err := asd.VerifyAll(background, d, asd.VerifyOptions{})
				if err != nil || len(res.Bad) != 1 || res.Bad[0].Key != "" {
					t.Fatalf("%s: Verify says %+v, %v", name, res.Bad, err)
				}
				if res, err = asd.VerifyAll(background, d, asd.VerifyOptions{}); err != nil || len(res.Bad) > 0 {
					t.Fatalf("%s: Verify after that says %+v, %v", name, res.Bad, err)
				}
				if s, err := d.Stats(background); err != nil || s.Damaged != "" || s.CorruptBlocks == 0 {
					t.Fatalf("%s: %+v, %v", name, s, err)
				}
			}
			if n == 0 {
				t.Fatal("no such file")
			}
			killed, err := fsys.KillClone()
			must(t, err)
			d = open(t, killed, "/asd", testOptions)
			defer d.Close()
			if bad := unreadable(t, d, m, "after the next start"); bad > 0 {
				t.Errorf("%d can't be read", bad)
			}
		})
	}
}

// TestLastWriteIsFollowed: when nothing is written for a while another record follows the
// last one, so that damage to that is no write cut short.
func TestLastWriteIsFollowed(t *testing.T) {
	fsys, d, _ := rotRig(t, false)
	defer d.Close()
	must(t, d.Apply(background, nil, []asd.Update{asd.Put("the last one", asd.NewValue(nil))}, guest))
	eventually(t, "another record follows", func() bool {
		for _, name := range d.durable.list() {
			if _, ok := walNumber(name); !ok {
				continue
			}
			b, err := readAll(fsys, name)
			must(t, err)
			if at := bytes.Index(b, []byte("the last one")); at >= 0 && lastWrite(t, fsys, name) > int64(at) {
				return true
			}
		}
		return false
	})
}

// TestBothManifestsDamaged: where the copies of the manifest contradict each other the
// ASD is refused, not opened with less.
func TestBothManifestsDamaged(t *testing.T) {
	a, b := manifestOf(t, "one", "two"), manifestOf(t, "one", "three")
	if _, err := better(a, b); !errors.Is(err, errTwins) {
		t.Fatalf("error %v", err)
	}
	if got, err := better(a, manifestOf(t, "one")); err != nil || !bytes.Equal(got, a) {
		t.Fatalf("%q, %v", got, err)
	}
	if got, err := better(manifestOf(t, "one"), a); err != nil || !bytes.Equal(got, a) {
		t.Fatalf("%q, %v", got, err)
	}
}

// TestSalvage: an ASD whose log is damaged is refused, keeps its files, and opens with
// what the log held before the damage when that is asked for.
func TestSalvage(t *testing.T) {
	fsys, d, _ := rotRig(t, false)
	must(t, d.Close())
	var log string
	for _, name := range filesBelow(t, fsys, "/asd/kv") {
		if _, ok := walNumber(name); ok {
			log = name
		}
	}
	whole, err := readAll(fsys, log)
	must(t, err)
	end, _ := walEnd(whole, logNumber(t, log))
	must(t, fsys.Corrupt(log, end/2))
	before, err := readAll(fsys, log)
	must(t, err)
	if _, err := Open(fsys, "/asd", testOptions); !errors.Is(err, asd.ErrCorrupt) || !strings.Contains(err.Error(), "salvage") {
		t.Fatalf("opened: %v", err)
	}
	if after, err := readAll(fsys, log); err != nil || !bytes.Equal(before, after) {
		t.Fatalf("the refusal changed the log: %v", err)
	}
	opts := testOptions
	opts.Salvage = true
	must(t, open(t, fsys, "/asd", opts).Close())
	if kept, err := readAll(fsys, log+".damaged"); err != nil || !bytes.Equal(before, kept) {
		t.Fatalf("the log was not kept: %v", err)
	}
	d = open(t, fsys, "/asd", testOptions)
	defer d.Close()
	for i := range rotKeys / 2 {
		key := fmt.Sprint("key-", i)
		if _, err := d.Get(background, key, guest); err != nil {
			t.Errorf("%s, which was in a table: %v", key, err)
		}
	}
	res, err := asd.VerifyAll(background, d, asd.VerifyOptions{})
	if err != nil || len(res.Bad) > 0 {
		t.Fatalf("Verify says %+v, %v", res.Bad, err)
	}
	must(t, d.Apply(background, nil, []asd.Update{asd.Put("key-0", asd.NewValue(nil))}, guest))
}

// manifestOf returns the bytes of a manifest with these records.
func manifestOf(t *testing.T, records ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := kvrecord.NewWriter(&b)
	for _, r := range records {
		_, err := w.WriteRecord([]byte(r))
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

// logNumber returns the number of a log.
func logNumber(t *testing.T, log string) uint32 {
	t.Helper()
	n, ok := walNumber(log)
	if !ok {
		t.Fatalf("%q is no log", log)
	}
	return n
}
