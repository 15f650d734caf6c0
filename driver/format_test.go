package driver

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"scoria/alba/vfs"
	"scoria/driver/lba"
	"scoria/driver/sco"
)

// UpdateGolden says that golden files are to be written anew.
var UpdateGolden = flag.Bool("update", false, "write the golden files anew")

const goldenBoot = "11111111-2222-3333-4444-555555555555"

// golden compares bytes, in hex, with a file.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	text := []byte(hex.Dump(got))
	if *UpdateGolden {
		if err := os.WriteFile(name, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(text, want) {
		t.Errorf("%s: stored as\n%s\nwant\n%s", name, text, want)
	}
}

// testLogSCO is a SCO of a volume that is not there, for the pool's sake.
func testLogSCO(number uint64, p *pool) *logSCO {
	v := &Volume{eng: &Engine{pool: p}, cfg: VolumeConfig{
		ID: uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff"), SCOBytes: 1 << 20, Epoch: 1,
	}}
	return newLogSCO(v, number, number-1, 0)
}

func openTestPool(t testing.TB, fsys vfs.FS, boot string) (*pool, bool) {
	t.Helper()
	p, adopted, err := openPool(fsys, "pool", minPoolChunks*chunkBytes, boot)
	if err != nil {
		t.Fatal(err)
	}
	return p, adopted
}

// TestPoolGolden: header and descriptors of the pool file are stored as drawn.
// Another version of the program may find the file of one that was killed.
func TestPoolGolden(t *testing.T) {
	golden(t, "testdata/pool-header.hex", encodePoolHeader(minPoolChunks, goldenBoot)[:64])
	p, adopted := openTestPool(t, vfs.NewMem(), goldenBoot)
	defer p.mapping.Close()
	if adopted {
		t.Fatal("a new pool is adopted")
	}
	l := testLogSCO(7, p)
	a, b := p.alloc(l, 3, chunkData), p.alloc(l, 0, chunkRecs)
	golden(t, "testdata/pool-descriptors.hex", append(bytes.Clone(p.descriptor(a)), p.descriptor(b)...))
}

// TestPoolAdopted: a pool of this boot is adopted with its size and its chunks;
// one of another boot, of another version or with a damaged header is not; a
// damaged descriptor frees its chunk and no other.
func TestPoolAdopted(t *testing.T) {
	build := func() (*vfs.Mem, []uint32) {
		fsys := vfs.NewMem()
		p, _ := openTestPool(t, fsys, goldenBoot)
		l := testLogSCO(7, p)
		var ids []uint32
		for slot := range uint32(4) {
			ids = append(ids, p.alloc(l, slot, chunkData))
		}
		copy(p.chunk(ids[2]), "what it holds")
		clone, err := fsys.KillClone()
		if err != nil {
			t.Fatal(err)
		}
		return clone, ids
	}
	fsys, ids := build()
	p, adopted, err := openPool(fsys, "pool", 4*minPoolChunks*chunkBytes, goldenBoot)
	if err != nil || !adopted || p.n != minPoolChunks || len(p.free) != minPoolChunks-4 || p.dirty.Load() != 4 {
		t.Fatalf("adopted %v, %v: %d chunks, %d free, %d dirty", adopted, err, p.n, len(p.free), p.dirty.Load())
	}
	if got := string(p.chunk(ids[2])[:13]); got != "what it holds" {
		t.Errorf("chunk holds %q", got)
	}
	if found := p.takeFound(testLogSCO(7, p).hdr.Volume); len(found) != 4 {
		t.Errorf("found %+v", found)
	}

	for bit := 0; bit < descriptorLen*8; bit += 7 {
		fsys, ids := build()
		off := int64(poolHeader + int(ids[1]-1)*descriptorLen + bit/8)
		damage(t, fsys, off, 1<<(bit%8))
		p, adopted := openTestPool(t, fsys, goldenBoot)
		if !adopted || p.dirty.Load() != 3 || len(p.free) != minPoolChunks-3 {
			t.Fatalf("bit %d: adopted %v, %d dirty, %d free", bit, adopted, p.dirty.Load(), len(p.free))
		}
		p.mapping.Close()
	}

	fsys, _ = build()
	if p, adopted := openTestPool(t, fsys, "another boot"); adopted || len(p.free) != minPoolChunks {
		t.Errorf("a pool of another boot is adopted: %v, %d free", adopted, len(p.free))
	}
	for _, off := range []int64{0, 8, 12, 16, 30, 60} {
		fsys, _ := build()
		damage(t, fsys, off, 2)
		if p, adopted := openTestPool(t, fsys, goldenBoot); adopted || len(p.free) != minPoolChunks {
			t.Errorf("header byte %d is damaged: adopted %v, %d free", off, adopted, len(p.free))
		}
	}
}

// damage flips bits of the pool file.
func damage(t *testing.T, fsys vfs.FS, off int64, mask byte) {
	t.Helper()
	f, err := fsys.Open("pool", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= mask
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
}

// FuzzOpenPool: a pool file of any bytes, with a header whose checksum is right,
// opens without a panic; every chunk is then either free or found.
func FuzzOpenPool(f *testing.F) {
	f.Add(encodePoolHeader(minPoolChunks, goldenBoot)[:64], make([]byte, 3*descriptorLen), uint16(64))
	f.Add(encodePoolHeader(1<<31, goldenBoot)[:64], []byte{1, 2, 3}, uint16(1))
	f.Add([]byte{}, []byte{}, uint16(0))
	p, _, err := openPool(vfs.NewMem(), "pool", minPoolChunks*chunkBytes, goldenBoot)
	if err != nil {
		f.Fatal(err)
	}
	l := testLogSCO(7, p)
	id := p.alloc(l, 1, chunkRecs)
	f.Add(encodePoolHeader(minPoolChunks, goldenBoot)[:64], bytes.Clone(p.descriptor(id)), uint16(70))
	f.Fuzz(func(t *testing.T, header, descriptors []byte, pages uint16) {
		fsys := vfs.NewMem()
		file, err := fsys.Open("pool", vfs.Create)
		if err != nil {
			t.Fatal(err)
		}
		if len(header) >= 64 {
			binary.LittleEndian.PutUint32(header[60:], crc32.Checksum(header[:60], castagnoli))
		}
		if err := file.Truncate(int64(pages) * 64 << 10); err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteAt(append(header, 0), 0); err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteAt(append(descriptors, 0), poolHeader); err != nil {
			t.Fatal(err)
		}
		file.Close()
		p, _, err := openPool(fsys, "pool", minPoolChunks*chunkBytes, goldenBoot)
		if err != nil {
			return
		}
		defer p.mapping.Close()
		found := 0
		for _, list := range p.found {
			found += len(list)
		}
		if uint32(len(p.free)+found) != p.n || p.dirty.Load() != uint32(found) {
			t.Fatalf("%d chunks, %d free, %d found, %d dirty", p.n, len(p.free), found, p.dirty.Load())
		}
	})
}

// tableVolume is a volume as far as a SCO table needs one.
func tableVolume() *Volume {
	v := &Volume{scos: map[uint64]*scoMeta{}}
	add := func(n uint64, m scoMeta, live int32) {
		m.number = n
		v.live.ensure(n)
		v.live.at(n).Store(live)
		v.scos[n] = &m
	}
	add(3, scoMeta{clusters: 256, records: 257, crcOff: 1 << 20, size: 1<<20 + 8192}, 200)
	return v
}

// compactedMeta is a SCO of a later generation.
func compactedMeta() *scoMeta {
	return &scoMeta{number: 4, clusters: 20, records: 21, crcOff: 22 * 4096, size: 26 * 4096,
		compact: &compacted{generation: 5, span: 256, keptCRC: 0xc0ffee}}
}

// testBlob is the driver's part of a root with something of everything.
func testBlob() *rootBlob {
	v := tableVolume()
	v.pins = map[uint64]uint32{3: 250}
	table, _ := v.table(noPins, noPins, v.live.copy())
	table = append(table, tableEntry{scoMeta: *compactedMeta(), live: 7, sealed: true, pinned: 20})
	return &rootBlob{
		scos: table,
		ancestry: []Ancestor{
			{Volume: uuid.UUID{1, 1}, Snapshot: uuid.UUID{2, 1}, SCO: 1, Object: 7},
			{Volume: uuid.UUID{1, 2}, Snapshot: uuid.UUID{2, 2}, SCO: 2, Object: 9},
		},
		objects: []uint32{10, 11, 12, 15},
		dropped: []seqRange{{4, 9}},
		snapshot: &Snapshot{
			ID: uuid.UUID{3}, Name: "monday", Created: time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC),
			Metadata: map[string]string{"by": "test"}, Size: 1 << 30, SCO: 3, Sequence: 12, LastObject: 15,
		},
	}
}

// TestTableGolden: the driver's part of a root is stored as drawn, and read; so are
// that of version 2, which knew of no generations, and that of version 1, which knew of
// no snapshots.
func TestTableGolden(t *testing.T) {
	want := testBlob()
	b, err := want.encode()
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/sco-table-3.hex", b)
	got, err := decodeBlob(b)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v, %v, want %+v", got, err, want)
	}
	second, err := decodeBlob(oldTable(t, "testdata/sco-table-2.hex"))
	want.scos = want.scos[:1]
	if err != nil || !reflect.DeepEqual(second, want) {
		t.Fatalf("%+v, %v, want %+v", second, err, want)
	}
	old, err := decodeBlob(oldTable(t, "testdata/sco-table.hex"))
	if err != nil || len(old.scos) != 1 || old.snapshot != nil {
		t.Fatalf("%+v, %v", old, err)
	}
	if e := old.scos[0]; e.number != 3 || e.clusters != 256 || e.records != 257 || e.crcOff != 1<<20 ||
		e.size != 1<<20+8192 || e.live != 200 || !e.sealed || e.pinned != 0 {
		t.Errorf("read %+v", e)
	}
}

