package disk

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

// partsOf cuts contents into values of size bytes with the keys prefix-0 and so on.
func partsOf(prefix string, contents []byte, size int) (parts []asd.FilePart) {
	for off := 0; off < len(contents); off += size {
		p := contents[off:min(off+size, len(contents))]
		v := asd.NewValue(p)
		parts = append(parts, asd.FilePart{Key: fmt.Sprintf("%s-%d", prefix, len(parts)), Off: int64(off), Size: int64(len(p)), CRCs: v.CRCs})
	}
	return parts
}

// writeForeign makes a file that an ASD may adopt.
func writeForeign(t testing.TB, fsys vfs.FS, name string, size int, seed uint64) []byte {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	f, err := fsys.Open(name, vfs.Create)
	must(t, err)
	_, err = f.WriteAt(b, 0)
	must(t, err)
	must(t, f.Close()) // not synced: Adopt does that
	return b
}

// TestAdoptedFile: parts of a file are values like any others, by every way of
// reading, after the file's own name is gone and after a restart; deleted, they give
// their names back one by one.
func TestAdoptedFile(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", crashOptions)
	const size, part = 10*4096 + 100, 3 * 4096
	b := writeForeign(t, fsys, "/sco", size, 1)
	parts := partsOf("a", b, part)
	mark := asd.NewValue([]byte("manifest"))
	must(t, d.Adopt(background, "/sco", parts, []asd.Assert{asd.AssertAbsent("mark")}, []asd.Update{asd.Put("mark", mark), asd.RaiseEpoch("ns", 3)}, guest))
	wantErr(t, d.Adopt(background, "/sco", parts, []asd.Assert{asd.AssertAbsent("mark")}, nil, guest), asd.ErrAssert)
	wantErr(t, d.Adopt(background, "/sco", parts, []asd.Assert{asd.AssertEpoch("ns", 2)}, nil, guest), asd.ErrStaleEpoch)
	waitForFiles(t, fsys, "/asd", len(parts)) // those that were refused are gone
	must(t, fsys.Remove("/sco"))
	before, err := d.Stats(background)
	must(t, err)
	if before.Bytes != size+int64(len(mark.Data)) || before.Keys != int64(len(parts))+1 {
		t.Fatalf("stats %+v", before)
	}
	for range 2 {
		checkParts(t, d, parts, b)
		must(t, d.Close())
		d = open(t, fsys, "/asd", crashOptions)
	}
	must(t, d.Apply(background, nil, []asd.Update{asd.Put(parts[1].Key, asd.NewValue(make([]byte, 5000))), asd.Delete(parts[0].Key)}, guest))
	waitForFiles(t, fsys, "/asd", len(parts)-1)
	st, err := d.Stats(background)
	must(t, err)
	if want := before.Bytes - 2*part + 5000; st.Bytes != want {
		t.Fatalf("%d bytes of values, want %d", st.Bytes, want)
	}
	for _, p := range parts[1:] {
		must(t, d.Apply(background, nil, []asd.Update{asd.Delete(p.Key)}, guest))
	}
	waitForFiles(t, fsys, "/asd", 0)
	if left := d.state.Load().fileBytes; left != 0 {
		t.Fatalf("%d bytes of files are still counted", left)
	}
}

func checkParts(t *testing.T, d *Disk, parts []asd.FilePart, contents []byte) {
	t.Helper()
	keys := make([]string, len(parts))
	for i, p := range parts {
		keys[i] = p.Key
		want := contents[p.Off : p.Off+p.Size]
		v, err := d.Get(background, p.Key, guest)
		if err != nil || !bytes.Equal(v.Data, want) || v.Sum() != asd.SumOf(p.Size, asd.DefaultBlockSize, p.CRCs) {
			t.Fatalf("get %s: %d bytes, %v", p.Key, len(v.Data), err)
		}
		q := make([]byte, min(5000, p.Size-50))
		if _, err := d.ReadAt(background, p.Key, q, 50, guest); err != nil || !bytes.Equal(q, want[50:50+len(q)]) {
			t.Fatalf("read %s: %v", p.Key, err)
		}
	}
	infos, err := d.Exists(background, keys, guest)
	must(t, err)
	for i := range infos {
		if !infos[i].Exists || infos[i].Size != parts[i].Size {
			t.Fatalf("exists: %+v", infos[i])
		}
	}
	res, err := asd.VerifyAll(background, d, asd.VerifyOptions{})
	if err != nil || len(res.Bad) > 0 {
		t.Fatalf("verify: %+v, %v", res.Bad, err)
	}
}

