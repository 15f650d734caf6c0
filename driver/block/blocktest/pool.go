package blocktest

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"scoria/driver/block"
)

// Pool is a block.Opener of RAM devices. Options are what Create gives each new
// device, apart from its name.
type Pool struct {
	Options Options

	mu      sync.Mutex
	devices map[string]*RAM
}

// Add puts a device into the pool under the name of its Info.
func (p *Pool) Add(d *RAM) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.devices == nil {
		p.devices = make(map[string]*RAM)
	}
	p.devices[d.opts.Name] = d
}

// Get returns a device, or nil if there is none of that name.
func (p *Pool) Get(name string) *RAM {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.devices[name]
}

// Open implements block.Opener.
func (p *Pool) Open(_ context.Context, name string) (block.Device, error) {
	if d := p.Get(name); d != nil {
		return d, nil
	}
	return nil, fmt.Errorf("volume %s: %w", name, block.ErrNotFound)
}

// Names implements block.Opener.
func (p *Pool) Names(context.Context) ([]string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	names := make([]string, 0, len(p.devices))
	for name := range p.devices {
		names = append(names, name)
	}
	slices.Sort(names)
	return names, nil
}

// Create implements block.Opener. Sizes follow the volume driver's rule: a
// positive multiple of block.ClusterSize.
func (p *Pool) Create(_ context.Context, name string, size uint64) error {
	if size == 0 || size%block.ClusterSize != 0 {
		return fmt.Errorf("volume %s: size %d: must be a positive multiple of %d bytes", name, size, block.ClusterSize)
	}
	p.mu.Lock()
	_, exists := p.devices[name]
	p.mu.Unlock()
	if exists {
		return fmt.Errorf("volume %s exists", name)
	}
	opts := p.Options
	opts.Name = name
	p.Add(NewRAM(size, opts))
	return nil
}

// Resize implements block.Opener.
func (p *Pool) Resize(_ context.Context, name string, size uint64) error {
	d := p.Get(name)
	if d == nil {
		return fmt.Errorf("volume %s: %w", name, block.ErrNotFound)
	}
	return d.Resize(size)
}

// Close closes all devices.
func (p *Pool) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, d := range p.devices {
		d.Close()
	}
}
