package tlog

import (
	"bytes"
	"encoding/hex"
	"flag"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
)

var update = flag.Bool("update", false, "write the golden files anew")

var goldenVolume = uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff")

// goldenRecords has one record of every type.
var goldenRecords = []Record{
	{Type: Open, LBA: 6, Arg: 1234, DataCRC: 42, Cluster: NoCluster},
	{Type: Write, LBA: 1<<40 + 5, DataCRC: 0xdeadbeef, Durable: 1, Cluster: 0},
	{Type: Relocate, LBA: 77, Arg: 0x0006_0000_0123, DataCRC: 0x01020304, Durable: 2, Cluster: 1},
	{Type: Discard, LBA: 1000, Arg: 1 << 30, Durable: 2, Cluster: NoCluster},
	{Type: Void, Cluster: 2},
	{Type: Void, Cluster: NoCluster},
}

// TestGolden: records are stored as the package doc draws them, and those that
// earlier versions wrote are read.
func TestGolden(t *testing.T) {
	const name = "testdata/records.hex"
	key := Key(goldenVolume, 7)
	var b bytes.Buffer
	for i := range goldenRecords {
		rec := make([]byte, Size)
		Put(rec, key, uint32(i), &goldenRecords[i])
		b.WriteString(hex.EncodeToString(rec) + "\n")
	}
	if *update {
		if err := os.WriteFile(name, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b.Bytes(), want) {
		t.Errorf("records are stored as\n%s\nwant\n%s", b.Bytes(), want)
	}
	for i, line := range strings.Fields(string(want)) {
		rec, err := hex.DecodeString(line)
		if err != nil {
			t.Fatal(err)
		}
		got, ok := Get(rec, key, uint32(i))
		if !ok || got != goldenRecords[i] {
			t.Errorf("record %d: read %+v, %v; want %+v", i, got, ok, goldenRecords[i])
		}
	}
}

// TestEveryBit: a record with any bit flipped, at another index, or under
// another key is not one.
func TestEveryBit(t *testing.T) {
	key := Key(goldenVolume, 7)
	for i := range goldenRecords {
		rec := make([]byte, Size)
		Put(rec, key, uint32(i), &goldenRecords[i])
		for bit := range Size * 8 {
			rec[bit/8] ^= 1 << (bit % 8)
			if r, ok := Get(rec, key, uint32(i)); ok {
				t.Errorf("record %d with bit %d flipped is read as %+v", i, bit, r)
			}
			rec[bit/8] ^= 1 << (bit % 8)
		}
		for _, other := range []uint32{uint32(i) + 1, uint32(i) ^ 1<<20, 0xffffffff} {
			if _, ok := Get(rec, key, other); ok {
				t.Errorf("record %d is valid at index %d", i, other)
			}
		}
		if _, ok := Get(rec, Key(goldenVolume, 8), uint32(i)); ok {
			t.Errorf("record %d is valid in another SCO", i)
		}
		if _, ok := Get(rec, Key(uuid.UUID{1}, 7), uint32(i)); ok {
			t.Errorf("record %d is valid in another volume", i)
		}
	}
	if _, ok := Get(make([]byte, Size), key, 0); ok {
		t.Error("zeroes are a record")
	}
}

// TestPublication: whoever sees a record filled sees all of it.
func TestPublication(t *testing.T) {
	const n = 20_000
	b := make([]byte, n*Size)
	key := Key(goldenVolume, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range uint32(n) {
			Put(b[i*Size:(i+1)*Size], key, i, &Record{Type: Write, LBA: uint64(i) * 3, DataCRC: i, Cluster: i})
		}
	})
	if raceEnabled {
		wg.Wait() // the detector doesn't know that the checksum settles it
	}
	for i := range uint32(n) {
		rec := b[i*Size : (i+1)*Size]
		for !Filled(rec) {
		}
		r, ok := Get(rec, key, i)
		if !ok || r.LBA != uint64(i)*3 || r.Cluster != i {
			t.Fatalf("record %d: %+v, %v", i, r, ok)
		}
	}
	wg.Wait()
}

func TestPutDoesNotAllocate(t *testing.T) {
	b := make([]byte, Size)
	r := Record{Type: Write, LBA: 1, Cluster: 2}
	if n := testing.AllocsPerRun(100, func() { Put(b, 1, 2, &r) }); n != 0 {
		t.Errorf("Put allocates %v times", n)
	}
}

// FuzzGet: any bytes are read without a panic, and what is read as a record is
// stored as those bytes.
func FuzzGet(f *testing.F) {
	key := Key(goldenVolume, 7)
	for i := range goldenRecords {
		rec := make([]byte, Size)
		Put(rec, key, uint32(i), &goldenRecords[i])
		f.Add(rec, key, uint32(i))
	}
	f.Add(make([]byte, Size), uint32(0), uint32(0))
	f.Fuzz(func(t *testing.T, raw []byte, key, index uint32) {
		b := make([]byte, Size) // aligned
		copy(b, raw)
		r, ok := Get(b, key, index)
		if !ok {
			return
		}
		again := make([]byte, Size)
		Put(again, key, index, &r)
		if !bytes.Equal(again, b) {
			t.Fatalf("%x is read as %+v, which is stored as %x", b, r, again)
		}
	})
}

func BenchmarkPut(b *testing.B) {
	rec := make([]byte, Size)
	r := Record{Type: Write, LBA: 1, Cluster: 2}
	for i := range b.N {
		Put(rec, 1, uint32(i), &r)
	}
}
