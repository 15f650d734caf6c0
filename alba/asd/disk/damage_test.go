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
)

// TestP5EveryDamagedByteOfAFileIsFound flips a bit in every part of a value file:
// no read gives wrong bytes, Verify names the block, and a new put repairs.
func TestP5EveryDamagedByteOfAFileIsFound(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", testOptions)
	defer d.Close()
	data := asdtest.Bytes(rand.New(rand.NewPCG(1, 1)), 40_000)
	v := asd.NewValue(data)
	head := fileHeadBytes("key", len(v.CRCs))
	offsets := []int{0, 8, 12, 16, 24, 32, 36, 40, 44, 46, 48, 51, 55, 51 + 4*len(v.CRCs) - 1}
	for off := head; off < head+len(data); off += 1777 {
		offsets = append(offsets, off)
	}
	for _, off := range append(offsets, head+len(data)-1) {
		must(t, d.Apply(background, nil, []asd.Update{asd.Put("key", v)}, guest))
		waitForFiles(t, fsys, "/asd", 1)
		must(t, fsys.Corrupt(valueFiles(t, fsys, "/asd")[0], int64(off)))
		_, err := d.Get(background, "key", guest)
		wantErr(t, err, asd.ErrCorrupt)
		p := make([]byte, 4096)
		for block := range len(v.CRCs) - 1 {
			_, err := d.ReadAt(background, "key", p, int64(block)*4096, guest)
			hit := off < head || (off-head)/4096 == block
			if hit {
				wantErr(t, err, asd.ErrCorrupt)
			} else if err != nil || !bytes.Equal(p, data[block*4096:][:4096]) {
				t.Fatalf("byte %d is bad, and block %d can't be read: %v", off, block, err)
			}
		}
		res, err := asd.VerifyAll(background, d, asd.VerifyOptions{})
		must(t, err)
		if len(res.Bad) != 1 || res.Bad[0].Key != "key" {
			t.Fatalf("byte %d: verify says %+v", off, res.Bad)
		}
		if b := res.Bad[0]; off >= head && (b.Off > int64(off-head) || b.Off+b.Size <= int64(off-head)) {
			t.Fatalf("byte %d of the data: verify says %+v", off-head, b)
		}
	}
	must(t, d.Apply(background, nil, []asd.Update{asd.Put("key", v)}, guest))
	got, err := d.Get(background, "key", guest)
	if err != nil || !bytes.Equal(got.Data, data) {
		t.Fatal("not repaired:", err)
	}
	if s, _ := d.Stats(background); s.CorruptBlocks == 0 || s.Damaged != "" || s.Keys != 1 {
		t.Fatalf("%+v", s)
	}
}

func TestMissingFile(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", testOptions)
	defer d.Close()
	v := asd.NewValue(make([]byte, 40_000))
	must(t, d.Apply(background, nil, []asd.Update{asd.Put("key", v)}, guest))
	must(t, fsys.Remove(valueFiles(t, fsys, "/asd")[0]))
	_, err := d.Get(background, "key", guest)
	wantErr(t, err, asd.ErrCorrupt)
	res, err := asd.VerifyAll(background, d, asd.VerifyOptions{})
	if err != nil || len(res.Bad) != 1 || res.Bad[0].Size != 0 {
		t.Fatalf("%+v, %v", res, err)
	}
	must(t, d.Apply(background, []asd.Assert{asd.AssertSum("key", 40_000, v.Sum())}, []asd.Update{asd.Put("key", v)}, guest))
	_, err = d.Get(background, "key", guest)
	must(t, err)
}

// TestSwappedFiles: a file with sound checksums under another's name is found.
func TestSwappedFiles(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", testOptions)
	defer d.Close()
	must(t, d.Apply(background, nil, []asd.Update{asd.Put("key", asd.NewValue(make([]byte, 40_000)))}, guest))
	must(t, d.Apply(background, nil, []asd.Update{asd.Put("key", asd.NewValue(make([]byte, 40_001))), asd.Put("other", asd.NewValue(make([]byte, 40_002)))}, guest))
	waitForFiles(t, fsys, "/asd", 2)
	files := valueFiles(t, fsys, "/asd")
	must(t, fsys.Rename(files[1], files[0]))
	_, err := d.Get(background, "key", guest)
	wantErr(t, err, asd.ErrCorrupt)
	_, err = d.Get(background, "other", guest)
	wantErr(t, err, asd.ErrCorrupt)
}

