package repair

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"scoria/alba"
)

// Collect removes what nobody refers to: intents of uploads that died, trash,
// fragments, copies of namespaces that are gone. It returns how many keys it deleted
// from devices.
func (m *Maintainer) Collect(ctx context.Context) (int64, error) {
	var deleted int64
	err := m.job(ctx, JobOrphans, true, func(ctx context.Context, r *run) error {
		err := m.collect(ctx, r)
		deleted = r.job.Problems
		return err
	})
	return deleted, err
}

// orphanLoop collects everything once in a while, and after a device came back what it
// has missed.
func (m *Maintainer) orphanLoop(ctx context.Context) {
	seen := map[string]uint64{}
	var last time.Time
	m.loop(ctx, JobOrphans, m.o.OrphanEvery, func() error {
		returns := map[string]uint64{}
		back := map[string]bool{}
		for _, d := range m.p.Fleet().Members() {
			id := d.Record().ID
			returns[id] = d.Returns()
			back[id] = returns[id] != seen[id]
		}
		all := last.IsZero() || time.Since(last) >= m.o.OrphanEvery
		j, _, err := loadJob(ctx, m.reg, JobOrphans)
		if err != nil {
			return err
		}
		asked := j.State == JobRunning && j.By == "" // by the operator
		if !all && !asked && !slices.Contains(slices.Collect(maps.Values(back)), true) {
			return nil
		}
		only := func(id string) bool { return all || asked || back[id] }
		r, err := m.claim(ctx, JobOrphans, true)
		if err != nil || r == nil {
			return err // somebody else is at it, perhaps past that device: it is looked at again
		}
		if err := r.end(ctx, m.collectFrom(ctx, r, only)); err != nil {
			return err
		}
		seen = returns
		if all || asked {
			last = time.Now()
		}
		return nil
	})
}

func (m *Maintainer) collect(ctx context.Context, r *run) error {
	return m.collectFrom(ctx, r, func(string) bool { return true })
}

// collectFrom empties the trash and collects the orphans of the devices that only says.
func (m *Maintainer) collectFrom(ctx context.Context, r *run, only func(id string) bool) error {
	r.job.Done, r.job.Problems = 0, 0
	var errs []error
	errs = append(errs, m.p.FinishDeletes(ctx), m.removeIntents(ctx), m.emptyTrash(ctx, r))
	members := m.p.Fleet().Members()
	r.job.Total = int64(len(members))
	for _, d := range members {
		id := d.Record().ID
		if err := m.p.Older(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		if c := m.condition(id); only(id) && (c == Fine || c == Leaving) {
			if err := m.collectDevice(ctx, r, d); err != nil {
				errs = append(errs, fmt.Errorf("device %s: %w", id, err))
			}
		}
		r.job.Done++
		if err := r.save(ctx, false); err != nil {
			return err
		}
	}
	return errors.Join(errs...)
}

// removeIntents removes the intents of uploads and moves that nobody is at work on
// any more. Whoever is after all can't commit.
func (m *Maintainer) removeIntents(ctx context.Context) error {
	kvs, err := m.reg.List(ctx, alba.IntentPrefix)
	if err != nil {
		return err
	}
	var errs []error
	for _, kv := range kvs {
		rec, err := alba.Decode[alba.Intent](kv.Value)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", kv.Key, err))
			continue
		}
		ns, upload, err := alba.SplitKey(kv.Key, alba.IntentPrefix)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		mine := rec.By == m.node
		if mine && m.p.Active(upload) || !mine && time.Since(rec.Since) < m.o.IntentAge {
			continue
		}
		writes := []alba.Write{{Key: kv.Key}}
		if !rec.Move {
			writes = append(writes, alba.Write{Key: alba.TrashKey(ns, upload), Value: alba.Encode(rec)})
		}
		// What a move has left is found on the devices.
		_, err = m.reg.Commit(ctx, []alba.Compare{{Key: kv.Key, Revision: kv.Revision}}, writes)
		if err != nil && !errors.Is(err, alba.ErrConflict) {
			errs = append(errs, err)
			continue
		}
		m.log.Info().Str("namespace", rec.Namespace).Str("object", rec.Object).Str("by", rec.By).Time("since", rec.Since).Msg("removed the intent of an upload that died")
	}
	return errors.Join(errs...)
}

// emptyTrash deletes the fragments of what is in the trash. What is on a device that
// can't be reached stays for the next time.
func (m *Maintainer) emptyTrash(ctx context.Context, r *run) error {
	waiting := 0
	err := alba.Each(ctx, m.reg, alba.TrashPrefix, func(kv alba.KV) error {
		rec, err := alba.Decode[alba.Intent](kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		ns, upload, err := alba.SplitKey(kv.Key, alba.TrashPrefix)
		if err != nil {
			return err
		}
		if err := r.wait(ctx, 0, unhurried); err != nil {
			return err
		}
		if err := m.p.Purge(ctx, ns, upload, rec, kv.Revision); err != nil {
			waiting++
		}
		return nil
	})
	if err != nil {
		return err
	}
	if waiting > 0 {
		m.log.Info().Int("objects", waiting).Msg("deleted objects wait for devices that are out of reach")
	}
	return ctx.Err()
}
