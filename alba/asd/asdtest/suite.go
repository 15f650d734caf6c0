// Package asdtest holds what every asd.Client must do as a test suite, a plain
// Model to compare with, and Faulty, which makes a Client misbehave.
package asdtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"scoria/alba/asd"
)

const guest = asd.PriorityGuest

var background = context.Background()

// Open returns an empty ASD; the suite closes it.
type Open func(t *testing.T) asd.Client

// Run runs the suite.
func Run(t *testing.T, open Open) {
	tests := []struct {
		name string
		run  func(t *testing.T, c asd.Client)
	}{
		{"PutGetReadAt", putGetReadAt},
		{"Missing", missing},
		{"OverwriteAndDelete", overwriteAndDelete},
		{"Asserts", asserts},
		{"FailedAssertChangesNothing", failedAssertChangesNothing},
		{"P4EpochsFence", epochsFence},
		{"LaterUpdateCounts", laterUpdateCounts},
		{"Range", ranges},
		{"MultiGet", multiGet},
		{"P5DamagedPutIsRefused", damagedPutIsRefused},
		{"Limits", limits},
		{"CompareAndSwapFromManyGoroutines", compareAndSwap},
		{"RandomAgainstModel", randomAgainstModel},
		{"CanceledContext", canceledContext},
		{"VerifyOfSoundData", verifyOfSoundData},
		{"Stats", stats},
		{"Closed", closed},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := open(t)
			t.Cleanup(func() {
				if err := c.Close(); err != nil {
					t.Error("close:", err)
				}
			})
			test.run(t, c)
		})
	}
}

// within returns a context that ends, with a failure, when a test hangs.
func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
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

// Bytes returns n bytes that look like nothing.
func Bytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func put(t testing.TB, c asd.Client, key string, data []byte) {
	t.Helper()
	must(t, c.Apply(within(t), nil, []asd.Update{asd.Put(key, asd.NewValue(data))}, guest))
}

func wantValue(t testing.TB, c asd.Client, key string, want []byte) {
	t.Helper()
	v, err := c.Get(within(t), key, guest)
	must(t, err)
	if !bytes.Equal(v.Data, want) {
		t.Fatalf("key %q has other bytes (%d, want %d)", key, len(v.Data), len(want))
	}
	must(t, v.Check(key))
}

func wantNoKey(t testing.TB, c asd.Client, key string) {
	t.Helper()
	_, err := c.Get(within(t), key, guest)
	wantErr(t, err, asd.ErrNoKey)
}

var sizes = []int{0, 1, 511, 4096, 4097, 16 << 10, 16<<10 + 1, 100_000, 1 << 20, 5<<20 + 3}

func putGetReadAt(t *testing.T, c asd.Client) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, blockSize := range []int{512, 4096, 4112} {
		for _, size := range sizes {
			key := fmt.Sprintf("%d/%d", blockSize, size)
			data := Bytes(rng, size)
			v := asd.NewValueBlocks(data, blockSize)
			must(t, c.Apply(within(t), nil, []asd.Update{asd.Put(key, v)}, guest))
			wantValue(t, c, key, data)
			infos, err := c.Exists(within(t), []string{key}, guest)
			must(t, err)
			if want := (asd.Info{Key: key, Exists: true, Size: int64(size), BlockSize: blockSize, Sum: v.Sum()}); infos[0] != want {
				t.Fatalf("exists: %+v, want %+v", infos[0], want)
			}
			for range 20 {
				readSome(t, c, rng, key, &v)
			}
		}
	}
}