// TestP5DamagedTable: a bit that rots in the key-value store's tables is found by
// Verify, and never gives a read wrong bytes.
func TestP5DamagedTable(t *testing.T) {
	fsys := vfs.NewMem()
	opts := testOptions
	d := open(t, fsys, "/asd", opts)
	m := asdtest.NewModel("m")
	for i := range 200 {
		u := []asd.Update{asd.Put(fmt.Sprint("key-", i), asd.NewValue(asdtest.Bytes(rand.New(rand.NewPCG(1, uint64(i))), 500)))}
		must(t, d.Apply(background, nil, u, guest))
		must(t, m.Apply(background, nil, u, guest))
	}
	must(t, d.Close())
	d = open(t, fsys, "/asd", opts) // writes the log's contents into tables
	must(t, d.db.Flush())
	must(t, d.Close())
	size, name := largestTable(t, fsys)
	found := 0
	const footer = 64 // at most; some of its bytes say nothing, and their damage does none
	for off := int64(0); off < size-footer; off += size / 40 {
		cut, err := fsys.CrashClone(rand.New(rand.NewPCG(1, 1))).KillClone()
		must(t, err)
		must(t, cut.Corrupt(name, off))
		d, err := Open(cut, "/asd", opts)
		if err != nil {
			found++
			continue // the disk says so itself
		}
		for i := range 200 {
			key := fmt.Sprint("key-", i)
			got, err := d.Get(background, key, guest)
			want, _ := m.Get(background, key, guest)
			if err == nil && !bytes.Equal(got.Data, want.Data) {
				t.Fatalf("byte %d is bad: key %s has wrong bytes", off, key)
			}
			if err != nil && !errors.Is(err, asd.ErrCorrupt) {
				t.Fatalf("byte %d is bad: %v", off, err)
			}
		}
		res, err := asd.VerifyAll(background, d, asd.VerifyOptions{})
		if err != nil || len(res.Bad) == 0 {
			t.Errorf("byte %d of %d is bad: verify says %+v, %v", off, size, res, err)
		} else {
			found++
			if s, _ := d.Stats(background); s.Damaged == "" {
				t.Errorf("byte %d is bad: stats don't say so", off)
			}
		}
		_ = d.Close()
	}
	if found == 0 {
		t.Fatal("nothing was found")
	}
}

// TestMissingTable: a table of the key-value store that is gone is found by Verify,
// which takes none for gone that compaction has removed.
func TestMissingTable(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", testOptions)
	defer d.Close()
	put := func(i int) {
		must(t, d.Apply(background, nil, []asd.Update{asd.Put(fmt.Sprint("key-", i), asd.NewValue(make([]byte, 500)))}, guest))
	}
	put(0)
	must(t, d.db.Flush())
	listed, err := d.tableNames()
	if err != nil || len(listed) == 0 {
		t.Fatalf("tables %v, %v", listed, err)
	}
	put(1)
	must(t, d.db.Flush())
	must(t, d.db.Compact(background, []byte{0}, []byte{255}, false))
	eventually(t, "a table is removed that was compacted", func() bool {
		_, err := fsys.Stat("/asd/kv/" + listed[0])
		return isNotExist(err)
	})
	v := &verifier{d: d, max: 1 << 20}
	if err := v.table(background, listed[0]); err != nil || len(v.res.Bad) > 0 {
		t.Fatalf("%s was compacted meanwhile: %+v, %v", listed[0], v.res, err)
	}
	names, err := d.tableNames()
	if err != nil || len(names) == 0 {
		t.Fatalf("tables %v, %v", names, err)
	}
	name := "/asd/kv/" + names[0]
	must(t, fsys.Remove(name))
	if res, err := asd.VerifyAll(background, d, asd.VerifyOptions{}); err != nil || len(res.Bad) == 0 {
		t.Fatalf("%s is gone: verify says %+v, %v", name, res, err)
	}
}

func largestTable(t *testing.T, fsys vfs.FS) (size int64, name string) {
	t.Helper()
	names, err := fsys.List("/asd/kv")
	must(t, err)
	for _, n := range names {
		if strings.HasSuffix(n, ".sst") {
			info, err := fsys.Stat(path.Join("/asd/kv", n))
			must(t, err)
			if info.Size() > size {
				size, name = info.Size(), path.Join("/asd/kv", n)
			}
		}
	}
	if name == "" {
		t.Fatal("no table")
	}
	return size, name
}

