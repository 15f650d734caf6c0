package vhost

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"

	"scoria/driver/block"
	"scoria/shm/mem"
)

// ramDevice is a block.Device in memory.
type ramDevice struct {
	mu       sync.Mutex
	info     block.Info
	data     []byte
	held     []*block.Request // taken over, in order
	hold     bool             // take over instead of answering
	async    bool             // answer from another goroutine
	delays   bool             // what is held is held on purpose: Hasten lets it go
	log      []string         // "op offset flags" of what was carried out
	fua      int
	flushes  int
	cancels  int
	holder   *block.Claimant
	watchers map[int]func(block.Info)
	nextID   int
	quiet    bool // keep no log
}

func newRAMDevice(size uint64) *ramDevice {
	return &ramDevice{
		info: block.Info{Name: "default/test", Serial: "serial-0123456789", Size: size, LogicalBlock: 512, PhysicalBlock: 4096, DiscardAlignment: 4096},
		data: make([]byte, size), watchers: map[int]func(block.Info){},
	}
}

func (d *ramDevice) Info() block.Info {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.info
}

func (d *ramDevice) Submit(batch []*block.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range batch {
		switch {
		case d.hold:
			d.held = append(d.held, r)
		case d.async:
			go func() {
				d.mu.Lock()
				r.Err = d.carryOut(r)
				d.mu.Unlock()
				r.Complete(r)
			}()
		default:
			r.Err = d.carryOut(r)
			r.Ended = true
		}
	}
}

// carryOut runs with d.mu held.
func (d *ramDevice) carryOut(r *block.Request) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			if _, ok := mem.Fault(p); !ok {
				panic(p)
			}
			err = block.ErrFault
		}
	}()
	if err := block.CheckRange(&d.info, r); err != nil {
		return err
	}
	if !d.quiet {
		d.log = append(d.log, fmt.Sprintf("%v %d", r.Op, r.Offset))
	}
	if r.Flags&block.FUA != 0 {
		d.fua++
	}
	part := d.data[r.Offset:]
	switch r.Op {
	case block.OpFlush:
		d.flushes++
	case block.OpRead:
		for _, s := range r.Segments {
			part = part[copy(s, part):]
		}
	case block.OpWrite:
		for _, s := range r.Segments {
			part = part[copy(part, s):]
		}
	default:
		clear(part[:r.Length])
	}
	return nil
}

// Hasten implements block.Delayer.
func (d *ramDevice) Hasten(any) {
	d.mu.Lock()
	delays := d.delays
	d.mu.Unlock()
	if delays {
		d.let(inOrder)
	}
}

// let ends held requests, in the order given by pick, and stops holding.
func (d *ramDevice) let(pick func(n int) []int) {
	d.mu.Lock()
	held := d.held
	d.held, d.hold = nil, false
	order := pick(len(held))
	for _, i := range order {
		held[i].Err = d.carryOut(held[i])
	}
	d.mu.Unlock()
	for _, i := range order {
		held[i].Complete(held[i])
	}
}

func (d *ramDevice) set(change func(*ramDevice)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change(d)
}

func (d *ramDevice) setHold(on bool) { d.set(func(d *ramDevice) { d.hold = on }) }

func (d *ramDevice) fuaCount() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.fua
}

func (d *ramDevice) flushCount() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flushes
}

func (d *ramDevice) heldCount() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.held)
}

func (d *ramDevice) Cancel(owner any) {
	d.mu.Lock()
	d.cancels++
	var mine []*block.Request
	d.held = slices.DeleteFunc(d.held, func(r *block.Request) bool {
		if r.Owner == owner {
			mine = append(mine, r)
			return true
		}
		return false
	})
	d.mu.Unlock()
	for _, r := range mine {
		r.Err = block.ErrCanceled
		r.Complete(r)
	}
}

func (d *ramDevice) Claim(c block.Claimant) (func(), error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.holder != nil && *d.holder != c {
		return nil, &block.InUseError{Volume: d.info.Name, Holder: *d.holder}
	}
	d.holder = &c
	return func() {
		d.mu.Lock()
		d.holder = nil
		d.mu.Unlock()
	}, nil
}

func (d *ramDevice) claimed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.holder != nil
}

func (d *ramDevice) Watch(fn func(block.Info)) func() {
	d.mu.Lock()
	defer d.mu.Unlock()
	id := d.nextID
	d.nextID++
	d.watchers[id] = fn
	return func() {
		d.mu.Lock()
		delete(d.watchers, id)
		d.mu.Unlock()
	}
}

func (d *ramDevice) resize(size uint64) {
	d.mu.Lock()
	d.info.Size = size
	d.data = append(d.data, make([]byte, size-uint64(len(d.data)))...)
	info := d.info
	var fns []func(block.Info)
	for _, fn := range d.watchers {
		fns = append(fns, fn)
	}
	d.mu.Unlock()
	for _, fn := range fns {
		fn(info)
	}
}

func (d *ramDevice) BlockStatus(context.Context, uint64, uint64, func(block.Extent) bool) error {
	return nil
}
