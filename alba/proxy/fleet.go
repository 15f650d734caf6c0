package proxy

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/place"
)

// Times of the fleet.
const (
	pollEvery   = 2 * time.Second
	statTimeout = 2 * time.Second

	maxCopies = 1 << 16 // namespaces of which a device is remembered to have a copy
)

// Dial opens the client of a device.
type Dial func(ctx context.Context, d alba.Device) (asd.Client, error)

// Location is where a daemon runs, to prefer what is near.
type Location struct{ Host, Rack, Datacentre string }

// distance is 0 for the same host, up to 3 for another datacentre.
func (l Location) distance(d *alba.Device) int {
	switch {
	case l.Datacentre != d.Datacentre:
		return 3
	case l.Rack != d.Rack:
		return 2
	case l.Host != d.Host:
		return 1
	}
	return 0
}

// Fleet is the devices of the registry with their clients and health. Safe from any
// goroutine.
type Fleet struct {
	reg  alba.Registry
	dial Dial
	near Location
	// Of the proxy; nil: nothing is asked. Set before the first device is known.
	check   func(ctx context.Context, id string, c asd.Client) error // what the device was told is known
	now     func(ctx context.Context) (alba.Position, error)         // how far the registry is
	refresh func(ctx context.Context) error                          // finds out anew what it knows
	silent  bool                                                     // nothing is told to devices

	// reloading is held from reading the registry until what it said is known, so that
	// an older state never replaces a newer one. Taken before mu.
	reloading sync.Mutex

	mu      sync.Mutex
	devices map[string]*Member
	order   []string // IDs, sorted
}

// NewFleet returns the fleet of the registry, empty until Reload.
func NewFleet(reg alba.Registry, dial Dial, here Location) *Fleet {
	return &Fleet{reg: reg, dial: dial, near: here, devices: map[string]*Member{}}
}

// Reload reads the devices from the registry anew. Clients of devices that are gone,
// or have another address, are closed.
func (f *Fleet) Reload(ctx context.Context) error {
	f.reloading.Lock()
	defer f.reloading.Unlock()
	kvs, err := f.reg.List(ctx, alba.DevicePrefix)
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	recs, revs := make(map[string]alba.Device, len(kvs)), make(map[string]int64, len(kvs))
	for _, kv := range kvs {
		d, err := alba.Decode[alba.Device](kv.Value)
		if err == nil {
			err = d.Check()
		}
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		recs[d.ID], revs[d.ID] = d, kv.Revision
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, m := range f.devices {
		if _, ok := recs[id]; !ok {
			m.close()
			delete(f.devices, id)
		}
	}
	f.order = f.order[:0]
	for id, d := range recs {
		f.order = append(f.order, id)
		if m := f.devices[id]; m != nil {
			m.replace(d, revs[id])
			continue
		}
		f.devices[id] = &Member{fleet: f, rec: d, rev: revs[id], copies: map[string]int64{}}
	}
	slices.Sort(f.order)
	return nil
}

// Close closes all clients.
func (f *Fleet) Close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.devices {
		m.close()
	}
	clear(f.devices)
	f.order = nil
}

// Member returns a device, or nil if the registry has none of that ID.
func (f *Fleet) Member(id string) *Member {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.devices[id]
}

// Members returns all devices, by ID.
func (f *Fleet) Members() []*Member {
	f.mu.Lock()
	defer f.mu.Unlock()
	list := make([]*Member, len(f.order))
	for i, id := range f.order {
		list[i] = f.devices[id]
	}
	return list
}

// Poll asks all devices that are not known to be down for their statistics, and so
// finds out which of the others are back.
func (f *Fleet) Poll(ctx context.Context) {
	var g errgroup.Group
	for _, m := range f.Members() {
		g.Go(func() error { m.Poll(ctx); return nil })
	}
	_ = g.Wait()
}

// States returns what placement needs to know. Devices that were never asked for
// their statistics are asked now. One whose key-value store is damaged takes nothing
// new as long as there is another that can.
func (f *Fleet) States(ctx context.Context) []place.Device {
	members := f.Members()
	var g errgroup.Group
	for _, m := range members {
		if m.unknown() {
			g.Go(func() error { m.Poll(ctx); return nil })
		}
	}
	_ = g.Wait()
	list := make([]place.Device, len(members))
	sound := false
	for i, m := range members {
		list[i] = m.State()
		sound = sound || list[i].Usable && m.Damaged() == ""
	}
	for i, m := range members {
		list[i].Usable = list[i].Usable && (!sound || m.Damaged() == "")
	}
	return list
}

// nearest orders members for reading: those that are up first, then by distance,
// then by latency.
func (f *Fleet) nearest(list []candidate) {
	now := time.Now()
	slices.SortStableFunc(list, func(a, b candidate) int {
		au, bu := 0, 0
		if !a.m.up(now) {
			au = 1
		}
		if !b.m.up(now) {
			bu = 1
		}
		ar, br := a.m.Record(), b.m.Record()
		return cmp.Or(cmp.Compare(au, bu), cmp.Compare(f.near.distance(&ar), f.near.distance(&br)),
			cmp.Compare(a.m.latency(), b.m.latency()))
	})
}

// candidate is a shard that may be read.
type candidate struct {
	shard int
	m     *Member
}
