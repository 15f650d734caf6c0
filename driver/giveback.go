package driver

import (
	"context"
	"errors"
	"syscall"
	"time"
)

// giveBack gives the space of dead SCOs back beside the scrubber, which goes on
// emptying others: a checkpoint, the upload of the SCOs before it, its publication,
// the deletion. It belongs to one call of scrub; run is its only goroutine, and there
// is one at a time.
type giveBack struct {
	v       *Volume
	ctx     context.Context
	running bool
	ended   chan error
	leave   chan struct{} // closed when nobody waits for uploads any more
	late    bool          // uploads, or the disk, take longer than an attempt waits
	putOff  bool          // the last attempt left it to others to write the log out first
	failed  error         // why nothing can be given back
	forced  uint64        // steps of spaceGate at the last force, and one
}

var (
	errChecked   = errors.New("a check of the volume is under way")
	errNotStored = errors.New("SCOs are still on their way to the store")
	errPutOff    = errors.New("the log is written out first")
	errNotTaken  = errors.New("the disk has no room for a checkpoint")
)

func (v *Volume) newGiveBack(ctx context.Context) *giveBack {
	return &giveBack{v: v, ctx: ctx, ended: make(chan error, 1)}
}

// begin starts an attempt if it would give enough back. One that was put off is not made
// again in the same turn of the scrubber, which would come round at once, and look at all
// SCOs each time, unless guests have become slow meanwhile.
func (g *giveBack) begin(u spaceUse) {
	if !g.running && u.reclaimable(g.v) && (!g.putOff || g.v.space.tight.Load()) {
		g.start(false)
	}
}

// force makes an attempt for however little, which also has the log written out. It
// reports false if nothing has come of the last one.
func (g *giveBack) force() bool {
	steps := g.v.spaceSteps() + 1
	if g.forced == steps {
		return false
	}
	g.forced = steps
	g.start(true)
	g.await()
	return true
}

func (g *giveBack) start(anything bool) {
	g.running, g.leave = true, make(chan struct{})
	go func() { g.ended <- g.run(anything) }()
}

// poll looks whether an attempt has ended.
func (g *giveBack) poll() {
	if !g.running {
		return
	}
	select {
	case err := <-g.ended:
		g.done(err)
	default:
	}
}

// await waits for the end of an attempt.
func (g *giveBack) await() {
	if g.running {
		g.done(<-g.ended)
	}
}

// finish waits for the end of an attempt, which no longer waits for uploads.
func (g *giveBack) finish() {
	if g.running {
		close(g.leave)
		g.await()
	}
}

func (g *giveBack) done(err error) {
	g.running, g.putOff = false, errors.Is(err, errPutOff)
	g.v.space.untaken.Store(errors.Is(err, errNotTaken))
	switch {
	case err == nil, g.ctx.Err() != nil, errors.Is(err, errPutOff), errors.Is(err, errNoRoom):
	case errors.Is(err, errNotStored), errors.Is(err, errNotTaken):
		g.late = true
	default:
		g.failed = err
	}
}

// run is one attempt: what an earlier checkpoint has to give back, and what a new one
// has.
func (g *giveBack) run(anything bool) error {
	v := g.v
	v.space.giving.Store(true)
	defer v.space.giving.Store(false)
	if !v.ckpt.idle() {
		if err := g.publish(); err != nil {
			return err
		}
	}
	if !anything && !v.usage().reclaimable(v) {
		return nil
	}
	if v.behind() && !v.space.tight.Load() {
		return errPutOff
	}
	v.compactCheckpoints(g.ctx)
	err := v.checkpoint(g.ctx)
	v.checkpointEnded(g.ctx, err)
	switch {
	case errors.Is(err, errNoRoom):
		_ = v.awaitPool(g.ctx)
		return err
	case errors.Is(err, errLogBehind), errors.Is(err, syscall.ENOSPC):
		g.pause(behindPause) // it would fail again at once
		return errNotTaken
	case err != nil:
		return err
	case v.ckpt.idle():
		return nil // nothing was logged since the last one
	}
	return g.publish()
}

// pause waits, unless there is no time.
func (g *giveBack) pause(d time.Duration) {
	select {
	case <-time.After(d):
	case <-g.leave:
	case <-g.ctx.Done():
	}
}

// publishWait is how long an attempt waits for uploads. An outage of the store may
// last: other housekeeping must go on.
const publishWait = time.Second

// publish waits for the uploads that the pending root builds on, publishes it and
// deletes what it does without.
func (g *giveBack) publish() error {
	v := g.v
	limit := time.NewTimer(publishWait)
	defer limit.Stop()
	for {
		v.kickUpload()
		did, err := v.publish(g.ctx)
		v.publishEnded(g.ctx, did, err)
		if err != nil {
			return err
		}
		if did {
			v.spaceProgress()
			v.measureGain()
			if v.ckpt.someDoomed() {
				return errChecked
			}
			return nil
		}
		select {
		case <-v.stored:
		case <-time.After(20 * time.Millisecond):
		case <-limit.C:
			return errNotStored
		case <-g.leave:
			return errNotStored
		case <-g.ctx.Done():
			return g.ctx.Err()
		}
	}
}