// readSome reads a random range and checks bytes, checksums and the end.
func readSome(t *testing.T, c asd.Client, rng *rand.Rand, key string, v *asd.Value) {
	t.Helper()
	off := rng.IntN(len(v.Data) + 1)
	p := make([]byte, rng.IntN(min(len(v.Data)-off, 20_000)+1))
	if rng.IntN(2) == 0 && len(v.Data) > v.BlockSize {
		off = off / v.BlockSize * v.BlockSize
		p = make([]byte, min(v.BlockSize, len(v.Data)-off))
	}
	info, err := c.ReadAt(within(t), key, p, int64(off), guest)
	must(t, err)
	if !bytes.Equal(p, v.Data[off:off+len(p)]) {
		t.Fatalf("key %q: wrong bytes at %d", key, off)
	}
	if info.Size != int64(len(v.Data)) || info.BlockSize != v.BlockSize {
		t.Fatalf("read info %+v", info)
	}
	if len(p) > 0 {
		if info.FirstBlock != off/v.BlockSize {
			t.Fatalf("first block %d for offset %d", info.FirstBlock, off)
		}
		for i, crc := range info.CRCs {
			if crc != v.CRCs[info.FirstBlock+i] {
				t.Fatalf("checksum %d of the read differs", i)
			}
		}
		if want := (off+len(p)+v.BlockSize-1)/v.BlockSize - info.FirstBlock; len(info.CRCs) != want {
			t.Fatalf("%d checksums, want %d", len(info.CRCs), want)
		}
	}
	_, err = c.ReadAt(within(t), key, make([]byte, 10), int64(len(v.Data)-5), guest)
	if len(v.Data) >= 5 {
		wantErr(t, err, io.ErrUnexpectedEOF)
	}
}

func missing(t *testing.T, c asd.Client) {
	wantNoKey(t, c, "nothing")
	_, err := c.ReadAt(within(t), "nothing", make([]byte, 1), 0, guest)
	wantErr(t, err, asd.ErrNoKey)
	infos, err := c.Exists(within(t), []string{"nothing", "neither"}, guest)
	must(t, err)
	if len(infos) != 2 || infos[0] != (asd.Info{Key: "nothing"}) || infos[1] != (asd.Info{Key: "neither"}) {
		t.Fatalf("%+v", infos)
	}
	must(t, c.Apply(within(t), nil, []asd.Update{asd.Delete("nothing")}, guest))
	must(t, c.Apply(within(t), nil, nil, guest))
}

func overwriteAndDelete(t *testing.T, c asd.Client) {
	rng := rand.New(rand.NewPCG(2, 2))
	for _, size := range append(sizes, sizes...) {
		data := Bytes(rng, size)
		put(t, c, "key", data)
		wantValue(t, c, "key", data)
	}
	must(t, c.Apply(within(t), nil, []asd.Update{asd.Delete("key")}, guest))
	wantNoKey(t, c, "key")
	res, err := c.Range(within(t), asd.RangeRequest{}, guest)
	must(t, err)
	if len(res.Infos) != 0 || res.More {
		t.Fatalf("keys are left: %+v", res)
	}
}

func asserts(t *testing.T, c asd.Client) {
	for _, size := range []int{10, 40_000} {
		key := strconv.Itoa(size)
		data := Bytes(rand.New(rand.NewPCG(3, 3)), size)
		v := asd.NewValue(data)
		other := asd.NewValue(append(bytes.Clone(data[1:]), data[0]))
		try := func(want error, a asd.Assert) {
			t.Helper()
			err := c.Apply(within(t), []asd.Assert{a}, []asd.Update{asd.Put("done", asd.NewValue([]byte{1}))}, guest)
			if want == nil {
				must(t, err)
				return
			}
			wantErr(t, err, want)
			var which *asd.AssertError
			if !errors.As(err, &which) || which.Index != 0 || which.Assert.Key != key {
				t.Fatalf("%v does not say which", err)
			}
		}
		try(nil, asd.AssertAbsent(key))
		try(asd.ErrAssert, asd.AssertValue(key, data))
		try(asd.ErrAssert, asd.AssertSum(key, int64(size), v.Sum()))
		put(t, c, key, data)
		try(asd.ErrAssert, asd.AssertAbsent(key))
		try(nil, asd.AssertValue(key, data))
		try(asd.ErrAssert, asd.AssertValue(key, other.Data))
		try(asd.ErrAssert, asd.AssertValue(key, data[1:]))
		try(nil, asd.AssertSum(key, int64(size), v.Sum()))
		try(asd.ErrAssert, asd.AssertSum(key, int64(size), other.Sum()))
	}
}

func failedAssertChangesNothing(t *testing.T, c asd.Client) {
	put(t, c, "a", []byte("old"))
	err := c.Apply(within(t), []asd.Assert{asd.AssertAbsent("b"), asd.AssertAbsent("a")}, []asd.Update{
		asd.Put("a", asd.NewValue([]byte("new"))), asd.Put("b", asd.NewValue(make([]byte, 1<<20))),
		asd.Delete("a"), asd.RaiseEpoch("ns", 9),
	}, guest)
	wantErr(t, err, asd.ErrAssert)
	wantValue(t, c, "a", []byte("old"))
	wantNoKey(t, c, "b")
	epochs, _, err := c.Epochs(within(t), "")
	must(t, err)
	if len(epochs) != 0 {
		t.Fatalf("an epoch was raised: %v", epochs)
	}
}

