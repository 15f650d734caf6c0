// Package lba is the map of a volume: cluster number (LBA) to location.
package lba

import (
	"context"
	"errors"
	"iter"
)

// ErrMemory: the kernel refuses memory for the map.
var ErrMemory = errors.New("no memory for map pages")

// ErrMapped: the map can't shrink because clusters behind the new end are mapped.
var ErrMapped = errors.New("clusters behind the new end are mapped")

// PageReader reads stored leaf pages and verifies them.
type PageReader interface {
	ReadPage(ctx context.Context, addr PageAddr, page []byte) error
}

// Map maps clusters to locations.
type Map struct{}

func New(clusters uint64) (*Map, error)                                    { panic("x") }
func (m *Map) Close()                                                      {}
func (m *Map) Clusters() uint64                                            { panic("x") }
func (m *Map) Get(lba uint64) (Location, bool)                             { panic("x") }
func (m *Map) Set(lba uint64, loc Location) (old Location, ok bool)        { panic("x") }
func (m *Map) GetRange(lba uint64, dst []Location) (n int)                 { panic("x") }
func (m *Map) Clear(lba, n uint64, freed func(Location)) (ok bool)         { panic("x") }
func (m *Map) Replace(lba uint64, old, new Location) (done, ok bool)       { panic("x") }
func (m *Map) Resident(lba, n uint64) bool                                 { panic("x") }
func (m *Map) Load(ctx context.Context, r PageReader, lba, n uint64) error { panic("x") }
func (m *Map) Resize(clusters uint64) error                                { panic("x") }
func (m *Map) Mapped() uint64                                              { panic("x") }

// Walk calls fn for every mapped cluster of [lba, lba+n), ascending.
func (m *Map) Walk(ctx context.Context, r PageReader, lba, n uint64, fn func(lba uint64, loc Location) bool) error {
	panic("x")
}

// Extents calls fn with consecutive runs that cover [lba, lba+n).
func (m *Map) Extents(ctx context.Context, r PageReader, lba, n uint64, fn func(lba, n uint64, mapped bool) bool) error {
	panic("x")
}

// Stats of a map.
type Stats struct {
	Mapped        uint64
	ResidentPages uint64
	DirtyPages    uint64
	Bytes         uint64
}

func (m *Map) Stats() Stats { panic("x") }

// Checkpoint is a snapshot of the map.
type Checkpoint struct{}

func (m *Map) BeginCheckpoint() *Checkpoint { panic("x") }
func (c *Checkpoint) WritePages(fn func(leaf uint64, page []byte) (PageAddr, error)) error {
	panic("x")
}
func (c *Checkpoint) Commit()                                {}
func (c *Checkpoint) Abort()                                 {}
func (c *Checkpoint) Mapped() uint64                         { panic("x") }
func (c *Checkpoint) Directory() iter.Seq2[uint64, PageAddr] { panic("x") }
func (m *Map) RestoreDirectory(entries iter.Seq2[uint64, PageAddr], mapped uint64) error {
	panic("x")
}
func (m *Map) LivePages(object uint32) int { panic("x") }
func (m *Map) Objects() []uint32           { panic("x") }
func (m *Map) MarkObjectDirty(ctx context.Context, r PageReader, object uint32) error {
	panic("x")
}
