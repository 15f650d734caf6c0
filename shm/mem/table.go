package mem

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
)

// MaxRegions bounds a Table. QEMU's guests have at most 256 memory devices, and
// a front end refuses a back end whose number of slots shrank, so this number
// never gets smaller in a later version.
const MaxRegions = 509

// Errors of Table's methods, wrapped with the addresses.
var (
	ErrOverlap        = errors.New("memory regions overlap")
	ErrTooManyRegions = errors.New("too many memory regions")
	ErrNoRegion       = errors.New("no such memory region")
)

// Region is a range of guest memory that is mapped here.
type Region struct {
	GuestAddr uint64 // guest-physical
	UserAddr  uint64 // in the front end's address space
	Data      []byte // Size bytes
	Mapping   *Mapping
}

// Size returns the region's size in bytes.
func (r *Region) Size() uint64 { return uint64(len(r.Data)) }

// Table is an immutable set of regions, counted like a Mapping. Its methods but
// Release may be called from any goroutine that holds a reference.
type Table struct {
	refs    atomic.Int64
	byGuest []Region
	byUser  []Region
}

// NewTable makes a table of one reference. It takes over the caller's reference
// on each region's mapping if it succeeds. Mapping may be nil for memory of
// this process (tests).
func NewTable(regions []Region) (*Table, error) {
	if len(regions) > MaxRegions {
		return nil, fmt.Errorf("%d regions, want at most %d: %w", len(regions), MaxRegions, ErrTooManyRegions)
	}
	t := &Table{byGuest: slices.Clone(regions), byUser: slices.Clone(regions)}
	guest := func(r *Region) uint64 { return r.GuestAddr }
	user := func(r *Region) uint64 { return r.UserAddr }
	if err := sortRegions(t.byGuest, "guest", guest); err != nil {
		return nil, err
	}
	if err := sortRegions(t.byUser, "user", user); err != nil {
		return nil, err
	}
	t.refs.Store(1)
	return t, nil
}

func sortRegions(rs []Region, kind string, addr func(*Region) uint64) error {
	slices.SortFunc(rs, func(a, b Region) int { return cmp.Compare(addr(&a), addr(&b)) })
	for i := range rs {
		r := &rs[i]
		if r.Size() == 0 || addr(r)+r.Size() < addr(r) {
			return fmt.Errorf("region of %#x bytes at %s address %#x: %w", r.Size(), kind, addr(r), ErrRange)
		}
		if i > 0 && addr(&rs[i-1])+rs[i-1].Size() > addr(r) {
			return fmt.Errorf("regions at %s addresses %#x and %#x: %w", kind, addr(&rs[i-1]), addr(r), ErrOverlap)
		}
	}
	return nil
}

// Add returns a new table with one region more. It takes over the caller's
// reference on r.Mapping if it succeeds; t stays as it is.
func (t *Table) Add(r Region) (*Table, error) {
	n, err := NewTable(append(slices.Clone(t.byGuest), r))
	if err != nil {
		return nil, err
	}
	for i := range t.byGuest {
		t.byGuest[i].retain()
	}
	return n, nil
}

// Remove returns a new table without the region that has exactly these
// addresses and size; t stays as it is.
func (t *Table) Remove(guestAddr, userAddr, size uint64) (*Table, error) {
	i := slices.IndexFunc(t.byGuest, func(r Region) bool {
		return r.GuestAddr == guestAddr && r.UserAddr == userAddr && r.Size() == size
	})
	if i < 0 {
		return nil, fmt.Errorf("region of %#x bytes at guest address %#x, user address %#x: %w", size, guestAddr, userAddr, ErrNoRegion)
	}
	n, err := NewTable(slices.Delete(slices.Clone(t.byGuest), i, i+1))
	if err != nil {
		return nil, err
	}
	for i := range n.byGuest {
		n.byGuest[i].retain()
	}
	return n, nil
}

func (r *Region) retain() {
	if r.Mapping != nil {
		r.Mapping.Retain()
	}
}

// Len returns the number of regions.
func (t *Table) Len() int { return len(t.byGuest) }

// Regions returns the regions by guest address; the caller must not change them.
func (t *Table) Regions() []Region { return t.byGuest }

// Retain adds a reference.
func (t *Table) Retain() { t.refs.Add(1) }

// Release drops a reference; the last one releases the mappings, which may
// take as long as unmapping does.
func (t *Table) Release() {
	switch n := t.refs.Add(-1); {
	case n == 0:
		for i := range t.byGuest {
			if m := t.byGuest[i].Mapping; m != nil {
				m.Release()
			}
		}
		t.byGuest, t.byUser = nil, nil
	case n < 0:
		panic("mem: Table released too often")
	}
}

// Contains reports whether the address addr of this process lies in a mapping.
func (t *Table) Contains(addr uintptr) bool {
	for i := range t.byGuest {
		if m := t.byGuest[i].Mapping; m != nil && m.Contains(addr) {
			return true
		}
	}
	return false
}

// find returns the region that holds guest address addr, or nil.
func (t *Table) find(addr uint64) *Region {
	rs := t.byGuest
	lo := 0
	if len(rs) > 8 {
		hi := len(rs)
		for lo < hi { // the last region that starts at or before addr
			if mid := int(uint(lo+hi) >> 1); rs[mid].GuestAddr <= addr {
				lo = mid + 1
			} else {
				hi = mid
			}
		}
		if lo == 0 {
			return nil
		}
		lo--
		rs = rs[:lo+1]
	}
	for ; lo < len(rs); lo++ {
		// One comparison for both ends: below the region the difference wraps.
		if r := &rs[lo]; addr-r.GuestAddr < uint64(len(r.Data)) {
			return r
		}
	}
	return nil
}

// Slice returns the n bytes at guest address addr, or nil unless they lie in
// exactly one region. An empty range is nil.
func (t *Table) Slice(addr, n uint64) []byte {
	r := t.find(addr)
	if r == nil || n == 0 {
		return nil
	}
	off := addr - r.GuestAddr
	if n > uint64(len(r.Data))-off {
		return nil
	}
	return r.Data[off : off+n : off+n]
}

// AppendSlices appends the n bytes at guest address addr to dst: one slice, or
// several where the range crosses regions that adjoin. It reports whether all
// of the range is mapped. It allocates only to grow dst.
func (t *Table) AppendSlices(dst [][]byte, addr, n uint64) ([][]byte, bool) {
	if addr+n < addr {
		return dst, false
	}
	for n > 0 {
		r := t.find(addr)
		if r == nil {
			return dst, false
		}
		off := addr - r.GuestAddr
		part := min(n, uint64(len(r.Data))-off)
		dst = append(dst, r.Data[off:off+part:off+part])
		addr += part
		n -= part
	}
	return dst, true
}

// ReadAt copies len(p) bytes at guest address addr to p. It reports whether all
// of them are mapped.
func (t *Table) ReadAt(p []byte, addr uint64) bool {
	for len(p) > 0 {
		r := t.find(addr)
		if r == nil {
			return false
		}
		n := copy(p, r.Data[addr-r.GuestAddr:])
		p = p[n:]
		if addr += uint64(n); addr == 0 && len(p) > 0 {
			return false
		}
	}
	return true
}

// UserSlice returns the n bytes at the front end's own address addr, or nil
// unless they lie in exactly one region. Ring addresses are such.
func (t *Table) UserSlice(addr, n uint64) []byte {
	for i := range t.byUser {
		r := &t.byUser[i]
		off := addr - r.UserAddr
		if off < r.Size() && n != 0 && n <= r.Size()-off {
			return r.Data[off : off+n : off+n]
		}
	}
	return nil
}