func epochsFence(t *testing.T, c asd.Client) {
	ctx := within(t)
	write := func(ns string, epoch uint64, key string) error {
		return c.Apply(ctx, []asd.Assert{asd.AssertEpoch(ns, epoch)}, []asd.Update{asd.Put(key, asd.NewValue(make([]byte, 50_000)))}, guest)
	}
	must(t, write("v1", 0, "x"))
	must(t, write("v1", 7, "x")) // asserting does not raise
	must(t, write("v1", 3, "x"))
	must(t, c.Apply(ctx, nil, []asd.Update{asd.RaiseEpoch("v1", 5)}, guest))
	must(t, c.Apply(ctx, nil, []asd.Update{asd.RaiseEpoch("v1", 5)}, guest))
	err := write("v1", 4, "y")
	wantErr(t, err, asd.ErrStaleEpoch)
	var stale *asd.StaleEpochError
	if !errors.As(err, &stale) || *stale != (asd.StaleEpochError{Namespace: "v1", Epoch: 4, Known: 5}) {
		t.Fatalf("%v does not say what is known", err)
	}
	wantNoKey(t, c, "y")
	wantErr(t, c.Apply(ctx, []asd.Assert{asd.AssertEpoch("v1", 4)}, []asd.Update{asd.Delete("x")}, guest), asd.ErrStaleEpoch)
	wantErr(t, c.Apply(ctx, nil, []asd.Update{asd.RaiseEpoch("v1", 4), asd.Delete("x")}, guest), asd.ErrStaleEpoch)
	wantErr(t, c.Apply(ctx, nil, []asd.Update{asd.RaiseEpoch("v1", 8), asd.RaiseEpoch("v1", 6)}, guest), asd.ErrStaleEpoch)
	must(t, write("v1", 5, "y"))
	must(t, write("v2", 1, "z")) // another namespace
	must(t, c.Apply(ctx, []asd.Assert{asd.AssertEpoch("v1", 6)}, []asd.Update{asd.RaiseEpoch("v1", 6), asd.Delete("x")}, guest))
	wantNoKey(t, c, "x")
	must(t, c.Apply(ctx, nil, []asd.Update{asd.RaiseEpoch("v0", 2)}, guest))
	epochs, more, err := c.Epochs(ctx, "")
	must(t, err)
	if more || fmt.Sprint(epochs) != "[{v0 2} {v1 6}]" {
		t.Fatalf("epochs %v, more %v", epochs, more)
	}
	if epochs, _, err = c.Epochs(ctx, "v0"); err != nil || fmt.Sprint(epochs) != "[{v1 6}]" {
		t.Fatalf("epochs behind v0: %v, %v", epochs, err)
	}
}

func laterUpdateCounts(t *testing.T, c asd.Client) {
	must(t, c.Apply(within(t), nil, []asd.Update{
		asd.Put("a", asd.NewValue(make([]byte, 70_000))), asd.Put("a", asd.NewValue([]byte("two"))),
		asd.Put("b", asd.NewValue([]byte("one"))), asd.Delete("b"),
		asd.Delete("c"), asd.Put("c", asd.NewValue(make([]byte, 60_000))),
	}, guest))
	wantValue(t, c, "a", []byte("two"))
	wantNoKey(t, c, "b")
	wantValue(t, c, "c", make([]byte, 60_000))
	s, err := c.Stats(within(t))
	must(t, err)
	if s.Keys != 2 || s.Bytes != 60_003 {
		t.Fatalf("%d keys of %d bytes, want 2 of 60003", s.Keys, s.Bytes)
	}
}

