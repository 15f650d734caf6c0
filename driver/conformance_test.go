package driver_test

import (
	"context"
	"math/rand/v2"
	"testing"

	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/block/blocktest"
)

// TestConformance runs the contract of block.Device over a Volume.
func TestConformance(t *testing.T) { overStores(t, testConformance) }

func testConformance(t *testing.T, k storeKind) {
	if k.fewer(0, raced(0, 1)) > 0 {
		t.Skip("long under the race detector; the models run over it")
	}
	blocktest.Run(t, func(t *testing.T) block.Device {
		w := newWorld(t, k, rand.New(rand.NewPCG(1, 1)), 16<<20, 1<<20, 16<<20)
		t.Cleanup(func() {
			if err := w.eng.Close(context.Background()); err != nil {
				t.Error(err)
			}
		})
		return resizable{w.vol}
	})
}

// resizable gives the suite the resize that it looks for.
type resizable struct{ *driver.Volume }

func (r resizable) Resize(size uint64) error { return r.Volume.Resize(context.Background(), size) }
