package registry

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

type brokenDisk struct{ syncer }

func (brokenDisk) Sync() error { return errors.New("injected: I/O error") }

// TestP1FailedSyncIsNeverForgotten: after a failed sync no commit succeeds, even
// if the disk seems healthy again, until the store is opened anew.
func TestP1FailedSyncIsNeverForgotten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "registry.db")
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	write := []Write{{Key: "a", Value: []byte("1")}}
	if _, err := s.Commit(t.Context(), nil, write); err != nil {
		t.Fatal(err)
	}
	healthy := s.syncFile
	s.syncFile = brokenDisk{healthy}
	if _, err := s.Commit(t.Context(), nil, []Write{{Key: "a", Value: []byte("2")}}); !errors.Is(err, ErrFailed) {
		t.Fatalf("Commit on a broken disk: %v; want ErrFailed", err)
	}
	s.syncFile = healthy
	if _, err := s.Commit(t.Context(), nil, write); !errors.Is(err, ErrFailed) {
		t.Fatalf("Commit after a failed sync: %v; want ErrFailed", err)
	}
	if !errors.Is(s.Err(), ErrFailed) {
		t.Fatalf("Err is %v", s.Err())
	}
	if kv, ok, err := s.Get(t.Context(), "a"); err != nil || !ok || string(kv.Value) != "1" {
		t.Fatalf("a is %+v, %v, %v; want what was committed", kv, ok, err)
	}
	s.Close()
	if s, err = Open(path); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Commit(t.Context(), nil, write); err != nil {
		t.Fatalf("Commit after reopening: %v", err)
	}
}

type fullDisk struct{ syncer }

func (fullDisk) Reserve(int64, int64) error { return syscall.ENOSPC }

// TestP8FullDiskRefusesAndRecovers: a commit that finds no room has no effect,
// and the next succeeds when there is room.
func TestP8FullDiskRefusesAndRecovers(t *testing.T) {
	s, err := Open(filepath.Join(t.TempDir(), "registry.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	roomy := s.syncFile
	s.syncFile = fullDisk{roomy}
	write := []Write{{Key: "a", Value: []byte("1")}}
	if _, err := s.Commit(t.Context(), nil, write); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("Commit on a full disk: %v; want ENOSPC", err)
	}
	if _, ok, err := s.Get(t.Context(), "a"); ok || err != nil {
		t.Fatalf("a is there, or %v", err)
	}
	s.syncFile = roomy
	if rev, err := s.Commit(t.Context(), nil, write); err != nil || rev != 1 {
		t.Fatalf("Commit with room again: %d, %v", rev, err)
	}
}

// TestP8FailedShrinkIsHarmless: the old file goes on.
func TestP8FailedShrinkIsHarmless(t *testing.T) {
	path := filepath.Join(t.TempDir(), "registry.db")
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := os.MkdirAll(path+".tmp/in-the-way", 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range 60 {
		if _, err := s.Commit(t.Context(), nil, []Write{{Key: "big", Value: make([]byte, 40<<10)}}); err != nil {
			t.Fatalf("commit %d: %v", i, err)
		}
	}
}

// TestReservedRoomSuffices: no commit writes more than it reserved.
func TestReservedRoomSuffices(t *testing.T) {
	s, err := Open(filepath.Join(t.TempDir(), "registry.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, n := range []int{1, 2, 100, MaxWrites} {
		for _, length := range []int{-1, 0, 1, 1000} {
			writes := make([]Write, n)
			for i := range writes {
				writes[i].Key = fmt.Sprintf("key-%d", i)
				if length >= 0 {
					writes[i].Value = bytes.Repeat([]byte("v"), length)
				}
			}
			before := s.size
			watch := &reserveWatch{syncer: s.syncFile}
			s.syncFile = watch
			if _, err := s.Commit(t.Context(), nil, writes); err != nil {
				t.Fatal(err)
			}
			if s.syncFile == syncer(watch) {
				s.syncFile = watch.syncer
			}
			if grown := s.size - before; grown > watch.n {
				t.Errorf("%d writes of %d bytes: wrote %d, reserved %d", n, length, grown, watch.n)
			}
		}
	}
}

type reserveWatch struct {
	syncer
	n int64
}

func (w *reserveWatch) Reserve(offset, n int64) error {
	w.n = n
	return w.syncer.Reserve(offset, n)
}

func TestNewerFormatIsRefusedUntouched(t *testing.T) {
	path := filepath.Join(t.TempDir(), "registry.db")
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(t.Context(), nil, []Write{{Key: "a", Value: []byte("1")}}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// Make the last value, under k:a, one of format 2 with a right checksum.
	value := b[len(b)-2-headerBytes-1 : len(b)-2]
	value[4] = 2
	sum := checksum("k:a", value)
	for i := range 4 {
		value[i] = byte(sum >> (8 * i))
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); !errors.Is(err, ErrVersion) {
		t.Fatalf("Open: %v; want ErrVersion", err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(after, b) {
		t.Fatal("the file of a newer program was changed")
	}
}

func FuzzScan(f *testing.F) {
	if golden, err := os.ReadFile(filepath.Join("testdata", "registry_v1.db")); err == nil {
		f.Add(golden)
		f.Add(golden[:len(golden)-5])
	}
	f.Add([]byte("*3\r\n$3\r\nset\r\n$1\r\na\r\n$1\r\nb\r\n"))
	f.Add([]byte("*2\r\n$3\r\ndel\r\n$99999999\r\na\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		good, _, err := scan(b)
		if good > len(b) {
			t.Fatalf("%d good bytes of %d", good, len(b))
		}
		if again, _, err2 := scan(b[:good]); err == nil && (again != good || err2 != nil) {
			t.Fatalf("the good %d bytes scan to %d, %v", good, again, err2)
		}
		laterJournal(b, 0)
	})
}

func FuzzDecodeJournal(f *testing.F) {
	j := journal{revision: 7, writes: []Write{{Key: "a", Value: []byte("1")}, {Key: "b"}}}
	f.Add(j.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= headerBytes { // let the fuzzer past the checksum
			seal(journalKey, 1, b)
		}
		if j, err := decodeJournal(b); err == nil && !bytes.Equal(j.encode(), b) {
			t.Fatalf("%x decodes to %+v, which encodes otherwise", b, j)
		}
	})
}