func ranges(t *testing.T, c asd.Client) {
	var updates []asd.Update
	keys := []string{"\x00", "a", "a\x00", "a\x00b", "aa", "b", "b\xff", "c", "\xff\xff", strings.Repeat("\xff", asd.MaxKeyBytes)}
	for _, k := range keys {
		updates = append(updates, asd.Put(k, asd.NewValue([]byte(k))))
	}
	must(t, c.Apply(within(t), nil, updates, guest))
	must(t, c.Apply(within(t), nil, []asd.Update{asd.RaiseEpoch("a", 1)}, guest))
	list := func(req asd.RangeRequest) (got []string) {
		t.Helper()
		for {
			res, err := c.Range(within(t), req, guest)
			must(t, err)
			if req.Limit > 0 && len(res.Infos) > req.Limit {
				t.Fatalf("%d entries, limit %d", len(res.Infos), req.Limit)
			}
			for _, info := range res.Infos {
				got = append(got, info.Key)
				if info.Size != int64(len(info.Key)) {
					t.Fatalf("%+v", info)
				}
			}
			if !res.More {
				return got
			}
			req.From, req.After = got[len(got)-1], true
		}
	}
	for limit := range 4 {
		for i, from := range keys {
			for j, to := range append([]string{""}, keys...) {
				want := keys[i:]
				if j > 0 {
					want = keys[i:max(i, j-1)]
				}
				if got := list(asd.RangeRequest{From: from, To: to, Limit: limit}); fmt.Sprint(got) != fmt.Sprint(want) {
					t.Fatalf("from %q to %q by %d: %q, want %q", from, to, limit, got, want)
				}
			}
		}
	}
	if got := list(asd.RangeRequest{}); len(got) != len(keys) {
		t.Fatalf("all: %q", got)
	}
}

func multiGet(t *testing.T, c asd.Client) {
	big := make([]byte, asd.MaxValueBytes*2/5)
	for _, k := range []string{"b1", "b2", "b3"} {
		put(t, c, k, big)
	}
	put(t, c, "small", []byte("s"))
	res, err := c.MultiGet(within(t), []string{"small", "none", "b1", "b2", "b3", "small"}, guest)
	must(t, err)
	if len(res) != 6 || string(res[0].Value.Data) != "s" || res[0].Err != nil {
		t.Fatalf("%d results, first %+v", len(res), res[0].Err)
	}
	wantErr(t, res[1].Err, asd.ErrNoKey)
	for _, r := range res[2:4] {
		must(t, r.Err)
		if !bytes.Equal(r.Value.Data, big) {
			t.Fatal("other bytes")
		}
	}
	wantErr(t, res[4].Err, asd.ErrTooMuch)
	wantErr(t, res[5].Err, asd.ErrTooMuch)
	if res, err := c.MultiGet(within(t), nil, guest); err != nil || len(res) != 0 {
		t.Fatalf("of nothing: %v, %v", res, err)
	}
}

func damagedPutIsRefused(t *testing.T, c asd.Client) {
	for _, size := range []int{5000, 50_000} {
		v := asd.NewValue(make([]byte, size))
		v.Data[4500] = 1
		err := c.Apply(within(t), nil, []asd.Update{asd.Put("k", v)}, guest)
		wantErr(t, err, asd.ErrCorrupt)
		wantNoKey(t, c, "k")
	}
}

