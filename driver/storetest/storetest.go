// Package storetest is the conformance suite of driver.Store. Run tests what
// every store promises; RunCrash adds what one on a vfs.FS promises about a loss
// of power and a kill.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"scoria/driver"
)

// deadline bounds every wait of the suite.
const deadline = 30 * time.Second

// namespace is what most tests use; it looks like a volume's UUID.
const namespace = "9b2f0c4e-5d1a-4a63-8f5e-2f1f4f1f7a10"

// Run tests the stores that open returns; each call must return one that is
// empty. What open needs to clean up it leaves to t.Cleanup.
func Run(t *testing.T, open func(t *testing.T) driver.Store) {
	tests := []struct {
		name string
		test func(t *testing.T, s driver.Store)
	}{
		{"Namespaces", testNamespaces},
		{"PutRead", testPutRead},
		{"ReadRanges", testReadRanges},
		{"List", testList},
		{"Delete", testDelete},
		{"PutAgain", testPutAgain},
		{"BadData", testBadData},
		{"LocalPath", testLocalPath},
		{"Names", testNames},
		{"Fence", testFence},
		{"P4PausedPut", testP4PausedPut},
		{"Cancel", testCancel},
		{"Concurrent", testConcurrent},
		{"ConcurrentSameName", testConcurrentSameName},
		{"P4ConcurrentFence", testP4ConcurrentFence},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t)
			must(t, s.CreateNamespace(t.Context(), namespace))
			tt.test(t, s)
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

// await waits for ch and fails with all goroutines when that takes too long.
func await[T any](ch <-chan T, what string) T {
	select {
	case v := <-ch:
		return v
	case <-time.After(deadline):
		buf := make([]byte, 1<<20)
		panic(fmt.Sprintf("storetest: %s: nothing after %v\n%s", what, deadline, buf[:runtime.Stack(buf, true)]))
	}
}

// pattern returns n bytes that differ by seed and offset.
func pattern(seed uint64, n int) []byte {
	b := make([]byte, n)
	x := seed*0x9e3779b97f4a7c15 + 1
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return b
}

func object(b []byte) driver.Object {
	return driver.Object{Data: bytes.NewReader(b), Size: int64(len(b))}
}

// expect reads the object back.
func expect(t testing.TB, s driver.Store, name string, want []byte) {
	t.Helper()
	ctx := context.Background()
	size, err := s.Size(ctx, namespace, name)
	must(t, err)
	if size != int64(len(want)) {
		t.Fatalf("%s: size %d, want %d", name, size, len(want))
	}
	got := make([]byte, size)
	must(t, s.ReadAt(ctx, namespace, name, got, 0))
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: wrong contents", name)
	}
}

func expectNone(t testing.TB, s driver.Store, name string) {
	t.Helper()
	ctx := context.Background()
	_, err := s.Size(ctx, namespace, name)
	wantErr(t, err, driver.ErrNoObject)
	wantErr(t, s.ReadAt(ctx, namespace, name, make([]byte, 1), 0), driver.ErrNoObject)
}

func testNamespaces(t *testing.T, s driver.Store) {
	ctx := t.Context()
	list := func(want ...string) {
		t.Helper()
		got, err := s.Namespaces(ctx)
		must(t, err)
		if !slices.Equal(got, want) {
			t.Fatalf("namespaces %q, want %q", got, want)
		}
	}
	list(namespace)
	must(t, s.CreateNamespace(ctx, "b"))
	must(t, s.CreateNamespace(ctx, "a"))
	must(t, s.CreateNamespace(ctx, "a"))
	list(namespace, "a", "b")
	must(t, s.Put(ctx, "a", "x", 1, object([]byte("in a"))))
	must(t, s.Put(ctx, "b", "x", 1, object([]byte("in b"))))
	got := make([]byte, 4)
	must(t, s.ReadAt(ctx, "a", "x", got, 0))
	must(t, s.DeleteNamespace(ctx, "a"))
	must(t, s.DeleteNamespace(ctx, "a"))
	list(namespace, "b")
	wantErr(t, s.ReadAt(ctx, "a", "x", got, 0), driver.ErrNoObject)
	if err := s.Put(ctx, "a", "x", 1, object(got)); err == nil {
		t.Fatal("put into a namespace that was deleted")
	}
	if err := s.Fence(ctx, "a", 1); err == nil {
		t.Fatal("fenced a namespace that was deleted")
	}
	if _, err := s.List(ctx, "a", ""); err == nil {
		t.Fatal("listed a namespace that was deleted")
	}
	must(t, s.Delete(ctx, "a", "x", 1))
	must(t, s.ReadAt(ctx, "b", "x", got, 0))
	if string(got) != "in b" {
		t.Fatalf("namespaces are mixed up: %q", got)
	}
	must(t, s.CreateNamespace(ctx, "a"))
	wantErr(t, s.ReadAt(ctx, "a", "x", got, 0), driver.ErrNoObject)
}

