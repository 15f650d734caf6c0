package mem

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
)

// ErrBudget is wrapped with what is used up.
var ErrBudget = errors.New("more shared memory than is allowed")

// Budget bounds what the mappings made by Map take together. The peer says how
// much of which file is to be mapped, and a sparse file of any size costs it
// nothing; but the address space and the number of mappings are the whole
// process's, and Go's runtime ends the process when it gets no more.
//
// Its methods may be called from any goroutine. mu is a leaf, but for that of
// the Budget above, which is taken under it.
type Budget struct {
	above    *Budget // which this is a part of; nil: none
	bytes    uint64
	mappings int

	mu           sync.Mutex
	usedBytes    uint64
	usedMappings int
}

// NewBudget returns a budget of so many bytes of address space and mappings; what
// is taken from it is taken from above, too, if that is not nil.
func NewBudget(above *Budget, bytes uint64, mappings int) *Budget {
	return &Budget{above: above, bytes: bytes, mappings: mappings}
}

// Map is the function Map within the budget: it also fails with ErrBudget. What it
// took is given back when the mapping is unmapped.
func (b *Budget) Map(fd int, offset, size uint64) (*Mapping, error) {
	start, length, err := extent(fd, offset, size)
	if err != nil {
		return nil, err
	}
	if err := b.take(length); err != nil {
		return nil, fmt.Errorf("mapping %d bytes at %d: %w", size, offset, err)
	}
	m, err := mapExtent(fd, start, length, offset, size)
	if err != nil {
		b.give(length)
		return nil, err
	}
	m.budget = b
	return m, nil
}

// Used returns what is taken now.
func (b *Budget) Used() (bytes uint64, mappings int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.usedBytes, b.usedMappings
}

func (b *Budget) take(bytes uint64) error {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case bytes > b.bytes-b.usedBytes:
		return fmt.Errorf("%w: %d of at most %d bytes are mapped, and this needs %d", ErrBudget, b.usedBytes, b.bytes, bytes)
	case b.usedMappings >= b.mappings:
		return fmt.Errorf("%w: there are %d mappings, the most that may be", ErrBudget, b.usedMappings)
	}
	if err := b.above.take(bytes); err != nil {
		return err
	}
	b.usedBytes += bytes
	b.usedMappings++
	return nil
}

func (b *Budget) give(bytes uint64) {
	if b == nil {
		return
	}
	b.mu.Lock()
	b.usedBytes -= bytes
	b.usedMappings--
	b.mu.Unlock()
	b.above.give(bytes)
}

// MaxMappings returns how many mappings the kernel lets a process have.
func MaxMappings() int {
	const usual = 65530
	text, err := os.ReadFile("/proc/sys/vm/max_map_count")
	if err != nil {
		return usual
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || n <= 0 {
		return usual
	}
	return n
}