func limits(t *testing.T, c asd.Client) {
	ctx := within(t)
	long := strings.Repeat("k", asd.MaxKeyBytes+1)
	for name, u := range map[string]asd.Update{
		"empty key":       asd.Put("", asd.NewValue(nil)),
		"long key":        asd.Delete(long),
		"long value":      asd.Put("k", asd.NewValue(make([]byte, asd.MaxValueBytes+1))),
		"block size":      asd.Put("k", asd.NewValueBlocks(nil, asd.MinBlockSize-1)),
		"empty namespace": asd.RaiseEpoch("", 1),
		"no kind":         {Key: "k"},
	} {
		if err := c.Apply(ctx, nil, []asd.Update{u}, guest); !errors.Is(err, asd.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, a := range map[string]asd.Assert{
		"long key":        asd.AssertAbsent(long),
		"long value":      asd.AssertValue("k", make([]byte, asd.MaxAssertBytes+1)),
		"empty namespace": asd.AssertEpoch("", 1),
		"no kind":         {Key: "k"},
	} {
		if err := c.Apply(ctx, []asd.Assert{a}, nil, guest); !errors.Is(err, asd.ErrInvalid) {
			t.Errorf("assert of %s: %v", name, err)
		}
	}
	half := asd.NewValue(make([]byte, asd.MaxValueBytes/2+1))
	wantErr(t, c.Apply(ctx, nil, []asd.Update{asd.Put("a", half), asd.Put("b", half)}, guest), asd.ErrInvalid)
	_, err := c.Get(ctx, long, guest)
	wantErr(t, err, asd.ErrInvalid)
	_, err = c.MultiGet(ctx, []string{""}, guest)
	wantErr(t, err, asd.ErrInvalid)
	_, err = c.Exists(ctx, make([]string, asd.MaxKeys+1), guest)
	wantErr(t, err, asd.ErrInvalid)
	_, err = c.ReadAt(ctx, "k", nil, -1, guest)
	wantErr(t, err, asd.ErrInvalid)
	put(t, c, "largest", make([]byte, asd.MaxValueBytes))
	put(t, c, strings.Repeat("k", asd.MaxKeyBytes), []byte("longest"))
}

func compareAndSwap(t *testing.T, c asd.Client) {
	const goroutines, rounds = 8, 20
	put(t, c, "n", []byte("0"))
	var wg sync.WaitGroup
	for range goroutines {
		wg.Go(func() {
			for done := 0; done < rounds; {
				v, err := c.Get(within(t), "n", guest)
				if err != nil {
					t.Error(err)
					return
				}
				n, _ := strconv.Atoi(string(v.Data))
				err = c.Apply(within(t), []asd.Assert{asd.AssertValue("n", v.Data)},
					[]asd.Update{asd.Put("n", asd.NewValue([]byte(strconv.Itoa(n+1))))}, guest)
				if err == nil {
					done++
				} else if !errors.Is(err, asd.ErrAssert) {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	wantValue(t, c, "n", []byte(strconv.Itoa(goroutines*rounds)))
}

func canceledContext(t *testing.T, c asd.Client) {
	put(t, c, "k", []byte("v"))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := c.Apply(ctx, nil, []asd.Update{asd.Delete("k")}, guest)
	if err != nil {
		wantErr(t, err, context.Canceled)
	}
	put(t, c, "k", []byte("w")) // whatever became of it, later ones come later
	wantValue(t, c, "k", []byte("w"))
}

func verifyOfSoundData(t *testing.T, c asd.Client) {
	total := 0
	for i, size := range sizes {
		put(t, c, strconv.Itoa(i), make([]byte, size))
		total += size
	}
	put(t, c, strings.Repeat("\xff", asd.MaxKeyBytes), nil)
	stretches := 0
	res, err := asd.VerifyAll(within(t), c, asd.VerifyOptions{Progress: func(asd.VerifyResult) { stretches++ }, BytesPerSecond: 100 << 20})
	must(t, err)
	if !res.Done || res.Keys != int64(len(sizes)+1) || res.Bytes < int64(total) || len(res.Bad) != 0 || stretches == 0 {
		t.Fatalf("%+v in %d stretches, want %d keys and %d bytes", res, stretches, len(sizes)+1, total)
	}
	_, err = c.Verify(within(t), asd.VerifyRequest{MaxBytes: 1})
	must(t, err)
}

func stats(t *testing.T, c asd.Client) {
	s, err := c.Stats(within(t))
	must(t, err)
	if s.ID == "" || s.Keys != 0 || s.Bytes != 0 || s.Full || s.Failed != "" || s.Damaged != "" || s.Capacity <= 0 {
		t.Fatalf("%+v", s)
	}
	for i, size := range sizes {
		put(t, c, strconv.Itoa(i%4), make([]byte, size))
	}
	must(t, c.Apply(within(t), nil, []asd.Update{asd.Delete("0")}, guest))
	s, err = c.Stats(within(t))
	must(t, err)
	if want := int64(sizes[9] + sizes[6] + sizes[7]); s.Keys != 3 || s.Bytes != want || s.Used < want {
		t.Fatalf("%+v, want 3 keys of %d bytes", s, want)
	}
}

func closed(t *testing.T, c asd.Client) {
	must(t, c.Close())
	must(t, c.Close())
	_, err := c.Get(within(t), "k", guest)
	wantErr(t, err, asd.ErrClosed)
	wantErr(t, c.Apply(within(t), nil, []asd.Update{asd.Delete("k")}, guest), asd.ErrClosed)
	_, err = c.Stats(within(t))
	wantErr(t, err, asd.ErrClosed)
}
