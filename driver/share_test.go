package driver

import (
	"testing"

	"scoria/alba/vfs"
)

// TestPoolShares: a volume with more than its fair share of the pool does not get
// the last chunks, one with less does; and the counts come out even.
func TestPoolShares(t *testing.T) {
	const chunks = 4 * minPoolChunks
	p, _, err := openPool(vfs.NewMem(), "pool", chunks*chunkBytes, goldenBoot)
	if err != nil {
		t.Fatal(err)
	}
	eng := &Engine{pool: p}
	volume := func(id byte) *logSCO {
		v := &Volume{eng: eng, cfg: VolumeConfig{SCOBytes: MaxSCOBytes}}
		v.cfg.ID[0] = id
		return newLogSCO(v, 1, 0, 0)
	}
	busy, quiet := volume(1), volume(2)
	take := func(l *logSCO, slot uint32) bool {
		id := p.alloc(l, slot, chunkData)
		if id != 0 {
			l.data[slot].Store(id)
		}
		return id != 0
	}
	if !take(quiet, 0) {
		t.Fatal("no first chunk")
	}
	n := uint32(0)
	for take(busy, n) {
		n++
	}
	if want := uint32(chunks - 1 - chunks/reservePart); n != want {
		t.Fatalf("the busy volume got %d of %d chunks; want %d", n, chunks, want)
	}
	if p.share(busy.vol) <= 1 || p.share(quiet.vol) > exemptShare {
		t.Fatalf("shares %v and %v", p.share(busy.vol), p.share(quiet.vol))
	}
	if !take(quiet, 1) {
		t.Fatal("the quiet volume got nothing although it has less than its share")
	}
	// What is written out makes room, for whoever wants it.
	p.markClean(busy, 0)
	p.markClean(busy, 1)
	p.markClean(quiet, 0)
	if !take(busy, n) {
		t.Fatal("no chunk although more than the reserve is clean")
	}
	busy.releaseChunks()
	p.abandon(quiet)
	if d, h := p.dirty.Load(), p.holders.Load(); d != 2 || h != 0 || busy.vol.dirtyChunks.Load() != 0 || quiet.vol.dirtyChunks.Load() != 0 {
		t.Fatalf("%d dirty, %d holders, the volumes have %d and %d", d, h, busy.vol.dirtyChunks.Load(), quiet.vol.dirtyChunks.Load())
	}
	for _, c := range p.takeFound(quiet.hdr.Volume) {
		p.adopt(c, quiet)
	}
	if d, h := p.dirty.Load(), p.holders.Load(); d != 2 || h != 1 || quiet.vol.dirtyChunks.Load() != 2 {
		t.Fatalf("adopted: %d dirty, %d holders, %d of the volume", d, h, quiet.vol.dirtyChunks.Load())
	}
	// What was written out may have to be written again, after a failed sync.
	p.markClean(quiet, 0)
	if !p.markDirty(quiet, 0) || quiet.vol.dirtyChunks.Load() != 2 || p.holders.Load() != 1 {
		t.Fatalf("dirty again: %d holders, %d of the volume", p.holders.Load(), quiet.vol.dirtyChunks.Load())
	}
	quiet.releaseChunks()
	if p.dirty.Load() != 0 || p.holders.Load() != 0 || len(p.free) != chunks {
		t.Fatalf("in the end %d dirty, %d holders, %d free", p.dirty.Load(), p.holders.Load(), len(p.free))
	}
}
