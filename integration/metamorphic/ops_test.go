package metamorphic

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"scoria/alba/asd"
	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/shm/client"
)

var noID uuid.UUID

// kind is a kind of operations: how often the generator picks it, how it makes one,
// and how it is carried out. An operation on what is not there does nothing or is
// refused.
type kind struct {
	weight int
	make   func(g *generator, o *op) bool // false: none fits now
	do     func(r *run, o op) error
}

// kinds is filled by init, as what it has refers to it.
var kinds map[string]kind

func init() {
	kinds = map[string]kind{
		"write":   {300, (*generator).write, (*run).write},
		"zero":    {30, (*generator).rangeOf, (*run).clear},
		"discard": {60, (*generator).rangeOf, (*run).clear},
		"batch":   {60, (*generator).batch, (*run).batch},
		"read":    {200, (*generator).readRange, (*run).read},
		"flush":   {60, (*generator).volume, (*run).flush},
		"rings":   {10, (*generator).rings, (*run).rings},

		"create":      {12, (*generator).create, (*run).create},
		"import":      {3, (*generator).create, (*run).importVolume},
		"delete":      {5, (*generator).delete, (*run).delete},
		"snapshot":    {20, (*generator).snapshot, (*run).snapshot},
		"unsnapshot":  {10, (*generator).snapshotOf, (*run).unsnapshot},
		"name":        {3, (*generator).renameSnapshot, (*run).renameSnapshot},
		"rollback":    {8, (*generator).rollback, (*run).rollback},
		"clone":       {10, (*generator).clone, (*run).cloneVolume},
		"flatten":     {4, (*generator).volume, (*run).flatten},
		"resize":      {8, (*generator).resize, (*run).resize},
		"template":    {4, (*generator).toggle, (*run).template},
		"readonly":    {3, (*generator).toggle, (*run).setReadOnly},
		"attach":      {4, (*generator).volume, (*run).attach},
		"detach":      {12, (*generator).volume, (*run).detach},
		"copy":        {5, (*generator).copy, (*run).copyVolume},
		"increment":   {10, (*generator).increment, (*run).increment},
		"verify":      {1, (*generator).nothing, (*run).verifyOp},
		"space":       {2, (*generator).nothing, (*run).space},
		"check":       {3, (*generator).volume, (*run).check},
		"tick":        {30, (*generator).tick, (*run).tick},
		"diskfails":   {2, (*generator).diskFails, (*run).diskFails},
		"diskreturns": {4, (*generator).nothing, (*run).diskReturns},

		"adddisk":     {6, (*generator).addDisk, (*run).addDisk},
		"drain":       {5, (*generator).disk, (*run).drain},
		"removedisk":  {10, (*generator).disk, (*run).removeDisk},
		"replacedisk": {4, (*generator).disk, (*run).replaceDisk},
		"settle":      {0, (*generator).nothing, (*run).settle}, // at the end
		"newkey":      {2, (*generator).newKey, (*run).newKey},
		"rotate":      {3, (*generator).rotate, (*run).rotateKeys},

		"rebuild": {3, (*generator).rebuild, (*run).rebuild},
		"restart": {2, (*generator).nothing, (*run).restart},
		"kill":    {3, (*generator).death, (*run).kill},
		"power":   {3, (*generator).death, (*run).power},
		"doom":    {6, (*generator).doom, (*run).doom},
	}
}

// target is a volume to write to, nil if there is none or it takes no writes.
func (r *run) target(o op) *volume {
	v := r.m.volumes[o.Vol]
	if v == nil || v.readOnly || v.template {
		return nil
	}
	return v
}

// fit cuts an operation's range to what the volume has; false if nothing is left.
func (v *volume) fit(o *op) bool {
	if o.Off >= v.sectors() {
		return false
	}
	o.N = min(o.N, v.sectors()-o.Off)
	o.Off, o.N = o.Off/v.block*v.block, max(o.N/v.block, 1)*v.block
	return true
}

// claim is who writes.
var claim = block.Claimant{Kind: "test", ID: "guest"}

// change carries out requests that change a volume. The steps are noted before.
func (r *run) change(v *volume, batch ...*block.Request) error {
	err := r.device(v.name, func(_ context.Context, dev block.Device) error {
		release, err := dev.Claim(claim)
		if err != nil {
			return err
		}
		defer release()
		return submit(dev, batch...)
	})
	if err == nil && !r.w.life.died() {
		v.ack()
		for _, q := range batch {
			if q.Flags&block.FUA != 0 && len(batch) == 1 {
				v.settle()
			}
		}
	}
	return err
}

func request(kind block.Op, off, n uint64, v version) *block.Request {
	q := &block.Request{Op: kind, Offset: off * sector, Length: n * sector}
	if kind == block.OpWrite {
		p := make([]byte, n*sector)
		stamp(p, off, v)
		q.Segments = segments(p, v)
	}
	return q
}

