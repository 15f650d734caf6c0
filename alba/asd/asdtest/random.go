package asdtest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"

	"scoria/alba/asd"
)

// Workload makes random Applies over few keys and namespaces.
type Workload struct {
	Rng     *rand.Rand
	MaxSize int // bytes of a value
}

// Key returns a random key.
func (w *Workload) Key() string { return fmt.Sprintf("key-%d", w.Rng.IntN(12)) }

// Value returns a random value.
func (w *Workload) Value() asd.Value {
	size := w.Rng.IntN(300)
	if w.Rng.IntN(2) == 0 {
		size = w.Rng.IntN(w.MaxSize + 1)
	}
	return asd.NewValueBlocks(Bytes(w.Rng, size), []int{512, 4096, 4112}[w.Rng.IntN(3)])
}

// Apply returns a random Apply; m is for asserts that may hold.
func (w *Workload) Apply(m *Model) (asserts []asd.Assert, updates []asd.Update) {
	for range w.Rng.IntN(3) {
		key := w.Key()
		v, err := m.Get(background, key, guest)
		switch n := w.Rng.IntN(8); {
		case n == 0:
			asserts = append(asserts, asd.AssertAbsent(key))
		case n < 3 && err == nil && len(v.Data) <= asd.MaxAssertBytes:
			asserts = append(asserts, asd.AssertValue(key, v.Data))
		case n < 5 && err == nil:
			asserts = append(asserts, asd.AssertSum(key, int64(len(v.Data)), v.Sum()))
		case n < 7:
			asserts = append(asserts, asd.AssertEpoch(w.namespace(), w.epoch()))
		}
	}
	for range 1 + w.Rng.IntN(4) {
		switch n := w.Rng.IntN(10); {
		case n < 6:
			updates = append(updates, asd.Put(w.Key(), w.Value()))
		case n < 9:
			updates = append(updates, asd.Delete(w.Key()))
		default:
			updates = append(updates, asd.RaiseEpoch(w.namespace(), w.epoch()))
		}
	}
	return asserts, updates
}

func (w *Workload) namespace() string { return []string{"ns-a", "ns-b"}[w.Rng.IntN(2)] }
func (w *Workload) epoch() uint64     { return 5 + w.Rng.Uint64N(3) }

// Compare returns what a Client has otherwise than the Model, nil if nothing.
func Compare(c asd.Client, m *Model) error {
	want, err := m.Range(background, asd.RangeRequest{}, guest)
	if err != nil {
		return err
	}
	got, err := c.Range(background, asd.RangeRequest{}, guest)
	if err != nil {
		return err
	}
	if !reflect.DeepEqual(got, want) {
		return fmt.Errorf("keys %+v, want %+v", got, want)
	}
	for _, info := range want.Infos {
		g, err := c.Get(background, info.Key, guest)
		if err != nil {
			return err
		}
		w, err := m.Get(background, info.Key, guest)
		if err != nil {
			return err
		}
		if !bytes.Equal(g.Data, w.Data) || g.BlockSize != w.BlockSize || g.Sum() != w.Sum() {
			return fmt.Errorf("key %q: %d bytes, want others, %d", info.Key, len(g.Data), len(w.Data))
		}
	}
	gotEpochs, _, err := c.Epochs(background, "")
	if err != nil {
		return err
	}
	wantEpochs, _, err := m.Epochs(background, "")
	if err != nil {
		return err
	}
	if fmt.Sprint(gotEpochs) != fmt.Sprint(wantEpochs) {
		return fmt.Errorf("epochs %v, want %v", gotEpochs, wantEpochs)
	}
	gs, err := c.Stats(background)
	if err != nil {
		return err
	}
	ws, err := m.Stats(background)
	if err == nil && (gs.Keys != ws.Keys || gs.Bytes != ws.Bytes) {
		err = fmt.Errorf("%d keys of %d bytes, want %d of %d", gs.Keys, gs.Bytes, ws.Keys, ws.Bytes)
	}
	return err
}

// SameRefusal says whether two errors of an Apply mean the same.
func SameRefusal(a, b error) bool {
	for _, e := range []error{nil, asd.ErrStaleEpoch, asd.ErrAssert, asd.ErrFull, asd.ErrInvalid, asd.ErrCorrupt} {
		if errors.Is(a, e) != errors.Is(b, e) {
			return false
		}
	}
	return true
}

// randomAgainstModel does the same random Applies to the Client and to a Model.
func randomAgainstModel(t *testing.T, c asd.Client) {
	w := &Workload{Rng: rand.New(rand.NewPCG(7, 7)), MaxSize: 100_000}
	m := NewModel("model")
	for i := range 400 {
		asserts, updates := w.Apply(m)
		got := c.Apply(within(t), asserts, updates, asd.Priority(i%2))
		want := m.Apply(background, asserts, updates, guest)
		if !SameRefusal(got, want) {
			t.Fatalf("apply %d of %v, %v: %v, want %v", i, asserts, len(updates), got, want)
		}
		if i%20 == 19 {
			if err := Compare(c, m); err != nil {
				t.Fatalf("after apply %d: %v", i, err)
			}
		}
	}
}