// TestAdoptRefused: what can't be adopted is refused and leaves nothing.
func TestAdoptRefused(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", crashOptions)
	b := writeForeign(t, fsys, "/sco", 3*4096, 1)
	parts := partsOf("a", b, 2*4096)
	wantErr(t, d.Adopt(background, "/missing", parts, nil, nil, guest), asd.ErrNotAdopted)
	wantErr(t, d.Adopt(background, "/sco", nil, nil, nil, guest), asd.ErrInvalid)
	wantErr(t, d.Adopt(background, "/sco", []asd.FilePart{{Key: "k", Off: 100, Size: 1, CRCs: []uint32{1}}}, nil, nil, guest), asd.ErrInvalid)
	wantErr(t, d.Adopt(background, "/sco", []asd.FilePart{{Key: "k", Size: 4097, CRCs: []uint32{1}}}, nil, nil, guest), asd.ErrInvalid)
	beyond := append(parts, asd.FilePart{Key: "k", Off: 3 * 4096, Size: 1, CRCs: []uint32{1}})
	wantErr(t, d.Adopt(background, "/sco", beyond, nil, nil, guest), asd.ErrInvalid)
	waitForFiles(t, fsys, "/asd", 0)
	otherDisk := errors.New("invalid cross-device link")
	fsys.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpLink {
			return otherDisk
		}
		return nil
	})
	wantErr(t, d.Adopt(background, "/sco", parts, nil, nil, guest), asd.ErrNotAdopted)
	fsys.SetHook(nil)
	waitForFiles(t, fsys, "/asd", 0)
	must(t, d.Adopt(background, "/sco", parts, nil, nil, guest))
	checkParts(t, d, parts, b)
}

// TestP5DamageInAnAdoptedFile is found by reads and by verification, in its block
// alone; a put over it repairs it.
func TestP5DamageInAnAdoptedFile(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", crashOptions)
	b := writeForeign(t, fsys, "/sco", 4*4096, 1)
	parts := partsOf("a", b, 2*4096)
	must(t, d.Adopt(background, "/sco", parts, nil, nil, guest))
	f, err := fsys.Open("/sco", 0)
	must(t, err)
	_, err = f.WriteAt([]byte{b[3*4096+7] ^ 1}, 3*4096+7)
	must(t, err)
	must(t, f.Close())
	p := make([]byte, 4096)
	_, err = d.ReadAt(background, parts[1].Key, p, 4096, guest)
	wantErr(t, err, asd.ErrCorrupt)
	_, err = d.ReadAt(background, parts[1].Key, p, 0, guest)
	must(t, err)
	res, err := asd.VerifyAll(background, d, asd.VerifyOptions{})
	if err != nil || len(res.Bad) != 1 || res.Bad[0].Key != parts[1].Key || res.Bad[0].Off != 4096 || res.Bad[0].Size != 4096 {
		t.Fatalf("verify: %+v, %v", res.Bad, err)
	}
	must(t, d.Apply(background, nil, []asd.Update{asd.Put(parts[1].Key, asd.NewValue(b[2*4096:]))}, guest))
	checkParts(t, d, parts, b)
}

// TestP1PowerLossWhileAdopting: cut off at any call, an Adopt was done whole or not at
// all, what it acknowledged is there although the file's own name is not, and
// nothing is left over.
func TestP1PowerLossWhileAdopting(t *testing.T) {
	const size, part = 5 * 4096, 2 * 4096
	type moment struct {
		fsys  *vfs.Mem
		acked int // files adopted
		op    string
	}
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", crashOptions)
	contents := make([][]byte, 6)
	for i := range contents {
		contents[i] = writeForeign(t, fsys, fmt.Sprintf("/sco-%d", i), size, uint64(i))
	}
	must(t, fsys.SyncDir("/"))
	var mu sync.Mutex
	var moments []moment
	acked, step := 0, 0
	rng := rand.New(rand.NewPCG(7, 7))
	fsys.SetHook(func(op vfs.Op, name string) error {
		mu.Lock()
		defer mu.Unlock()
		if step++; len(moments) < 150 {
			moments = append(moments, moment{fsys.CrashClone(rng), acked, fmt.Sprintf("step %d, %v %s", step, op, name)})
		}
		return nil
	})
	for i := range contents {
		must(t, d.Adopt(background, fmt.Sprintf("/sco-%d", i), partsOf(fmt.Sprint("f", i), contents[i], part), nil, nil, guest))
		mu.Lock()
		acked++
		mu.Unlock()
		must(t, fsys.Remove(fmt.Sprintf("/sco-%d", i)))
	}
	fsys.SetHook(nil)
	mu.Lock()
	defer mu.Unlock()
	if len(moments) < 20 {
		t.Fatalf("only %d moments", len(moments))
	}
	for _, m := range moments {
		checkAdopted(t, m.fsys, m.op, m.acked, contents, part)
	}
}

// checkAdopted opens what is left: the acknowledged files are there, and at most one
// more.
func checkAdopted(t *testing.T, fsys *vfs.Mem, when string, acked int, contents [][]byte, part int) {
	t.Helper()
	d, err := Open(fsys, "/asd", crashOptions)
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	defer func() { must(t, d.Close()) }()
	files := 0
	for i, b := range contents {
		parts := partsOf(fmt.Sprint("f", i), b, part)
		there := 0
		for _, p := range parts {
			v, err := d.Get(background, p.Key, guest)
			switch {
			case err == nil && bytes.Equal(v.Data, b[p.Off:p.Off+p.Size]):
				there++
			case !errors.Is(err, asd.ErrNoKey):
				t.Fatalf("%s: %s: %v", when, p.Key, err)
			}
		}
		if there != 0 && there != len(parts) || there == 0 && i < acked || there > 0 && i > acked {
			t.Fatalf("%s: %d of %d parts of file %d, %d files were acknowledged", when, there, len(parts), i, acked)
		}
		files += there
	}
	waitForFiles(t, fsys, "/asd", files)
}