// segments splits data as the buffers of a guest are.
func segments(p []byte, seed uint64) (list [][]byte) {
	rng := rand.New(rand.NewPCG(seed, 11))
	for len(p) > 0 {
		n := len(p)
		if rng.IntN(3) == 0 {
			n = 1 + rng.IntN(n)
		}
		list, p = append(list, p[:n]), p[n:]
	}
	return list
}

func (r *run) write(o op) error {
	v := r.target(o)
	if v == nil {
		return r.refuseWrite(o)
	}
	if !v.fit(&o) {
		return nil
	}
	q := request(block.OpWrite, o.Off, o.N, o.Seed)
	if o.has("fua") {
		q.Flags |= block.FUA
	}
	v.put(v.writing(o.Off, o.N, o.Seed)...)
	return r.change(v, q)
}

// refuseWrite writes to what must not be written to.
func (r *run) refuseWrite(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil || !v.fit(&o) {
		return nil
	}
	err := r.device(v.name, func(_ context.Context, dev block.Device) error {
		return submit(dev, request(block.OpWrite, o.Off, o.N, o.Seed))
	})
	if r.w.life.died() || errors.Is(err, block.ErrReadOnly) {
		return nil
	}
	return fmt.Errorf("a write to %s, which is a template (%v) or read-only (%v): %v", v.name, v.template, v.readOnly, err)
}

func (r *run) clear(o op) error {
	v := r.target(o)
	if v == nil || !v.fit(&o) {
		return nil
	}
	how := block.OpDiscard
	if o.Kind == "zero" {
		how = block.OpWriteZeroes
	}
	v.put(v.clearing(o.Off, o.N)...)
	return r.change(v, request(how, o.Off, o.N, 0))
}

// batch writes several ranges, with whole clusters of their own, at the same time.
func (r *run) batch(o op) error {
	v := r.target(o)
	if v == nil {
		return nil
	}
	rng := rand.New(rand.NewPCG(o.Seed, 13))
	together := step{}
	var list []*block.Request
	for i := range o.N {
		at := rng.IntN(len(v.cells))
		n := min(1+rng.IntN(8), len(v.cells)-at)
		if slices.ContainsFunc(list, func(q *block.Request) bool {
			return int(q.Offset/cluster) < at+n && at < int((q.Offset+q.Length)/cluster)
		}) {
			continue
		}
		off, length, seed := uint64(at)*perCluster, uint64(n)*perCluster, o.Seed+i
		for c := at; c < at+n; c++ {
			together[c] = v.overlay(c, off, length, seed)
		}
		list = append(list, request(block.OpWrite, off, length, seed))
	}
	v.put(together)
	return r.change(v, list...)
}

func (r *run) read(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil {
		return nil
	}
	name, cells := v.name, v.cells
	if o.Snap != "" {
		s, _ := v.find(o.Snap)
		if s == nil {
			return nil
		}
		name, cells = name+"@"+s.name, s.cells
	}
	o.Off, o.N = o.Off/v.block*v.block, max(o.N/v.block, 1)*v.block
	size := uint64(len(cells)) * perCluster
	if o.Off >= size {
		return nil
	}
	o.N = min(o.N, size-o.Off)
	p := make([]byte, o.N*sector)
	err := r.device(name, func(_ context.Context, dev block.Device) error {
		return submit(dev, &block.Request{Op: block.OpRead, Offset: o.Off * sector, Length: o.N * sector, Segments: segments(p, o.Seed)})
	})
	if err != nil || r.w.life.died() {
		return err
	}
	got, err := readStamps(p, o.Off)
	if err != nil {
		return err
	}
	for i, have := range got {
		at := o.Off + uint64(i)
		if want := cells[at/perCluster].versions()[at%perCluster]; have != want {
			return fmt.Errorf("P5: sector %d (cluster %d) of %s has version %d, want %d", at, at/perCluster, name, have, want)
		}
	}
	return nil
}

func (r *run) flush(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil {
		return nil
	}
	err := r.device(v.name, func(_ context.Context, dev block.Device) error { return submit(dev, &block.Request{Op: block.OpFlush}) })
	if err == nil && !r.w.life.died() {
		v.settle()
	}
	return err
}