func testPutRead(t *testing.T, s driver.Store) {
	expectNone(t, s, "none")
	for i, size := range []int{0, 1, 511, 4096, 1<<20 - 1, 1 << 20, 3<<20 + 5} {
		name := fmt.Sprintf("sco-%08x", i)
		b := pattern(uint64(i), size)
		must(t, s.Put(t.Context(), namespace, name, 1, object(b)))
		expect(t, s, name, b)
	}
}

func testReadRanges(t *testing.T, s driver.Store) {
	ctx := t.Context()
	b := pattern(1, 100_000)
	must(t, s.Put(ctx, namespace, "o", 1, object(b)))
	for _, r := range [][2]int{{0, 1}, {4096, 4096}, {99_999, 1}, {12_345, 54_321}, {100_000, 0}} {
		p := make([]byte, r[1])
		must(t, s.ReadAt(ctx, namespace, "o", p, int64(r[0])))
		if !bytes.Equal(p, b[r[0]:r[0]+r[1]]) {
			t.Fatalf("wrong bytes at %v", r)
		}
	}
	wantErr(t, s.ReadAt(ctx, namespace, "o", make([]byte, 2), 99_999), io.ErrUnexpectedEOF)
	wantErr(t, s.ReadAt(ctx, namespace, "o", make([]byte, 1), 100_000), io.ErrUnexpectedEOF)
	wantErr(t, s.ReadAt(ctx, namespace, "o", make([]byte, 1), 1<<40), io.ErrUnexpectedEOF)
	if err := s.ReadAt(ctx, namespace, "o", make([]byte, 1), -1); err == nil {
		t.Fatal("negative offset accepted")
	}
}

func testList(t *testing.T, s driver.Store) {
	ctx := t.Context()
	for _, name := range []string{"sco-2", "sco-10", "map-1", "sco-1"} {
		must(t, s.Put(ctx, namespace, name, 1, object([]byte(name))))
	}
	for prefix, want := range map[string][]string{
		"":      {"map-1", "sco-1", "sco-10", "sco-2"},
		"sco-":  {"sco-1", "sco-10", "sco-2"},
		"sco-1": {"sco-1", "sco-10"},
		"none":  {},
	} {
		got, err := s.List(ctx, namespace, prefix)
		must(t, err)
		if len(got)+len(want) > 0 && !reflect.DeepEqual(got, want) {
			t.Fatalf("list %q: %q, want %q", prefix, got, want)
		}
	}
}

func testDelete(t *testing.T, s driver.Store) {
	ctx := t.Context()
	must(t, s.Delete(ctx, namespace, "none", 1))
	for i := range uint64(3) {
		// Read before and after: an object that was open must not linger.
		b := pattern(i, 5000)
		must(t, s.Put(ctx, namespace, "o", 1, object(b)))
		expect(t, s, "o", b)
		must(t, s.Delete(ctx, namespace, "o", 1))
		expectNone(t, s, "o")
		must(t, s.Delete(ctx, namespace, "o", 1))
	}
	names, err := s.List(ctx, namespace, "")
	must(t, err)
	if len(names) != 0 {
		t.Fatalf("deleted objects are listed: %q", names)
	}
}

func testPutAgain(t *testing.T, s driver.Store) {
	ctx := t.Context()
	b := pattern(1, 2<<20)
	must(t, s.Put(ctx, namespace, "o", 1, object(b)))
	must(t, s.Put(ctx, namespace, "o", 1, object(b)))
	must(t, s.Put(ctx, namespace, "o", 2, object(b)))
	other := slices.Clone(b)
	other[len(other)-1]++
	wantErr(t, s.Put(ctx, namespace, "o", 2, object(other)), driver.ErrExists)
	wantErr(t, s.Put(ctx, namespace, "o", 2, object(b[:len(b)-1])), driver.ErrExists)
	wantErr(t, s.Put(ctx, namespace, "o", 2, object(append(b, 0))), driver.ErrExists)
	expect(t, s, "o", b)
	must(t, s.Fence(ctx, namespace, 3))
	wantErr(t, s.Put(ctx, namespace, "o", 2, object(b)), driver.ErrStaleEpoch)
}

func testBadData(t *testing.T, s driver.Store) {
	ctx := t.Context()
	obj := object(pattern(1, 3<<20))
	obj.Size++
	wantErr(t, s.Put(ctx, namespace, "short", 1, obj), io.ErrUnexpectedEOF)
	expectNone(t, s, "short")
	bad := errors.New("bad sector")
	wantErr(t, s.Put(ctx, namespace, "bad", 1, driver.Object{Data: failing{bad}, Size: 10}), bad)
	expectNone(t, s, "bad")
	must(t, s.Put(ctx, namespace, "bad", 1, object([]byte("well now"))))
	expect(t, s, "bad", []byte("well now"))
}

// failing is a source that can't be read.
type failing struct{ err error }

func (f failing) ReadAt([]byte, int64) (int, error) { return 0, f.err }

