package blocktest_test

import (
	"testing"

	"scoria/driver/block"
	"scoria/driver/block/blocktest"
)

func TestRAMConforms(t *testing.T) {
	for name, opts := range map[string]blocktest.Options{
		"Sync":     {},
		"Async":    {Mode: blocktest.Async},
		"Mixed4K":  {Mode: blocktest.Mixed, LogicalBlock: 4096},
		"ReadOnly": {Mode: blocktest.Mixed, ReadOnly: true},
		"Limit":    {MaxDiscard: 5 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device {
				// An odd size: the last cluster is there only in part.
				size := uint64(blocktest.MinSize + 4096)
				if opts.LogicalBlock != 4096 {
					size += 512
				}
				d := blocktest.NewRAM(size, opts)
				t.Cleanup(d.Close)
				return d
			})
		})
	}
}

func TestRAMCloseEndsWaitingRequests(t *testing.T) {
	d := blocktest.NewRAM(1<<20, blocktest.Options{})
	d.Stall()
	ended := make(chan error, 1)
	d.Submit([]*block.Request{{
		Op: block.OpWrite, Length: 512, Segments: [][]byte{make([]byte, 512)},
		Complete: func(r *block.Request) { ended <- r.Err },
	}})
	if n := d.Waiting(); n != 1 {
		t.Fatalf("%d requests wait for room, want 1", n)
	}
	d.Close()
	if err := <-ended; err != block.ErrClosed {
		t.Errorf("waiting request ended with %v, want ErrClosed", err)
	}
}