// rings writes and reads through the shared-memory rings.
func (r *run) rings(o op) error {
	v := r.target(o)
	if v == nil || !v.fit(&o) || r.w.life.countdown.Load() > 0 || r.attached[v.name] != nil {
		return nil // a client waits for the next daemon
	}
	v.put(v.writing(o.Off, o.N, o.Seed)...)
	p := make([]byte, o.N*sector)
	stamp(p, o.Off, o.Seed)
	back := make([]byte, len(p))
	err := r.call("shared-memory client", func(ctx context.Context) error {
		d, err := client.Open(ctx, client.Options{Socket: r.w.shmSocket(), Volume: v.name, ArenaBytes: 4 << 20, Reconnect: -1})
		if err != nil {
			return err
		}
		_, err = d.WriteContext(ctx, p, int64(o.Off*sector), 0)
		if err == nil {
			_, err = d.ReadContext(ctx, back, int64(o.Off*sector))
		}
		return errors.Join(err, d.Close())
	})
	if err == nil {
		err = r.device(v.name, awaitClaim)
	}
	if err == nil && !bytes.Equal(p, back) {
		err = fmt.Errorf("rings of %s: what was written at sector %d reads otherwise", v.name, o.Off)
	}
	if err == nil {
		v.ack()
	}
	return err
}

// awaitClaim waits until the daemon has noticed that another writer is gone.
func awaitClaim(ctx context.Context, dev block.Device) error {
	for {
		release, err := dev.Claim(claim)
		if err == nil {
			release()
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Millisecond):
		}
	}
}

// tick has the daemon do its housekeeping, as if time had passed.
func (r *run) tick(o op) error {
	l := r.w.life
	select {
	case l.ticks <- time.Now().Add(time.Duration(o.N) * time.Second):
	case <-l.dead:
	case <-time.After(patience):
		return fmt.Errorf("the housekeeper does not tick\n%s", dump())
	}
	return nil
}

// diskFails has the first disk fail, unless an object that was stored or moved while
// others were away may need it.
func (r *run) diskFails(op) error {
	if r.w.settings.DirOnly {
		return nil
	}
	if r.w.moved {
		st, err := r.backend()
		if err != nil || least(st) < 1 {
			return err
		}
	}
	r.w.life.asdDown.Store(true)
	return nil
}

func (r *run) diskReturns(op) error {
	r.w.life.asdDown.Store(false)
	return nil
}

func (r *run) verifyOp(op) error { return r.verify() }

// restart stops the daemon in order and starts it again.
func (r *run) restart(op) error {
	l := r.w.life
	l.countdown.Store(0)
	l.asdDown.Store(false) // its disk would take no write of the stop
	for name, release := range r.attached {
		release()
		delete(r.attached, name)
	}
	if l.died() {
		return nil
	}
	if err := r.w.stop(); err != nil {
		return fmt.Errorf("stop: %w", err)
	}
	for _, v := range r.m.volumes {
		v.settle()
	}
	if err := r.w.start(); err != nil {
		return err
	}
	r.restarts++
	return r.verify()
}

// onlyFailedDisks reports whether an error is about disks of storage daemons alone, which
// take no writes once they have failed.
func onlyFailedDisks(err error) bool {
	if err == nil {
		return false
	}
	if list, ok := err.(interface{ Unwrap() []error }); ok && !strings.HasPrefix(err.Error(), "close ASD") {
		return !slices.ContainsFunc(list.Unwrap(), func(e error) bool { return !onlyFailedDisks(e) })
	}
	return errors.Is(err, asd.ErrFailed)
}

func (r *run) kill(o op) error {
	r.w.life.die(death{seed: o.Seed})
	return nil
}

func (r *run) power(o op) error {
	r.w.life.die(death{power: true, seed: o.Seed})
	return nil
}

// doom has the daemon die at the Nth call to its disk or commit to its registry from now on.
func (r *run) doom(o op) error {
	l := r.w.life
	if l.countdown.Load() > 0 {
		return nil
	}
	l.doom = death{power: o.has("power"), seed: o.Seed}
	l.countdown.Store(int64(o.N))
	return nil
}

func (r *run) attach(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil || r.attached[v.name] != nil || v.template || v.readOnly {
		return nil
	}
	var release func()
	err := r.device(v.name, func(_ context.Context, dev block.Device) (err error) {
		release, err = dev.Claim(claim)
		return err
	})
	if err == nil {
		r.attached[v.name] = release
	}
	return err
}

func (r *run) detach(o op) error {
	if release := r.attached[o.Vol]; release != nil {
		release()
		delete(r.attached, o.Vol)
	}
	return nil
}

// check has a volume verified by the daemon.
func (r *run) check(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil {
		return nil
	}
	return r.ask("check of "+v.name, func(ctx context.Context, c *control.Client) error {
		j, err := c.StartCheck(ctx, v.name)
		j, err = await(ctx, c, j, err)
		if err == nil && len(j.Report.Problems) > 0 {
			err = fmt.Errorf("check: %d problems: %q", len(j.Report.Problems), j.Report.Problems[:min(len(j.Report.Problems), 5)])
		}
		return err
	})
}