// testLocalPath puts objects with a local copy, which may be gone or elsewhere.
func testLocalPath(t *testing.T, s driver.Store) {
	ctx := t.Context()
	b := pattern(1, 100_000)
	local := filepath.Join(t.TempDir(), "sco")
	must(t, os.WriteFile(local, b, 0o600))
	obj := object(b)
	obj.LocalPath = local
	must(t, s.Put(ctx, namespace, "linked", 1, obj))
	must(t, os.Remove(local))
	expect(t, s, "linked", b)
	must(t, s.Put(ctx, namespace, "gone", 1, obj))
	expect(t, s, "gone", b)
	must(t, os.WriteFile(local, b[:100], 0o600))
	must(t, s.Put(ctx, namespace, "other-size", 1, obj))
	expect(t, s, "other-size", b)
}

func testNames(t *testing.T, s driver.Store) {
	ctx := t.Context()
	for _, name := range []string{"", ".", "..", "../x", "a/b", "/a", "a\x00b", "a b", "ü", string(pattern(1, 20)), string(bytes.Repeat([]byte("x"), 300))} {
		obj := object([]byte("x"))
		if err := s.Put(ctx, namespace, name, 1, obj); err == nil {
			t.Errorf("put of %q succeeded", name)
		}
		if err := s.CreateNamespace(ctx, name); err == nil {
			t.Errorf("namespace %q was made", name)
		}
		if err := s.DeleteNamespace(ctx, name); err == nil {
			t.Errorf("namespace %q was deleted", name)
		}
		if err := s.ReadAt(ctx, namespace, name, make([]byte, 1), 0); err == nil {
			t.Errorf("%q was read", name)
		}
		if err := s.Delete(ctx, namespace, name, 1); err == nil {
			t.Errorf("%q was deleted", name)
		}
	}
	must(t, s.Put(ctx, namespace, "Az09._-", 1, object([]byte("x"))))
	expect(t, s, "Az09._-", []byte("x"))
}

// sourceReader calls before ahead of each read.
type sourceReader struct {
	io.ReaderAt
	before func(off int64)
}

func (r sourceReader) ReadAt(p []byte, off int64) (int, error) {
	r.before(off)
	return r.ReaderAt.ReadAt(p, off)
}

func testCancel(t *testing.T, s driver.Store) {
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	wantErr(t, s.Put(canceled, namespace, "o", 1, object([]byte("x"))), context.Canceled)
	wantErr(t, s.Fence(canceled, namespace, 7), context.Canceled)

	// In the middle of a put that would take for ever.
	ctx, cancel := context.WithCancel(t.Context())
	reads := 0
	b := pattern(1, 1<<20)
	endless := driver.Object{Size: 1 << 40, Data: sourceReader{repeating(b), func(int64) {
		if reads++; reads == 3 {
			cancel()
		}
	}}}
	result := make(chan error, 1)
	go func() { result <- s.Put(ctx, namespace, "endless", 1, endless) }()
	wantErr(t, await(result, "canceled put"), context.Canceled)
	expectNone(t, s, "endless")
	expectNone(t, s, "o")
	must(t, s.Put(t.Context(), namespace, "endless", 1, object(b)))
	expect(t, s, "endless", b)
}

// repeating is an endless source.
type repeating []byte

func (r repeating) ReadAt(p []byte, _ int64) (int, error) {
	for n := 0; n < len(p); {
		n += copy(p[n:], r)
	}
	return len(p), nil
}

func testConcurrent(t *testing.T, s driver.Store) {
	ctx := t.Context()
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 12 {
				name := fmt.Sprintf("o-%d-%d", g, i)
				b := pattern(uint64(g*1000+i), 10_000+i)
				if err := s.Put(ctx, namespace, name, 1, object(b)); err != nil {
					t.Error(err)
					return
				}
				p := make([]byte, 1000)
				if err := s.ReadAt(ctx, namespace, name, p, 9_000); err != nil || !bytes.Equal(p, b[9_000:10_000]) {
					t.Errorf("%s: wrong bytes: %v", name, err)
				}
				if _, err := s.List(ctx, namespace, "o-"); err != nil {
					t.Error(err)
				}
				if i%2 == 0 {
					if err := s.Delete(ctx, namespace, name, 1); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	await(done, "concurrent puts")
	names, err := s.List(ctx, namespace, "")
	must(t, err)
	if len(names) != 8*6 {
		t.Fatalf("%d objects, want 48", len(names))
	}
}

// testConcurrentSameName: of two contents one wins, and only one.
func testConcurrentSameName(t *testing.T, s driver.Store) {
	for round := range 10 {
		name := fmt.Sprint("o", round)
		results := make(chan error, 4)
		for g := range 4 {
			go func() { results <- s.Put(t.Context(), namespace, name, 1, object(pattern(uint64(g/2), 50_000))) }()
		}
		won, refused := 0, 0
		for range 4 {
			switch err := await(results, "put of one name"); {
			case err == nil:
				won++
			case errors.Is(err, driver.ErrExists):
				refused++
			default:
				t.Fatal(err)
			}
		}
		if won != 2 || refused != 2 {
			t.Fatalf("%d puts succeeded and %d were refused, want 2 and 2", won, refused)
		}
	}
}
