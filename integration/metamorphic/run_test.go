package metamorphic

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/rs/zerolog"

	"scoria/driver/block"
	"scoria/driver/control"
)

// run is a world beside its model.
type run struct {
	w *world
	m *model

	// alternatives are what the operation under way may have done if the daemon dies
	// meanwhile, besides nothing.
	alternatives []func(*model)
	attached     map[string]func() // claims of guests, by volume
	restarts     int
}

func newRun(s settings, log zerolog.Logger, wrap func(block.Device) block.Device) (*run, error) {
	w, err := newWorld(s, log)
	if err != nil {
		return nil, err
	}
	w.wrap = wrap
	return &run{w: w, m: newModel(), attached: map[string]func(){}}, nil
}

// replay runs a trace to its end and verifies everything.
func replay(t *trace, log zerolog.Logger, wrap func(block.Device) block.Device) error {
	r, err := newRun(t.settings, log, wrap)
	if err != nil {
		return err
	}
	for i, o := range t.ops {
		if err := r.do(o); err != nil {
			r.leave()
			return fmt.Errorf("operation %d, %s: %w", i+1, o, err)
		}
	}
	return r.end()
}

// do carries an operation out. If the daemon died meanwhile, it is started again.
func (r *run) do(o op) error {
	r.alternatives = nil
	err := kinds[o.Kind].do(r, o)
	if r.w.life.died() && !r.w.life.buried {
		return r.rise()
	}
	return err
}

// rise starts a daemon that has died, finds what is there, and lets the model be that
// if it may be.
func (r *run) rise() error {
	how := unansweredLost
	if r.w.life.how.power {
		how = unflushedLost
	}
	clear(r.attached)
	if err := r.w.bury(); err != nil {
		return err
	}
	if err := r.w.start(); err != nil {
		return err
	}
	r.restarts++
	found, err := r.observe()
	if err != nil {
		return err
	}
	var errs []error
	for i, alternative := range append([]func(*model){func(*model) {}}, r.alternatives...) {
		m := r.m.clone()
		alternative(m)
		if err := m.match(found, how); err != nil {
			errs = append(errs, fmt.Errorf("alternative %d: %w", i, err))
			continue
		}
		r.m = m
		r.alternatives = nil
		return r.verifyRest()
	}
	return errors.Join(errs...)
}

// verify compares everything.
func (r *run) verify() error {
	found, err := r.observe()
	if err == nil && !r.w.life.died() {
		err = r.m.match(found, nothingLost)
	}
	if err == nil {
		err = r.verifyRest()
	}
	return err
}

// end verifies everything, deletes it, and sees that nothing is left.
func (r *run) end() error {
	err := r.finish()
	if err != nil {
		r.leave()
		return fmt.Errorf("at the end: %w", err)
	}
	return r.w.close()
}

// leave ends the world as it is.
func (r *run) leave() {
	r.w.life.die(death{})
	_ = r.w.bury()
	r.w.remove()
}

func (r *run) finish() error {
	r.w.life.countdown.Store(0)
	r.w.life.asdDown.Store(false)
	for _, o := range []op{{Kind: "restart"}, {Kind: "settle"}, {Kind: "restart"}, {Kind: "space"}} {
		if err := r.do(o); err != nil {
			return fmt.Errorf("%s: %w", o, err)
		}
	}
	for len(r.m.volumes) > 0 {
		before := len(r.m.volumes)
		for _, name := range r.m.names() {
			if sure, _ := r.m.dependents(r.m.volumes[name], noID); !sure {
				if err := r.do(op{Kind: "delete", Vol: name, Mod: "force"}); err != nil {
					return fmt.Errorf("delete %s: %w", name, err)
				}
			}
		}
		if before == len(r.m.volumes) {
			return fmt.Errorf("none of %v can be deleted", r.m.names())
		}
	}
	return r.verifyNothing()
}

// call runs fn while the daemon lives. When it dies, requests that wait are ended.
func (r *run) call(what string, fn func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- fn(ctx) }()
	l := r.w.life
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%s has not ended after %v\n%s", what, patience, dump())
	case <-l.dead:
	}
	cancel()
	late := time.Now().Add(patience)
	for time.Now().Before(late) {
		l.engine.Doom()
		select {
		case err := <-done:
			return err
		case <-time.After(time.Millisecond):
		}
	}
	return fmt.Errorf("%s has not ended %v after the daemon's death\n%s", what, patience, dump())
}

// manage asks for something through the control API. Alternatives are what has
// happened if the daemon dies before it answers.
func (r *run) manage(what string, fn func(ctx context.Context, c *control.Client) error, alternatives ...func(*model)) error {
	r.alternatives = alternatives
	return r.call(what, func(ctx context.Context) error { return fn(ctx, r.w.life.client) })
}

// ask is manage for what changes nothing.
func (r *run) ask(what string, fn func(ctx context.Context, c *control.Client) error) error {
	return r.call(what, func(ctx context.Context) error { return fn(ctx, r.w.life.client) })
}

// expect says whether an error is one with one of the codes; the empty code stands for
// none.
func expect(what string, err error, codes ...control.Code) error {
	has := control.Code("")
	if err != nil {
		has = control.CodeOf(err)
	}
	for _, c := range codes {
		if has == c {
			return nil
		}
	}
	return fmt.Errorf("%s: got %q (%w), want one of %q", what, has, err, codes)
}

// await follows a job to its end.
func await(ctx context.Context, c *control.Client, j control.Job, err error) (control.Job, error) {
	for err == nil && j.State == control.JobRunning {
		j, err = c.Job(ctx, j.ID, 10*time.Second)
	}
	if err == nil && j.Error != nil {
		err = j.Error
	}
	return j, err
}

// device opens a volume or snapshot as a front end does, for fn.
func (r *run) device(name string, fn func(ctx context.Context, dev block.Device) error) error {
	return r.call(name, func(ctx context.Context) error {
		dev, err := r.w.life.host.Devices().Open(ctx, name)
		if err != nil {
			return err
		}
		defer block.Release(dev)
		if r.w.wrap != nil {
			dev = r.w.wrap(dev)
		}
		return fn(ctx, dev)
	})
}

// submit carries out requests at once and returns the first error.
func submit(dev block.Device, batch ...*block.Request) error {
	done := make(chan struct{}, len(batch))
	for _, q := range batch {
		q.Complete = func(*block.Request) { done <- struct{}{} }
	}
	dev.Submit(batch)
	for _, q := range batch {
		if !q.Ended {
			<-done
		}
	}
	for _, q := range batch {
		if q.Err != nil {
			return fmt.Errorf("%s of %d bytes at %d: %w", q.Op, q.Length, q.Offset, q.Err)
		}
	}
	return nil
}