// TestP8FullDisk: a full ASD refuses puts, serves reads and deletes, and takes
// puts again when there is room; a restart changes nothing about that.
func TestP8FullDisk(t *testing.T) {
	for name, limit := range map[string]func(*vfs.Mem, *Options){
		"file system": func(m *vfs.Mem, _ *Options) { m.SetCapacity(32 << 20) },
		"capacity":    func(_ *vfs.Mem, o *Options) { o.CapacityBytes = 24 << 20 },
		"no reserve":  func(m *vfs.Mem, o *Options) { m.SetCapacity(32 << 20); o.ReserveBytes = 1 },
	} {
		t.Run(name, func(t *testing.T) {
			fsys := vfs.NewMem()
			opts := testOptions
			opts.ReserveBytes = 8 << 20
			limit(fsys, &opts)
			d := open(t, fsys, "/asd", opts)
			m := asdtest.NewModel("m")
			apply := func(us ...asd.Update) error {
				err := d.Apply(background, nil, us, guest)
				if err == nil {
					must(t, m.Apply(background, nil, us, guest))
				}
				return err
			}
			n := 0
			var err error
			for ; err == nil && n < 100; n++ {
				err = apply(asd.Put(fmt.Sprint("key-", n), asd.NewValue(make([]byte, 1<<20))))
			}
			wantErr(t, err, asd.ErrFull)
			if opts.ReserveBytes > 1 {
				for ; err == nil; n++ { // what is left, in smaller pieces
					err = apply(asd.Put(fmt.Sprint("key-", n), asd.NewValue(make([]byte, 4096))))
				}
				wantErr(t, err, asd.ErrFull)
				must(t, asdtest.Compare(d, m))
				must(t, apply(asd.RaiseEpoch("ns", 4)))
				must(t, d.Close())
				d = open(t, fsys, "/asd", opts)
			}
			must(t, asdtest.Compare(d, m))
			for i := range 5 {
				must(t, apply(asd.Delete(fmt.Sprint("key-", i))))
			}
			waitForFiles(t, fsys, "/asd", liveFiles(m, defaultInlineBytes))
			if opts.ReserveBytes > 1 {
				must(t, apply(asd.Put("new", asd.NewValue(make([]byte, 2<<20)))))
			}
			must(t, asdtest.Compare(d, m))
			must(t, d.Close())
		})
	}
}

func TestFullFlag(t *testing.T) {
	fsys := vfs.NewMem()
	fsys.SetCapacity(16 << 20)
	opts := testOptions
	opts.ReserveBytes = 16 << 20
	d := open(t, fsys, "/asd", opts)
	defer d.Close()
	if s, err := d.Stats(background); err != nil || !s.Full {
		t.Fatalf("%+v, %v", s, err)
	}
	fsys.SetCapacity(64 << 20)
	if s, err := d.Stats(background); err != nil || s.Full || s.Capacity > 64<<20 {
		t.Fatalf("%+v, %v", s, err)
	}
}

// TestReplacedUnderAReader: readers of a key that is put all the time get one of
// its values, whole.
func TestReplacedUnderAReader(t *testing.T) {
	d := open(t, vfs.NewMem(), "/asd", testOptions)
	defer d.Close()
	must(t, d.Apply(background, nil, []asd.Update{asd.Put("key", versioned(0, 20_000))}, guest))
	done := make(chan error)
	go func() {
		var err error
		for v := 1; v <= 200 && err == nil; v++ {
			err = d.Apply(background, nil, []asd.Update{asd.Put("key", versioned(v, 20_000+v))}, guest)
		}
		done <- err
	}()
	last := 0
	for {
		select {
		case err := <-done:
			must(t, err)
			return
		default:
		}
		if v := version(t, d, "key"); v < last {
			t.Fatalf("version %d after %d", v, last)
		} else {
			last = v
		}
	}
}

// TestP5SealedValueThatChanged: a writer in this process whose memory changes after it
// computed the checksums is believed when it writes; its readers get no wrong byte.
func TestP5SealedValueThatChanged(t *testing.T) {
	for _, size := range []int{5000, 50_000} { // in the key-value store, and as a file
		d := open(t, vfs.NewMem(), "/asd", testOptions)
		defer d.Close()
		data := asdtest.Bytes(rand.New(rand.NewPCG(2, 2)), size)
		v := asd.SealBlocks(data, asd.DefaultBlockSize)
		data[4500] ^= 1
		must(t, d.Apply(background, nil, []asd.Update{asd.Put("key", v)}, guest))
		_, err := d.Get(background, "key", guest)
		wantErr(t, err, asd.ErrCorrupt)
		_, err = d.ReadAt(background, "key", make([]byte, 100), 4400, guest)
		wantErr(t, err, asd.ErrCorrupt)
		_, err = d.ReadAt(background, "key", make([]byte, 4096), 0, guest)
		must(t, err)
		wrong := v
		wrong.CRCs = wrong.CRCs[1:]
		wantErr(t, d.Apply(background, nil, []asd.Update{asd.Put("key", wrong)}, guest), asd.ErrInvalid)
	}
}