// oldTable is a table as an earlier version stored it.
func oldTable(t testing.TB, name string) (b []byte) {
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(text), "\n") {
		if len(line) < 60 {
			continue
		}
		part, err := hex.DecodeString(strings.ReplaceAll(line[8:60], " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, part...)
	}
	return b
}

// FuzzDecodeBlob: any bytes are refused with ErrFormat, or read, and then written
// as read again.
func FuzzDecodeBlob(f *testing.F) {
	b, err := testBlob().encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(oldTable(f, "testdata/sco-table.hex"))
	f.Add(oldTable(f, "testdata/sco-table-2.hex"))
	f.Add([]byte{1, 0, 0, 0, 255, 255, 255, 255})
	f.Add([]byte{2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := decodeBlob(b)
		if err != nil {
			if !errors.Is(err, lba.ErrFormat) {
				t.Fatal(err)
			}
			return
		}
		again, err := got.encode()
		if err != nil {
			return // a date that has no text
		}
		if _, err := decodeBlob(again); err != nil {
			t.Fatalf("%v: written as %x", err, again)
		}
	})
}

// TestGarbageInPlaceOfFiles: a volume whose files hold anything at all opens or
// is refused; it never panics, and other volumes open.
func TestGarbageInPlaceOfFiles(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for range 60 {
		fsys := vfs.NewMem()
		eng, err := OpenEngine(context.Background(), Config{
			FS: fsys, DataDir: "data", PoolFile: "pool", PoolBytes: minPoolChunks * chunkBytes,
			CacheBytes: 1 << 20, ReadCacheBytes: 1 << 20, BootID: goldenBoot, Log: zerolog.Nop(),
		})
		if err != nil {
			t.Fatal(err)
		}
		cfg := VolumeConfig{ID: uuid.UUID{1}, Name: "default/garbage", Size: 1 << 20, LogicalBlock: 512, SCOBytes: 1 << 20, Epoch: 1, Store: emptyStore{}}
		if err := eng.CreateVolume(context.Background(), cfg); err != nil {
			t.Fatal(err)
		}
		dir := eng.volumeDir(cfg.ID)
		h := sco.Header{Volume: cfg.ID, Number: 1, Epoch: 1, ClustersCap: 256, RecordsLimit: 1024}
		for _, name := range []string{"/sco/0000000000000001.sco", "/sco/0000000000000002.sco", "/sco/x.sco", "/map/root-0000000000000001", "/map/pages-00000001", "/map/root-zz", "/map/pages-00000002.tmp"} {
			if rng.IntN(2) == 0 {
				continue
			}
			b := make([]byte, rng.IntN(40)*sco.Page+rng.IntN(2)*rng.IntN(5000))
			for i := range b {
				b[i] = byte(rng.Uint32() & rng.Uint32() & rng.Uint32())
			}
			if rng.IntN(2) == 0 {
				copy(b, h.Encode())
			}
			f, err := fsys.Open(dir+name, vfs.Create)
			if err == nil {
				_, err = f.WriteAt(append(b, 0), 0)
			}
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
		}
		if v, err := eng.OpenVolume(context.Background(), cfg); err == nil {
			if _, err := v.Check(context.Background(), nil); err != nil {
				t.Error(err)
			}
		}
		other := cfg
		other.ID, other.Name = uuid.UUID{2}, "default/other"
		if _, err := eng.OpenVolume(context.Background(), other); err != nil {
			t.Fatalf("another volume: %v", err)
		}
		eng.Abandon()
	}
}

// emptyStore has nothing and takes nothing.
type emptyStore struct{}

func (emptyStore) CreateNamespace(context.Context, string) error        { return nil }
func (emptyStore) DeleteNamespace(context.Context, string) error        { return nil }
func (emptyStore) Namespaces(context.Context) ([]string, error)         { return nil, nil }
func (emptyStore) Fence(context.Context, string, uint64) error          { return nil }
func (emptyStore) Delete(context.Context, string, string, uint64) error { return nil }
func (emptyStore) Put(context.Context, string, string, uint64, Object) error {
	return errors.New("takes nothing")
}
func (emptyStore) ReadAt(context.Context, string, string, []byte, int64) error { return ErrNoObject }
func (emptyStore) Size(context.Context, string, string) (int64, error)         { return 0, ErrNoObject }
func (emptyStore) List(context.Context, string, string) ([]string, error)      { return nil, nil }
