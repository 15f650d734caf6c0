package metamorphic

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"scoria/driver/control"
	"scoria/driver/host"
)

// rebuild has the registry lost, with the daemon stopped, killed or without power, makes it
// anew from the storage daemons alone (P10) and goes on. What a volume has is not lost by that,
// but for what its end loses; snapshots lose names that they were given later, and pools
// without volumes are gone. The storage daemons have all volumes' records before, and no
// deleted volumes any more. What was being stored or deleted as the daemon ended may be found
// in part; the operator is told and goes on without it.
func (r *run) rebuild(o op) error {
	if !r.w.settings.Objects || len(r.m.volumes) == 0 {
		return nil
	}
	r.w.life.countdown.Store(0)
	r.w.life.asdDown.Store(false)
	if err := r.rest(); err != nil || r.w.life.died() {
		return err
	}
	list, err := r.disks()
	if err != nil || r.w.life.died() {
		return err
	}
	how, err := r.stopFor(o)
	if err != nil {
		return err
	}
	req := host.RebuildRequest{}
	for _, a := range list {
		if a != nil {
			req.ASDs = append(req.ASDs, a.Address)
		}
	}
	if err := os.Remove(r.w.registry()); err != nil {
		return err
	}
	if err := r.rebuildFrom(req); err != nil {
		return err
	}
	if o.has("twice") {
		req.Force = true // as there is a registry
		if err := r.rebuildFrom(req); err != nil {
			return fmt.Errorf("again: %w", err)
		}
	}
	if err := r.w.start(); err != nil {
		return err
	}
	r.restarts++
	if err := r.w.makePools(); err != nil {
		return err
	}
	for _, v := range r.m.volumes {
		v.rebuilt()
	}
	found, err := r.observe()
	if err == nil {
		err = r.m.match(found, how)
	}
	if err == nil {
		err = r.verifyRest()
	}
	return err
}

// rest waits until every object can lose a disk, what was deleted while a disk was away is
// collected, and the copies of the records are those of the registry.
func (r *run) rest() error {
	if err := r.settle(op{}); err != nil || r.w.life.died() {
		return err
	}
	const pause = 5 * time.Millisecond
	return r.ask("storage daemons at rest", func(ctx context.Context, c *control.Client) error {
		asked := time.Now()
		j, err := c.StartBackendJob(ctx, "orphans")
		for err == nil && (j.State != "done" || j.Started.Before(asked)) {
			if j.State != "running" && j.State != "never" {
				j, err = c.StartBackendJob(ctx, "orphans")
			}
			time.Sleep(pause)
			if err == nil {
				j, err = c.BackendJob(ctx, "orphans")
			}
		}
		copied := false
		for err == nil && !copied {
			time.Sleep(pause)
			copied, err = r.w.life.host.RecordsCopied(ctx)
		}
		return err
	})
}

// stopFor ends the daemon as an operation says, and says what may be lost by that.
func (r *run) stopFor(o op) (ending, error) {
	for name, release := range r.attached {
		release()
		delete(r.attached, name)
	}
	how := nothingLost
	switch {
	case o.has("kill"):
		r.w.life.die(death{seed: o.Seed})
		how = unansweredLost
	case o.has("power"):
		r.w.life.die(death{power: true, seed: o.Seed})
		how = unflushedLost
	default:
		if err := r.w.stop(); err != nil {
			return how, fmt.Errorf("stop: %w", err)
		}
		for _, v := range r.m.volumes {
			v.settle()
		}
		return how, nil
	}
	return how, r.w.bury()
}

// rebuildFrom makes the registry, which must have all volumes, with nothing to be said of
// them. Whether what was lost was needed is seen when they are read.
func (r *run) rebuildFrom(req host.RebuildRequest) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	report, err := host.RebuildRegistryOn(ctx, r.w.fs, r.w.registry(), r.w.config(), req, r.w.log)
	if control.CodeOf(err) == control.CodeNeedsForce && len(report.Lost) > 0 {
		req.Force = true
		report, err = host.RebuildRegistryOn(ctx, r.w.fs, r.w.registry(), r.w.config(), req, r.w.log)
	}
	if err != nil {
		return fmt.Errorf("rebuild: %w", err)
	}
	var names []string
	for _, v := range report.Volumes {
		if names = append(names, v.Name); v.Note != "" {
			err = errors.Join(err, fmt.Errorf("volume %s: %s", v.Name, v.Note))
		}
	}
	if slices.Sort(names); !slices.Equal(names, r.m.names()) || len(report.Missing)+len(report.Problems) > 0 {
		err = errors.Join(err, fmt.Errorf("rebuilt for volumes %q: %+v", r.m.names(), report))
	}
	return err
}
